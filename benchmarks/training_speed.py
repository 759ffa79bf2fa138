"""Time of training and its growth: STPM, by the paper and with nothing kept, Stfpm, PaDiM.

    python -m benchmarks.training_speed passes --root DIR --teacher FILE   # seconds a pass, memory: models in turns
    python -m benchmarks.training_speed growth --root DIR --teacher FILE   # with the number and the size of images
    python -m benchmarks.training_speed whole  --root DIR --teacher FILE   # fits of many images, and beside other work
    python -m benchmarks.training_speed plot                               # redraw and tabulate what is kept

Each run is the real `anomalib train` in a fresh process; rows are written as they come to
`results/training_speed.json`, and a run that has one is not repeated. All models get the same weights of torchvision's
ResNet-18 as their teacher; anomalib's own would download others, which changes no time. Rows that name a batch and a
number of passes are of recipes that were tried before the present one (`recipes.md`). Whole runs: `accuracy.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.environment import environment, keep, markdown, rows, spread

HERE = Path(__file__).parent
RESULT = HERE / "results" / "training_speed.json"
CONFIGS = HERE.parent / "configs"
# Passes that are timed; those of a model are alike.
TIMED = {"STPM": 4, "STPM, paper": 4, "STPM, paper, nothing kept": 1, "anomalib Stfpm": 1, "anomalib PaDiM": 1}
SECONDS = [1, 2, 5, 10, 20, 50]  # marked on the plot's axes
OTHERS = {  # PatchCore with a tenth of its usual coreset, which would take hours to pick on two cores
    "anomalib Stfpm": ("Stfpm", {}),
    "anomalib PaDiM": ("Padim", {"backbone": "resnet18"}),
    "anomalib PatchCore": ("Patchcore", {"backbone": "resnet18", "coreset_sampling_ratio": 0.01}),
}
BACKBONES = {"resnet18": "resnet18.tv_in1k", "lite0": "tf_efficientnet_lite0.in1k"}
ROUNDS = 3
WHOLE: dict[str, tuple[int, int, dict[str, Any]]] = {  # images, busy processes beside, arguments
    "320 images": (320, 0, {}),
    "20,000 images": (20_000, 0, {}),
    "150 steps": (320, 0, SHORT := {"steps": [150, 150]}),
    "150 steps beside one busy process": (320, 1, SHORT),
    "150 steps beside two busy processes": (320, 2, SHORT),
}
TRANSFORMS = "torchvision.transforms.v2"
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
COUNTS, SIZES, IMAGES_AT_SIZES = (50, 100, 200, 320), (256, 384, 512), 50


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
        ends = [*self.starts[1:], time.perf_counter()]
        self.row["pass_seconds"] = [round(end - start, 3) for start, end in zip(self.starts, ends, strict=True)]

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
            self.row["chosen"] = getattr(getattr(getattr(pl_module, "selection", None), "chosen", None), "epoch", None)
        elif stage == "test":
            self.row["milliseconds_an_image"] = round(1000 * self.test_seconds / self.images, 1)
            self.row["metrics"] = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        self.path.write_text(json.dumps(self.row))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["passes", "growth", "whole", "plot"])
    parser.add_argument("--root", type=Path, help="MVTec AD's folder")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--results", type=Path, default=RESULT, help="file of what is kept")
    args = parser.parse_args()
    if args.part != "plot":
        with tempfile.TemporaryDirectory() as folder:
            for key, run in runs(args, Path(folder)):
                if key not in rows(args.results):
                    with busy(run.get("beside", 0)):
                        row = {**run, **train(run, args.teacher.resolve(), Path(folder))}
                    del row["root"]  # a path of this machine
                    keep(args.results, key, row | environment(f"python -m benchmarks.training_speed {args.part}"))
                    print(key, json.dumps({name: row[name] for name in ("pass_seconds", "fit_seconds")}), flush=True)
    kept = rows(args.results)
    print(table(kept))
    growth = [row for key, row in kept.items() if key.startswith("growth")]
    if growth:
        draw(growth).savefig(args.results.with_suffix(".png"), dpi=110)


def runs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the settings of each run of a part, the models in turns."""
    root = args.root.resolve()
    run: dict[str, Any]
    if args.part == "passes":
        for number in range(ROUNDS):
            for model, epochs in TIMED.items():
                run = {"model": model, "root": str(root), "category": "screw", "epochs": epochs, "seed": number}
                yield f"passes, {model}, round {number}", run
    elif args.part == "whole":
        for number, (name, (count, beside, arguments)) in itertools.product(range(ROUNDS), WHOLE.items()):
            run = {"model": "STPM", "root": str(few(root / "screw", count, folder / str(count))), "category": "screw"}
            run |= {"epochs": None, "seed": number, "beside": beside, "arguments": arguments, "name": f"STPM, {name}"}
            yield f"whole, {name}, round {number}", run
    else:
        shapes = [*((IMAGES_AT_SIZES, size) for size in SIZES), *((count, 256) for count in COUNTS)]
        for count, size in dict.fromkeys(shapes):
            for model, epochs in TIMED.items():
                run = {"model": model, "root": str(few(root / "screw", count, folder / str(count)))}
                run |= {"category": "screw", "epochs": min(epochs, 2), "seed": 0, "images": count, "size": size}
                yield f"growth, {model}, {count} images, {size} pixels", run


def few(source: Path, count: int, root: Path) -> Path:
    """Copy ``count`` training images and a small test set, on which a validation costs little; returns the root.

    Beyond the images that there are, they are taken again and again, by links.
    """

    def others(folder: str, names: list[str]) -> list[str]:
        images = sorted(name for name in names if name.endswith(".png"))
        return images[count if folder.endswith("train/good") else 2 :]

    if root.exists():
        return root
    shutil.copytree(source, root / "screw", ignore=others)
    files = sorted((root / "screw/train/good").iterdir())
    for number in range(len(files), count):
        os.link(files[number % len(files)], files[0].with_name(f"{number:05}.png"))
    return root


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def train(run: dict[str, Any], teacher: Path, folder: Path) -> dict[str, Any]:
    """Run `anomalib train` once.

    Args:
        run: The model, the data's root and category, the passes (``epochs``) and the seed; and, if need be, the images'
            ``size``, more ``arguments`` of the model, ``metrics`` and ``callbacks``, and other ``data``.
        teacher: Weights of torchvision's ResNet-18.
        folder: For the run's files.

    Returns:
        What the clock kept.
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
        "data": run.get("data", {"class_path": "anomalib.data.MVTecAD", "init_args": data}),
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
    transforms = [{"class_path": f"{TRANSFORMS}.{name}", "init_args": arguments} for name, arguments in names.items()]
    compose = {"class_path": f"{TRANSFORMS}.Compose", "init_args": {"transforms": transforms}}
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
    return {"HF_HOME": str(folder / "home")}


def use_hub(teacher: Path, folder: Path) -> None:
    """Let anomalib's models find the teacher offline in this process."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = f"{hub(teacher, folder)['HF_HOME']}/hub"


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Seconds of a pass and of a fit, and peak memory, of each model: mean and deviation over the rounds."""
    groups = defaultdict(list)
    for key, row in kept.items():
        if key.startswith(("passes", "whole")):
            groups[row.get("name", row["model"])].append(row)
    lines: list[list[Any]] = [["model", "rounds", "a pass, s", "fit, s", "peak, GiB"]]
    for model, found in groups.items():
        seconds = spread([mean(row["pass_seconds"]) for row in found])
        fits, peaks = ([row[name] for row in found] for name in ("fit_seconds", "peak_memory_gib"))
        lines.append([model, len(found), seconds, spread(fits, 0), spread(peaks)])
    return markdown(lines)


def draw(growth: list[dict[str, Any]]) -> Any:
    """Draw the growth of a pass with the number and the size of the images."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    axes[0].set(xlabel="training images at 256 x 256", ylabel="seconds a pass")
    axes[1].set(xlabel=f"image height and width, pixels ({IMAGES_AT_SIZES} images)")
    panels = [("images", COUNTS, "size", 256), ("size", SIZES, "images", IMAGES_AT_SIZES)]
    for axis, (name, marks, other, value) in zip(axes, panels, strict=True):
        for model, marker in zip(TIMED, "osD^v", strict=True):
            found = [row for row in growth if row["model"] == model and row[other] == value]
            points = sorted((row[name], mean(row["pass_seconds"])) for row in found)
            axis.plot(*np.transpose(points or np.empty((0, 2))), marker=marker, label=model)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(marks, marks, minor=False)
        axis.minorticks_off()
        axis.set_yticks(SECONDS, SECONDS)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(TIMED), fontsize=8)
    return figure


if __name__ == "__main__":
    main()
