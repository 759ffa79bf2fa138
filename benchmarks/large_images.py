"""Small defects on large images: resized, and at their own size; how well, how long, and in how much memory.

    python -m benchmarks.large_images run drawn --teacher FILE --sizes 256 512 own     # draws 2048 x 2048 pixels
    python -m benchmarks.large_images run DIR/grid DIR/bottle --teacher FILE --sizes 256 own
    python -m benchmarks.large_images table

A size is that to which images are resized, or `own`; `own-160` has crops of 160 pixels. Each fit is a process of its
own, by anomalib's Engine, with nothing else on the machine; rows are written as they come to
`results/large_images.json`, and what has a row is not run again. Maps are compared with masks at the masks' size.
Recipes are the plugin's; at their own size `configs/native.yaml`'s, but for the hold-out, which is the others'. Rows of
12 megapixels, of half the steps, and of anomalib's PatchCore and Stfpm are by the command as of commit 951a4ce.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu
from torch.nn import functional as F

from benchmarks.environment import Row, environment, fit, grouped, keep, markdown, missing, parser, rows, spread
from benchmarks.questions import SizedAUPRO, thirds
from benchmarks.training_speed import BACKBONES
from stpm_plugin import STPM, DemoData

DRAWN = {"train_images": 80, "test_images": 16, "image_side": 2048, "defect_pixels": (6, 40)}
EXTENTS = list(itertools.pairwise((0, 10, 16, 25, 60)))  # pixels: drawn defects of a range are counted together


def main() -> None:
    """Run what has no row, or tabulate."""
    options = parser(__doc__, ["run", "table"], "--seed")
    options.add_argument("data", nargs="*", help="folders in MVTec AD's layout, or drawn")
    options.add_argument("--teacher", default="lite0", help="weights of the backbone: a file, or lite0")
    options.add_argument("--backbone", choices=BACKBONES, default="resnet18")
    options.add_argument("--sizes", nargs="+", default=["256", "own"])
    options.add_argument("--work", type=Path, default=Path("datasets/large"), help="where images are drawn")
    args = options.parse_args()
    file, here = args.results / "large_images.json", environment("python -m benchmarks.large_images")
    if args.part == "run":
        pairs = itertools.product(args.data, args.sizes)
        wanted = ((f"{args.backbone}, {Path(pair[0]).name}, {pair[1]}, {args.seed}", pair) for pair in pairs)
        for key, pair in missing(file, wanted):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                keep(file, key, alone.submit(measured, *pair, args).result() | here)
    kept = rows(file)
    file.with_suffix(".md").write_text(text := table(kept))
    draw(kept).savefig(file.with_suffix(".png"), dpi=120)
    print(text)


def data_of(name: str, work: Path) -> AnomalibDataModule:
    """A category's datamodule, set up."""
    options: dict[str, Any] = {"num_workers": 1, "val_split_mode": "none", "eval_batch_size": 1}
    if name == "drawn":
        made: AnomalibDataModule = DemoData(root=work, **DRAWN, **options)
    else:
        made = MVTecAD(root=Path(name).resolve().parent, category=Path(name).name, **options)
    made.prepare_data()
    made.setup()
    return made


def settings_of(size: str) -> Row:
    """The model's arguments for a size."""
    kind, _, crop = size.partition("-")
    native: Row = {"image_size": None, "batch_size": 1, "epochs": 4, "steps": (300, 1400)}
    made: Row = native if kind == "own" else {"image_size": (int(size), int(size))}
    return made | ({"crop_size": int(crop)} if crop else {})


def measured(name: str, size: str, args: argparse.Namespace) -> Row:
    """Fit once, and score the test images."""
    data, backbone = data_of(name, args.work), BACKBONES[args.backbone]
    model = STPM(backbone=backbone, teacher_weights=args.teacher, seed=args.seed, **settings_of(size))
    with tempfile.TemporaryDirectory() as folder:
        engine, seconds = fit(model, data, folder, limit_val_batches=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"seconds": round(seconds, 1), "GiB": round(peak, 2), "steps": engine.trainer.global_step}
    metrics: dict[str, AnomalibMetric] = {"image_AUROC": AUROC(fields=["pred_score", "gt_label"])}
    if name != "drawn":
        fields = {"fields": ["anomaly_map", "gt_mask"]}
        metrics |= {"pixel_AUPRO": AUPRO(**fields), "small_AUPRO": SizedAUPRO(**fields, high=thirds(Path(name))[0])}
    truth = data_of(name, args.work).test_data  # of its own: a model's datamodule resizes masks too
    shape = truth[0].gt_mask.shape[-2:]  # metrics take one
    times: list[float] = []
    scores: list[tuple[int, float]] = []  # extent of the defect, pixels, 0 of a good image; and its image score
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    for image, item in zip(data.test_data, truth, strict=True):
        begin = time.perf_counter()
        with torch.inference_mode():
            found = model.model(model.pre_processor.transform(image.image[None].to(model.device)))
        score, anomaly_map = found.pred_score.reshape(1).cpu() / 2, found.anomaly_map.cpu() / 2  # metrics want [0, 1]
        times.append(time.perf_counter() - begin)
        where = item.gt_mask.squeeze().nonzero()
        extent = int((where.amax(0) - where.amin(0)).max()) + 1 if len(where) else 0
        scores.append((extent, round(float(score), 7)))
        mask = F.interpolate(item.gt_mask.reshape(1, 1, *item.gt_mask.shape[-2:]).float(), shape)[:, 0] > 0
        resized = F.interpolate(anomaly_map, shape, mode="bilinear")[:, 0]
        seen = {"anomaly_map": resized, "gt_mask": mask, "pred_score": score, "gt_label": item.gt_label.reshape(1)}
        for metric in metrics.values():
            metric.update(SimpleNamespace(image=None, **seen))
    row |= {name: round(float(metric.compute()), 4) for name, metric in metrics.items()}
    row |= {"scores": scores} if name == "drawn" else {}
    return row | {"seconds_an_image": round(float(np.median(times)), 3)}


def by_extent(scores: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """Image AUROC of drawn defects of each range of extents, against all good images; and how many there are."""
    good = [score for extent, score in scores if not extent]
    ranges = [[score for extent, score in scores if low < extent <= high] for low, high in EXTENTS]
    areas = [mannwhitneyu(bad, good).statistic / len(bad) / len(good) if bad else math.nan for bad in ranges]
    return [*zip(areas, map(len, ranges), strict=True)]


def table(kept: dict[str, Row]) -> str:
    """Markdown; a line for all seeds of a run."""
    columns = {"image_AUROC": "image AUROC", "pixel_AUPRO": "PRO", "small_AUPRO": "PRO, smallest third"}
    columns |= {"seconds": "fit, s", "GiB": "GiB", "seconds_an_image": "s an image"}
    lines = [["run", "n", *columns.values(), *(f"{low + 1} to {high} px" for low, high in EXTENTS)]]
    named = (row | {"run": re.sub(r", \d+(?=$|, GPU)", "", key)} for key, row in kept.items())
    for (run,), found in sorted(grouped(named, "run").items()):
        cells = [spread([row.get(name) for row in found], 4 if "AU" in name else 2) for name in columns]
        areas = by_extent(found[0]["scores"]) if "scores" in found[0] else []
        extents = [f"{area:.3f} ({count})" for area, count in areas] or [""] * len(EXTENTS)
        lines.append([run, str(found[0].get("n", len(found))), *cells, *extents])
    return markdown(lines) + "\n"


def draw(kept: dict[str, Row]) -> Figure:
    """Draw how many drawn defects of each extent are told from good images."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    ticks = [f"{low + 1} to {high}" for low, high in EXTENTS]
    for key, row in kept.items():
        if "scores" in row and " " not in (size := key.split(", ")[2]):  # the others are of former recipes
            label = f"resized to {size} x {size}" if size.isdigit() else size.replace("own", "own size")
            axis.plot(ticks, [area for area, _ in by_extent(row["scores"])], "o-", label=label)
    axis.set(xlabel="extent of the defect, pixels of 2048", ylabel="image AUROC", ylim=(0.5, 1.02))
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
