"""What holds for any input, on small networks: Hypothesis draws the input."""

import functools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stpm_plugin import STPMModel
from stpm_plugin.errors import STPMError
from stpm_plugin.model.features import FeaturePyramid

settings.register_profile("same each time", deadline=None, derandomize=True, database=None)
settings.load_profile("same each time")
BACKBONES = st.sampled_from(["resnet18", "mobilenetv3_small_100"])
SIDES = st.sampled_from([32, 57, 64])


@functools.cache
def network(score_area: int = 12) -> STPMModel:
    torch.manual_seed(0)
    return STPMModel("resnet18", ["layer1", "layer2", "layer3"], score_area=score_area).eval()


@st.composite
def images(draw, count, scale) -> torch.Tensor:
    """Noise of any size, or of one value alone: (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(count), 3, draw(SIDES), draw(SIDES))
    noise = torch.randn(shape, generator=generator) * draw(st.sampled_from([0, 1]))
    return (noise + draw(st.sampled_from([-1, 0, 1]))) * draw(scale)


@settings(max_examples=20)
@given(images(st.integers(1, 3), st.floats(1e-30, 1e30)), st.sampled_from([0, 12, 10**6]))
def test_maps_and_scores_are_finite_and_in_range(batch, score_area):
    made = network(score_area)(batch)
    assert made.anomaly_map.shape == (len(batch), 1, *batch.shape[-2:])
    assert made.pred_score.shape == (len(batch),)
    blocks = (batch.shape[-2] // 4) * (batch.shape[-1] // 4)
    highest = (2 * blocks / min(score_area, blocks)) ** 0.5 if score_area else 2
    for values, most in ((made.anomaly_map, 2), (made.pred_score, highest)):
        assert torch.isfinite(values).all()
        assert (values >= 0).all()
        assert (values <= most * (1 + 1e-6)).all()


@settings(max_examples=8)
@given(images(st.integers(2, 4), st.floats(0.1, 3)), st.data())
def test_company_changes_no_score(batch, data):
    """Neither the order of a batch, nor its size, nor other images in it."""
    alone = torch.cat([network()(image[None]).pred_score for image in batch])
    order = data.draw(st.permutations(range(len(batch))))
    others = torch.full_like(batch[:2], data.draw(st.floats(-10, 10)))
    together = network()(torch.cat([batch[order], others])).pred_score
    torch.testing.assert_close(together[: len(batch)], alone[order], rtol=1e-5, atol=1e-7)


@functools.cache
def levels(backbone: str) -> tuple[str, ...]:
    """Names of a backbone's levels, from shallow to deep."""
    return tuple(timm.create_model(backbone, features_only=True).feature_info.module_name())


@settings(max_examples=15)
@given(BACKBONES, st.data())
def test_layers_work_or_are_refused_in_a_sentence(backbone, data):
    known = levels(backbone)
    layer = st.sampled_from(known) | st.integers(-1, len(known)) | st.sampled_from(["layer9", "", "LAYER1"])
    layers = data.draw(st.lists(layer, max_size=4))
    places = [known.index(one) if one in known else one for one in layers]
    valid = all(place in range(len(known)) for place in places) and places == sorted(set(places)) and bool(places)
    if not valid:
        with pytest.raises(STPMError) as refused:
            FeaturePyramid(backbone, layers)
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith("layers=")
        return
    made = STPMModel(backbone, layers).eval()(torch.rand(2, 3, 64, 64))
    assert made.anomaly_map.shape == (2, 1, 64, 64)
    assert torch.isfinite(made.pred_score).all()


@settings(max_examples=10)
@given(BACKBONES, st.integers(1, 40), st.integers(1, 40))
def test_small_images_work_or_are_refused_in_a_sentence(backbone, height, width):
    model = pyramid(backbone)
    if min(height, width) < model.strides[-1]:
        with pytest.raises(STPMError, match=f"^image of {height} x {width} pixels is smaller than the stride"):
            model(torch.rand(1, 3, height, width))
    else:
        assert all(level.numel() for level in model(torch.rand(1, 3, height, width)))


@functools.cache
def pyramid(backbone: str) -> FeaturePyramid:
    return FeaturePyramid(backbone, levels(backbone)).eval()
