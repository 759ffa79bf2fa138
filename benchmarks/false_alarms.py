"""Asked against found: false alarms of thresholds from held-out good images, on good test images.

    python -m benchmarks.false_alarms run DIR/screw DIR/bottle --teacher FILE   # folders in MVTec AD's layout
    python -m benchmarks.false_alarms table                                     # from what is kept

Each category is trained once by the default recipe with a fifth of its good images held out. What is kept are the raw
image scores and map maxima of the held-out and of the good test images, so that the table needs no training. No
threshold is chosen on test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment, markdown
from stpm_plugin.false_alarms import found, limit

RESULTS = Path(__file__).parent / "results" / "false_alarms.json"
QUANTILES = (0.9, 0.95, 0.99, 0.995)
SMALL = (3, 8, 16, 32)  # held-out images of a user who has few
DRAWS = 500


def main() -> None:
    """Run what is missing, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("categories", nargs="*", type=Path)
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--holdout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.part == "run":
        for folder in args.categories:
            key = f"{folder.name}, holdout {args.holdout:g}, seed {args.seed}"
            if key not in kept:
                kept[key] = run(folder, args)
                RESULTS.write_text(json.dumps(kept, indent=None).replace('}, "', '},\n"'))
    text = table(kept)
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, and score the good test images."""
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine

    from stpm_plugin import STPM, STPMPostProcessor

    datamodule = MVTecAD(root=folder.parent, category=folder.name, num_workers=2, val_split_mode="none")
    rule = STPMPostProcessor(normal_quantile=0.995)
    model = STPM(teacher_weights=str(args.teacher), holdout=args.holdout, seed=args.seed, post_processor=rule)
    engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False)
    engine.fit(model, datamodule=datamodule)
    scores, maxima = [], []
    data = datamodule.test_data
    model.eval()
    with torch.inference_mode():
        for place in np.flatnonzero(data.samples.label_index.to_numpy() == 0):
            made = model.model(model.transform(data[int(place)].image[None]))
            scores.append(float(made.pred_score))
            maxima.append(float(made.anomaly_map.max()))
    return {
        "category": folder.name,
        "held_out_scores": rule.held_out_scores,
        "held_out_maxima": rule.held_out_maxima,
        "test_scores": scores,
        "test_maxima": maxima,
        **environment("python -m benchmarks.false_alarms run"),
    }


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Write Markdown: each category, all of them together, and few held-out images drawn from many."""
    rows = [["category", "held out", "good test images", "asked", "expected", "found, labels", "found, masks"]]
    for quantile in QUANTILES:
        total = np.zeros(3)
        for one in kept.values():
            by_label = of(one["held_out_scores"], one["test_scores"], quantile)
            by_mask = of(one["held_out_maxima"], one["test_maxima"], quantile)
            count = len(one["test_scores"])
            total += [by_label * count, by_mask * count, count]
            expected = limit(np.array(one["held_out_scores"]), quantile).expected
            cells = [one["category"], len(one["held_out_scores"]), count, share(1 - quantile), share(expected)]
            rows.append([*map(str, cells), interval(by_label, count), interval(by_mask, count)])
        labels, masks, count = total
        rows.append(
            [
                "**all**",
                "",
                str(int(count)),
                share(1 - quantile),
                "",
                *(interval(x / count, int(count)) for x in (labels, masks)),
            ]
        )
    few = [["held-out images", *(f"asked {share(1 - quantile)}" for quantile in QUANTILES)]]
    few += [[str(count), *(share(small(kept, count, quantile)) for quantile in QUANTILES)] for count in SMALL]
    return (
        "False alarms on good test images, with 90 % intervals (Clopper and Pearson). A label is a false alarm if the "
        "image score is above its threshold, a mask if one pixel is above the pixel threshold.\n\n"
        f"{markdown(rows)}\n\nFew held-out images: n of them are drawn at random {DRAWS} times from each category's, "
        "the threshold is set from those alone, and the share of its other good images above it is averaged over draws "
        f"and categories.\n\n{markdown(few)}\n"
    )


def of(held_out: list[float], test: list[float], quantile: float) -> float:
    """Share of test scores above the threshold that held-out scores set."""
    return float((np.array(test) > limit(np.array(held_out), quantile).value).mean())


def small(kept: dict[str, dict[str, Any]], count: int, quantile: float) -> float:
    """Mean share of false alarms of thresholds from ``count`` held-out images, over draws and categories."""
    random, shares = np.random.default_rng(0), []
    for one in kept.values():
        held_out, test = np.array(one["held_out_scores"]), np.array(one["test_scores"])
        for _ in range(DRAWS if len(held_out) >= count else 0):
            order = random.permutation(len(held_out))
            others = np.concatenate([held_out[order[count:]], test])
            shares.append((others > limit(held_out[order[:count]], quantile).value).mean())
    return float(np.mean(shares)) if shares else float("nan")


def interval(value: float, count: int) -> str:
    """A share of ``count`` images, with its interval."""
    above = round(value * count)
    known = found(np.array([1.0] * above + [0.0] * (count - above)), 0.5)
    return f"{share(value)} ({share(known.low)} to {share(known.high)})"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
