"""What images are ignored by: by hand, in the loss and the scores, by every route, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from conftest import TEACHER, TINY, command, fit
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from stpm_plugin import STPM, DemoData, STPMPreProcessor
from stpm_plugin.deployment.regions import shrunk
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.deployment.verdict import Scale, Verdict
from stpm_plugin.errors import STPMError
from stpm_plugin.model.ignored import Ignored
from stpm_plugin.model.matching import anomaly_map, distances, image_score, loss_of
from stpm_plugin.training.held_out import score
from stpm_plugin.training.normal_images import Good

SIDE, NETWORK = 256, 64  # pixels of the drawn images, and of the network's input
IMAGES = {**TINY, "train_images": 24}
CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def painted(path: Path, *boxes: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE), mode="L") -> Path:
    """A mask of height and width, white in boxes (left, top, right, bottom; the last pixel included)."""
    image = Image.new(mode, size[::-1])
    for box in boxes:
        ImageDraw.Draw(image).rectangle(box, fill="white")
    image.save(path)
    return path


def made(counted: torch.Tensor) -> Ignored:
    """Of a map (H, W), 1 where it counts."""
    one = Ignored(tuple(counted.shape), "")
    one.counted.copy_(counted)
    return one


LEFT = (0, 0, 95, SIDE - 1)  # three eighths


# By hand


def test_a_pixel_of_the_map_is_ignored_if_any_pixel_of_it_is():
    mask = np.zeros((32, 48), bool)
    mask[:, :8] = True
    mask[20, 40] = True
    ignored = Ignored((8, 12), "")
    ignored.take(torch.from_numpy(mask))
    assert torch.equal(ignored.counted[0, 0] == 0, torch.from_numpy(shrunk(mask, (8, 12))))  # as `score --ignore`
    assert ignored.counted[0, 0, 0].tolist() == [0, 0, 0] + [1] * 9  # the resize's triangle sees two pixels more
    assert ignored.counted[0, 0, 5, 9:12].tolist() == [0, 0, 1]


def test_positions_that_reach_what_counts_by_hand():
    counted = torch.ones(8, 16)
    counted[:, :8] = 0
    ignored = made(counted)
    assert ignored.share == 0.5
    # Positions of stride 4 have centres 1.5, 5.5, 9.5 and 13.5; pixel 8 lies between the second and the third.
    assert ignored.reached((2, 4)).tolist() == [[False, True, True, True]] * 2
    assert ignored.reached((8, 16)).tolist() == counted.bool().tolist()
    assert ignored.reached((1, 2)).tolist() == [[True, True]]
    level = torch.arange(8.0).view(1, 2, 4)
    assert ignored.kept(level).tolist() == [[1, 2, 3, 5, 6, 7]]


@pytest.mark.parametrize("shape", [(16, 16), (8, 8), (3, 5), (25, 33)])
def test_what_reaches_nothing_that_counts_changes_no_map(shape):
    """The positions are those that the upsampling says, of sizes that are no whole parts too."""
    counted = (torch.rand(100, 131, generator=torch.Generator().manual_seed(0)) > 0.1).float()
    counted[20:70, 30:90] = 0
    ignored = made(counted)
    level = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    F.interpolate(level, counted.shape, mode="bilinear").mul(counted).sum().backward()
    assert torch.equal(level.grad[0, 0] > 0, ignored.reached(shape))


def test_image_score_with_a_share_by_hand():
    anomalies = torch.tensor([[0.1, 0.1, 0.0, 0.0], [0.4, 0.2, 0.0, 0.0]]).view(1, 1, 2, 4)  # half is ignored
    assert image_score(anomalies, 1, 1, 0.5).item() == pytest.approx(0.4 / 0.2**0.5)
    alone = anomalies[..., :2]
    assert image_score(anomalies, 2, 1, 0.5).item() == pytest.approx(image_score(alone, 2, 1).item())
    ours = Verdict("", Scale(1.0), Scale(1.0), score_area=2, stride=1, stands_out=True, counted=0.5)
    assert ours.image_score(anomalies[0, 0].numpy()) == pytest.approx(image_score(alone, 2, 1).item())


def test_the_mean_is_over_what_counts():
    ignored = made(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert ignored.mean(torch.tensor([[0.1, 9.0], [0.2, 0.3]]).view(1, 1, 2, 2)).item() == pytest.approx(0.2)


# A trained model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Drawn plates and a mask of their left part."""
    root = tmp_path_factory.mktemp("ignored")
    painted(root / "mask.png", LEFT)
    return root


@pytest.fixture(scope="module")
def masked(place):
    """A model that ignores the left part of aligned plates, and its checkpoint."""
    mask = str(place / "mask.png")
    engine, model = fit(
        DemoData(root=place, **IMAGES), place, 2, visualizer=False, layers=None, aligned=True, ignore=mask
    )
    return model.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="module")
def exported(masked, tmp_path_factory) -> Path:
    return STPM.load_from_checkpoint(masked[1]).to_openvino(tmp_path_factory.mktemp("exported"))


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, NETWORK, NETWORK, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def verdict(model: STPM, some: torch.Tensor):
    return model(some)


def arrays(some: torch.Tensor) -> list[tuple[str, np.ndarray]]:
    """As `Scorer.score_arrays` takes images (B, 3, H, W) in [0, 1]."""
    return [(str(n), one) for n, one in enumerate((255 * some).byte().permute(0, 2, 3, 1).numpy())]


def test_maps_are_empty_and_verdicts_know_nothing_there(masked):
    model, _ = masked
    ignored = model.model.ignored
    assert ignored.counted[0, 0].mean(0).tolist() == [0.0] * 25 + [1.0] * 39
    assert model.model.usual_places.variance[:, :, 0].isinf().all()
    assert model.model.usual_places.variance[:, :, 1:].isfinite().all()
    ready = model.pre_processor(images())
    with torch.inference_mode():
        teacher = model.model.teach(ready)
        levels = distances(teacher, model.model.study(ready))
        plain = model.model.score(levels, (NETWORK, NETWORK), teacher[-1])
        spoilt = [level.masked_fill(~ignored.reached(level.shape[1:]), 2.0) for level in levels]
        odd = torch.where(ignored.reached((4, 4)), teacher[-1], -teacher[-1])
        other = model.model.score(spoilt, (NETWORK, NETWORK), odd)
    assert (plain.anomaly_map[..., :25] == 0).all()
    assert (plain.anomaly_map[..., 25:] > 0).all()
    assert sum(int((one != two).sum()) for one, two in zip(levels, spoilt, strict=True)) > 0
    assert torch.equal(plain.pred_score, other.pred_score)
    assert torch.equal(plain.anomaly_map, other.anomaly_map)


def test_the_loss_and_the_held_out_score_count_what_counts(masked, monkeypatch):
    module = copy.deepcopy(masked[0])
    teacher = [torch.rand(2, 8, side, side, generator=torch.Generator().manual_seed(side)) for side in (16, 8, 4)]
    student = [torch.rand(2, 8, side, side, generator=torch.Generator().manual_seed(9 + side)) for side in (16, 8, 4)]
    # The first columns that reach pixel 25: their centres are at 21.5, 19.5 and 23.5, and they reach 4, 8, 16.
    columns = [5, 2, 1]
    monkeypatch.setattr(module.model, "study", lambda images: student)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(type(module), "autocast", lambda self: torch.inference_mode())
    batch = type("Batch", (), {"image": images(2), "teacher": teacher, "windows": None})()
    found = module.training_step(batch, 0)
    levels = distances(teacher, student)
    by_hand = loss_of([level[..., at:] for level, at in zip(levels, columns, strict=True)], module.hard_share)
    assert found.item() == pytest.approx(by_hand.item())

    strategy = type("Alone", (), {"reduce": staticmethod(lambda sums, reduce_op: sums)})
    monkeypatch.setattr(type(module), "trainer", type("Trainer", (), {"strategy": strategy}))
    product = anomaly_map(levels, (NETWORK, NETWORK)).pow(3)[..., 25:].mean().item()
    value, _ = score(module, [Good(images(2), teacher)])
    assert value == pytest.approx(product ** (1 / 3), rel=1e-5)


def test_every_route_knows_the_mask(masked, tmp_path):
    """A folder without the mask's file."""
    model, checkpoint = masked
    moved = Path(shutil.copy(checkpoint, tmp_path / "moved.ckpt"))
    settings = torch.load(moved, weights_only=True)
    assert settings["hyper_parameters"]["ignore"].endswith("mask.png")
    settings["hyper_parameters"]["ignore"] = "gone.png"
    torch.save(settings, moved)
    expected = verdict(model, images())
    bare, loaded = STPM(visualizer=False), STPM.load_from_checkpoint(moved)
    bare.load_state_dict(settings["state_dict"])
    for other in (bare.eval(), loaded.eval()):
        again = verdict(other, images())
        assert torch.equal(again.pred_score, expected.pred_score)
        assert torch.equal(again.anomaly_map, expected.anomaly_map)


def test_what_was_exported_knows_the_mask(masked, exported):
    model, scorer = masked[0], Scorer(exported)
    exact = verdict(model, images().mul(255).byte().float() / 255)
    found = list(scorer.score_arrays(arrays(images()), "RGB", maps=True))
    assert [one.score for one in found] == pytest.approx(exact.pred_score.tolist(), abs=1e-4)
    for one, anomalies in zip(found, exact.anomaly_map, strict=True):
        np.testing.assert_allclose(one.anomaly_map, anomalies[0].numpy(), atol=1e-4)
        assert (one.anomaly_map[:, :25] == scorer.verdict.pixel.normalize(0)).all()


def test_scorer_and_the_engine_agree_on_files(masked, exported, place, tmp_path):
    _, checkpoint = masked
    paths = sorted(place.glob("plate-*/test/dent/*.png"))
    engine = Engine(default_root_dir=tmp_path, **CPU)
    predicted = engine.predict(STPM(visualizer=False), data_path=paths[0].parent, ckpt_path=checkpoint)
    by_path = {Path(p).name: float(s) for b in predicted for p, s in zip(b.image_path, b.pred_score, strict=True)}
    scorer = Scorer(exported)
    found = {Path(one.path).name: one.score for one in scorer.score(paths)}
    assert found == pytest.approx(by_path, abs=1e-4)


def test_the_verdict_makes_the_graphs_score_and_a_second_mask_adds_to_the_first(exported, place, tmp_path):
    path = next(place.glob("plate-*/test/stain/000.png"))
    plain = Scorer(exported)
    (one,) = plain.score([path], maps=True)
    assert plain.verdict.counted == pytest.approx(39 / 64)
    nothing = Scorer(exported, ignore=painted(tmp_path / "none.png"))
    twice = Scorer(exported, ignore=place / "mask.png")
    more = Scorer(exported, ignore=painted(tmp_path / "right.png", (200, 0, SIDE - 1, SIDE - 1)))
    for scorer in (nothing, twice):  # by NumPy, of the graph's map
        (same,) = scorer.score([path])
        assert same.raw == pytest.approx(one.raw, rel=1e-5)
    (less,) = more.score([path], maps=True)
    zero = plain.verdict.pixel.normalize(0)
    assert less.raw <= one.raw
    assert (less.anomaly_map[:, :25] == zero).all()
    assert (less.anomaly_map[:, 50:] == zero).all()
    assert (less.anomaly_map[:, 26:49] == one.anomaly_map[:, 26:49]).all()


# What is stated against a checkpoint, and trained again


BRIEF = {"visualizer": False, "layers": ["layer1", "layer2"]}


@pytest.fixture(scope="module")
def brief_run(demo_root, tmp_path_factory):
    """A checkpoint of one pass with a mask, and the mask."""
    folder = tmp_path_factory.mktemp("brief")
    mask = painted(folder / "mask.png", LEFT)
    engine, _ = fit(DemoData(root=demo_root, **TINY), folder, 1, ignore=str(mask), **BRIEF)
    return Path(engine.best_model_path), mask


@pytest.fixture
def brief(brief_run):
    """The same, the mask painted anew."""
    painted(brief_run[1], LEFT)
    return brief_run


def test_another_mask_than_the_checkpoints_is_refused(masked, place, trained, tmp_path):
    _, checkpoint = masked
    other, same = painted(tmp_path / "other.png", (0, 0, 9, 9)), shutil.copy(place / "mask.png", tmp_path / "same.png")
    with pytest.raises(STPMError, match=r"trained with another mask: omit ignore, or train the model again"):
        STPM.load_from_checkpoint(checkpoint, ignore=str(other))
    with pytest.raises(STPMError, match=r"trained without a mask: train it with the mask, or give .*--ignore"):
        STPM.load_from_checkpoint(trained, ignore=str(other))
    for ignore in (str(same), "gone.png", None):
        assert STPM.load_from_checkpoint(checkpoint, ignore=ignore).model.ignored.counted.min() == 0
    data = DemoData(root=place, **IMAGES)
    with pytest.raises(STPMError, match="trained with another mask"):
        Engine(**CPU).test(STPM(ignore=str(other)), datamodule=data, ckpt_path=checkpoint)


def test_a_file_that_has_changed_since_harms_no_checkpoint(brief, tmp_path):
    checkpoint, mask = brief
    painted(mask, (0, 0, 9, 9))
    assert STPM.load_from_checkpoint(checkpoint).model.ignored.share == pytest.approx(39 / 64)
    with pytest.raises(STPMError, match="trained with another mask"):
        STPM.load_from_checkpoint(checkpoint, ignore=str(mask))


@pytest.mark.parametrize("stated", [True, False])
def test_resuming_keeps_the_mask(stated, brief, demo, tmp_path):
    checkpoint, mask = brief
    ignore = str(mask) if stated else None
    _, model = fit(demo, tmp_path, 2, checkpoint, ignore=ignore, **BRIEF)
    assert model.model.ignored.share == pytest.approx(39 / 64)


def test_resuming_with_another_mask_or_without_its_file_is_refused(brief, demo, tmp_path):
    checkpoint, mask = brief
    other = painted(tmp_path / "other.png", (0, 0, 9, 9))
    with pytest.raises(STPMError, match="trained with another mask"):
        fit(demo, tmp_path, 2, checkpoint, ignore=str(other), **BRIEF)
    with pytest.raises(STPMError, match=r"the mask .* does not exist"):
        fit(demo, tmp_path, 2, checkpoint, ignore=f"{mask}.gone", **BRIEF)


def test_a_second_fit_reads_the_mask_again_and_forgets_it_without_one(brief, demo, tmp_path):
    checkpoint, _ = brief
    for ignore, least in ((..., 0), (None, 1)):  # the argument that was saved, and none
        model = STPM.load_from_checkpoint(checkpoint)
        model.ignore = model.ignore if ignore is ... else None
        Engine(default_root_dir=tmp_path, max_epochs=1, **CPU).fit(model, datamodule=demo)
        assert (1.0 if model.model.ignored is None else model.model.ignored.counted.min()) == least
    assert verdict(model.eval(), images()).anomaly_map.min() > 0


def test_int8_keeps_the_mask(brief, demo, tmp_path):
    model = STPM.load_from_checkpoint(brief[0])
    exported = model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=demo)
    scorer = Scorer(exported)
    found = list(scorer.score_arrays(arrays(images()), "RGB", maps=True))
    assert scorer.verdict.counted == pytest.approx(39 / 64)
    assert all((one.anomaly_map[:, :25] == scorer.verdict.pixel.normalize(0)).all() for one in found)
    assert all((one.anomaly_map[:, 25:] > 0).all() for one in found)


# What is refused before anything trains


REFUSED = {
    "missing": r"the mask .*gone\.png does not exist",
    "text": "cannot be read as an image",
    "white": "white everywhere: every pixel would be ignored. Paint white only",
    "black": "black everywhere, so it ignores nothing: paint white",
    "small": r"training image .*\.png has 256 x 256 pixels and the mask .* has 64 x 65: they must be equal",
    "leaves nothing": r"leaves no pixel at 64 x 64: ignore less, or set a larger image_size",
    "not resized": r"resized to one size, and these are not: set image_size \(and no crop_size\), or pass",
    "cropped": "also go through a CenterCrop: leave out one of the two",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_cannot_serve_is_refused(name, demo, tmp_path):
    mask, more = tmp_path / "mask.png", {}
    if name == "text":
        mask.write_text("no image")
    elif name == "missing":
        mask = tmp_path / "gone.png"
    else:
        everything = (0, 0, SIDE - 1, SIDE - 1)
        boxes = {"white": [everything], "black": [], "leaves nothing": [(0, 0, SIDE - 1, SIDE - 2)]}
        painted(mask, *boxes.get(name, [(0, 0, 30, 30)]), size=(64, 65) if name == "small" else (SIDE, SIDE))
    if name == "not resized":
        more = {"image_size": None}
    if name == "cropped":
        transform = Compose([Resize((80, 80), antialias=True), CenterCrop(64), Normalize([0.5] * 3, [0.5] * 3)])
        more = {"pre_processor": STPMPreProcessor(transform)}
    with pytest.raises(STPMError, match=REFUSED[name]) as said:
        fit(demo, tmp_path, 1, ignore=str(mask), **more)
    assert len(str(said.value).splitlines()) == 1


def test_a_mask_is_refused_if_any_image_has_another_size(demo_root, tmp_path):
    shutil.copytree(next(demo_root.glob("plate-*/train/good")), tmp_path / "good")
    last = sorted((tmp_path / "good").iterdir())[-1]
    Image.open(last).resize((SIDE, SIDE - 8)).save(last)
    mask = painted(tmp_path / "mask.png", LEFT)
    options = {"test_split_mode": "none", "val_split_mode": "none", "num_workers": 0}
    data = Folder("uneven", root=tmp_path, normal_dir="good", **options)
    with pytest.raises(STPMError, match=rf"{last.name} has 248 x 256 pixels and the mask .* has 256 x 256"):
        fit(data, tmp_path, 1, ignore=str(mask))


def test_a_coloured_mask_is_white_where_all_its_channels_are(demo, tmp_path):
    mask = painted(tmp_path / "mask.png", LEFT, mode="RGB")
    image = Image.open(mask)
    ImageDraw.Draw(image).rectangle((150, 0, 255, 255), fill=(0, 0, 255))
    image.save(mask)
    _, model = fit(demo, tmp_path, 1, visualizer=False, ignore=str(mask))
    assert model.model.ignored.share == pytest.approx(39 / 64)


# Through the command


@pytest.fixture
def parts(demo_root, tmp_path) -> Path:
    """A folder of good images, and a mask of their left part."""
    (tmp_path / "parts").symlink_to(next(demo_root.glob("plate-*/train/good")))
    painted(tmp_path / "mask.png", LEFT)
    return tmp_path


def test_what_lies_in_the_ignored_part_alone_is_no_defect(parts, demo_root):
    little = ["--model.init_args.image_size", "[128,128]", "--trainer.max_epochs", "8", "--teacher", str(TEACHER)]
    command("stpm", "train", "parts", "--name", "plates", "--ignore", "mask.png", *little, cwd=parts)
    (parts / "mask.png").unlink()
    good = next(demo_root.glob("plate-*/test/good/*.png"))
    image = Image.open(good).convert("RGB")
    (parts / "images").mkdir()
    for name, box in {"plain": (0, 0, 0, 0), "inside": (16, 100, 40, 140), "outside": (170, 100, 194, 140)}.items():
        drawn = image.copy()
        if any(box):
            ImageDraw.Draw(drawn).rectangle(box, fill=(255, 0, 255))
        drawn.save(parts / "images" / f"{name}.png")
    exported = "results/STPM/plates/latest/weights/openvino/model.xml"
    said = command("stpm", "score", exported, "images", "--csv", "scores.csv", "--json", cwd=parts)
    found = {Path(one["path"]).stem: one for one in map(json.loads, (x for x in said.splitlines() if x[:1] == "{"))}
    assert found["outside"]["raw"] > 1.2 * found["plain"]["raw"]
    assert found["inside"]["raw"] == pytest.approx(found["plain"]["raw"], rel=0.05)
    edge = 2 * 49
    assert all(box["x"] + box["w"] > edge for one in found.values() for box in one["regions"])
    scorer = Scorer(parts / exported)
    for one in scorer.score(sorted((parts / "images").glob("*.png")), maps=True):
        assert (one.anomaly_map[:, :49] == scorer.verdict.pixel.normalize(0)).all()


def test_the_command_ends_a_bad_mask_in_a_sentence(parts):
    for mask, words in {"gone.png": "does not exist", str(TEACHER): "cannot be read as an image"}.items():
        said = command("stpm", "train", "parts", "--ignore", mask, check=False, cwd=parts)
        assert words in said
        assert "Traceback" not in said
