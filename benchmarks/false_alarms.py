"""Asked against found: false alarms of thresholds from held-out good images, on good test images.

    python -m benchmarks.false_alarms run DIR/screw DIR/bottle --teacher FILE   # folders in MVTec AD's layout
    python -m benchmarks.false_alarms table                                     # from what is kept

Each category is trained once by the default recipe with a fifth of its good images held out. What is kept are the raw
image scores and map maxima of the held-out and of the good test images, so that the table needs no training. No
threshold is chosen on test images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import Row, environment, fit, keep, markdown, missing, parser, rows
from stpm_plugin.false_alarms import found, limit

QUANTILES = (0.9, 0.95, 0.99, 0.995)
SMALL = (3, 8, 16, 32)  # held-out images of a user who has few
DRAWS = 500
HOLDOUT = 0.2


def main() -> None:
    """Run what is missing, or tabulate."""
    args = parser(__doc__, ["run", "table"], "categories", "--teacher", "--seed").parse_args()
    file = args.results / "false_alarms.json"
    wanted = ((f"{folder.name}, holdout {HOLDOUT:g}, seed {args.seed}", folder) for folder in args.categories)
    for key, folder in missing(file, wanted):
        keep(file, key, run(folder, str(args.teacher), args.seed))
    text = table(rows(file))
    file.with_suffix(".md").write_text(text)
    print(text)


def run(folder: Path, teacher: str, seed: int) -> Row:
    """Train once, and score the good test images."""
    from anomalib.data import MVTecAD

    from stpm_plugin import STPM, STPMPostProcessor

    datamodule = MVTecAD(root=folder.parent, category=folder.name, num_workers=2, val_split_mode="none")
    rule = STPMPostProcessor(normal_quantile=0.995)
    model = STPM(teacher_weights=teacher, holdout=HOLDOUT, seed=seed, post_processor=rule)
    with tempfile.TemporaryDirectory() as files:
        fit(model, datamodule, files, accelerator="cpu")
    row: Row = {"category": folder.name, "test_scores": [], "test_maxima": []}
    row |= {"held_out_scores": rule.held_out_scores, "held_out_maxima": rule.held_out_maxima}
    model.eval()
    for index in np.flatnonzero(datamodule.test_data.samples.label_index.to_numpy() == 0):
        with torch.inference_mode():
            made = model.model(model.transform(datamodule.test_data[int(index)].image[None]))
        row["test_scores"].append(float(made.pred_score))
        row["test_maxima"].append(float(made.anomaly_map.max()))
    return row | environment("python -m benchmarks.false_alarms run")


def table(kept: dict[str, Row]) -> str:
    """Write Markdown: each category, all of them together, and few held-out images drawn from many."""
    lines: list[list[Any]] = [
        ["category", "held out", "good test images", "asked", "expected", "found, labels", "found, masks"]
    ]
    for quantile in QUANTILES:
        labels, masks = [], []
        for one in kept.values():
            labels.append(alarms(one["held_out_scores"], one["test_scores"], quantile))
            masks.append(alarms(one["held_out_maxima"], one["test_maxima"], quantile))
            expected = f"{limit(np.array(one['held_out_scores']), quantile).expected:.1%}"
            counts = [len(one["held_out_scores"]), len(one["test_scores"])]
            found_here = [interval(labels[-1]), interval(masks[-1])]
            lines.append([one["category"], *counts, f"{1 - quantile:.1%}", expected, *found_here])
        together = [np.concatenate(labels), np.concatenate(masks)]
        lines.append(["**all**", "", len(together[0]), f"{1 - quantile:.1%}", "", *map(interval, together)])
    few = [["held-out images", *(f"asked {1 - quantile:.1%}" for quantile in QUANTILES)]]
    few += [[str(count), *(f"{small(kept, count, quantile):.1%}" for quantile in QUANTILES)] for count in SMALL]
    return (
        "False alarms on good test images, with 90 % intervals (Clopper and Pearson). A label is a false alarm if the "
        "image score is above its threshold, a mask if one pixel is above the pixel threshold.\n\n"
        f"{markdown(lines)}\n\nFew held-out images: n of them are drawn at random {DRAWS} times from each category's, "
        "the threshold is set from those alone, and the share of its other good images above it is averaged over draws "
        f"and categories.\n\n{markdown(few)}\n"
    )


def alarms(held_out: Any, test: Any, quantile: float) -> np.ndarray:
    """Tell for each test score whether it is above the threshold that held-out scores set."""
    return np.array(test) > limit(np.array(held_out), quantile).value


def small(kept: dict[str, Row], count: int, quantile: float) -> float:
    """Mean share of false alarms of thresholds from ``count`` held-out images, over draws and categories."""
    random, shares = np.random.default_rng(0), []
    for one in kept.values():
        held_out = np.array(one["held_out_scores"])
        for _ in range(DRAWS if len(held_out) >= count else 0):
            order = random.permutation(len(held_out))
            others = np.concatenate([held_out[order[count:]], one["test_scores"]])
            shares.append(alarms(held_out[order[:count]], others, quantile).mean())
    return float(np.mean(shares)) if shares else float("nan")


def interval(alarmed: np.ndarray) -> str:
    """The share of images that raise a false alarm, with its interval."""
    known = found(alarmed, 0.5)
    return f"{known.expected:.1%} ({known.low:.1%} to {known.high:.1%})"


if __name__ == "__main__":
    main()
