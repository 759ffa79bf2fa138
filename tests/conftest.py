"""What the tests share: a small drawn data set, one short trained run, and where the optional real data lie."""

from __future__ import annotations

import os

# Read when torch is imported. Tests run side by side, each with processes of its own: two threads that share a core
# with others wait for each other in oneDNN's bfloat16 kernels, and a step takes fifty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a hub
os.environ["COLUMNS"] = "200"

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from filelock import FileLock
from PIL import Image

# A shell that starts the tests in the background leaves Ctrl-C ignored, in all processes that they start too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"
TEACHER = Path(__file__).with_name("cifar10_teacher.safetensors")  # a ResNet-18
# timm's smallest ResNet as torch.manual_seed(0) draws it, BatchNorm's weights from [0.5, 1.5], layer4 left out: a
# fortieth of a ResNet-18, where what a teacher knows proves nothing.
DRAWN_TEACHER = Path(__file__).with_name("drawn_teacher.safetensors")
TINY = {"train_images": 10, "test_images": 2, "num_workers": 0, "train_batch_size": 4}
RESNET18 = {"backbone": "resnet18", "teacher_weights": str(TEACHER)}
MODEL = {
    "backbone": "test_resnet",
    "teacher_weights": str(DRAWN_TEACHER),
    "layers": ["layer1", "layer2"],
    "image_size": (64, 64),
    "batch_size": None,
    "schedule": "constant",
    "lr": 0.1,
    "holdout": 0.2,
}

NUMBERED = [(64, 64), (64, 64), (101, 77), (64, 64), (200, 131)]  # sizes of the numbered images


LONG = ("test_tutorial", "test_cluster", "test_many_processes", "test_host")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of the longest tests, so that none is left to one process when the other has no more."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that returns a folder of a name, which one of pytest's processes fills and all others wait for."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the processes' folders lie side by side

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = base / "once" / name, base / "once" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def demo_root(once) -> Path:
    """Root of the tiny demo data, drawn once."""
    from stpm_plugin import DemoData

    return once("demo", lambda root: DemoData(root=root, **TINY).prepare_data())


@pytest.fixture
def demo(demo_root: Path):
    """A fresh datamodule on the tiny demo data."""
    from stpm_plugin import DemoData

    return DemoData(root=demo_root, **TINY)


@pytest.fixture(scope="session")
def trained(once, demo_root: Path) -> Path:
    """The checkpoint of a model of the default's three levels, trained for three epochs."""
    from stpm_plugin import DemoData

    return checkpoint_in(
        once("trained", lambda out: fit(DemoData(root=demo_root, **TINY), out, 3, layers=None, **RESNET18))
    )


@pytest.fixture(scope="session")
def exported(once, trained: Path) -> Path:
    """An OpenVINO file of the trained model, for images of any size."""
    return exported_in(once("exported", lambda out: loaded(trained).to_openvino(out)))


@pytest.fixture(scope="session")
def exported_for_one_size(once, trained: Path) -> Path:
    """An OpenVINO file of the trained model, for images of 64 x 64 alone."""
    return exported_in(once("exported_64", lambda out: loaded(trained).to_openvino(out, input_size=(64, 64))))


@pytest.fixture(scope="session")
def exported_to_onnx(once, trained: Path) -> Path:
    """An ONNX file of the trained model, with its thresholds, by `Engine.export`."""
    from anomalib.engine import Engine

    from stpm_plugin import STPM

    def export(folder: Path) -> None:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False)
        engine.export(STPM(), "onnx", export_root=folder, ckpt_path=trained)

    return once("exported_onnx", export) / "weights/onnx/model.onnx"


@pytest.fixture(scope="session")
def numbered_images(once, demo_root: Path) -> Path:
    """Drawn images of several sizes, good and bad, numbered so that names and numbers sort apart."""

    def fill(folder: Path) -> None:
        drawn = sorted(demo_root.glob("*/test/*/*.png"))
        for index, (height, width) in enumerate(NUMBERED):
            Image.open(drawn[2 * index]).convert("RGB").resize((width, height)).save(folder / f"frame {index + 7}.png")

    return once("numbered", fill)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of the one run in a folder."""
    return next(folder.rglob("model.ckpt"))


def exported_in(folder: Path) -> Path:
    """The OpenVINO file of the one export to a folder."""
    return folder / "weights/openvino/model.xml"


def loaded(checkpoint: Path):
    """A checkpoint's model."""
    from stpm_plugin import STPM

    return STPM.load_from_checkpoint(checkpoint, map_location="cpu")


def six_frames(folder: Path) -> Path:
    """A video of six grey frames, from black to light, in a folder."""
    import cv2
    import numpy as np

    video = folder / "line.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for number in range(6):
        writer.write(np.full((64, 64, 3), 40 * number, np.uint8))
    writer.release()
    return video


def rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV of scores."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fit(
    datamodule,
    folder: Path,
    max_epochs: int | None,
    ckpt_path: Path | None = None,
    seed: int = 0,
    trainer=None,
    **arguments,
):
    """Fit a small STPM through anomalib's Engine and return both."""
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from stpm_plugin import STPM

    seed_everything(seed)
    model = STPM(**{**MODEL, **arguments})
    engine = Engine(
        default_root_dir=folder, max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False, **(trainer or {})
    )
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return engine, model


def run(*command: str, env: dict[str, str] | None = None, check: bool = True, cwd: Path | None = None) -> str:
    """Run Python with arguments in a fresh process and return all that it printed."""
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    output = result.stdout + result.stderr
    if check:
        assert result.returncode == 0, output[-4000:]
    return output


def anomalib(*arguments: str, env: dict[str, str] | None = None, **options) -> str:
    """Run the installed `anomalib` command in a process of its own and return all that it printed."""
    return command("anomalib", *arguments, env=env, **options)


def command(*line: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run an installed command in a process of its own and return all that it printed."""
    done = None if env else warm.run(list(line), cwd)
    if done is None and line[0] == "python":
        return run(*line[1:], env=env, check=check, cwd=cwd)
    if done is None:
        module, name = warm.ENTRIES[line[0]].split(":")
        code = f"import sys; from {module} import {name}; sys.exit({name}())"
        return run("-c", code, *line[1:], env=env, check=check, cwd=cwd)
    code, output = done
    assert code == 0 or not check, output[-4000:]
    return output
