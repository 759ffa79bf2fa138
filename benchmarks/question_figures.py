"""The table and the figures of `questions.py`, from its rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.environment import METRICS, Row, grouped, markdown, spread
from benchmarks.questions import EDGES, GROUPS, LAYERS, SHARES, SUBSETS, TEACHERS, THIRDS

Series = dict[tuple[str, str], dict[int, list[Row]]]  # by category and model, then by share of the images
ALL = METRICS | {f"{third}_SizedAUPRO": f"PRO, {third}" for third in THIRDS}  # by the size of the defects


def draw(kept: dict[str, Row], results: Path) -> None:
    """Write ``questions.md`` and a figure for each question that has rows."""
    okabe_ito = ["#0072b2", "#009e73", "#e69f00", "#d55e00", "#56b4e9", "#cc79a7"]  # told apart by all eyes
    mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    mpl.rcParams.update({"axes.prop_cycle": mpl.cycler(color=okabe_ito), "legend.fontsize": 7, "lines.markersize": 3})
    trained = [row | {"layers": tuple(row["layers"])} for row in kept.values() if "metrics" in row]
    trained = [row for row in trained if not row.get("distances")]
    usual = "imagenet" if any(row["teacher"] == "imagenet" for row in trained) else "cifar10"
    plain = [row for row in trained if row["teacher"] == usual]
    series = few(row for row in plain if row["layers"] == LAYERS)
    (results / "questions.md").write_text(table(kept, series))
    whole = [row for row in trained if row["model"] == "STPM" and row["share"] == 100 and row["seed"] == 0]
    levels = {levels: "+".join(name[-1] for name in levels) for levels in SUBSETS}
    names = {name: name.replace("_", "\n") for name in (*TEACHERS, *(row["teacher"] for row in whole))}
    for question, found, figure in [
        ("match", [row for row in kept.values() if row.get("distances")], match),
        ("scales", [row for row in whole if row in plain], lambda rows: compared(rows, "layers", levels)),
        ("teachers", [row for row in whole if row["layers"] == LAYERS], lambda rows: compared(rows, "teacher", names)),
        ("fewshot", series, fewshot),
    ]:
        if found:
            figure(found).savefig(results / f"questions_{question}.png", dpi=110)
            plt.close("all")


def few(rows: Iterable[Row]) -> Series:
    """Group runs by category and model, then by share of the images; without those that saw all images alone."""
    series = {key: grouped(found, "share") for key, found in sorted(grouped(rows, "category", "model").items())}
    named = {key: {share: found for (share,), found in sorted(shares.items())} for key, shares in series.items()}
    return {key: shares for key, shares in named.items() if set(shares) != {100}}


def table(kept: dict[str, Row], series: Series) -> str:
    """Every run, the teachers, the means over seeds for each share of the images, and the distances."""
    runs: list[list[Any]] = [["run", *ALL.values(), "s"]]
    for key, row in sorted(kept.items()):
        if metrics := row.get("metrics"):
            cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in ALL]
            runs.append([key, *cells, row["seconds"]])
        elif "why" in row:
            runs.append([key, row["why"], *[""] * len(ALL)])
    tables = [markdown(runs)]
    accuracies = {row["teacher"]: row["teacher_accuracy"] for row in kept.values() if row.get("teacher_accuracy")}
    if accuracies:
        lines = [[name, f"{share:.1%}"] for name, share in accuracies.items()]
        tables.append(markdown([["teacher", "its own test images classified right"], *lines]))
    if series:
        lines = [["category", "model", "share", "images", "steps", "seeds", *METRICS.values()]]
        for (category, model), shares in series.items():
            for share, found in shares.items():
                counts = [found[-1].get("training_images", ""), found[-1].get("steps", ""), len(found)]
                cells = [spread([row["metrics"][metric] for row in found], 3) for metric in METRICS]
                lines.append([category, model, f"{share} %", *counts, *cells])
        tables.append(markdown(lines))
    for row in kept.values():
        for look in row.get("looks", [])[-1:]:
            tables.append(f"Levels after {look['passes']} passes, {row['model']}, {row['category']}:")
            lines = [["level", *(f"median, {group}" for group in GROUPS), "AUROC of pixels"]]
            for name, groups in zip([*row["layers"], "product"], zip(*look["shares"], strict=True), strict=True):
                medians = [f"{median(shares):.4f}" for shares in groups]
                lines.append([name, *medians, f"{separation(groups[2], groups[3]):.3f}"])
            tables.append(markdown(lines))
    return "\n\n".join(tables) + "\n"


def median(shares: list[float]) -> float:
    """Upper edge of the bin in which a histogram passes a half."""
    return float(EDGES[1:][min(int((np.cumsum(shares) < 0.5).sum()), len(EDGES) - 2)])


def separation(normal: list[float], anomalous: list[float]) -> float:
    """AUROC from two histograms; values in one bin count as ties."""
    below = np.cumsum(normal) - np.array(normal) / 2
    return float(np.dot(anomalous, below))


def match(rows: list[Row]) -> plt.Figure:
    """Medians and separation over training, and the last histograms of the map."""
    figure, axes = plt.subplots(len(rows), 3, figsize=(10, 2.9 * len(rows)), squeeze=False)
    for row, (medians, separations, last) in zip(rows, axes, strict=True):
        looks = {look["passes"]: look["shares"] for look in row["looks"]}  # of each group, of each level
        for group, name in enumerate(GROUPS):
            values = [median(shares[group][-1]) for shares in looks.values()]
            medians.plot([*looks], values, "o-", lw=4 - group, label=name)  # the first lie under one another
            last.stairs(row["looks"][-1]["shares"][group][-1], EDGES, color=f"C{group}")
        for level, name in enumerate([*row["layers"], "product"]):
            values = [separation(shares[2][level], shares[3][level]) for shares in looks.values()]
            separations.plot([*looks], values, "o-", label=name)
        title = f"{row['model']}, {row['category']}"
        medians.set(yscale="log", xlabel="passes", ylabel="median of the product", title=title)
        medians.minorticks_off()
        medians.set_yticks(marks := [0.02, 0.05, 0.1, 0.2, 0.5], map(str, marks))
        separations.set(xlabel="passes", title="AUROC of test pixels")
        last.set(xscale="log", xlim=(1e-3, 2), xlabel="distance", title="product at the end, pixels")
        medians.legend()
        separations.legend()
    return figure


def compared(rows: list[Row], key: str, names: dict[Any, str]) -> plt.Figure:
    """A cluster of bars for each value of ``key``, one for each category; axes are cut below the lowest."""
    frame = pd.DataFrame([row["metrics"] | {key: names[row[key]], "category": row["category"]} for row in rows])
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.6))
    for axis, (metric, title) in zip(axes.flat, ALL.items(), strict=True):
        bars = frame.pivot(index=key, columns="category", values=metric)
        bars = bars.loc[[name for name in names.values() if name in bars.index]]
        bars.plot.bar(ax=axis, title=title, xlabel="", ylim=(max(0, bars.min(None) - 0.05), 1), width=0.75, rot=0)
        axis.grid(axis="x", visible=False)
        axis.get_legend().remove()
    figure.supxlabel(key)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def fewshot(series: Series) -> plt.Figure:
    """Three metrics over the share of images, with deviations over seeds."""
    categories = sorted({category for category, _ in series})
    figure, axes = plt.subplots(len(categories), 3, figsize=(11, 3 * len(categories)), squeeze=False)
    for category, line in zip(categories, axes, strict=True):
        models = {model: shares for (where, model), shares in series.items() if where == category}
        for axis, (metric, title) in zip(line, METRICS.items(), strict=True):
            for name, shares in models.items():
                values = [[row["metrics"][metric] for row in found] for found in shares.values()]
                means, errors = [mean(v) for v in values], [stdev(v) if len(v) > 1 else 0 for v in values]
                axis.errorbar([*shares], means, errors, marker="o", capsize=3, label=name)
            axis.set(xscale="log", xlabel="share of normal images, %", title=f"{category}: {title}")
            axis.set_xticks([*SHARES], map(str, SHARES))
            axis.minorticks_off()
        line[0].legend()
    return figure
