"""Time and memory of training: STPM, by the paper and with nothing kept, Stfpm, PaDiM.

    python -m benchmarks.training_speed passes --root DIR --teacher FILE   # seconds a pass, memory: models in turns
    python -m benchmarks.training_speed whole  --root DIR --teacher FILE   # fits of 320 and of 20,000 images
    python -m benchmarks.training_speed table                              # from what is kept

Each run is the real `anomalib train` in a fresh process; rows are written as they come to
`results/training_speed.json`, and a run that has one is not repeated. All models get the same weights of torchvision's
ResNet-18 as their teacher; anomalib's own would download others, which changes no time. Rows that name a batch and a
number of passes are of recipes that were tried before the present one (`recipes.md`), `growth` rows of one of them, by
the command as of commit 12c2a5f; `earlier` rows are of a machine with AVX512, `whole` rows beside a busy process by the
command as of 951a4ce, `busy` rows by the one that they name. Whole runs: `accuracy.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from anomalib import models
from anomalib.models import AnomalibModule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.environment import Row, environment, grouped, keep, markdown, missing, parser, rows, spread

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
# Passes that are timed; those of a model are alike.
TIMED = {"STPM": 4, "STPM, paper": 4, "STPM, paper, nothing kept": 1, "anomalib Stfpm": 1, "anomalib PaDiM": 1}
OTHERS = {  # PatchCore with a tenth of its usual coreset, which would take hours to pick on two cores
    "anomalib Stfpm": ("Stfpm", {}),
    "anomalib PaDiM": ("Padim", {"backbone": "resnet18"}),
    "anomalib PatchCore": ("Patchcore", {"backbone": "resnet18", "coreset_sampling_ratio": 0.01}),
    "anomalib ReverseDistillation": ("ReverseDistillation", {"backbone": "resnet18"}),
    "anomalib FastFlow": ("Fastflow", {"backbone": "resnet18"}),
    "anomalib CFA": ("Cfa", {"backbone": "resnet18"}),
}
BACKBONES = {"resnet18": "resnet18.tv_in1k", "lite0": "tf_efficientnet_lite0.in1k"}
ROUNDS = 3
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


class Clock(Callback):
    """Keeps the times of a fit, its peak memory and the test's metrics in a JSON file."""

    def __init__(self, path: str) -> None:
        self.path, self.starts, self.row = Path(path), [], {}
        self.test_seconds, self.images = 0.0, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start with the fit's preparation: the first pass over the images belongs to it."""
        if stage == "fit":
            self.begin = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Note the start of a pass."""
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end of the last pass, held-out scores or validation included."""
        self.row |= {"training_images": len(trainer.datamodule.train_data), "steps": trainer.global_step}
        self.row["pass_seconds"] = np.diff([*self.starts, time.perf_counter()]).round(3).tolist()

    def on_test_batch_start(self, *_: Any) -> None:
        """Start the clock of a test batch; it is stopped before the metrics read it."""
        self.test_begin = time.perf_counter()

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: int) -> None:
        """Stop it."""
        self.test_seconds += time.perf_counter() - self.test_begin
        self.images += len(batch.image)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the end of the fit, thresholds included, and the test's metrics."""
        if stage == "fit":
            self.row["fit_seconds"] = round(time.perf_counter() - self.begin, 2)
            self.row["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        elif stage == "test":
            self.row["milliseconds_an_image"] = round(1000 * self.test_seconds / self.images, 1)
            self.row["metrics"] = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        self.path.write_text(json.dumps(self.row))


def main() -> None:
    """Run one part."""
    args = parser(__doc__, ["passes", "whole", "table"], "--root", "--teacher").parse_args()
    file = args.results / "training_speed.json"
    if args.part != "table":
        with tempfile.TemporaryDirectory() as folder:
            for key, run in missing(file, runs(args, Path(folder))):
                row = run | train(run, args.teacher.resolve(), Path(folder))
                del row["root"]  # a path of this machine
                keep(file, key, row | environment(f"python -m benchmarks.training_speed {args.part}"))
    print(table(rows(file)))


def runs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Row]]:
    """Yield the name and the settings of each run of a part, the models in turns."""
    source = args.root.resolve() / "screw"
    usual = {"model": "STPM", "root": str(source.parent), "category": "screw", "seed": 0}
    if args.part == "passes":
        for number, (model, epochs) in itertools.product(range(ROUNDS), TIMED.items()):
            yield f"passes, {model}, round {number}", usual | {"model": model, "epochs": epochs, "seed": number}
    else:
        for number, count in itertools.product(range(ROUNDS), (320, 20_000)):
            run = usual | {"root": few(source, count, folder / str(count)), "epochs": None, "seed": number}
            yield f"whole, {count:,} images, round {number}", run | {"name": f"STPM, {count:,} images"}


def few(source: Path, count: int, root: Path) -> str:
    """Copy ``count`` training images and a small test set, on which a validation costs little; returns the root.

    If there are fewer images, they are repeated, as links.
    """
    if not root.exists():
        names = sorted(path.name for path in (source / "train/good").iterdir())
        part_of(source, root / source.name, names[:count], tests=2)
        good = root / source.name / "train/good"
        for number in range(len(names), count):
            os.link(good / names[number % len(names)], good / f"{number:05}.png")
    return str(root)


def part_of(source: Path, target: Path, images: list[str], tests: int | None = None) -> None:
    """Copy a category with some of its training images, and with all or so many test images of a kind."""

    def others(folder: str, names: list[str]) -> set[str]:
        kept = images if folder.endswith("train/good") else sorted(name for name in names if "." in name)[:tests]
        return {name for name in names if "." in name} - set(kept)

    shutil.copytree(source, target, ignore=others, copy_function=shutil.copyfile)  # anomalib lists no links


def train(run: Row, teacher: Path, folder: Path) -> Row:
    """Run `anomalib train` once, with a folder for its files; returns what the clock kept.

    ``run`` has the model, the data's root and category, the passes (``epochs``) and the seed; optionally the images'
    ``size``, more ``arguments`` of the model, ``metrics`` and ``callbacks``.
    """
    default, paper = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("stpm", "paper"))
    size = run.get("size", 256)
    if run["model"].startswith("STPM"):
        model = (paper if "paper" in run["model"] else default)["model"]
        model["init_args"] |= {"teacher_weights": str(teacher), "image_size": [size, size], "seed": run["seed"]}
        model["init_args"] |= run.get("arguments", {})
        if "nothing kept" in run["model"]:
            model["init_args"]["cache"] = "off"
    else:
        class_path, arguments = OTHERS[run["model"]]
        model = {"class_path": class_path, "init_args": dict(arguments)}
        model["init_args"]["pre_processor"] = resize(size)
        model["init_args"]["evaluator"] = paper["model"]["init_args"]["evaluator"]
    model["init_args"]["visualizer"] = False
    precision = {"class_path": "anomalib.metrics.AUPR", "init_args": {"fields": ["anomaly_map", "gt_mask"]}}
    precision["init_args"] |= {"prefix": "pixel_", "strict": False}
    model["init_args"]["evaluator"]["init_args"]["test_metrics"] += [precision, *run.get("metrics", [])]
    data = {"root": run["root"], "category": run["category"], "num_workers": 2}
    clock = {"class_path": "benchmarks.training_speed.Clock", "init_args": {"path": str(folder / "clock.json")}}
    trainer = {"accelerator": "auto", "enable_progress_bar": False, "callbacks": [clock, *run.get("callbacks", [])]}
    config = {
        "model": model,
        "data": {"class_path": "anomalib.data.MVTecAD", "init_args": data},
        "trainer": trainer | ({"max_epochs": run["epochs"]} if run["epochs"] else {}),
        "default_root_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "run", ignore_errors=True)
    cache = {} if run["model"].startswith("STPM") else hub(teacher, folder)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("anomalib")), "train", "-c", str(folder / "config.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", **cache},
        check=False,
    )
    if done.returncode:
        sys.exit(f"{run} failed:\n{done.stdout[-3000:]}")
    return json.loads((folder / "clock.json").read_text())


def resize(size: int) -> dict[str, Any]:
    """Anomalib's pre-processor at another size."""
    names = {"Resize": {"size": [size, size]}, "Normalize": {"mean": MEAN, "std": DEVIATION}}
    made = [{"class_path": f"torchvision.transforms.v2.{name}", "init_args": one} for name, one in names.items()]
    compose = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": made}}
    return {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": compose}}


def hub(teacher: Path, folder: Path) -> dict[str, str]:
    """Make a hub client's cache in which anomalib's models find the teacher offline; returns its environment."""
    import timm
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher)
    snapshot = folder / "home/hub/models--timm--resnet18.a1_in1k/snapshots/0"
    if not snapshot.exists():
        snapshot.mkdir(parents=True)
        save_file({**timm.create_model("resnet18").state_dict(), **weights}, snapshot / "model.safetensors")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text("0")
        torchvisions = folder / "home/hub/checkpoints/resnet18-f37072fd.pth"
        torchvisions.parent.mkdir()
        torch.save({**timm.create_model("resnet18").state_dict(), **weights}, torchvisions)
    return {"HF_HOME": str(folder / "home"), "TORCH_HOME": str(folder / "home")}


def use_hub(teacher: Path, folder: Path) -> None:
    """Let anomalib's models find the teacher offline in this process."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = f"{hub(teacher, folder)['HF_HOME']}/hub"


def rival(name: str, size: int = 256, **options: Any) -> AnomalibModule:
    """One of anomalib's models, with the teacher's weights where the hub is :func:`use_hub`'s."""
    class_path, arguments = OTHERS[name]
    kind = getattr(models, class_path)
    return kind(**arguments, pre_processor=kind.configure_pre_processor((size, size)), **options)


def table(kept: dict[str, Row]) -> str:
    """Seconds of a pass and of a fit, and peak memory, of each model: mean and deviation over the rounds."""
    lines: list[list[Any]] = [["model", "rounds", "a pass, s", "fit, s", "peak, GiB"]]
    timed = [
        {"name": row["model"], "pass": mean(row["pass_seconds"])} | row
        for key, row in kept.items()
        if key.startswith(("passes", "whole"))
    ]
    columns = {"pass": 2, "fit_seconds": 0, "peak_memory_gib": 2}
    for (name,), found in grouped(timed, "name").items():
        cells = [spread([row[column] for row in found], digits) for column, digits in columns.items()]
        lines.append([name, len(found), *cells])
    return markdown(lines)


if __name__ == "__main__":
    main()
