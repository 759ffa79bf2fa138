"""Accuracy of STPM and others on whole categories: official split, anomalib's metrics, several seeds.

    python -m benchmarks.accuracy run DIR/screw DIR/bottle --teacher FILE --seeds 0 1 2   # folders in MVTec AD's layout
    python -m benchmarks.accuracy run DIR/* --teacher FILE --ray ADDRESS                  # over a Ray cluster
    python -m benchmarks.accuracy table                                                   # from what is kept

Each run is the real `anomalib train` in a fresh process. Rows are written as they come to `results/accuracy.json`, and
a run that has one is not repeated. All models get the same weights of torchvision's ResNet-18, but for the light one,
which brings its own. anomalib's Stfpm is given as many passes as `--stfpm-passes` says, since its hundred take hours.
Rows without times are of models that were trained side by side through the Engine, by a script that each row names and
that is in the history up to commit f4b4dd4.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.progress import Progress

from benchmarks.environment import environment, keep, markdown, rows, spread
from benchmarks.training_speed import OTHERS, train

RESULTS = Path(__file__).parent / "results"
LITE0 = {"backbone": "tf_efficientnet_lite0.in1k", "teacher_weights": "lite0"}
MODELS = ("STPM", "STPM, lite0", "STPM, paper", *OTHERS)
SIX = ("screw", "bottle", "kolektor_sdd", "grid", "transistor", "toothbrush")
LIGHT = {  # variants of `inference_speed.py light`: rows here, and their labels in the figure
    "lite0": ("STPM, lite0", "this plugin, Lite0"),
    "resnet18": ("STPM", "this plugin, ResNet-18"),
    "padim": ("anomalib PaDiM", "PaDiM"),
    "patchcore": ("anomalib PatchCore", "PatchCore"),
}
METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "PRO",
    "image_F1Score": "image F1",
    "pixel_AUPR": "pixel AP",
}


def main() -> None:
    """Run what is missing, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("categories", nargs="*", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stfpm-passes", type=int, default=100)
    parser.add_argument("--passes", type=int, help="of every model, for a trial; by default each model's own")
    parser.add_argument("--ray", metavar="ADDRESS", help="spread the runs over a Ray cluster")
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the trained models in")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is kept")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "accuracy.json"
    if args.part == "run":
        wanted = {key: job for key, job in jobs(args) if key not in rows(file)}
        with Progress() as progress:
            task = progress.add_task("runs", total=len(wanted))
            for key, row in spread_out(wanted, args) if args.ray else one_by_one(wanted, args):
                keep(file, key, row)
                progress.update(task, advance=1, description=key)
                progress.console.print(key, json.dumps(row["metrics"]))
    table(rows(file), file)


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the settings of each run; a seed's models follow each other."""
    for category in args.categories:
        for seed in args.seeds:
            for model in args.models:
                own = {"anomalib Stfpm": args.stfpm_passes, "anomalib PaDiM": 1, "anomalib PatchCore": 1}
                passes = args.passes or own.get(model)
                name = f"{model}, {passes} passes" if model == "anomalib Stfpm" else model
                yield (
                    f"{name}, {category.name}, seed {seed}",
                    {
                        "model": model,
                        "name": name,
                        "root": str(category.absolute().parent),
                        "category": category.name,
                        "epochs": passes,
                        "seed": seed,
                        "arguments": LITE0 if model == "STPM, lite0" else {},
                    },
                )


def run(job: dict[str, Any], teacher: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train and test once, and keep the checkpoint if it is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        row = train(job, teacher, Path(folder))
        if checkpoint:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            next(Path(folder, "run").rglob("model.ckpt")).replace(checkpoint)
    kept = {name: value for name, value in job.items() if name != "root"}  # a path of this machine
    return {**kept, **row, **environment("python -m benchmarks.accuracy")}


def one_by_one(wanted: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run here, one after the other."""
    for key, job in wanted.items():
        kept = args.checkpoints
        yield key, run(job, args.teacher.resolve(), kept and kept / f"{key.replace(', ', '-').replace(' ', '-')}.ckpt")


def spread_out(wanted: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run on a Ray cluster, one run a node at a time; a lost node's runs start again elsewhere."""
    import ray

    ray.init(args.ray, ignore_reinit_error=True)
    remote = ray.remote(run).options(num_cpus=2, max_retries=3, scheduling_strategy="SPREAD")
    waiting = {remote.remote(job, args.teacher.resolve()): key for key, job in wanted.items()}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)


def table(kept: dict[str, dict[str, Any]], file: Path) -> None:
    """Write Markdown, CSV and two figures of what is kept beside its file."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in kept.values():
        groups[row["category"], row["name"]].append(row)
    columns = ["category", "model", "n", *METRICS.values(), "fit, s", "test, ms an image", "peak, GiB"]
    lines = []
    for (category, name), found in sorted(groups.items()):
        values = [[row["metrics"].get(metric) for row in found] for metric in METRICS]
        times = ("fit_seconds", "milliseconds_an_image", "peak_memory_gib")  # nothing where other runs were beside
        values += [[row.get(key) for row in found] for key in times]
        digits = [4] * len(METRICS) + [0, 1, 2]
        cells = [spread(one, count) for one, count in zip(values, digits, strict=True)]
        lines.append([category, name, str(len(found)), *cells])
    with file.with_suffix(".csv").open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([columns, *lines])
    text = "\n\n".join(markdown(one) for one in ([columns, *lines], six(groups)))
    text += "\n\nPatchCore with a coreset of 1 %. No times where other runs were beside."
    text += "".join(dict.fromkeys(f" {row['name']}: {row['note']}." for row in kept.values() if "note" in row))
    file.with_suffix(".md").write_text(text + "\n")
    print(text)
    if groups:
        draw(groups).savefig(file.with_suffix(".png"), dpi=100)
    speeds = RESULTS / "inference_speed.json"
    variants = json.loads(speeds.read_text()).get("light", {}).get("variants", {}) if speeds.exists() else {}
    if "padim" in variants and all((category, name) in groups for category in SIX for name, _ in LIGHT.values()):
        over_latency(groups, variants).savefig(file.with_name("accuracy_latency.png"), dpi=110)


def six(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[list[str]]:
    """Each model that has all of `SIX`: mean over them of the means over the seeds, and the lowest of those means."""
    lines = [["six categories: mean (lowest)", "seeds", *METRICS.values()]]
    for name in sorted({name for _, name in groups}):
        found = [groups[category, name] for category in SIX if (category, name) in groups]
        if len(found) == len(SIX):
            means = [[mean(row["metrics"][metric] for row in rows) for rows in found] for metric in METRICS]
            seeds = sorted({len(rows) for rows in found})
            cells = [f"{mean(values):.4f} ({min(values):.3f})" for values in means]
            lines.append([name, " to ".join(map(str, seeds[:: max(1, len(seeds) - 1)])), *cells])
    return lines


def over_latency(groups: dict[tuple[str, str], list[dict[str, Any]]], variants: dict[str, Any]) -> Any:
    """Mean image AUROC and PRO of the six categories over the milliseconds of one image in OpenVINO."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, metric in zip(axes, ("image_AUROC", "pixel_AUPRO"), strict=True):
        for number, (key, (name, label)) in enumerate(LIGHT.items()):
            value = mean(mean(row["metrics"][metric] for row in groups[category, name]) for category in SIX)
            milliseconds = variants.get(f"{key}, float32", variants.get(key))["p50_ms"]
            axis.plot(milliseconds, value, "o", color=f"C{number}", markersize=9)
            above = 8 if name != "anomalib PatchCore" else -16  # whose point is just below another
            axis.annotate(
                label, (milliseconds, value), xytext=(0, above), textcoords="offset points", ha="center", size=9
            )
            if rounded := variants.get(f"{key}, INT8"):
                axis.plot([rounded["p50_ms"], milliseconds], [value, value], ":", color=f"C{number}")
                axis.plot(rounded["p50_ms"], value, "o", color=f"C{number}", markersize=9, fillstyle="none")
        axis.set(title=f"{METRICS[metric]}, mean of six categories", xlabel="ms per image, OpenVINO, two cores")
        axis.margins(0.35, 0.25)
        axis.set_xlim(left=0)
    return figure


def draw(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> Any:
    """Bars of three metrics with deviations, and image AUROC over fit time."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    categories, names = sorted({c for c, _ in groups}), sorted({n for _, n in groups})
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.4), layout="constrained")
    for axis, metric in zip(axes, ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"), strict=False):
        for place, name in enumerate(names):
            for at, category in enumerate(categories):
                values = [row["metrics"][metric] for row in groups.get((category, name), [])]
                if values:
                    error = stdev(values) if len(values) > 1 else 0
                    where, colour = at + 0.8 * (place + 0.5) / len(names) - 0.4, f"C{place}"
                    axis.bar(where, mean(values), 0.7 / len(names), yerr=error, color=colour)
        axis.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
        axis.set(title=METRICS[metric], ylim=(0.3, 1.0))
    handles = [Patch(color=f"C{place}", label=name) for place, name in enumerate(names)]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=5)
    for place, name in enumerate(names):
        found = [groups[category, name] for category in categories if (category, name) in groups]
        for one in found:
            seconds = [row["fit_seconds"] for row in one if row.get("fit_seconds") is not None]
            if seconds:
                axes[3].plot(mean(seconds), mean(row["metrics"]["image_AUROC"] for row in one), "o", color=f"C{place}")
    axes[3].set(xscale="log", xlabel="seconds to fit", title="image AUROC over time")
    axes[3].minorticks_off()
    axes[3].set_xticks(marks := [50, 100, 200, 500, 1000], map(str, marks))
    return figure


if __name__ == "__main__":
    main()
