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
from pathlib import Path

import pytest
import warm
from PIL import Image

# A shell that starts the tests in the background leaves Ctrl-C ignored, in all processes that they start too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"
TEACHER = Path(__file__).with_name("cifar10_teacher.safetensors")  # a ResNet-18
TINY = {"train_images": 10, "test_images": 2, "num_workers": 0, "train_batch_size": 4}
MODEL = {
    "backbone": "resnet18",
    "teacher_weights": str(TEACHER),
    "image_size": (64, 64),
    "batch_size": None,
    "schedule": "constant",
    "lr": 0.1,
    "holdout": 0.2,
}

NUMBERED = [(64, 64), (64, 64), (101, 77), (64, 64), (200, 131)]  # sizes of the numbered images


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the tiny demo data, drawn once."""
    from stpm_plugin import DemoData

    root = tmp_path_factory.mktemp("demo")
    DemoData(root=root, **TINY).prepare_data()
    return root


@pytest.fixture
def demo(demo_root: Path):
    """A fresh datamodule on the tiny demo data."""
    from stpm_plugin import DemoData

    return DemoData(root=demo_root, **TINY)


@pytest.fixture(scope="session")
def trained(demo_root: Path, tmp_path_factory: pytest.TempPathFactory):
    """A model trained for three epochs, its engine, and its checkpoint."""
    from stpm_plugin import DemoData

    engine, model = fit(DemoData(root=demo_root, **TINY), tmp_path_factory.mktemp("trained"), 3)
    return model, engine, Path(engine.best_model_path)


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenVINO file of the trained model."""
    from stpm_plugin import STPM

    model = STPM.load_from_checkpoint(trained[2])
    return model.to_openvino(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def numbered_images(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images of several sizes, good and bad, numbered so that names and numbers sort apart."""
    folder = tmp_path_factory.mktemp("images")
    drawn = sorted(demo_root.glob("*/test/*/*.png"))
    for index, (height, width) in enumerate(NUMBERED):
        Image.open(drawn[2 * index]).convert("RGB").resize((width, height)).save(folder / f"frame {index + 7}.png")
    return folder


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
