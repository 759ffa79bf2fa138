"""One model, one set of image files, every route that anomalib and the package offer: one verdict."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import checkpoint_in, command, fit, loaded
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import save_file

from stpm_plugin import STPM, STPMModel, STPMPostProcessor, STPMPreProcessor
from stpm_plugin.deployment.scorer import Scorer

TESTS = Path(__file__).parent
HEAD = {"score_area": 5}
SENSITIVITY = {"image_sensitivity": 0.4, "pixel_sensitivity": 0.55}
SIZES = [(64, 64), (101, 77), (48, 80), (60, 131), (256, 200), (90, 90)]
CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Verdict(NamedTuple):
    """What a route says of an image; the mask is flat."""

    score: float
    label: bool
    mask: np.ndarray | None = None


Verdicts = dict[str, Verdict]  # by path


class Recorder(Callback):
    """Keeps what a test or a prediction has found, and writes it to a file if one is given.

    Args:
        path: A ``.json`` file, for a run in another process.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path, self.batches = path, []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches.append(outputs)  # the post-processor, whose turn comes later, changes it in place

    on_test_batch_end = on_predict_batch_end

    def on_predict_end(self, trainer, pl_module) -> None:
        thresholds = [float(pl_module.post_processor.image_threshold), float(pl_module.post_processor.pixel_threshold)]
        rows = [
            [name, *map(float, (score, label)), mask.flatten().int().tolist()]
            for b in self.batches
            for name, score, label, mask in zip(b.image_path, b.pred_score, b.pred_label, b.pred_mask, strict=True)
        ]
        self.found = {"thresholds": thresholds, "rows": rows}
        if self.path:
            Path(self.path).write_text(json.dumps(self.found))

    on_test_end = on_predict_end


def verdicts(found: dict) -> Verdicts:
    return {n: Verdict(score, bool(label), np.array(mask)) for n, score, label, mask in found["rows"]}


class Trained(NamedTuple):
    """A trained model whose every setting differs from the default, and what `Engine.test` said when it was trained."""

    kind: str
    checkpoint: Path
    root: Path
    expected: Verdicts
    thresholds: list[float]

    @property
    def data(self) -> Folder:
        return folder(self.root)

    @property
    def images(self) -> list[Path]:
        return sorted((self.root / "tested").glob("*/*.png"))


def folder(root: Path) -> Folder:
    return Folder(
        "routes", "train", root, "tested/bad", "tested/good", "masks",
        train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip


@pytest.fixture(scope="session")
def root(once, demo_root: Path) -> Path:
    """Ten good images to train on, and six of as many sizes to test, the bad ones with a patch of noise."""
    return once("routes", lambda root: draw(root, next(demo_root.glob("plate*"))))


def draw(root: Path, drawn: Path) -> None:
    shutil.copytree(drawn / "train/good", root / "train")
    (root / "masks").mkdir()
    for index, (size, path) in enumerate(zip(SIZES, sorted(drawn.glob("test/*/*.png"))[::2], strict=True)):
        kind = root / "tested" / ("good" if path.parent.name == "good" else "bad")
        kind.mkdir(parents=True, exist_ok=True)
        image = np.array(Image.open(path).resize(size))
        if kind.name == "bad":
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[len(mask) // 3 : len(mask) // 2, 20:40] = 255
            image[mask > 0] = np.random.default_rng(index).integers(0, 255, image[mask > 0].shape)
            Image.fromarray(mask).save(root / f"masks/{index}.png")
        Image.fromarray(image).save(kind / f"{index}.png")


def fit_different(kind: str, root: Path, out: Path) -> tuple[Engine, STPM]:
    """Train with one of the two kinds of thresholds, and a backbone and statistics of its own."""
    backbone, layers, size, made = "test_resnet", ["act1", "layer1"], (48, 80), True
    post_processor = STPMPostProcessor(**SENSITIVITY)
    if kind == "quantile":
        backbone, layers, size = "resnet34", ["act1", "layer1"], (256, 256)
        made = STPMPreProcessor(image_size=(48, 80), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
        post_processor = STPMPostProcessor(normal_quantile=0.8, **SENSITIVITY)
    torch.manual_seed(1)
    weights = STPMModel(backbone, layers).teacher.net.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "teacher.safetensors")
    return fit(
        folder(root), out, 20, lr=0.4, backbone=backbone, layers=layers, teacher_weights=str(out / "teacher.safetensors"),
        image_size=size, pre_processor=made, post_processor=post_processor, holdout=0.3, visualizer=False, **HEAD,
    )  # fmt: skip


@pytest.fixture(scope="session", params=["quantile", "best F1"])
def different(request: pytest.FixtureRequest, once, root: Path) -> Trained:
    def train(out: Path) -> None:
        _, model = fit_different(request.param, root, out)
        recorder = Recorder(str(out / "found.json"))
        tests = Engine(callbacks=[recorder], default_root_dir=out / "tests", **CPU)
        tests.test(model, datamodule=folder(root), verbose=False)

    out = once(request.param, train)
    found = json.loads((out / "found.json").read_text())
    expected = verdicts(found)
    assert {one.label for one in expected.values()} == {True, False}
    assert any(0 < one.mask.mean() < 1 for one in expected.values())
    return Trained(request.param, checkpoint_in(out), root, expected, found["thresholds"])


def agree(trained: Trained, found: Verdicts, masks: float = 0, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Compare what a route says with what `Engine.test` said; ``masks`` is the share of pixels that may differ."""
    assert found.keys() == trained.expected.keys()
    for name, one in trained.expected.items():
        np.testing.assert_allclose(found[name].score, one.score, rtol=rtol, atol=atol, err_msg=name)
        assert found[name].label == one.label, name
        assert found[name].mask is None or np.mean(found[name].mask != one.mask) <= masks, name


def engine(*callbacks, **trainer) -> Engine:
    return Engine(callbacks=list(callbacks), default_root_dir=Path("runs"), **CPU, **trainer)


def scored(model: STPM, datamodule, checkpoint: Path | None = None) -> Verdicts:
    recorder = Recorder()
    engine(recorder).test(model, datamodule=datamodule, ckpt_path=checkpoint, verbose=False)
    return verdicts(recorder.found)


def same(one: Verdicts, other: Verdicts) -> bool:
    return one.keys() == other.keys() and all(
        (one[name].score, one[name].label) == (other[name].score, other[name].label)
        and (one[name].mask == other[name].mask).all()
        for name in one
    )


EAGER = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("command", "by"), [("test", "data"), ("predict", "data"), ("predict", "path")])
def test_engine_with_a_bare_model(different, command, by, tmp_path):
    recorder, model = Recorder(), STPM()
    engine = Engine(callbacks=[recorder], default_root_dir=tmp_path, **CPU)
    given = {"datamodule": different.data} if by == "data" else {"data_path": different.root / "tested"}
    getattr(engine, command)(model, ckpt_path=different.checkpoint, **given)
    agree(different, verdicts(recorder.found), **EAGER)
    assert recorder.found["thresholds"] == different.thresholds


def test_commands_with_a_bare_model(different, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # where the recorder is
    split = {"name": "routes", "normal_dir": "train", "abnormal_dir": "tested/bad", "normal_test_dir": "tested/good"}
    split |= {
        "mask_dir": "masks",
        "root": different.root,
        "val_split_mode": "same_as_test",
        "num_workers": 0,
        "eval_batch_size": 2,
    }
    data = {
        "predict": [str(different.root / "tested")],
        "test": ["anomalib.data.Folder", *(f"--data.{name}={value}" for name, value in split.items())],
    }
    for name, given in data.items():
        command(
            "anomalib", name, "--model", "STPM", "--ckpt_path", str(different.checkpoint), "--data", *given,
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            "--trainer.callbacks+", "test_routes.Recorder", "--trainer.callbacks.path", f"{name}.json", cwd=tmp_path,
        )  # fmt: skip
        found = json.loads((tmp_path / f"{name}.json").read_text())
        agree(different, verdicts(found), **EAGER)
        assert found["thresholds"] == different.thresholds


def forward(model: torch.nn.Module, images: list[Path]) -> Verdicts:
    """What a model, post-processor included, makes of images of any size in [0, 1]."""
    found = {}
    for path in images:
        with torch.no_grad():
            made = model(torch.from_numpy(pixels(path)))
        found[str(path)] = Verdict(float(made.pred_score), bool(made.pred_label), made.pred_mask.flatten().numpy())
    return found


def pixels(path: Path) -> np.ndarray:
    """An image (1, 3, H, W) in [0, 1]."""
    return np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255


def test_in_python_without_an_engine(different):
    loaded, bare = STPM.load_from_checkpoint(different.checkpoint), STPM()
    bare.load_state_dict(torch.load(different.checkpoint, weights_only=True)["state_dict"])
    for model in (loaded, bare):
        post_processor = model.post_processor
        agree(different, forward(model.eval(), different.images), **EAGER)
        assert [float(post_processor.image_threshold), float(post_processor.pixel_threshold)] == different.thresholds


@pytest.fixture(scope="session")
def exports(once, different) -> tuple[Trained, Path]:
    """The folder that holds each export of the model."""

    def export(out: Path) -> None:
        model = loaded(different.checkpoint)
        for export_to in (model.to_torch, model.to_onnx, model.to_openvino):
            export_to(out)

    return different, once(f"{different.kind} exported", export) / "weights"


ROUNDED = 0.001  # share of a mask's pixels that lie so near the threshold that another runtime may decide otherwise


def test_torch_inferencer(exports, monkeypatch):
    from anomalib.deploy import TorchInferencer

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer, found = TorchInferencer(exports[1] / "torch/model.pt", device="cpu"), {}
    for path in exports[0].images:
        made = inferencer.predict(path)
        found[str(path)] = Verdict(made.pred_score.item(), bool(made.pred_label), made.pred_mask.flatten().numpy())
    agree(exports[0], found, ROUNDED)


def test_onnx_runtime_and_openvino(exports):
    import onnxruntime
    import openvino as ov

    trained, weights = exports
    session = onnxruntime.InferenceSession(weights / "onnx/model.onnx")
    compiled = ov.compile_model(weights / "openvino/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.name for output in session.get_outputs()]
    runtimes = [
        lambda image: dict(zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True)),
        lambda image: {name: compiled([image])[name] for name in names},
    ]
    for made_by in runtimes:
        found = {}
        for path in trained.images:
            made = made_by(pixels(path))
            found[str(path)] = Verdict(
                made["pred_score"].item(), bool(made["pred_label"].item()), made["pred_mask"].flatten()
            )
        agree(trained, found, ROUNDED)


def test_scorer(exports):
    trained, weights = exports
    scorer = Scorer(weights / "openvino/model.xml")
    found = {}
    for one in scorer.score(trained.images, maps=True):
        found[one.path] = Verdict(one.score, one.label == "anomalous", (one.anomaly_map > scorer.pixel_limit).flatten())
    agree(trained, found, ROUNDED)


def test_unequal_verdicts_would_be_noticed(different):
    """The comparison itself: the default head, in place of the saved one, gives other scores."""
    model = STPM.load_from_checkpoint(different.checkpoint)
    model.model.score_area = 1
    with pytest.raises(AssertionError):
        agree(different, forward(model.eval(), different.images))


SPAWNED = """
import sys
sys.path.append(sys.argv[2])  # of this test: the new process imports it too
from pathlib import Path
from conftest import TINY, fit
from stpm_plugin import DemoData
if __name__ == "__main__":
    data = DemoData(root=sys.argv[1], **TINY)
    engine, model = fit(data, Path("run"), 2, trainer={"strategy": "ddp_spawn", "devices": 1}, visualizer=False)
    print("trained here:", model.trained, model.data_record is not None, model.post_processor.report())
    print("tested:", sorted(engine.test(model, datamodule=data, verbose=False)[0]))
"""


def test_a_model_that_a_spawned_process_trained_is_trained_here(demo_root, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    output = command("python", "-m", "spawned", str(demo_root), str(TESTS), cwd=tmp_path)
    assert "trained here: True True image threshold" in output
    assert "tested: ['image_AUROC'" in output
