"""Accuracy of STPM and others on whole categories: official split, anomalib's metrics, several seeds.

    python -m benchmarks.accuracy run DIR/screw DIR/bottle --teacher FILE --seeds 0 1 2   # folders in MVTec AD's layout
    python -m benchmarks.accuracy run DIR/* --teacher FILE --ray ADDRESS                  # over a Ray cluster
    python -m benchmarks.accuracy table                                                   # from what is kept

Each run is the real `anomalib train` in a fresh process. Rows are written as they come to `results/accuracy.json`, and
a run that has one is not repeated. All models get the same weights of torchvision's ResNet-18, but for the light one,
which brings its own. Rows without times are of models that were trained side by side through the Engine, by a script
that each row names and that is in the history up to commit f4b4dd4.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.environment import (
    METRICS,
    RESULTS,
    Row,
    environment,
    grouped,
    keep,
    markdown,
    missing,
    parser,
    rows,
    spread,
)
from benchmarks.training_speed import OTHERS, train

LITE0 = {"backbone": "tf_efficientnet_lite0.in1k", "teacher_weights": "lite0"}
MODELS = ("STPM", "STPM, lite0", "STPM, paper", *OTHERS)
PASSES = dict.fromkeys(OTHERS, 1) | {"anomalib Stfpm": 100, "anomalib CFA": 30}
PASSES |= dict.fromkeys(["anomalib ReverseDistillation", "anomalib FastFlow"], 200)
SIX = ("screw", "bottle", "kolektor_sdd", "grid", "transistor", "toothbrush")
LIGHT = {  # variants of `inference_speed.py light`: rows here, and their labels in the figure
    "lite0": ("STPM, lite0", "this plugin, Lite0"),
    "resnet18": ("STPM", "this plugin, ResNet-18"),
    "padim": ("anomalib PaDiM", "PaDiM"),
    "patchcore": ("anomalib PatchCore", "PatchCore"),
}
ALL = METRICS | {"image_F1Score": "image F1", "pixel_AUPR": "pixel AP"}
TIMES = {"fit_seconds": ("fit, s", 0), "milliseconds_an_image": ("test, ms an image", 1)}  # titles and digits
TIMES |= {"peak_memory_gib": ("peak, GiB", 2)}  # all are missing where other runs shared the machine
Groups = dict[tuple[Any, ...], list[Row]]  # by category and name


def main() -> None:
    """Run what is missing, or tabulate."""
    options = parser(__doc__, ["run", "table"], "categories", "--teacher")
    options.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--passes", type=int, help="of every model; by default each model's own")
    options.add_argument("--ray", metavar="ADDRESS", help="spread the runs over a Ray cluster")
    args = options.parse_args()
    file = args.results / "accuracy.json"
    if args.part == "run":
        wanted = dict(missing(file, jobs(args)))
        here = ((key, run(job, args)) for key, job in wanted.items())
        for key, row in spread_out(wanted, args) if args.ray else here:
            keep(file, key, row)
    table(rows(file), file)


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the name and the settings of each run; a seed's models follow each other."""
    for category, seed, model in itertools.product(args.categories, args.seeds, args.models):
        passes = args.passes or PASSES.get(model)
        name = f"{model}, {passes} passes" if passes and passes > 1 else model
        job = {"model": model, "name": name, "root": str(category.absolute().parent), "category": category.name}
        job |= {"epochs": passes, "seed": seed, "arguments": LITE0 if model == "STPM, lite0" else {}}
        yield f"{name}, {category.name}, seed {seed}", job


def run(job: Row, args: argparse.Namespace) -> Row:
    """Train and test once."""
    with tempfile.TemporaryDirectory() as folder:
        row = train(job, args.teacher.resolve(), Path(folder))
    kept = {name: value for name, value in job.items() if name != "root"}  # a path of this machine
    return kept | row | environment("python -m benchmarks.accuracy")


def spread_out(wanted: dict[str, Row], args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Run on a Ray cluster, one run a node at a time; a lost node's runs start again elsewhere."""
    import ray

    ray.init(args.ray, ignore_reinit_error=True)
    remote = ray.remote(run).options(num_cpus=2, max_retries=3, scheduling_strategy="SPREAD")
    waiting = {remote.remote(job, args): key for key, job in wanted.items()}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)


def table(kept: dict[str, Row], file: Path) -> None:
    """Write Markdown and a figure of what is kept beside its file."""
    groups = grouped((row | row["metrics"] for row in kept.values()), "category", "name")
    columns = {metric: (title, 4) for metric, title in ALL.items()} | TIMES
    lines = [["category", "model", "n", *(title for title, _ in columns.values())]]
    for (category, name), found in sorted(groups.items()):
        cells = [spread([row.get(column) for row in found], digits) for column, (_, digits) in columns.items()]
        lines.append([category, name, str(len(found)), *cells])
    text = f"{markdown(lines)}\n\n{markdown(six(groups))}"
    text += "\n\nPatchCore with a coreset of 1 %. No times where other runs were beside."
    text += "".join(dict.fromkeys(f" {row['name']}: {row['note']}." for row in kept.values() if "note" in row))
    file.with_suffix(".md").write_text(text + "\n")
    print(text)
    variants = rows(RESULTS / "inference_speed.json").get("light", {}).get("variants", {})
    if "padim" in variants and all((category, name) in groups for category in SIX for name, _ in LIGHT.values()):
        over_latency(groups, variants).savefig(file.with_name("accuracy_latency.png"), dpi=110)


def six(groups: Groups) -> list[list[str]]:
    """Each model that has all of `SIX`: mean over them of the means over the seeds, and the lowest of those means."""
    lines = [["six categories: mean (lowest)", "seeds", *ALL.values()]]
    for name in sorted({name for _, name in groups}):
        found = [groups[category, name] for category in SIX if (category, name) in groups]
        if len(found) == len(SIX):
            means = [[mean(row[metric] for row in rows if metric in row) for rows in found] for metric in ALL]
            seeds = sorted({len(rows) for rows in found})
            cells = [f"{mean(values):.4f} ({min(values):.3f})" for values in means]
            lines.append([name, " to ".join(map(str, seeds[:: max(1, len(seeds) - 1)])), *cells])
    return lines


def over_latency(groups: Groups, variants: dict[str, Row]) -> plt.Figure:
    """Mean image AUROC and PRO of the six categories over the milliseconds of one image in OpenVINO."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, metric in zip(axes, ("image_AUROC", "pixel_AUPRO"), strict=True):
        for number, (key, (name, label)) in enumerate(LIGHT.items()):
            value = mean(mean(row[metric] for row in groups[category, name]) for category in SIX)
            milliseconds = variants.get(f"{key}, float32", variants.get(key))["p50_ms"]
            axis.plot(milliseconds, value, "o", color=f"C{number}", markersize=9)
            above = 8 if name != "anomalib PatchCore" else -16  # whose point is just below another
            where = {"xytext": (0, above), "textcoords": "offset points", "ha": "center"}
            axis.annotate(label, (milliseconds, value), size=9, **where)
            if rounded := variants.get(f"{key}, INT8"):
                axis.plot([rounded["p50_ms"], milliseconds], [value, value], ":", color=f"C{number}")
                axis.plot(rounded["p50_ms"], value, "o", color=f"C{number}", markersize=9, fillstyle="none")
        axis.set(title=f"{METRICS[metric]}, mean of six categories", xlabel="ms per image, OpenVINO, two cores")
        axis.margins(0.35, 0.25)
        axis.set_xlim(left=0)
    return figure


if __name__ == "__main__":
    main()
