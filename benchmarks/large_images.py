"""Small defects on large images: resized, and at their own size; how well, how long, and in how much memory.

    python -m benchmarks.large_images run drawn --teacher FILE --sizes 256 512 own     # draws 2048 x 2048 pixels
    python -m benchmarks.large_images run DIR/grid DIR/bottle --teacher FILE --sizes 256 own
    python -m benchmarks.large_images score --teacher FILE      # time and memory of `stpm score` on 12 megapixels
    python -m benchmarks.large_images table

A size is that to which images are resized, or `own`; `half` has half the steps, `own-160` crops of 160 pixels.
`PatchCore-512` and `Stfpm-512` are anomalib's at that size, the latter with tiles of 256 that overlap by half. Each fit
is a process of its own, by anomalib's Engine, alone on the machine; rows are written as they come to
`results/large_images.json`, and what has a row is not run again. Maps are compared with masks at the masks' size.
Recipes are the plugin's; at their own size `configs/native.yaml`'s, but for the hold-out, which is the others'.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric
from anomalib.models import AnomalibModule, Patchcore, Stfpm
from lightning import seed_everything
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment, keep, markdown, rows, spread
from benchmarks.questions import SizedAUPRO, thirds
from benchmarks.training_speed import BACKBONES, use_hub
from stpm_plugin import STPM, DemoData
from stpm_plugin.demo.demo_data import scene

RESULTS = Path(__file__).parent / "results/large_images.json"
DRAWN = {"train_images": 80, "test_images": 16, "image_side": 2048, "defect_pixels": (6, 40)}
OWN: dict[str, Any] = {"image_size": None, "batch_size": 1}
HALF = {"epochs": 4, "steps": (300, 700)}
RIVALS = ("PatchCore", "Stfpm")
IMAGES, SIZE = 6, (4000, 3000)  # of `score`: their number, width and height
MEASURED = (  # runs a command, and prints the most memory that it took, KiB
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)
EXTENTS = (0, 10, 16, 25, 60)  # pixels, between which drawn defects are counted together


def main() -> None:
    """Run what has no row, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["run", "one", "score", "table"])
    parser.add_argument("data", nargs="*", help="folders in MVTec AD's layout, or drawn")
    parser.add_argument("--teacher", default="lite0", help="weights of the backbone: a file, or lite0")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet18")
    parser.add_argument("--sizes", nargs="+", default=["256", "own"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("datasets/large"), help="where images are drawn")
    args = parser.parse_args()
    if args.task == "one":
        print(json.dumps(fit(args.data[0], args.sizes[0], args)))
        return
    if args.task == "run":
        for data in args.data:
            for size in args.sizes:
                run(f"{args.backbone}, {Path(data).name}, {size}, {args.seed}", data, size, args)
    elif args.task == "score":
        with tempfile.TemporaryDirectory() as folder:
            for key, row in scoring(args, Path(folder)):
                save(key, row)
    RESULTS.with_suffix(".md").write_text(text := table(rows(RESULTS)))
    draw(rows(RESULTS))
    print(text)


def save(key: str, row: dict[str, Any]) -> None:
    """Keep a row, and print it."""
    keep(RESULTS, key, row | environment("python -m benchmarks.large_images"))
    print(key, row, flush=True)


def run(key: str, data: str, size: str, args: argparse.Namespace) -> None:
    """Fit and score in a process of its own, unless there is a row."""
    if key in rows(RESULTS):
        return
    given = ["--teacher", args.teacher, "--backbone", args.backbone, "--work", str(args.work), "--seed", str(args.seed)]
    command = [sys.executable, "-m", "benchmarks.large_images", "one", data, "--sizes", size, *given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    save(key, json.loads(done.stdout.splitlines()[-1]))


def data_of(name: str, work: Path) -> AnomalibDataModule:
    """A category's images, at hand."""
    options: dict[str, Any] = {"num_workers": 1, "val_split_mode": "none", "eval_batch_size": 1}
    if name == "drawn":
        made: AnomalibDataModule = DemoData(root=work, **DRAWN, **options)
    else:
        made = MVTecAD(root=Path(name).resolve().parent, category=Path(name).name, **options)
    made.prepare_data()
    made.setup()
    return made


def fit(name: str, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fit once, and score the test images."""
    if size.startswith(RIVALS):  # which do not fit without a validation set
        data = MVTecAD(root=Path(name).resolve().parent, category=Path(name).name, num_workers=1)
    else:
        data = data_of(name, args.work)
    with tempfile.TemporaryDirectory() as folder:
        model, options = prepared(size, args, Path(folder))
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 1}
        engine = Engine(default_root_dir=folder, **quiet, **options)
        begin = time.perf_counter()
        engine.fit(model, datamodule=data)
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"seconds": round(seconds, 1), "GiB": round(peak, 2), "steps": engine.trainer.global_step}
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    times: list[float] = []
    with torch.inference_mode():
        masks = data_of(name, args.work)  # of its own: a model's datamodule resizes masks too
        row |= judged(masks, scored(model, data, times), [] if name == "drawn" else thirds(Path(name)))
    return row | {"seconds_an_image": round(float(np.median(times)), 3)}


def prepared(size: str, args: argparse.Namespace, folder: Path) -> tuple[AnomalibModule, dict[str, Any]]:
    """Return a model and its Engine's options."""
    kind, _, number = size.partition("-")
    if kind in RIVALS:
        use_hub(Path(args.teacher), folder)
        seed_everything(args.seed)
        side = (int(number), int(number))
        if kind == "PatchCore":
            resized = Patchcore.configure_pre_processor(side)
            return Patchcore(backbone="resnet18", coreset_sampling_ratio=0.01, pre_processor=resized), {}
        tiles = TilerConfigurationCallback(enable=True, tile_size=256, stride=128)
        model = Stfpm(backbone="resnet18", pre_processor=Stfpm.configure_pre_processor(side))
        return model, {"callbacks": [tiles], "max_epochs": 100}
    settings: dict[str, Any] = {"own": OWN, "half": OWN | HALF}.get(kind) or {"image_size": (int(size), int(size))}
    cropped = {"crop_size": int(number)} if number else {}
    model = STPM(backbone=BACKBONES[args.backbone], teacher_weights=args.teacher, seed=args.seed, **settings, **cropped)
    return model, {}


def scored(model: AnomalibModule, data: AnomalibDataModule, times: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image score (1,) and map (1, 1, H, W) of each test image; the seconds go to ``times``."""
    for item in data.test_data:
        begin = time.perf_counter()
        found = model.model(model.pre_processor.transform(item.image[None].to(model.device)))
        score, anomaly_map = found.pred_score.reshape(1).cpu(), found.anomaly_map.cpu()
        times.append(time.perf_counter() - begin)
        most = 2 if isinstance(model, STPM) else 1000  # beyond all: metrics want numbers from 0 to 1
        yield score / most, anomaly_map / most


def judged(data: AnomalibDataModule, made: Iterable[tuple[Tensor, Tensor]], cuts: list[float]) -> dict[str, Any]:
    """Image AUROC; of drawn defects their extents and scores; PRO, also of the smallest third, of the others."""
    metrics: dict[str, AnomalibMetric] = {"image_AUROC": AUROC(fields=["pred_score", "gt_label"])}
    if cuts:
        fields = {"fields": ["anomaly_map", "gt_mask"]}
        metrics |= {"pixel_AUPRO": AUPRO(**fields), "small_AUPRO": SizedAUPRO(**fields, high=cuts[0])}
    size: torch.Size | None = None
    scores: list[tuple[int, float]] = []  # extent of the defect, pixels, 0 of a good image; and its image score
    for item, (score, anomaly_map) in zip(data.test_data, made, strict=True):
        where = item.gt_mask.squeeze().nonzero() if item.gt_mask is not None else torch.empty(0, 2)
        extent = int((where.amax(0) - where.amin(0)).max()) + 1 if len(where) else 0
        scores.append((extent, round(float(score), 7)))
        labelled = SimpleNamespace(pred_score=score, gt_label=item.gt_label.reshape(1))
        metrics["image_AUROC"].update(labelled)
        if cuts:
            size = size or item.gt_mask.shape[-2:]  # the first one's: metrics take one
            mask = F.interpolate(item.gt_mask.reshape(1, 1, *item.gt_mask.shape[-2:]).float(), size)[:, 0] > 0
            resized = F.interpolate(anomaly_map, size, mode="bilinear")[:, 0]
            for name in ("pixel_AUPRO", "small_AUPRO"):
                metrics[name].update(Pixels(image=None, anomaly_map=resized, gt_mask=mask))
    row = {name: round(float(metric.compute()), 4) for name, metric in metrics.items()}
    return row | ({} if cuts else {"scores": scores})


def scoring(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time `stpm score` on images of 12 megapixels; the weights do not matter, so they are of a few steps."""
    (folder / "images").mkdir()
    for seed in range(IMAGES):
        pixels = scene(np.random.default_rng(seed))[0]
        Image.fromarray(pixels).resize(SIZE).save(folder / f"images/{seed}.png", compress_level=1)
    data = DemoData(root=folder, train_images=12, test_images=1, num_workers=0)
    model = STPM(backbone=BACKBONES[args.backbone], teacher_weights=args.teacher, seed=0, **OWN | {"steps": (4, 4)})
    Engine(default_root_dir=folder, logger=False, enable_progress_bar=False).fit(model, datamodule=data)
    exported = {"float32": model.to_openvino(folder)}
    exported["INT8"] = model.to_openvino(folder, compression_type="int8_ptq", datamodule=data)
    exported["bfloat16"] = exported["float32"]
    for name, file in exported.items():
        precision = "bf16" if name == "bfloat16" else "f32"
        options = ["--csv", str(folder / f"{name}.csv"), "--precision", precision, "--hint", "latency"]
        command = ["stpm", "score", str(file), str(folder / "images"), *options]
        measured = [sys.executable, "-c", MEASURED, *command]
        done = subprocess.run(measured, check=True, stdout=subprocess.PIPE, text=True)
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as table:
            times = [float(row["latency_ms"]) / 1000 for row in csv.DictReader(table)]
        mean, deviation = round(statistics.mean(times), 2), round(statistics.stdev(times), 2)
        row = {"GiB": round(int(done.stdout.split()[-1]) / 2**20, 2), "seconds_an_image": mean, "deviation": deviation}
        yield f"{args.backbone}, 12 megapixels, {name}", row | {"n": len(times)}


class Pixels(SimpleNamespace):
    """Maps and masks as a metric reads them."""


def by_extent(scores: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """Image AUROC of drawn defects of each range of extents, against all good images; and how many there are."""
    good = [score for extent, score in scores if not extent]
    made = []
    for low, high in itertools.pairwise(EXTENTS):
        bad = [score for extent, score in scores if low < extent <= high]
        wins = [(one > other) + (one == other) / 2 for one in bad for other in good]
        made.append((float(np.mean(wins)) if wins else math.nan, len(bad)))
    return made


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Markdown; a line for all seeds of a run."""
    ranges = [f"{low + 1} to {high} px" for low, high in itertools.pairwise(EXTENTS)]
    head = ["run", "n", "image AUROC", "PRO", "PRO, smallest third", "fit, s", "GiB", "s an image", *ranges]
    names = ("image_AUROC", "pixel_AUPRO", "small_AUPRO", "seconds", "GiB", "seconds_an_image")
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, row in kept.items():
        runs.setdefault(re.sub(r", \d+(?=$|, GPU)", "", key), []).append(row)
    lines = [head]
    for run, found in sorted(runs.items()):
        cells = [run, str(found[0].get("n", len(found)))]
        cells += [spread([row.get(name) for row in found], 4 if "AU" in name else 2) for name in names]
        measured = by_extent(found[0]["scores"]) if "scores" in found[0] else []
        cells += [f"{area:.3f} ({count})" for area, count in measured] or [""] * len(ranges)
        lines.append(cells)
    return markdown(lines) + "\n"


def draw(kept: dict[str, dict[str, Any]]) -> None:
    """Draw how many drawn defects of each extent are told from good images."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    ticks = [f"{low + 1} to {high}" for low, high in itertools.pairwise(EXTENTS)]
    for key, row in kept.items():
        if "scores" in row:
            axis.plot(ticks, [area for area, _ in by_extent(row["scores"])], "o-", label=key)
    axis.set(xlabel="extent of the defect, pixels of 2048", ylabel="image AUROC", ylim=(0.5, 1.02))
    axis.axhline(0.5, color="#999999", linewidth=1)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
