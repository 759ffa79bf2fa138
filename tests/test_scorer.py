"""The scorer beside torch: sizes, hints, batches; what it refuses; its parts by hand."""

import dataclasses
import math

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from conftest import exported_in, fit, loaded
from PIL import Image
from torchvision.transforms.v2 import Compose, Normalize, Resize
from torchvision.transforms.v2.functional import resize as torch_resize

from stpm_plugin import STPMPostProcessor, STPMPreProcessor
from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.exported_model import write
from stpm_plugin.deployment.openvino_export import verdict_of
from stpm_plugin.deployment.regions import regions
from stpm_plugin.deployment.resize import BLOCK, resize
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.deployment.verdict import Scale, Verdict
from stpm_plugin.errors import STPMError

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
SIZES = [(64, 64), (9, 300), (301, 7), (257, 255), (3400, 3400), (40, 9000)]  # 3400 x 3400 has more than 2^25 values


def textured(height: int, width: int) -> np.ndarray:
    """An image with something at every scale: (H, W, 3), uint8."""
    rng = np.random.default_rng(height + width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return (np.asarray(coarse) // 2 + rng.integers(0, 128, (height, width, 3), np.uint8)).astype(np.uint8)


def by_torch(model, image: np.ndarray):
    with torch.inference_mode():
        return model(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)


@pytest.mark.parametrize("size", SIZES)
def test_resize_is_that_of_training(size):
    image = textured(*size)
    expected = torch_resize(torch.from_numpy(image).permute(2, 0, 1).float(), [64, 80], antialias=True)
    np.testing.assert_allclose(resize(image, (64, 80)), expected.permute(1, 2, 0).numpy(), atol=2e-3)


def test_resize_by_hand():
    rows = np.array([0, 10, 20, 30], np.uint8).reshape(4, 1, 1)
    # Two pixels of one: 1/4 and 3/4, then 3/4 and 1/4 of the distances; the outer neighbours weigh 1/4 where there.
    expected = [(0 * 0.75 + 10 * 0.75 + 20 * 0.25) / 1.75, (10 * 0.25 + 20 * 0.75 + 30 * 0.75) / 1.75]
    np.testing.assert_allclose(resize(rows, (2, 1))[:, 0, 0], expected, rtol=1e-6)


def test_a_ramp_stays_a_ramp_from_block_to_block():
    wanted = 2 * BLOCK + 5
    ramp = np.arange(3 * wanted, dtype=np.uint8)
    expected = 3 * np.arange(1, wanted - 1) + 1  # a symmetric mean of a ramp is its value at the centre
    for axis in (0, 1):
        image = np.expand_dims(ramp, (1 - axis, 2))
        made = resize(image, (wanted, 1) if axis == 0 else (1, wanted)).ravel()
        np.testing.assert_allclose(made[1:-1], expected, atol=1e-4)  # the border lacks neighbours


@pytest.fixture(scope="module")
def eager(trained):
    return loaded(trained).eval()


@pytest.mark.parametrize(("hint", "batch", "threads"), [("latency", 1, None), ("throughput", 4, 1)])
def test_scores_of_any_size_are_torchs(hint, batch, threads, eager, exported):
    images = {str(size): textured(*size) for size in SIZES}
    scorer = Scorer(exported, hint=hint, batch=batch, threads=threads)
    for found in scorer.score_arrays(images.items(), "RGB", maps=True):
        made = by_torch(eager, images[found.path])
        assert found.score == pytest.approx(float(made.pred_score), abs=1e-4)
        assert (found.label == "anomalous") == bool(made.pred_label)
        np.testing.assert_allclose(found.anomaly_map, made.anomaly_map[0, 0].numpy(), atol=1e-3)


def test_a_graph_that_does_more_before_its_resize_gets_the_whole_image(demo, tmp_path):
    own = STPMPreProcessor(Compose([Normalize([0.5] * 3, [0.5] * 3), Resize([64, 64], antialias=True)]))
    _, model = fit(demo, tmp_path, 1, pre_processor=own, visualizer=False)
    scorer = Scorer(model.to_openvino(tmp_path / "own"), hint="latency")
    assert scorer.size is None
    images = {str(size): textured(*size) for size in [(64, 64), (100, 81), (3400, 3400)]}
    for found in scorer.score_arrays(images.items(), "RGB"):
        assert found.score == pytest.approx(float(by_torch(model.eval(), images[found.path]).pred_score), abs=1e-3)


def test_a_model_of_one_size_takes_every_size_at_once(exported_for_one_size, eager):
    scorer = Scorer(exported_for_one_size)
    images = {str(size): textured(*size) for size in SIZES[:4]}
    for found in scorer.score_arrays(images.items(), "RGB"):
        assert found.score == pytest.approx(float(by_torch(eager, images[found.path]).pred_score), abs=1e-4)


def test_it_computes_in_float32_unless_asked(exported):
    assert Scorer(exported).compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32


def test_channels_are_named_and_bgr_is_rgb_reversed(exported):
    image = textured(64, 64)
    scorer = Scorer(exported)
    (rgb,) = scorer.score_arrays([("a", image)], "RGB")
    (bgr,) = scorer.score_arrays([("a", image[:, :, ::-1])], "BGR")
    (wrong,) = scorer.score_arrays([("a", image)], "BGR")
    assert rgb.raw == bgr.raw != wrong.raw
    with pytest.raises(STPMError, match='say "BGR" for images from OpenCV'):
        list(scorer.score_arrays([("a", image)], "rgb"))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "part.png is None: the file was not read"),
        (np.zeros((8, 8, 3), np.float32), "part.png is float32"),
        (np.zeros((8, 8, 3), np.float64), "part.png is float64"),
        (np.zeros((8, 8), np.uint8), r"part.png is uint8 \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"part.png is uint8 \(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), "part.png has no pixels"),
        ([[1]], "part.png is list"),
    ],
)
def test_what_would_be_misread_is_refused(image, words, exported):
    with pytest.raises(STPMError, match=words):
        list(Scorer(exported).score_arrays([("part.png", image)], "RGB"))


def test_a_file_that_cannot_be_read_raises_unless_it_is_asked_for(exported, numbered_images, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    scorer, refused = Scorer(exported), []
    with pytest.raises(STPMError, match=r"x.png cannot be read as an image"):
        list(scorer.score([tmp_path / "x.png"]))
    assert (
        len(list(scorer.score([tmp_path / "x.png", *sorted(numbered_images.iterdir())], unreadable=refused.append)))
        == 5
    )
    assert refused == [str(tmp_path / "x.png")]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_refused_image_costs_no_other_its_verdict(batch, exported, numbered_images, tmp_path):
    files = sorted(numbered_images.iterdir())
    with Image.open(files[0]) as image:
        Image.new("L", image.size).save(tmp_path / "mask.png")
        fitting = [str(file) for file in files if Image.open(file).size == image.size]
    refused = {}
    scorer = Scorer(exported, batch=batch, ignore=tmp_path / "mask.png")
    found = [one.path for one in scorer.score(files, refused=lambda path, why: refused.update({path: why}))]
    assert found == fitting
    assert [*found, *refused] == [*fitting, *(str(file) for file in files if str(file) not in fitting)]
    assert all(f"{path} has " in why and "they must be equal" in why for path, why in refused.items())
    with pytest.raises(STPMError, match="they must be equal"):
        list(scorer.score(files))


# Thresholds


RELATIVE = Verdict("held-out good images", Scale(0.2), Scale(0.4), held_out_scores=(0.1, 0.2, 0.3, 0.4))


def test_the_verdict_by_hand():
    assert RELATIVE.image.normalize(np.float32(0.6)) == pytest.approx(0.75)  # 0.6 / (0.6 + 0.2)
    assert RELATIVE.percentile(0.25) == 50
    moved = RELATIVE.with_threshold(0.3)
    assert moved.image.normalize(np.float32(0.3)) == pytest.approx(0.5)
    assert moved.pixel.threshold == pytest.approx(0.6)  # by the same factor
    with pytest.raises(STPMError, match="has no threshold to move: set one with `stpm threshold"):
        Verdict("none", Scale(np.nan), Scale(np.nan)).with_threshold(0.3)
    keener = RELATIVE.with_sensitivity(0.8)  # scores above 0.2: s / (s + 0.2) > 0.2
    assert keener.image.raw_limit == pytest.approx(0.05)
    spread = Scale(0.5, 0.1, 0.9)
    assert spread.normalize(np.array([0.1, 0.5, 0.7, 2])) == pytest.approx([0, 0.5, 0.75, 1])
    assert Scale(0.5, 0.1, 0.9, 0.75).raw_limit == pytest.approx(0.3)


def test_the_image_score_of_a_map_is_torchs():
    from stpm_plugin.model.matching import image_score

    maps = torch.rand(1, 1, 66, 61, generator=torch.Generator().manual_seed(0))
    for area in (0, 1, 12, 1000):
        ours = Verdict("", Scale(1.0), Scale(1.0), score_area=area, stride=4, stands_out=True).image_score(
            maps[0, 0].numpy()
        )
        assert ours == pytest.approx(float(image_score(maps, area, 4)), rel=1e-6)
    empty = Verdict("", Scale(1.0), Scale(1.0), score_area=1, stands_out=True).image_score(np.full((8, 8), 1e-9))
    assert empty == pytest.approx(float(image_score(torch.full((1, 1, 8, 8), 1e-9), 1, 4)), rel=1e-6)


def test_a_score_of_an_older_export_is_the_parts_mean():
    old = Verdict("", Scale(1.0), Scale(1.0), score_share=0.5, stride=1)
    assert old.image_score(np.array([[0.1, 0.2], [0.3, 0.4]])) == pytest.approx(0.35)


def test_threshold_and_sensitivity_move_the_labels(exported, numbered_images):
    files = sorted(numbered_images.iterdir())
    found = list(Scorer(exported).score(files))
    middle = float(np.median([one.raw for one in found]))
    moved = list(Scorer(exported, threshold=middle).score(files))
    assert [one.label == "anomalous" for one in moved] == [one.raw > middle for one in found]
    assert [one.raw for one in moved] == [one.raw for one in found]
    assert Scorer(exported, sensitivity=0.7).verdict.image.sensitivity == 0.7
    with pytest.raises(STPMError, match="pass only one"):
        Scorer(exported, threshold=0.1, sensitivity=0.7)


@pytest.fixture(scope="module")
def raw(once, trained):
    """The trained model, and its OpenVINO file without the post-processor."""

    def export(folder):
        model = loaded(trained)
        model.post_processor = None
        model.to_openvino(folder)

    return loaded(trained).eval(), exported_in(once("raw", export))


def test_a_precision_that_the_device_lacks_is_refused(exported):
    missing = {"BF16": "bf16", "FP16": "f16"}
    for name in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        missing.pop(name, None)
    for precision in missing.values():
        with pytest.raises(STPMError, match=f"precision={precision}: CPU computes only in f32"):
            Scorer(exported, precision=precision)


def test_a_graph_that_would_resize_again_takes_only_images_of_its_own_size(exported, tmp_path):
    model = ov.Core().read_model(exported)
    model.reshape([-1, 3, 96, 128])
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    scorer = Scorer(tmp_path / "model.xml")
    (found,) = scorer.score_arrays([("a", textured(96, 128))], "RGB")
    (usual,) = Scorer(exported).score_arrays([("a", textured(96, 128))], "RGB")
    assert found.raw == pytest.approx(usual.raw, rel=1e-4)
    with pytest.raises(STPMError, match="a has 64 x 64 pixels, and the model was exported for images of 96 x 128"):
        list(scorer.score_arrays([("a", textured(64, 64))], "RGB"))


def test_a_model_without_a_post_processor_gives_raw_scores_and_no_labels(raw, tmp_path, capsys):
    line = ["score", str(raw[1]), str(tmp_path), "--csv", str(tmp_path / "s.csv"), "--fail-on-anomaly"]
    cv2.imwrite(str(tmp_path / "a.png"), textured(64, 64))
    assert stpm(line) == 1
    assert "calls no image anomalous, since it has no threshold: omit --fail-on-anomaly." in capsys.readouterr().err
    assert stpm(line[:-1]) == 0
    scorer = Scorer(raw[1])
    (found,) = scorer.score_arrays([("a", textured(64, 64))], "RGB")
    assert scorer.size == (64, 64)
    assert 0 < found.score < 2
    assert found.label == ""


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"normal_quantile": 0.9},
        {"normal_quantile": 0.9, "image_sensitivity": 0.7, "pixel_sensitivity": 0.2},
        {"enable_normalization": False},
        {"enable_normalization": False, "normal_quantile": 0.9, "image_sensitivity": 0.4},
        {"enable_thresholding": False},
    ],
    ids=str,
)
def test_every_post_processor_judges_alike_in_torch_in_the_graph_and_in_the_scorer(arguments, raw, tmp_path):
    """Without training: thresholds are set from drawn scores."""
    model, plain = raw
    judge = STPMPostProcessor(**arguments)
    judge.load_state_dict(model.post_processor.state_dict())
    judge.basis = "validation set"
    if "normal_quantile" in arguments:
        drawn = torch.linspace(0.55, 0.66, 30)
        judge.set_from_normal_images(drawn, 1.2 * drawn)
    network = ov.Core().read_model(plain)
    outputs = (network.output(name).get_node().input_value(0) for name in ("pred_score", "anomaly_map"))
    write(verdict_of(judge, model.model).append_to(network, *outputs), tmp_path / "judged.xml")
    scorer, graph = Scorer(tmp_path / "judged.xml"), ov.compile_model(tmp_path / "judged.xml", "CPU", FLOAT32)
    names = {name for output in graph.outputs for name in output.get_names()}
    images = {str(size): textured(*size) for size in [(64, 64), (80, 64), (64, 120)]}
    for found in scorer.score_arrays(images.items(), "RGB", maps=True):
        with torch.inference_mode():
            x = torch.from_numpy(images[found.path]).permute(2, 0, 1)[None] / 255
            made = judge(model.model(model.pre_processor(x)))
        inside = graph(x.numpy())
        assert found.score == pytest.approx(made.pred_score.item(), abs=1e-4)
        assert inside["pred_score"].item() == pytest.approx(made.pred_score.item(), abs=1e-4)
        np.testing.assert_allclose(inside["anomaly_map"], made.anomaly_map.numpy(), atol=1e-3)
        if made.pred_label is None:
            assert found.label == ""
            assert "pred_label" not in names
            continue
        assert (found.label == "anomalous") == bool(made.pred_label) == bool(inside["pred_label"].item())
        shown = found.anomaly_map > scorer.pixel_limit
        for mask in (inside["pred_mask"].ravel(), shown.ravel()):
            assert np.mean(mask != made.pred_mask.numpy().ravel()) <= 1e-3


def test_regions_by_hand():
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[2:4, 3:6] = 0.6
    anomaly_map[3, 4] = 0.9
    anomaly_map[8, 8] = 1.0
    anomaly_map[0, 0] = 0.5  # the threshold itself is not above it
    found = regions(anomaly_map, 0.5, (100, 200))
    assert [tuple(one[:5]) for one in found] == [(160, 80, 20, 10, 200), (60, 20, 60, 20, 1200)]
    assert [one.peak for one in found] == pytest.approx([1.0, 0.9])


# The ignore mask


def test_what_is_ignored_raises_no_score(exported, demo_root, tmp_path):
    path = next(demo_root.glob("*/test/stain/000.png"))
    image = np.asarray(Image.open(path).convert("RGB"))
    plain = Scorer(exported)
    plain.verdict = dataclasses.replace(plain.verdict, normalize=False)  # no value is cut off
    (whole,) = plain.score([path], maps=True)
    nothing = np.zeros(image.shape[:2], np.uint8)
    Image.fromarray(nothing).save(tmp_path / "none.png")
    (same,) = Scorer(exported, ignore=tmp_path / "none.png").score([path], maps=True)
    assert same.raw == pytest.approx(whole.raw, rel=1e-5)
    blocks = whole.anomaly_map.reshape(16, 4, 16, 4).mean((1, 3))  # the image score is the highest block's mean
    row, column = (4 * int(place) + 2 for place in np.unravel_index(blocks.argmax(), blocks.shape))
    down, across = (length // 64 for length in image.shape[:2])
    mask = nothing.copy()
    mask[max(0, row - 9) * down : (row + 10) * down, max(0, column - 9) * across : (column + 10) * across] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    scorer = Scorer(exported, ignore=tmp_path / "mask.png")
    (less,) = scorer.score([path], maps=True)
    assert less.raw < whole.raw
    assert less.anomaly_map[row, column] == scorer.verdict.pixel.normalize(0)
    assert "ignore" in scorer.settings
    with pytest.raises(STPMError, match=r"has 9 x 9 pixels and the mask .* they must be equal"):
        list(scorer.score_arrays([("other", textured(9, 9))], "RGB"))
    Image.fromarray(nothing + 255).save(tmp_path / "all.png")
    with pytest.raises(STPMError, match="white everywhere"):
        Scorer(exported, ignore=tmp_path / "all.png")


def test_a_score_that_is_not_a_number_is_refused(tmp_path):
    from openvino import opset13 as ops

    image = ops.parameter([1, 3, 8, 8], np.float32, "image")
    score = ops.reduce_mean(image, np.array([1, 2, 3]))
    made = ov.Model([ops.divide(score, score)], [image])
    made.output(0).get_tensor().set_names({"pred_score"})
    ov.save_model(made, tmp_path / "ratio.xml")
    scorer = Scorer(tmp_path / "ratio.xml")
    assert next(scorer.score_arrays([("grey", textured(8, 8))], "RGB")).score == 1
    with pytest.raises(STPMError, match="black has the score nan: the model is damaged"):
        list(scorer.score_arrays([("black", np.zeros((8, 8, 3), np.uint8))], "RGB"))
    for name, value in [("a", 9), ("b", 0), ("c", 9)]:
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.png")
    refused = []
    files = [tmp_path / f"{name}.png" for name in "abc"]
    found = scorer.score(files, refused=lambda path, why: refused.append((path, why)))
    assert [one.path for one in found] == [str(files[0]), str(files[2])]
    ((path, why),) = refused
    assert path == str(files[1])
    assert "has the score nan" in why


def test_another_models_export_is_scored_and_its_thresholds_are_its_own(demo_root, tmp_path):
    """A graph with anomalib's outputs that says nothing of its thresholds."""
    from openvino import opset13 as ops

    image = ops.parameter([1, 3, 8, 8], np.float32, "image")
    score = ops.reduce_mean(image, np.array([1, 2, 3]))
    made = ov.Model([score, ops.reduce_mean(image, np.array([1]), keep_dims=True)], [image])
    for output, name in zip(made.outputs, ("pred_score", "anomaly_map"), strict=True):
        output.get_tensor().set_names({name})
    ov.save_model(made, tmp_path / "other.xml")
    (found,) = Scorer(tmp_path / "other.xml").score_arrays(
        [("grey", np.full((30, 20, 3), 51, np.uint8))], "RGB", maps=True
    )
    assert found.score == pytest.approx(0.2, abs=1e-6)
    assert math.isnan(found.raw)
    assert found.label == ""
    with pytest.raises(STPMError, match="describes no thresholds that could be changed"):
        Scorer(tmp_path / "other.xml", sensitivity=0.6)
