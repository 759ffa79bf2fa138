"""Draw images, their true masks and the maps of models beside each other.

    python -m benchmarks.accuracy run DIR/screw --teacher FILE --seeds 0 --checkpoints CHECKPOINTS
    python -m benchmarks.pictures DIR/screw --checkpoints CHECKPOINTS     # all models, cases chosen by rule
    stpm demo
    python -m benchmarks.pictures --demo results/STPM/DemoData/plate-v1-80-10-0/latest/weights/lightning/model.ckpt

The cases are, by STPM's image scores, the two surest and the two least sure defective images and the two good images
with the highest scores. Each map's colours go from the median of that model's good test images to its highest value.
`--demo` draws the README's picture: demo images, good and with each defect, and what the model makes of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from anomalib import models
from anomalib.data import MVTecAD
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
BARE = {"xticks": [], "yticks": []}


def main() -> None:
    """Predict with every checkpoint of a category, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("categories", "--seed", "--results"):
        parser.add_argument(name, **OPTIONS[name])
    parser.add_argument("--checkpoints", type=Path, help="folder of MODEL-CATEGORY-seed-N.ckpt")
    parser.add_argument("--demo", help="checkpoint of a demo model")
    args = parser.parse_args()
    for category in args.categories:
        found = {}
        for name, kind in CLASSES.items():
            for path in args.checkpoints.glob(f"{name}-{category.name}-seed-{args.seed}.ckpt"):
                found[name.replace("-", " ")] = predict(kind, path, category)
        if not found:
            sys.exit(f"{args.checkpoints} holds no MODEL-{category.name}-seed-{args.seed}.ckpt: keep some, see above.")
        draw(found).savefig(args.results / f"pictures_{category.name}.png", dpi=90)
    if args.demo:
        draw_demo(args.demo).savefig(args.results / "demo.png", dpi=110)


def predict(kind: type[AnomalibModule], checkpoint: Path, category: Path) -> list[Row]:
    """Score a category's test images, in the data set's order."""
    arguments: dict[str, Any] = {"pre_trained": False} if kind in (Padim, Patchcore) else {}
    if kind is not STPM:
        arguments["strict"] = False  # the benchmark's metrics, which are in the checkpoint, are not this model's
    model = kind.load_from_checkpoint(checkpoint, map_location="cpu", **arguments)
    data = MVTecAD(root=category.resolve().parent, category=category.name)
    data.setup()
    with torch.inference_mode():
        found = ((item, model.eval()(item.image[None])) for item in data.test_data)
        return [
            {
                "path": item.image_path,
                "score": float(made.pred_score),
                "map": made.anomaly_map.squeeze().float(),
                "mask": item.gt_mask,
                "bad": bool(item.gt_label),
            }
            for item, made in found
        ]


def draw(found: dict[str, list[Row]]) -> plt.Figure:
    """Draw a row for each case, a column for each model."""
    first = next(iter(found.values()))
    ranks = sorted(range(len(first)), key=lambda index: -first[index]["score"])
    bad, good = [i for i in ranks if first[i]["bad"]], [i for i in ranks if not first[i]["bad"]]
    kinds = (bad[:2], "surest"), (bad[-2:], "least sure"), (good[:2], "good, highest")
    chosen = {index: why for indices, why in kinds for index in indices}
    shape = len(chosen), len(found) + 2
    figure, axes = plt.subplots(*shape, layout="constrained", squeeze=False, subplot_kw=BARE)
    figure.set_size_inches(1.6 * shape[1] + 0.4, 1.62 * shape[0] + 0.3)
    for row, (index, why) in zip(axes, chosen.items(), strict=True):
        case, path = first[index], Path(first[index]["path"])
        row[0].imshow(Image.open(path).convert("RGB").resize(case["map"].shape[::-1]))
        row[0].set_ylabel(f"{why}\n{path.parent.name}/{path.stem}", fontsize=8)
        row[1].imshow(case["mask"].squeeze(), cmap="gray", vmin=0, vmax=1)
        for axis, cases in zip(row[2:], found.values(), strict=True):
            low = torch.cat([case["map"].flatten()[::16] for case in cases if not case["bad"]]).median()
            high = max(case["map"].max() for case in cases)
            axis.imshow(cases[index]["map"], cmap="viridis", vmin=low, vmax=high)
            axis.set_xlabel(f"{cases[index]['score']:.2f}", fontsize=8)
    for axis, name in zip(axes[0], ["image", "truth", *found], strict=True):
        axis.set_title(name, fontsize=9)
    return figure


def draw_demo(checkpoint: str) -> plt.Figure:
    """Draw a column for each image: itself, the truth, the heat map."""
    model = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    datamodule = DemoData(val_split_mode="none")
    datamodule.setup()
    kinds: dict[str, list] = {}
    for item in datamodule.test_data:
        kinds.setdefault(Path(item.image_path).parent.name, []).append(item)
    items = [*kinds["good"][-2:], *(kinds[kind][-1] for kind in DEFECTS)]
    figure, axes = plt.subplots(3, len(items), figsize=(10, 4.7), layout="constrained", subplot_kw=BARE)
    for (top, middle, bottom), item in zip(axes.T, items, strict=True):
        with torch.inference_mode():
            prediction = model(item.image.unsqueeze(0))
        image, heat = item.image.permute(1, 2, 0), prediction.anomaly_map[0, 0]
        top.imshow(image)
        top.set_title(Path(item.image_path).parent.name.replace("_", " "), fontsize=11)
        middle.imshow(item.gt_mask, cmap="gray", vmin=0, vmax=1)
        bottom.imshow(image)
        shown = ((heat - CALM) / (LIT - CALM)).clamp(0, 1)
        bottom.imshow(heat, cmap="inferno", vmin=0, vmax=1.4 * LIT, alpha=0.85 * shown)
        bottom.contour(heat, [LIT], colors="white", linewidths=1.2)
        label, colour = ("anomalous", RED) if prediction.pred_label.item() else ("normal", GREEN)
        bottom.set_xlabel(f"{label}, {prediction.pred_score.item():.2f}", fontsize=10, color=colour)
    for axis, name in zip(axes[:, 0], ["image", "truth", "heat map"], strict=True):
        axis.set_ylabel(name, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
