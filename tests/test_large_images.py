"""Images at their own size: windows see what the whole image shows, in a step, in a score, and by every route."""

from __future__ import annotations

import itertools
import shutil
import sys

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
import yaml
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from conftest import checkpoint_in, command, exported_in, fit, loaded
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from benchmarks.large_images import settings_of
from stpm_plugin import STPM, DemoData, STPMModel, STPMPreProcessor
from stpm_plugin.commands.config import packaged
from stpm_plugin.deployment import large_images
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.errors import STPMError
from stpm_plugin.model import network
from stpm_plugin.model.matching import anomaly_map, distances, loss_of
from stpm_plugin.model.reach import reaches, stitched
from stpm_plugin.model.windows import Reach, Span, Window, cut, drawn, over
from stpm_plugin.training import crops, feature_cache
from stpm_plugin.training.crops import draw_window, unspoilt
from stpm_plugin.training.feature_cache import ImageCache
from stpm_plugin.training.worst_windows import around_peaks

BACKBONES = ["resnet18", "tf_efficientnet_lite0"]  # symmetric padding, and TensorFlow's, which depends on the size
SIZES = [(400, 320), (413, 497)]
OWN_SIZE = {"layers": ["layer1", "layer2"], "image_size": None, "crop_size": 64, "batch_size": 1}


@pytest.fixture(scope="module", params=BACKBONES)
def model(request) -> STPMModel:
    torch.manual_seed(0)
    made = STPMModel(request.param, [1, 2]).eval()  # two levels see less, and take fewer windows
    for each in made.modules():  # a new ResNet leaves out its blocks' branches, by a weight of 0
        if isinstance(each, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(each.weight, 0.5, 1.5)
    return made


def noise(*size: int) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def test_how_far_a_resnet_sees():
    """By hand, of the first level: 7 x 7 by 2, pooling of 3 x 3 by 2, then four 3 x 3 convolutions: 43 pixels."""
    seen = reaches(STPMModel("resnet18").teacher)
    assert [one.stride for one in seen] == [4, 8, 16]
    assert seen[0].before == -(-21 // 4)  # half of 43, in positions of 4 pixels
    assert seen[0].after == 5


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "swin_tiny_patch4_window7_224"])
def test_a_network_that_sees_the_whole_image_takes_no_windows(backbone):
    assert reaches(STPMModel(backbone).teacher) is None


def test_a_benchmarks_size_is_the_models():
    assert settings_of("384") == {"image_size": (384, 384)}
    recipe = yaml.safe_load(packaged("native").read_text(encoding="utf-8"))["model"]["init_args"]
    own = settings_of("own")
    assert own | {"steps": list(own["steps"])} == {name: recipe[name] for name in own}
    assert settings_of("own-160") == settings_of("own") | {"crop_size": 160}


def test_windows_leave_no_gap_and_have_one_size():
    for seen, largest, length in itertools.product(
        ([Reach(4, 6, 5), Reach(8, 7, 6), Reach(16, 7, 6)], [Reach(4, 3, 3), Reach(8, 5, 5), Reach(16, 11, 11)]),
        (480, 1000),
        range(16, 2300, 37),
    ):
        spans = cut(length, largest, seen)
        assert len({span.stop - span.start for span in spans}) == 1
        for reach in seen:
            covered = 0
            for span in spans:
                assert span.start % 16 == 0
                assert (length - span.stop) % 16 == 0
                assert span.valid(reach).start <= covered
                covered = span.valid(reach).stop
            assert covered == -(-length // reach.stride)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("largest", [200, 300])
@torch.no_grad()
def test_a_stitched_map_equals_the_whole_images(model, size, largest):
    image = noise(*size)

    def levels(part):
        return distances(model.teach(part), model.study(part))

    whole = levels(image)
    assert len(list(over(*size, largest, model.reaches))) > 1
    for one, other in zip(whole, stitched(levels, image, largest, model.reaches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        anomaly_map(whole, size), anomaly_map(stitched(levels, image, largest, model.reaches), size)
    )


def test_too_small_a_margin_would_be_noticed(model):
    """The comparison itself: three positions less, and the map is another."""
    image = noise(*SIZES[0])
    seen = [Reach(one.stride, one.before - 3, one.after - 3) for one in model.reaches]

    @torch.no_grad()
    def levels(part):
        return distances(model.teach(part), model.study(part))

    wrong = stitched(levels, image, 200, seen)
    assert any(not torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(levels(image), wrong, strict=True))


@pytest.mark.parametrize("hard_share", [1.0, 0.2])
def test_a_cropped_step_has_the_whole_images_gradient(model, hard_share):
    """Of the loss at the same positions; statistics of batches aside, which are those of what a step sees."""
    image, seen = noise(400, 333), model.reaches
    numbers = iter([15, 12])
    rows, columns = (drawn(length, 64, seen, lambda count: next(numbers) % count) for length in image.shape[-2:])
    window = Window(rows, columns)
    assert rows.start > 0
    assert rows.stop < 400

    def gradient(levels):
        model.student.zero_grad()
        loss_of([level.flatten() for level in levels], hard_share).backward()
        return {name: value.grad.clone() for name, value in model.student.named_parameters()}

    crop = window.of(image)
    by_crop = gradient(unspoilt(distances(model.teach(crop), model.study(crop)), [window], model))
    whole = distances(model.teach(image), model.study(image))
    by_whole = gradient([level[(..., *window.within(reach))] for level, reach in zip(whole, seen, strict=True)])
    assert sum(value.abs().max() > 0 for value in by_whole.values()) > 0.9 * len(by_whole)
    for name, value in by_whole.items():
        torch.testing.assert_close(by_crop[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_crops_reach_every_corner_and_depend_on_their_numbers_alone():
    module = STPM(backbone="resnet18", **OWN_SIZE)
    reach = module.model.reaches[-1]
    counted = torch.zeros(40, 50, dtype=torch.int)
    for number in range(300):
        window = draw_window((317, 400), module, 0, number)
        assert window == draw_window((317, 400), module, 0, number)
        counted[window.within(reach)] += 1
    assert (counted > 0).all()
    assert draw_window((50, 60), module, 0) == Window(Span(0, 50, 50), Span(0, 60, 60))


@pytest.fixture(scope="module")
def own_size(once):
    """A model trained on images of uneven sizes, its checkpoint and data."""

    def draw(root):
        rng = np.random.default_rng(0)
        for kind, count in (("good", 6), ("bad", 2)):
            (root / kind).mkdir()
            for index in range(count):
                size = (int(rng.integers(150, 260)), int(rng.integers(150, 260)))
                image = cv2.resize(rng.integers(0, 255, (9, 9, 3), np.uint8), size[::-1])
                Image.fromarray(image).save(root / kind / f"{index}.png")

    root = once("uneven", draw)

    def data():
        return Folder(
            "uneven", root=root, normal_dir="good", abnormal_dir="bad", num_workers=0, eval_batch_size=1, seed=0,
            val_split_mode="none",
        )  # fmt: skip

    checkpoint = checkpoint_in(once("own_size", lambda out: fit(data(), out, 2, visualizer=False, **OWN_SIZE)))
    return loaded(checkpoint), checkpoint, data, root


@pytest.fixture(scope="module")
def own_size_exported(once, own_size):
    """An OpenVINO file of it, for images of all sizes."""
    return exported_in(once("own_size_exported", lambda out: loaded(own_size[1]).to_openvino(out)))


def test_every_route_gives_one_verdict_at_the_images_own_size(own_size, own_size_exported, tmp_path, monkeypatch):
    """Whole and in windows, by Engine and by OpenVINO, float and rounded."""
    trained, checkpoint, data, root = own_size
    files = sorted((root / "bad").iterdir()) + sorted((root / "good").iterdir())[:1]
    by_engine = {
        one.image_path[0]: one
        for one in Engine(accelerator="cpu", logger=False, default_root_dir=tmp_path).predict(
            STPM(visualizer=False), dataset=PredictDataset(root / "bad"), ckpt_path=checkpoint
        )
    }
    exported = own_size_exported
    whole = {one.path: one for one in Scorer(exported).score(files, maps=True)}
    monkeypatch.setattr(large_images, "LARGEST", 128)
    monkeypatch.setattr(network, "LARGEST", 128)
    in_windows = {one.path: one for one in Scorer(exported, batch=2).score(files, maps=True)}
    assert list(in_windows) == [str(file) for file in files]
    for path, one in whole.items():
        other = in_windows[path]
        assert other.raw == pytest.approx(one.raw, rel=1e-4)
        assert (other.label, other.percentile) == (one.label, one.percentile)
        np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, atol=1e-4)
    for path, one in by_engine.items():
        assert whole[path].score == pytest.approx(float(one.pred_score), rel=1e-4)
        np.testing.assert_allclose(whole[path].anomaly_map, one.anomaly_map.squeeze().numpy(), atol=1e-4)
        with torch.inference_mode():  # by Engine in windows
            again = trained.eval()(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255)
        assert float(again.pred_score) == pytest.approx(float(one.pred_score), rel=1e-4)
    rounded = trained.to_openvino(tmp_path, compression_type="int8_ptq", datamodule=data())
    assert Scorer(rounded).large is not None
    assert [one.path for one in Scorer(rounded).score(files)] == [str(file) for file in files]


def test_thresholds_are_those_of_whole_held_out_images(own_size):
    trained, _, data, _ = own_size
    held = trained.data_record.held_out
    source = data()
    source.setup("fit")
    images = [source.train_data[index].image[None] for index in held]
    with torch.inference_mode():
        raw = sorted(float(trained.model.eval()(trained.transform(image)).pred_score) for image in images)
    assert trained.post_processor.held_out_scores == pytest.approx(raw, rel=1e-5)


@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
def test_it_matters_not_where_images_are_kept(cache, own_size, tmp_path):
    trained, _, data, _ = own_size
    _, model = fit(data(), tmp_path, 2, cache=cache, visualizer=False, **OWN_SIZE)
    for name, value in trained.model.student.state_dict().items():
        assert torch.equal(value, model.model.student.state_dict()[name]), name


def test_bytes_are_kept_as_they_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 400)  # 105, 189 and 21 bytes fit into one file, 441 need their own
    images = [torch.randint(0, 256, (3, side, 7), dtype=torch.uint8) for side in (5, 9, 1, 21, 6)]
    for cache in (ImageCache(5, None), ImageCache(5, tmp_path / "new")):
        assert all(cache.put(image) for image in images)
        assert all(torch.equal(cache.get(index), image) for index, image in enumerate(images))
    storages = [cache.get(index).untyped_storage().data_ptr() for index in range(len(images))]
    assert len(set(storages)) == 3


def test_a_resumed_run_draws_the_crops_of_an_uninterrupted_one(own_size, tmp_path):
    trained, _, data, _ = own_size
    engine, _ = fit(data(), tmp_path, 1, visualizer=False, **OWN_SIZE)
    _, resumed = fit(data(), tmp_path, 2, ckpt_path=engine.best_model_path, visualizer=False, **OWN_SIZE)
    for name, value in trained.model.student.state_dict().items():
        assert torch.equal(value, resumed.model.student.state_dict()[name]), name


def test_worst_windows_hold_the_highest_peaks():
    """By hand: three peaks of a map, the highest first; a fourth is within a quarter of a crop of the second."""
    module = STPM(backbone="resnet18", **OWN_SIZE)
    reach = module.model.reaches[-1]
    one = torch.zeros(320, 400)
    one[37, 391], one[200, 200], one[205, 203], one[300, 8] = 3, 2, 1.9, 1
    windows = around_peaks(one, 3, module, torch.Generator().manual_seed(0))
    for window, (row, column) in zip(windows, [(37, 391), (200, 200), (300, 8)], strict=True):
        rows, columns = window.within(reach)
        assert rows.start <= row // reach.stride < rows.stop
        assert columns.start <= column // reach.stride < columns.stop
    assert one[37, 391] == 3  # the map stays the caller's


class Windows(Callback):
    """Notes each step's windows, by epoch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).extend(batch.windows)


def test_every_second_window_of_a_later_epoch_is_where_the_student_does_worst(own_size, tmp_path, monkeypatch):
    """And a run that was stopped in the middle of such an epoch ends with the student of an uninterrupted one."""
    trained, _, data, _ = own_size
    found, plain = [], crops.worst_windows

    def noted(*arguments):
        found.append(plain(*arguments))
        return found[-1]

    monkeypatch.setattr(crops, "worst_windows", noted)
    windows = Windows()
    steps = ModelCheckpoint(dirpath=tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, model = fit(
        data(), tmp_path, 2, trainer={"callbacks": [windows, steps]}, visualizer=False, **OWN_SIZE
    )  # fmt: skip
    (worst,) = found
    count = len(windows.seen[0])
    assert len(windows.seen[1]) == count > 3
    assert windows.seen[1][1::2] == [window for _, window in worst]
    assert not set(windows.seen[0]) & {window for _, window in worst}
    _, resumed = fit(
        data(), tmp_path, 2, ckpt_path=tmp_path / "all" / f"step={count + 2}.ckpt", visualizer=False, **OWN_SIZE
    )
    assert len(found) == 1  # not tried again, by a student of the middle of the epoch
    for name, value in model.model.student.state_dict().items():
        assert torch.equal(value, resumed.model.student.state_dict()[name]), name
        assert torch.equal(value, trained.model.student.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": (64, 64), "crop_size": 64}, "crop_size=64 .* resized to 64 x 64: set image_size to null"),
        ({"image_size": None, "crop_size": 0}, "crop_size=0 must be the side of a crop"),
        ({"pre_processor": STPMPreProcessor(), "crop_size": 64}, "crop_size=64 .* resized to 256 x 256"),
    ],
)
def test_crops_of_resized_images_are_refused(settings, words):
    with pytest.raises(STPMError, match=words):
        STPM(backbone="resnet18", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "mobilenetv3_small_100", "layers": None}, "mobilenetv3_small_100 sees the whole image"),
        ({"batch_size": 2}, r"training image .* has .* pixels and others .*batch_size=1"),
        ({"layers": [4]}, r"training image .*tiny.png has 20 x 40 pixels, and test_resnet needs 32 along each side"),
        ({"aligned": True}, "aligned=True is impossible here, because images are not resized to one size"),
    ],
)
def test_what_cannot_train_at_its_own_size_is_said(settings, words, own_size, tmp_path, monkeypatch):
    monkeypatch.setattr("stpm_plugin.training.lightning_model.load_teacher", lambda *_: None)
    data = own_size[2]()
    if settings.get("layers"):
        shutil.copytree(own_size[3], tmp_path / "images")
        Image.new("RGB", (40, 20)).save(tmp_path / "images/good/tiny.png")
        data = Folder("tiny", root=tmp_path / "images", normal_dir="good", num_workers=0, val_split_mode="none")
    with pytest.raises(STPMError, match=words):
        fit(data, tmp_path, 1, visualizer=False, **{**OWN_SIZE, **settings})


def test_a_stated_size_against_the_checkpoints_is_refused(own_size, trained, demo, tmp_path):
    checkpoint = own_size[1]
    assert STPM.load_from_checkpoint(checkpoint).network_size is None
    with pytest.raises(STPMError, match=r"image_size=\(32, 32\) contradicts the checkpoint.* of their own size"):
        STPM(image_size=(32, 32)).load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with pytest.raises(STPMError, match=r"image_size=None contradicts the checkpoint.* of 64 x 64 pixels"):
        STPM.load_from_checkpoint(trained, image_size=None)
    with pytest.raises(STPMError, match="trained on images at their own size: set image_size to null to resume it"):
        fit(demo, tmp_path, 3, ckpt_path=checkpoint, image_size=(256, 256))


@torch.no_grad()
def test_what_pads_by_the_size_is_exported_for_all_sizes(tmp_path):
    model = STPM(**{**OWN_SIZE, "backbone": "tf_efficientnet_lite0", "layers": [1]}).eval()
    model.trained = True
    graph = ov.compile_model(model.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((64, 96), (67, 98), (101, 64)):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        whole, found = model(image), graph(image.numpy())
        np.testing.assert_allclose(found["anomaly_map"], whole.anomaly_map, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["pred_score"], whole.pred_score, rtol=1e-4)


def test_a_model_of_one_size_takes_no_other(own_size, tmp_path):
    trained, _, _, root = own_size
    exported = trained.to_openvino(tmp_path, input_size=(160, 192))
    with pytest.raises(STPMError, match="pixels, and the model was exported for images of 160 x 192"):
        list(Scorer(exported).score(sorted((root / "bad").iterdir())))


def test_an_image_that_is_too_small_is_refused_by_each_route(own_size, own_size_exported):
    trained, _, _, _ = own_size
    scorer = Scorer(own_size_exported)
    with pytest.raises(STPMError, match="image of 7 x 30 pixels is smaller than the stride 8"):
        trained.model(torch.zeros(1, 3, 7, 30))
    with pytest.raises(STPMError, match=r"small has 7 x 30 pixels, .* which does not resize, needs at least 8"):
        list(scorer.score_arrays([("small", np.zeros((7, 30, 3), np.uint8))], "BGR"))


def test_demo_images_of_any_size_with_defects_of_stated_pixels(tmp_path):
    data = DemoData(root=tmp_path, train_images=2, test_images=2, image_side=300, defect_pixels=(6, 30))
    data.prepare_data()
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / data.category).rglob("*_mask.png")]
    assert len(masks) == 8
    for mask in masks:
        assert mask.shape == (300, 300)
        extents = [int(np.ptp(axis)) for axis in np.nonzero(mask)]
        assert 2 <= max(extents) <= 50


def test_scoring_needs_no_torch():
    """The scorer's side of windows, as the rest of it."""
    code = "import sys, stpm_plugin.deployment.scorer; sys.exit('torch' in sys.modules)"
    command("python", "-c", code)
    assert "torch" in sys.modules
