"""What is usual at each place: by hand, against its plain form, and through training, checkpoints and exports."""

import logging

import pytest
import torch
from anomalib.data.utils import read_image
from conftest import TINY, fit
from lightning.pytorch.callbacks import LearningRateFinder
from torch.nn import functional as F

from stpm_plugin import STPM, DemoData
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.errors import STPMError
from stpm_plugin.model.matching import distances
from stpm_plugin.model.usual_places import REACH, UsualPlaces
from stpm_plugin.training.placement import FLOOR, alignment, left_out, usual

IMAGES = {**TINY, "train_images": 24}


def vectors(count: int, *, channels: int = 4, side: int = 5) -> torch.Tensor:
    """Unit vectors that scatter around a direction of their own at each position, (count, channels, side, side)."""
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(1, channels, side, side, generator=generator)
    return F.normalize(usual + 0.3 * torch.randn(count, channels, side, side, generator=generator), dim=1)


def test_oddness_and_what_it_raises_by_hand():
    places = UsualPlaces((1, 1, 1))
    places.mean.fill_(0.5)
    places.variance.fill_(0.01)
    places.limit.fill_(4)
    places.ordinary.fill_(0.2)
    features = torch.tensor([0.6, 0.8, 0.8, 0.9]).view(4, 1, 1, 1)  # 1, 9, 9 and 16 variances from the mean
    torch.testing.assert_close(places.oddness(features).flatten(), torch.tensor([1.0, 9, 9, 16]))
    anomalies = torch.full((4, 1, 2, 2), 0.1)
    scores = torch.tensor([0.2, 0.1, 0.4, 0.5])  # raised to 2.25 x 0.2 at most: by 2.25, 4.5, 1.125, and not at all
    raised = places(anomalies, scores, features)[:, 0, 0, 0]
    torch.testing.assert_close(raised, 0.1 * torch.tensor([1.0, 9 / 4, REACH * 0.2 / 0.4, 1.0]))


def test_odd_places_are_means_over_three_by_three():
    places = UsualPlaces((1, 4, 4))
    features = torch.zeros(1, 1, 4, 4)
    features[..., 0, 0] = 3.0  # nine variances
    odd = places.oddness(features)[0, 0]
    assert odd[0, 0].item() == pytest.approx(9 / 4)  # a corner has four neighbours, itself among them
    assert odd[1, 1].item() == pytest.approx(1)
    assert odd[3, 3].item() == 0


def test_left_out_is_each_image_against_the_others():
    every = vectors(7)
    mean, variance = every.mean(0), every.var(0)
    found = left_out(every, len(every), mean, variance)
    for place, image in enumerate(every):
        others = torch.cat([every[:place], every[place + 1 :]])
        plain = UsualPlaces(tuple(mean.shape))
        plain.mean.copy_(others.mean(0))
        plain.variance.copy_(others.var(0) + FLOOR * variance.mean())
        torch.testing.assert_close(found[place], plain.oddness(image[None])[0], rtol=1e-4, atol=1e-5)


def test_images_that_are_all_the_same_raise_nothing_of_themselves():
    every = vectors(1).repeat(20, 1, 1, 1)
    mean, variance = every.mean(0), every.var(0)
    places = usual(mean, variance, left_out(every, 20, mean, variance).flatten(1).amax(1))
    assert places.limit == 1
    same = places(torch.ones(1, 1, 8, 8), torch.ones(1), every[:1])
    other = places(torch.ones(1, 1, 8, 8), torch.ones(1), -every[:1])
    assert torch.equal(same, torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(other, torch.full((1, 1, 8, 8), REACH))


def test_alignment_by_hand_and_of_what_lies_anyhow():
    mean = torch.tensor([[[0.0, 1.0]]])  # two positions, 0.5 from their mean
    assert alignment(mean, torch.full((1, 1, 2), 0.25)) == pytest.approx(0.5)  # as much within as between
    assert alignment(mean, torch.zeros(1, 1, 2)) == 1
    alike = vectors(60)
    assert alignment(alike.mean(0), alike.var(0)) > 0.7
    anyhow = torch.stack([one.flatten(1)[:, torch.randperm(25)].view(4, 5, 5) for one in alike])
    assert alignment(anyhow.mean(0), anyhow.var(0)) < 0.1


@pytest.fixture(scope="session")
def plates(once):
    """Root of drawn plates, which all lie alike, enough of them to learn their places."""
    return once("plates", lambda root: DemoData(root=root, **IMAGES).prepare_data())


@pytest.fixture(scope="module")
def aligned(plates, tmp_path_factory):
    """A model of the plates as its training leaves it, and its checkpoint."""
    data, out = DemoData(root=plates, **IMAGES), tmp_path_factory.mktemp("aligned")
    engine, model = fit(data, out, 2, visualizer=False, aligned=True)
    return model, engine.best_model_path


def test_every_route_knows_the_usual_places(aligned, tmp_path):
    model, checkpoint = aligned
    places = model.model.usual_places
    assert places.mean.shape == (48, 8, 8)
    assert 0 < places.ordinary < 1 < places.limit
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = model.eval()(images)
    loaded, bare = STPM.load_from_checkpoint(checkpoint).eval(), STPM(visualizer=False)
    bare.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    for other in (loaded, bare.eval()):
        assert torch.equal(other(images).pred_score, made.pred_score)
    scorer = Scorer(loaded.to_openvino(tmp_path))
    arrays = (255 * images).byte().permute(0, 2, 3, 1).numpy()
    exact = model((torch.from_numpy(arrays).float() / 255).permute(0, 3, 1, 2)).pred_score.tolist()
    found = [one.score for one in scorer.score_arrays([(str(n), one) for n, one in enumerate(arrays)], "RGB")]
    assert found == pytest.approx(exact, abs=1e-4)


def test_a_part_in_the_wrong_place_is_raised(aligned, plates):
    """A good plate upside down is made of good surroundings, but its places are not usual."""
    model = aligned[0]
    paths = sorted(plates.glob("plate-*/train/good/*.png"))[:6]
    good = torch.stack([read_image(path, as_tensor=True) for path in paths])
    for images, raised in ((good, False), (good.flip(2), True)):
        ready = model.pre_processor(images)
        with torch.inference_mode():
            teacher = model.model.teach(ready)
            levels = distances(teacher, model.model.study(ready))
            grown = (
                model.model.score(levels, (64, 64), teacher[-1]).anomaly_map
                / model.model.score(levels, (64, 64)).anomaly_map
            )
        assert grown.min() >= 1 - 1e-6
        assert (grown.amax((1, 2, 3)).median() > 1.2) == raised


def test_few_images_know_no_place_and_say_so(demo, tmp_path):
    _, model = fit(demo, tmp_path, 1)
    assert model.model.usual_places is None
    with pytest.raises(
        STPMError,
        match=r"aligned=True is impossible here, because it needs at least 16 training images, not 8: add images, or omit aligned",
    ):
        fit(demo, tmp_path, 1, aligned=True)


def test_it_can_be_left_out(plates, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = DemoData(root=plates, **IMAGES)
    _, model = fit(data, tmp_path, 1, aligned=False)
    assert model.model.usual_places is None
    assert "the parts are" not in caplog.text


def test_a_rate_finder_which_restores_the_model_leaves_them(plates, tmp_path):
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    data = DemoData(root=plates, **IMAGES)
    _, model = fit(data, tmp_path, 1, aligned=True, visualizer=False, trainer={"callbacks": [finder]})
    assert model.model.usual_places.limit > 0
    assert 0 < model.model.usual_places.ordinary < 1
    assert model.model.usual_places.mean.norm() > 0
