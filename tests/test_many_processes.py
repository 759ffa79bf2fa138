"""Training on two processes, through Lightning's DDP, in the real host."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import warm
from conftest import TEACHER, TINY

from stpm_plugin import STPM, DemoData

COMMAND = Path(sys.executable).with_name("anomalib")
IMAGES = {**TINY, "train_images": 21}


def command(root: Path, folder: Path, processes: int, epochs: int) -> list[str]:
    return [
        str(COMMAND), "train", "--model", "STPM", "--model.backbone", "resnet18", "--model.teacher_weights", str(TEACHER),
        "--model.image_size", "[64,64]", "--model.schedule", "constant", "--model.lr", "0.1", "--model.seed", "0",
        "--model.holdout", "0.2", "--model.hard_share", "1", "--model.batch_size", str(4 // processes),
        "--model.post_processor", "stpm_plugin.STPMPostProcessor", "--model.post_processor.normal_quantile", "0.75",
        "--data", "stpm_plugin.DemoData", "--data.root", str(root), *(f"--data.{k}={v}" for k, v in IMAGES.items()),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(processes), "--trainer.max_epochs", str(epochs),
        *(["--trainer.strategy", "ddp"] if processes > 1 else []), "--default_root_dir", str(folder),
        "--trainer.logger", f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {folder}}}}}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(once) -> Path:
    return once("demo21", lambda folder: DemoData(root=folder, **IMAGES).prepare_data())


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def started(line: list[str], anew: bool) -> tuple[int, str]:
    """Run a command; ``anew`` in an interpreter of its own, where it starts itself again for the second process."""
    if not anew and (done := warm.run(["anomalib", *line[1:]])):
        return done
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


def test_two_processes_train_one_model_as_well_as_one_process(root, tmp_path):
    results, models = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        code, output = started(command(root, folder, processes, 8), anew=processes > 1)
        assert code == 0, output[-4000:]
        results.append(pd.concat(map(pd.read_csv, folder.rglob("metrics.csv"))))
        models.append(STPM.load_from_checkpoint(next(folder.rglob("model.ckpt"))))
        checkpoint = torch.load(next(folder.rglob("model.ckpt")), weights_only=True)["stpm"]
        scores = results[-1].holdout_score.dropna()
        assert checkpoint["score"] == pytest.approx(scores.min(), rel=1e-4)  # one choice, over all held-out images
        assert scores.iloc[-1] < 0.7 * scores.iloc[0]
    # As many images in a step, drawn in another composition: as good a model, not the same.
    one, two = (frame.holdout_score.dropna().iloc[-1] for frame in results)
    assert two == pytest.approx(one, rel=0.3)
    one, two = (frame.pixel_AUROC.dropna().iloc[-1] for frame in results)
    assert two == pytest.approx(one, abs=0.05)
    one, two = (float(model.post_processor.image_threshold) for model in models)
    assert two == pytest.approx(one, rel=0.3)


def test_a_killed_process_ends_the_run_with_a_message(root, tmp_path):
    """The second: the first, which people wait for, says so and ends."""
    log = tmp_path / "log"
    with log.open("w") as output:
        main = subprocess.Popen(command(root, tmp_path, 2, 500), stdout=output, stderr=output, env=environment())
        try:
            _wait(lambda: list(tmp_path.rglob("model.ckpt")), 240)  # in the middle of training
            other = next(child for child in psutil.Process(main.pid).children() if "train" in child.cmdline())
            other.kill()
            _wait(lambda: main.poll() is not None, 120)
        finally:
            main.kill()
            main.wait()
    assert main.returncode != 0
    assert "STPM: process 0 of 2 lost the others in epoch" in log.read_text(), log.read_text()[-3000:]
    assert torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=True)["epoch"] >= 0


def _wait(condition, seconds: int) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.5)
