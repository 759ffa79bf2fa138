import shutil
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from conftest import fit, loaded
from PIL import Image
from timm.layers import Conv2dSame

from stpm_plugin import STPMModel, STPMPostProcessor
from stpm_plugin.deployment.int8 import outside_the_backbones, same_labels, scored, with_thresholds
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.errors import STPMError
from stpm_plugin.false_alarms import limit
from stpm_plugin.model.tracing import padded_alike, traceable
from stpm_plugin.training.thresholds import calibrate

SIZES = [(64, 64), (101, 77), (200, 131)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        # Noise in every pixel, which a resize without antialiasing turns into another image.
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def test_engine_torch_and_onnx_agree_on_odd_sizes(trained, exported_to_onnx, images, tmp_path, monkeypatch):
    import onnxruntime
    from anomalib.deploy import TorchInferencer

    model, checkpoint = loaded(trained), trained
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    predictions = engine.predict(model, dataset=PredictDataset(images), ckpt_path=checkpoint)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    torch_file = engine.export(model, "torch", export_root=tmp_path, ckpt_path=checkpoint)
    inferencer = TorchInferencer(torch_file, device="cpu")
    session = onnxruntime.InferenceSession(exported_to_onnx)
    for prediction in predictions:
        path = prediction.image_path[0]
        by_torch = inferencer.predict(path)
        pixels = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255
        by_onnx = dict(
            zip(
                (output.name for output in session.get_outputs()),
                session.run(None, {session.get_inputs()[0].name: pixels}),
                strict=True,
            )
        )
        for other in (by_torch.pred_score, torch.as_tensor(by_onnx["pred_score"])):
            torch.testing.assert_close(prediction.pred_score.flatten(), other.flatten(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            prediction.anomaly_map,
            torch.as_tensor(by_onnx["anomaly_map"]).reshape(prediction.anomaly_map.shape),
            rtol=1e-3,
            atol=1e-3,
        )
        assert bool(prediction.pred_label) == bool(by_torch.pred_label) == bool(by_onnx["pred_label"].item())


def test_openvino_agrees_through_every_door(trained, exported, exported_for_one_size, numbered_images, tmp_path):
    import openvino as ov
    from anomalib.deploy import OpenVINOInferencer

    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    predictions = engine.predict(loaded(trained), dataset=PredictDataset(numbered_images), ckpt_path=trained)
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    inferencer = OpenVINOInferencer(exported, config=float32)
    compiled = ov.compile_model(exported, "CPU", float32)
    scorer = Scorer(exported_for_one_size, hint="latency")
    for prediction in predictions:
        rgb = np.asarray(Image.open(prediction.image_path[0]).convert("RGB"))
        pixels = (rgb / np.float32(255)).transpose(2, 0, 1)
        three = compiled(np.stack([pixels, pixels[::-1], pixels]))
        (resized,) = scorer.score_arrays([("", rgb)], "RGB")
        anomalib = inferencer.predict(prediction.image_path[0])
        scores = [anomalib.pred_score.item(), *three["pred_score"][[0, 2]], resized.score]
        labels = [anomalib.pred_label.item(), *three["pred_label"][[0, 2]]]
        np.testing.assert_allclose(scores, prediction.pred_score.item(), rtol=1e-3, atol=1e-4)
        assert {bool(label) for label in labels} == {bool(prediction.pred_label)}
        assert resized.label == ["normal", "anomalous"][int(prediction.pred_label)]


def test_model_api_agrees(exported, numbered_images):
    import openvino as ov

    if int(version("openvino-model-api").split(".")[1]) < 4:
        pytest.skip("openvino-model-api before 0.4, the last for Python 3.10, takes models of one output alone")
    from model_api.adapters import OpenvinoAdapter
    from model_api.models import AnomalyDetection, Model

    float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    by_model_api = Model.create_model(OpenvinoAdapter(ov.Core(), str(exported), plugin_config=float32))
    assert isinstance(by_model_api, AnomalyDetection)
    compiled = ov.compile_model(exported, "CPU", float32)
    for path in sorted(numbered_images.iterdir()):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        plain, found = compiled((rgb / np.float32(255)).transpose(2, 0, 1)[None]), by_model_api(rgb)
        assert found.pred_score == pytest.approx(float(plain["pred_score"][0]), rel=1e-3, abs=1e-4)
        assert (found.pred_label == "True") == bool(plain["pred_label"][0])


def rounded_inputs(network):
    """The operations that take rounded values, once for each."""
    return [
        target.get_node()
        for node in network.get_ordered_ops()
        if node.get_type_name() == "FakeQuantize"
        for target in node.output(0).get_target_inputs()
    ]


def test_int8_rounds_the_backbones_alone_sets_thresholds_anew_and_lies_beside_float(trained, exported, demo, tmp_path):
    import openvino as ov

    model = loaded(trained)
    model.post_processor = STPMPostProcessor(normal_quantile=0.75)
    model.post_processor.set_from_normal_images(*torch.full((2, 4), 1e-3))  # thresholds that are far off
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    plain = tmp_path / "weights/openvino/model.xml"
    shutil.copytree(exported.parent, plain.parent)
    small = engine.export(model, "openvino", export_root=tmp_path, compression_type="int8_ptq", datamodule=demo)
    names = ["model.bin", "model.xml", "model_int8_ptq.bin", "model_int8_ptq.xml"]
    assert sorted((tmp_path / "weights/openvino").iterdir()) == [tmp_path / "weights/openvino" / name for name in names]
    assert (plain.name, small.name) == ("model.xml", "model_int8_ptq.xml")
    floats = 4 * sum(parameter.numel() for parameter in model.model.parameters())
    for path, (low, high) in ((plain, (0.9, 1.01)), (small, (0.2, 0.3))):
        assert low < path.with_suffix(".bin").stat().st_size / floats < high
    network = ov.Core().read_model(small)
    rounded = rounded_inputs(network)
    assert len(rounded) >= 16
    assert {node.get_type_name() for node in rounded} <= {"Convolution", "Add", "MaxPool"}
    assert {name for output in network.outputs for name in output.get_names()} == {
        name for output in ov.Core().read_model(plain).outputs for name in output.get_names()
    }
    images = [
        (str(place), (255 * item.image).byte().permute(1, 2, 0).numpy()) for place, item in enumerate(demo.test_data)
    ]
    exact, scores, several = (
        list(Scorer(path, hint=hint, batch=batch).score_arrays(images, "RGB"))
        for path, hint, batch in ((plain, "latency", 1), (small, "latency", 1), (small, "throughput", 3))
    )
    before, after, others = (torch.tensor([one.raw for one in found]) for found in (exact, scores, several))
    torch.testing.assert_close(others, after)
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.95
    torch.testing.assert_close(after, before, atol=0, rtol=0.05)
    verdict = Scorer(small).verdict  # set from the rounded model's scores, where the old threshold let none pass
    assert verdict.image.threshold == pytest.approx(limit(np.array(verdict.held_out_scores), 0.75).value)
    assert max(verdict.held_out_scores) < verdict.image.threshold
    assert sum(one.label == "anomalous" for one in scores) < len(scores)


@pytest.mark.parametrize(("strides", "in_float"), [((4, 1, 2, 1), {0, 1}), ((4, 1), set())])
def test_convolutions_up_to_a_quarter_of_the_size_stay_in_float(strides, in_float):
    import openvino as ov
    from openvino import opset13 as ops

    image = ops.parameter([1, 3, 64, 64], np.float32)
    layer = ops.multiply(image, np.float32(0.5))
    for index, stride in enumerate(strides):
        weights = np.ones((3, 3, 1, 1), np.float32)
        layer = ops.convolution(layer, weights, [stride] * 2, [0, 0], [0, 0], [1, 1])
        layer.set_friendly_name(f"convolution {index}")
    head = ops.reduce_mean(layer, np.array([1]), keep_dims=True)
    head.set_friendly_name("head")
    left = set(outside_the_backbones(ov.Model([head], [image])))
    assert "head" in left
    assert {name for name in left if name.startswith("conv")} == {f"convolution {index}" for index in in_float}


def test_the_threshold_of_a_rounded_model_repeats_the_float_labels():
    exact = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rounded = torch.tensor([0.21, 0.38, 0.62, 0.79])  # about twice as large
    assert 0.38 < same_labels(exact, torch.tensor(0.25), rounded) < 0.62
    assert 0.79 < same_labels(exact, torch.tensor(0.5), rounded) < 1.05  # none is anomalous: twice the threshold
    swapped = torch.tensor([0.21, 0.63, 0.62, 0.79])  # one label must differ, at 0.25 x 2.067 as at 0.71
    torch.testing.assert_close(same_labels(exact, torch.tensor(0.25), swapped), torch.tensor(0.25 * 0.62 / 0.3))


def brightness(factor: float):
    """A graph whose image score and anomaly map are an image's brightness times a factor."""
    import openvino as ov
    from openvino import opset13 as ops

    image = ops.parameter([1, 3, -1, -1], np.float32)
    anomaly_map = ops.multiply(ops.reduce_mean(image, np.array([1]), keep_dims=True), np.float32(factor))
    score = ops.reduce_mean(anomaly_map, np.array([1, 2, 3]))
    score.output(0).set_names({"pred_score"})
    anomaly_map.output(0).set_names({"anomaly_map"})
    return ov.Model([score, anomaly_map], [image])


def plain_images(values: list[float], anomalous_above: float = 1.0) -> list[ImageBatch]:
    return [
        ImageBatch(image=torch.full((1, 3, 4, 4), value), gt_label=torch.tensor([value > anomalous_above]))
        for value in values
    ]


HELD, VALIDATED = [0.1, 0.2, 0.3], [0.2, 0.25, 0.6, 0.7]  # brightness of good images, and of two good and two bad ones


@pytest.mark.parametrize(
    ("basis", "validation", "threshold"),
    [
        ("validation set", [], 0.425),  # kept: half-way from 0.25 to 0.6
        ("validation set", VALIDATED[:2], 0.425),
        ("validation set", VALIDATED, 0.425 * 1.1),  # as many labels are equal; the nearest to the scores' ratio
        ("held-out good images", VALIDATED, limit(1.1 * np.array(HELD), 0.995).value),
    ],
)
def test_int8_keeps_the_basis_of_the_thresholds(basis, validation, threshold):
    import openvino as ov

    post_processor = STPMPostProcessor()
    held_out = torch.tensor(HELD), torch.tensor(HELD)
    plain = scored(ov.compile_model(brightness(1.0), "CPU"), plain_images(VALIDATED, 0.5))
    calibrate(post_processor, held_out, plain if basis == "validation set" else ())
    assert post_processor.basis == basis
    before = float(post_processor.image_threshold)
    made = with_thresholds(
        post_processor, brightness(1.1), brightness(1.0), plain_images(HELD), plain_images(validation, 0.5)
    )
    assert made.basis == basis
    assert float(made.image_threshold) == pytest.approx(threshold, rel=1e-4)
    assert made.held_out_scores == pytest.approx([1.1 * value for value in HELD])
    assert (post_processor.basis, float(post_processor.image_threshold)) == (basis, before)  # a copy was changed


def test_int8_needs_normal_images_and_says_so(trained, tmp_path):
    with pytest.raises(STPMError, match="pass them with --data"):
        loaded(trained).to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_int8_with_control_goes_back_to_float_until_held_out_maps_agree(demo, tmp_path):
    import openvino as ov

    _, model = fit(demo, tmp_path, 1, layers=["layer1", "layer2"], image_size=(32, 32))
    names = {"model_file_name": "part", "datamodule": demo}
    path = model.to_openvino(tmp_path, compression_type=CompressionType.INT8_ACQ, max_drop=0.0, **names)
    assert path == tmp_path / "weights/openvino/part_int8_acq.xml"
    assert len(rounded_inputs(ov.Core().read_model(path))) <= 2
    model.data_record = replace(model.data_record, held_out=[])
    with pytest.raises(STPMError, match="use INT8_PTQ"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_ACQ, datamodule=demo)


def test_a_network_is_as_before_after_an_export_that_failed():
    network = STPMModel("tf_efficientnet_lite0")

    def changed():
        return [(getattr(part, "inplace", None), "forward" in vars(part)) for part in network.modules()]

    before = changed()
    assert (True, False) in before

    def fail():
        with traceable(network):
            assert not any(in_place for in_place, _ in changed())
            assert any(padded for _, padded in changed())
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert changed() == before


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 1), (3, 3, 2), (1, 2, 1)])
def test_padding_in_whole_numbers_is_timms(kernel, stride, dilation):
    convolution = Conv2dSame(2, 3, kernel, stride, dilation=dilation)
    for height, width in ((7, 8), (9, 12), (10, 11)):
        features = torch.rand(1, 2, height, width)
        torch.testing.assert_close(padded_alike(convolution, features), convolution(features))


def test_a_full_disk_is_said_before_the_export(trained, tmp_path, monkeypatch):
    model = loaded(trained)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(STPMError, match=r"the model may take 2\d MiB and the disk of .*out has 1: make room"):
        model.to_openvino(tmp_path / "out")
