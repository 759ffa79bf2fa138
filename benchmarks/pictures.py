"""Draw images, their true masks and the maps of models beside each other.

    python -m benchmarks.accuracy run DIR/screw --teacher FILE --seeds 0 --checkpoints CHECKPOINTS
    python -m benchmarks.pictures DIR/screw --checkpoints CHECKPOINTS     # all models, cases chosen by rule
    stpm demo
    python -m benchmarks.pictures --demo results/STPM/DemoData/plate-v1-80-10-0/latest/weights/lightning/model.ckpt

The cases are, by STPM's image scores, the two surest and the two least sure defective images and the two good images
with the highest scores. `--demo` draws the README's picture: demo images, good and with each defect. Maps have no
colour where they are calm, a line at the threshold, and below them the verdict and the image score.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from anomalib import models
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.models import AnomalibModule, Padim, Patchcore
from PIL import Image

from benchmarks.environment import OPTIONS, Row
from benchmarks.training_speed import OTHERS
from stpm_plugin import STPM, DemoData
from stpm_plugin.demo.demo_data import DEFECTS

CLASSES: dict[str, type[AnomalibModule]] = {"STPM": STPM, "STPM-paper": STPM}
CLASSES |= {name.replace(" ", "-"): getattr(models, kind) for name, (kind, _) in OTHERS.items()}
CALM, LIT = 0.3, 0.5  # of the normalised map: below the first no colour; the second is the threshold
GREEN, RED = "#2e8b57", "#c0392b"


def main() -> None:
    """Predict with every checkpoint of a category, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("categories", "--seed", "--results"):
        parser.add_argument(name, **OPTIONS[name])
    parser.add_argument("--checkpoints", type=Path, help="folder of MODEL-CATEGORY-seed-N.ckpt")
    parser.add_argument("--demo", type=Path, help="checkpoint of a demo model")
    args = parser.parse_args()
    for category in args.categories:
        data, found = MVTecAD(root=category.resolve().parent, category=category.name), {}
        for name, kind in CLASSES.items():
            for path in args.checkpoints.glob(f"{name}-{category.name}-seed-{args.seed}.ckpt"):
                found[name.replace("-", " ")] = predict(kind, path, data)
        if not found:
            sys.exit(f"{args.checkpoints} holds no MODEL-{category.name}-seed-{args.seed}.ckpt: keep some, see above.")
        draw(found, telling(next(iter(found.values())))).savefig(args.results / f"pictures_{category.name}.png", dpi=90)
    if args.demo:
        cases = predict(STPM, args.demo, DemoData(val_split_mode="none"))
        last = {case["kind"]: index for index, case in enumerate(cases)}
        columns = {last["good"] - 1: "good"} | {last[kind]: kind.replace("_", " ") for kind in ("good", *DEFECTS)}
        draw({"heat map": cases}, columns).savefig(args.results / "demo.png", dpi=110)


def predict(kind: type[AnomalibModule], checkpoint: Path, data: AnomalibDataModule) -> list[Row]:
    """Score the test images, in the data set's order."""
    arguments: dict[str, Any] = {"pre_trained": False} if kind in (Padim, Patchcore) else {}
    if kind is not STPM:
        arguments["strict"] = False  # the benchmark's metrics, which are in the checkpoint, are not this model's
    model = kind.load_from_checkpoint(checkpoint, map_location="cpu", **arguments).eval()
    data.setup()
    cases = []
    for item in data.test_data:
        with torch.inference_mode():
            made = model(item.image[None])
        case = {"path": item.image_path, "kind": Path(item.image_path).parent.name, "mask": item.gt_mask.squeeze()}
        case |= {"score": float(made.pred_score), "map": made.anomaly_map.squeeze().float()}
        cases.append(case | {"bad": bool(item.gt_label), "found": bool(made.pred_label)})
    return cases


def telling(cases: list[Row]) -> dict[int, str]:
    """Choose cases by their scores, and say why."""
    ranks = sorted(range(len(cases)), key=lambda index: -cases[index]["score"])
    bad, good = [i for i in ranks if cases[i]["bad"]], [i for i in ranks if not cases[i]["bad"]]
    kinds = (bad[:2], "surest"), (bad[-2:], "least sure"), (good[:2], "good, highest")
    names = [f"{case['kind']}/{Path(case['path']).stem}" for case in cases]
    return {index: f"{why}\n{names[index]}" for indices, why in kinds for index in indices}


def draw(found: dict[str, list[Row]], chosen: dict[int, str]) -> plt.Figure:
    """Draw a column for each case: the image, the truth, and each model's map and verdict."""
    shape = 2 + len(found), len(chosen)
    figure, axes = plt.subplots(*shape, figsize=(1.43 * shape[1], 1.57 * shape[0]), layout="constrained", squeeze=False)
    for (top, second, *others), (index, title) in zip(axes.T, chosen.items(), strict=True):
        first = next(iter(found.values()))[index]
        image = Image.open(first["path"]).convert("RGB").resize(first["map"].shape[::-1])
        top.imshow(image)
        top.set_title(title, fontsize=11)
        second.imshow(first["mask"], cmap="gray", vmin=0, vmax=1)
        for axis, cases in zip(others, found.values(), strict=True):
            heat = cases[index]["map"]
            axis.imshow(image)
            shown = ((heat - CALM) / (LIT - CALM)).clamp(0, 1)
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=1.4 * LIT, alpha=0.85 * shown)
            axis.contour(heat, [LIT], colors="white", linewidths=1.2)
            label, colour = ("anomalous", RED) if cases[index]["found"] else ("normal", GREEN)
            axis.set_xlabel(f"{label}, {cases[index]['score']:.2f}", fontsize=10, color=colour)
    for axis, name in zip(axes[:, 0], ["image", "truth", *found], strict=True):
        axis.set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    main()
