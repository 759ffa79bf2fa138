"""The table and the figures of `questions.py`, from its rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.questions import EDGES, GROUPS, LAYERS, SUBSETS, TEACHERS, THIRDS

Row = dict[str, Any]
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "PRO"}
COLOURS = ["#0072b2", "#009e73", "#e69f00", "#d55e00"]  # Okabe and Ito's, told apart by all eyes


def draw(kept: dict[str, Row], results: Path) -> None:
    """Write ``questions.md`` and a figure for each question that has rows."""
    mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    table(kept, results / "questions.md")
    whole, plain = trained(kept)
    for name, figure, found in [
        ("match", match, [row for row in kept.values() if row.get("distances")]),
        ("scales", scales, [r for r in plain if r["share"] == 100 and r["seed"] == 0]),
        ("teachers", teachers, [r for r in whole if len(r["layers"]) == len(LAYERS) and r["share"] == 100]),
        ("fewshot", fewshot, few_series(plain)),
        ("throughput", throughput, [row for row in kept.values() if "milliseconds" in row]),
    ]:
        if found:
            figure(found).savefig(results / f"questions_{name}.png", dpi=110)
            plt.close("all")


def trained(kept: dict[str, Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of whole runs, and of those the ones with ImageNet's teacher, or without any the built-in one."""
    whole = [row for row in kept.values() if row.get("metrics") and not row.get("distances")]
    usual = "imagenet" if any(row["teacher"] == "imagenet" for row in whole) else "cifar10"
    return whole, [row for row in whole if row["teacher"] == usual]


def table(kept: dict[str, Row], file: Path) -> None:
    """Write a line for each row, with what was run and what came out."""
    lines = [
        "| run | " + " | ".join(METRICS.values()) + " | " + " | ".join(f"PRO, {third}" for third in THIRDS) + " | s |",
        "|---" * 8 + "|",
    ]
    for key, row in sorted(kept.items()):
        names = [*METRICS, *(f"{third}_SizedAUPRO" for third in THIRDS)]
        if row.get("metrics"):
            cells = [f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "" for name in names]
            lines.append(f"| {key} | " + " | ".join(cells) + f" | {row['seconds']} |")
        elif "why" in row:
            lines.append(f"| {key} | {row['why']} |" + " |" * 6)
    teachers = {row["teacher"]: row["teacher_accuracy"] for row in kept.values() if row.get("teacher_accuracy")}
    if teachers:
        lines += ["", "| teacher | its own test images classified right |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |" for name, share in teachers.items()]
    lines += few_table(few_series(trained(kept)[1]))
    for row in kept.values():
        if "milliseconds" in row:
            lines += ["", "| one forward pass, pixels | ms | ns a pixel |", "|---|---|---|"]
            for size, times in row["milliseconds"].items():
                each = mean(times) * 1e6 / int(size) ** 2
                lines.append(f"| {size} x {size} | {spread(times)} | {each:.0f} |")
        for look in row.get("looks", [])[-1:]:
            lines += ["", f"Levels after {look['passes']} passes, {row['model']}, {row['category']}:", ""]
            lines += ["| level | " + " | ".join(f"median, {g}" for g in GROUPS) + " | AUROC of pixels |"]
            lines += ["|---" * (len(GROUPS) + 2) + "|"]
            for level, name in enumerate([*row["layers"], "product"]):
                shares = [group[level] for group in look["shares"]]
                medians = " | ".join(f"{quantile(one, 0.5):.4f}" for one in shares)
                lines.append(f"| {name} | {medians} | {separation(shares[2], shares[3]):.3f} |")
    file.write_text("\n".join(lines) + "\n")


def few_table(series: dict[tuple[str, str], dict[int, list[Row]]]) -> list[str]:
    """Lines with the mean and deviation over seeds for each share of a category's images."""
    if not series:
        return []
    lines = ["", "| category | model | share | images | steps | seeds | " + " | ".join(METRICS.values()) + " |"]
    lines += ["|---" * (6 + len(METRICS)) + "|"]
    for (category, model), shares in sorted(series.items()):
        for share, found in sorted(shares.items()):
            counts = [str(found[-1].get(name, "")) for name in ("training_images", "steps")]
            figures = [spread([row["metrics"][metric] for row in found], 3) for metric in METRICS]
            lines.append("| " + " | ".join([category, model, f"{share} %", *counts, str(len(found)), *figures]) + " |")
    return lines


def few_series(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, list[Row]]]:
    """Group runs with all levels by category and model, then by share of the images; all images alone are none."""
    series: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for category, part in by_category(row for row in rows if len(row["layers"]) == len(LAYERS)).items():
        for row in part:
            names = [row["model"]]
            if row["model"] == "STPM":
                passes, steps = longest(part), round(longest(part) * 100 / row["share"])
                equal = {"STPM, equal passes": passes, "STPM, equal steps": steps}
                names = [name for name, wanted in equal.items() if row["passes"] == wanted]
            for name in names:
                series[category, name][row["share"]].append(row)
    return {key: shares for key, shares in series.items() if set(shares) != {100}}


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def quantile(shares: list[float], part: float) -> float:
    """Upper edge of the bin in which a histogram passes ``part``."""
    total = 0.0
    for share, edge in zip(shares, EDGES[1:].tolist(), strict=True):
        total += share
        if total >= part:
            return edge
    return float(EDGES[-1])


def separation(normal: list[float], anomalous: list[float]) -> float:
    """AUROC from two histograms; values in one bin count as ties."""
    below, area = 0.0, 0.0
    for n, a in zip(normal, anomalous, strict=True):
        area += a * (below + n / 2)
        below += n
    return area


def by_category(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by their category."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    return dict(sorted(groups.items()))


def match(rows: list[Row]) -> plt.Figure:
    """Medians and separation over training, and the last histograms of the map."""
    figure, axes = plt.subplots(len(rows), 3, figsize=(10, 2.9 * len(rows)), squeeze=False)
    for row, (medians, separations, last) in zip(rows, axes, strict=True):
        passes = [look["passes"] for look in row["looks"]]
        for group, name in enumerate(GROUPS):
            values = [quantile(look["shares"][group][-1], 0.5) for look in row["looks"]]
            width = 4 - group  # the first lie under one another
            medians.plot(passes, values, "o-", ms=3, lw=width, color=COLOURS[group], label=name)
            last.stairs(row["looks"][-1]["shares"][group][-1], EDGES, color=COLOURS[group], label=name)
        for level, name in enumerate([*row["layers"], "product"]):
            values = [separation(look["shares"][2][level], look["shares"][3][level]) for look in row["looks"]]
            separations.plot(passes, values, "o-", ms=3, color=COLOURS[level], label=name)
        medians.set(
            yscale="log", xlabel="passes", ylabel="median of the product", title=f"{row['model']}, {row['category']}"
        )
        medians.minorticks_off()
        medians.set_yticks(marks := [0.02, 0.05, 0.1, 0.2, 0.5], map(str, marks))
        separations.set(xlabel="passes", title="AUROC of test pixels")
        last.set(xscale="log", xlim=(1e-3, 2), xlabel="distance", title="product at the end, pixels")
        for axis in (medians, separations):
            axis.legend(fontsize=7)
    return figure


def bars(axis: Axes, names: list[str], groups: dict[str, list[float | None]], title: str) -> None:
    """Draw one cluster of bars for each name, one bar for each group, with the axis cut below the lowest."""
    for place, (group, values) in enumerate(groups.items()):
        at = [i + 0.8 * (place + 0.5) / len(groups) - 0.4 for i, v in enumerate(values) if v is not None]
        heights = [value for value in values if value is not None]
        axis.bar(at, heights, 0.75 / len(groups), color=COLOURS[place % len(COLOURS)], label=group)
    lowest = min((v for values in groups.values() for v in values if v is not None), default=0)
    axis.set_xticks(range(len(names)), names)
    axis.set(title=title, ylim=(max(0, lowest - 0.05), 1))
    axis.grid(axis="x", visible=False)


def scales(rows: list[Row]) -> plt.Figure:
    """Each subset of levels: three metrics, and PRO by the size of defects."""
    found = {
        category: {tuple(r["layers"]): r for r in part if r["model"] == "STPM" and r["passes"] == longest(part)}
        for category, part in by_category(rows).items()
    }
    names = ["".join(name[-1] for name in subset) for subset in SUBSETS]
    figure, axes = plt.subplots(len(found), 4, figsize=(13, 2.8 * len(found)), squeeze=False)
    for (category, part), line in zip(found.items(), axes, strict=True):
        value: Callable[[str], list[float | None]] = lambda metric, part=part: [  # noqa: E731
            part[tuple(s)]["metrics"].get(metric) if tuple(s) in part else None for s in SUBSETS
        ]
        for axis, (metric, title) in zip(line, METRICS.items(), strict=False):
            bars(axis, names, {category: value(metric)}, f"{category}: {title}")
        bars(
            line[3], names, {third: value(f"{third}_SizedAUPRO") for third in THIRDS}, f"{category}: PRO by defect size"
        )
        line[3].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        for axis in line:
            axis.set_xlabel("levels used")
    return figure


def longest(rows: list[Row]) -> int:
    """Passes of the runs on all images with the defaults."""
    return min(row["passes"] for row in rows if row["model"] == "STPM")


def teachers(rows: list[Row]) -> plt.Figure:
    """Three metrics for each teacher."""
    groups = by_category(r for r in rows if r["model"] == "STPM" and r["seed"] == 0)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), squeeze=False)
    there = [name for name in TEACHERS if any(row["teacher"] == name for row in rows)]
    for axis, (metric, title) in zip(axes[0], METRICS.items(), strict=True):
        values = {
            category: [
                next((r["metrics"][metric] for r in part if r["teacher"] == t and r["passes"] == longest(part)), None)
                for t in there
            ]
            for category, part in groups.items()
        }
        bars(axis, [name.replace("_", "\n") for name in there], values, title)
    axes[0, 0].legend(fontsize=7)
    return figure


def fewshot(series: dict[tuple[str, str], dict[int, list[Row]]]) -> plt.Figure:
    """Three metrics over the share of images, with deviations over seeds."""
    categories = sorted({category for category, _ in series})
    figure, axes = plt.subplots(len(categories), 3, figsize=(11, 3 * len(categories)), squeeze=False)
    for category, line in zip(categories, axes, strict=True):
        models = {model: shares for (where, model), shares in sorted(series.items()) if where == category}
        for axis, (metric, title) in zip(line, METRICS.items(), strict=True):
            for colour, (name, shares) in zip(COLOURS, models.items(), strict=False):
                points = sorted((s, [r["metrics"][metric] for r in found]) for s, found in shares.items())
                errors = [stdev(values) if len(values) > 1 else 0 for _, values in points]
                axis.errorbar(
                    [s for s, _ in points],
                    [mean(values) for _, values in points],
                    errors,
                    marker="o",
                    ms=3,
                    capsize=3,
                    color=colour,
                    label=name,
                )
            axis.set(xscale="log", xlabel="share of normal images, %", title=f"{category}: {title}")
            axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
            axis.minorticks_off()
        line[0].legend(fontsize=7)
    return figure


def throughput(rows: list[Row]) -> plt.Figure:
    """Time of one pass over the number of pixels."""
    times = rows[0]["milliseconds"]
    pixels = [int(size) ** 2 / 1e6 for size in times]
    means = [mean(each) for each in times.values()]
    figure, axis = plt.subplots(figsize=(5, 3.2))
    axis.plot(pixels, means, "o-", color=COLOURS[0], label="measured")
    axis.plot(pixels, [means[0] * p / pixels[0] for p in pixels], "--", color="grey", label="in proportion to pixels")
    axis.set(xscale="log", yscale="log", xlabel="image height and width, pixels", ylabel="milliseconds, one image")
    axis.minorticks_off()
    axis.set_xticks(pixels, [*times])
    axis.set_yticks(marks := [20, 50, 100, 200, 500], map(str, marks))
    axis.legend()
    return figure
