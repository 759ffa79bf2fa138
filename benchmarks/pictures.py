"""Draw each category: image, ground truth and the maps of all models, for cases chosen by rule.

    python -m benchmarks.accuracy run DIR/screw --teacher FILE --seeds 0 --checkpoints CHECKPOINTS
    python -m benchmarks.pictures DIR/screw --checkpoints CHECKPOINTS

The cases are, by STPM's image scores, the two surest and the two least sure defective images and the two good images
with the highest scores. Each map's colours go from the median of that model's good test images to its highest value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Padim, Patchcore, Stfpm
from PIL import Image

from stpm_plugin import STPM

CLASSES: dict[str, type[AnomalibModule]] = {
    "STPM": STPM,
    "STPM-paper": STPM,
    "anomalib-Stfpm": Stfpm,
    "anomalib-PaDiM": Padim,
    "anomalib-PatchCore": Patchcore,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Predict with every checkpoint of a category, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("categories", nargs="+", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of MODEL-CATEGORY-seed-N.ckpt")
    parser.add_argument("--seed", type=int, default=0, help="which of the checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the pictures")
    args = parser.parse_args()
    for category in args.categories:
        found = {}
        for name, kind in CLASSES.items():
            for path in args.checkpoints.glob(f"{name}-{category.name}-seed-{args.seed}.ckpt"):
                found[name.replace("-", " ")] = predict(kind, path, category)
        if not found:
            sys.exit(f"{args.checkpoints} holds no MODEL-{category.name}-seed-{args.seed}.ckpt: keep some, see above.")
        draw(found).savefig(args.results / f"pictures_{category.name}.png", dpi=90)


def predict(kind: type[AnomalibModule], checkpoint: Path, category: Path) -> list[dict]:
    """Score a category's test images, in the data set's order."""
    arguments: dict = {"pre_trained": False} if kind in (Padim, Patchcore) else {}
    if kind is not STPM:
        arguments["strict"] = False  # the benchmark's metrics, which are in the checkpoint, are not this model's
    model = kind.load_from_checkpoint(checkpoint, map_location="cpu", **arguments)
    data = MVTecAD(root=category.resolve().parent, category=category.name, num_workers=0)
    engine = Engine(logger=False, enable_progress_bar=False, default_root_dir=checkpoint.parent / "predictions")
    data.setup()
    cases = []
    for batch in engine.predict(model, dataloaders=data.test_dataloader()):
        columns = {
            "path": batch.image_path,
            "score": batch.pred_score.flatten().tolist(),
            "map": batch.anomaly_map.squeeze(1).float() if batch.anomaly_map.ndim == 4 else batch.anomaly_map.float(),
            "mask": batch.gt_mask,
            "bad": batch.gt_label.tolist(),
        }
        cases += [dict(zip(columns, case, strict=True)) for case in zip(*columns.values(), strict=True)]
    return cases


def draw(found: dict[str, list[dict]]) -> plt.Figure:
    """Draw a row for each case, a column for each model."""
    first = next(iter(found.values()))
    ranks = sorted(range(len(first)), key=lambda place: -first[place]["score"])
    bad, good = [p for p in ranks if first[p]["bad"]], [p for p in ranks if not first[p]["bad"]]
    kinds = (bad[:2], "surest"), (bad[-2:], "least sure"), (good[:2], "good, highest")
    chosen = {place: why for places, why in kinds for place in places}
    figure, axes = plt.subplots(len(chosen), len(found) + 2, layout="constrained", squeeze=False)
    figure.set_size_inches(1.6 * axes.shape[1] + 0.4, 1.62 * axes.shape[0] + 0.3)
    scales = {
        name: (
            torch.cat([case["map"].flatten()[::16] for case in cases if not case["bad"]]).median().item(),
            max(case["map"].max().item() for case in cases),
        )
        for name, cases in found.items()
    }
    for row, (place, why) in zip(axes, chosen.items(), strict=True):
        case, path = first[place], Path(first[place]["path"])
        row[0].imshow(Image.open(path).convert("RGB").resize(case["map"].shape[::-1]))
        row[0].set_ylabel(f"{why}\n{path.parent.name}/{path.stem}", fontsize=8)
        row[1].imshow(case["mask"].squeeze(), cmap="gray", vmin=0, vmax=1)
        for axis, (name, cases) in zip(row[2:], found.items(), strict=True):
            low, high = scales[name]
            axis.imshow(cases[place]["map"], cmap="viridis", vmin=low, vmax=high)
            axis.set_xlabel(f"{cases[place]['score']:.2f}", fontsize=8)
    for axis, name in zip(axes[0], ["image", "truth", *found], strict=True):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    main()
