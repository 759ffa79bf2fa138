import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from PIL import Image

SIZES = [(64, 64), (101, 77), (200, 131)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        # Noise in every pixel, which a resize without antialiasing turns into another image.
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def test_engine_torch_and_onnx_agree_on_odd_sizes(trained, images, tmp_path, monkeypatch):
    import onnxruntime
    from anomalib.deploy import TorchInferencer

    model, _, checkpoint = trained
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    predictions = engine.predict(model, dataset=PredictDataset(images), ckpt_path=checkpoint)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    torch_file = engine.export(model, "torch", export_root=tmp_path, ckpt_path=checkpoint)
    inferencer = TorchInferencer(torch_file, device="cpu")
    onnx_file = engine.export(model, "onnx", export_root=tmp_path, ckpt_path=checkpoint)
    session = onnxruntime.InferenceSession(onnx_file)
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
