"""The raw values above which images and pixels are anomalous, without training: numbers worked out by hand."""

from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from openvino import opset13 as ops

from stpm_plugin import STPMPostProcessor
from stpm_plugin.deployment.openvino_export import verdict_of
from stpm_plugin.deployment.verdict import Scale, Verdict
from stpm_plugin.errors import STPMError

SCORES = torch.tensor([0.1, 0.4, 0.6, 0.7])
MAPS = SCORES.reshape(4, 1, 1, 1).expand(4, 1, 2, 2)  # each map is its image's score everywhere
NETWORK = SimpleNamespace(score_area=0, teacher=SimpleNamespace(strides=[4]), ignored=None)


def validated(**settings) -> STPMPostProcessor:
    """Without normalisation, from two good images and two defects: image threshold 0.5, pixel threshold 0.6."""
    judge = STPMPostProcessor(enable_normalization=False, **settings)
    labels = torch.tensor([0, 0, 1, 1])
    masks = labels.bool().reshape(4, 1, 1).expand(4, 2, 2)
    batch = ImageBatch(
        image=MAPS.expand(4, 3, 2, 2), gt_label=labels, gt_mask=masks, pred_score=SCORES, anomaly_map=MAPS
    )
    judge.on_validation_batch_end(None, None, batch)
    judge.on_validation_epoch_end(None, None)
    return judge


def without_range(judge: STPMPostProcessor) -> STPMPostProcessor:
    """As anomalib leaves it: it collects the range only to normalise."""
    assert judge.image_min.isnan()
    return judge


def with_range(judge: STPMPostProcessor) -> STPMPostProcessor:
    """As a checkpoint of a model that normalised holds it, of the four scores: 0.1 to 0.7."""
    for kind in ("image", "pixel"):
        getattr(judge, f"{kind}_min").fill_(0.1)
        getattr(judge, f"{kind}_max").fill_(0.7)
    return judge


def by_graph(verdict: Verdict) -> tuple[list[bool], list[bool]]:
    """Labels of the four images, and the masks' first pixels, from the verdict's operations."""
    inputs = [ops.parameter([4], np.float32), ops.parameter([4, 1, 2, 2], np.float32)]
    model = ov.Model([ops.result(one) for one in inputs], inputs)
    made = ov.compile_model(verdict.append_to(model, *(one.output(0) for one in inputs)), "CPU")(
        [SCORES.numpy(), MAPS.numpy()]
    )
    return made["pred_label"].tolist(), made["pred_mask"][:, 0, 0, 0].tolist()


def by_numpy(verdict: Verdict) -> tuple[list[bool], list[bool]]:
    return tuple((SCORES.numpy() > np.float32(scale.raw_limit)).tolist() for scale in (verdict.image, verdict.pixel))


@pytest.mark.parametrize(
    ("sensitivity", "image", "pixel"),
    [(0.5, 0.5, 0.6), (0.75, 0.35, 0.45)],  # the range is 0.7 - 0.1, and a quarter of it 0.15
)
def test_without_normalisation_the_raw_limit_is_the_threshold_moved_by_the_sensitivity(sensitivity, image, pixel):
    judge = with_range(validated(image_sensitivity=sensitivity, pixel_sensitivity=sensitivity))
    verdict = verdict_of(judge, NETWORK)
    assert (verdict.image.raw_limit, verdict.pixel.raw_limit) == pytest.approx((image, pixel))
    assert (judge.normalized_image_threshold, judge.normalized_pixel_threshold) == pytest.approx((image, pixel))
    labels, masks = (image < SCORES).tolist(), (pixel < SCORES).tolist()
    made = judge(InferenceBatch(pred_score=SCORES, anomaly_map=MAPS))
    assert made.pred_label.tolist() == labels
    assert made.pred_mask[:, 0, 0, 0].tolist() == masks
    assert by_numpy(verdict) == by_graph(verdict) == (labels, masks)


def test_without_a_range_the_raw_limit_is_the_threshold():
    judge = without_range(validated())
    made = judge(InferenceBatch(pred_score=SCORES, anomaly_map=MAPS))
    assert made.pred_label.tolist() == [False, False, True, True]
    assert made.pred_mask[:, 0, 0, 0].tolist() == [False, False, False, True]
    verdict = verdict_of(judge, NETWORK)
    assert by_numpy(verdict) == by_graph(verdict) == ([False, False, True, True], [False, False, False, True])
    moved = verdict.with_threshold(0.25)  # half of 0.5, so the pixel threshold becomes 0.3
    assert (moved.image.raw_limit, moved.pixel.raw_limit) == pytest.approx((0.25, 0.3))
    assert by_numpy(moved) == by_graph(moved) == ([False, True, True, True], [False, True, True, True])


def test_without_a_range_another_sensitivity_is_refused():
    judge = without_range(validated(image_sensitivity=0.75))
    with pytest.raises(STPMError, match=r"image_sensitivity=0\.75 .* enable_normalization=False"):
        judge(InferenceBatch(pred_score=SCORES, anomaly_map=MAPS))
    with pytest.raises(STPMError, match=r"sensitivity=0\.75 .* enable_normalization=False"):
        by_graph(verdict_of(judge, NETWORK))
    verdict = verdict_of(without_range(validated()), NETWORK)
    assert repr(verdict.with_sensitivity(0.5)) == repr(verdict)  # NaN equals nothing, nor do fields from Python 3.13 on
    with pytest.raises(STPMError, match=r"sensitivity=0\.75 .* enable_normalization=False"):
        verdict.with_sensitivity(0.75)


def test_without_a_threshold_nothing_is_refused():
    judge = STPMPostProcessor(enable_normalization=False, image_sensitivity=0.75)
    assert judge.normalized_image_threshold.isnan()
    assert np.isnan(Scale(np.nan, np.nan, np.nan, 0.75).raw_limit)


def test_a_threshold_replaces_a_high_sensitivity():
    """At 0.9 the image's raw limit is 0.5 - 0.4 x 2 = -0.3, by which no pixel threshold can be moved."""
    verdict = Verdict("validation set", Scale(0.5, 0.1, 2.1), Scale(0.6, 0.0, 3.0))
    keen = verdict.with_sensitivity(0.9)
    assert keen.image.raw_limit == pytest.approx(-0.3)
    moved = keen.with_threshold(0.4)
    assert moved == verdict.with_threshold(0.4)
    assert (moved.image.raw_limit, moved.pixel.raw_limit) == pytest.approx((0.4, 0.48))  # 0.6 x 0.4 / 0.5


def test_a_threshold_replaces_a_sensitivity_of_1():
    """The raw limit of 0.2 x 0 / 1 is 0; where both sensitivities are equal, they cancel."""
    for sensitivity in (0.2, 0.5, 1.0):
        verdict = Verdict(
            "held-out good images", Scale(0.2, sensitivity=sensitivity), Scale(0.4, sensitivity=sensitivity)
        )
        moved = verdict.with_threshold(0.3)
        assert (moved.image.raw_limit, moved.pixel.raw_limit) == pytest.approx((0.3, 0.6))


def test_a_pixel_sensitivity_of_its_own_outlasts_a_threshold():
    """The masks' limit is 0.4 x 0.25 / 0.75 = 0.4 / 3, and 1.5 times that after the image threshold's move."""
    moved = Verdict("held-out good images", Scale(0.2), Scale(0.4, sensitivity=0.75)).with_threshold(0.3)
    assert moved.pixel.raw_limit == pytest.approx(0.2)


def test_a_threshold_of_0_cannot_be_moved():
    with pytest.raises(STPMError, match="no threshold to move"):
        Verdict("held-out good images", Scale(0.0), Scale(0.4)).with_threshold(0.3)
