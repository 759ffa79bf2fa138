"""Draw the README's picture: demo images, good and with each defect, their true masks and a model's maps.

    stpm demo
    python -m docs.demo_picture results/STPM/DemoData/plate-v1-80-10-0/latest/weights/lightning/model.ckpt

Maps have no colour where they are calm, a line at the threshold, and below them the verdict and the image score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from benchmarks.environment import RESULTS, Row
from stpm_plugin import STPM, DemoData
from stpm_plugin.demo.demo_data import DEFECTS

CALM, LIT = 0.3, 0.5  # of the normalised map: below the first no colour; the second is the threshold
GREEN, RED = "#2e8b57", "#c0392b"


def main() -> None:
    """Predict, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a demo model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the picture")
    args = parser.parse_args()
    cases = predict(args.checkpoint, DemoData(val_split_mode="none"))
    draw([*of_kind(cases, "good")[-2:], *(of_kind(cases, kind)[-1] for kind in DEFECTS)]).savefig(
        args.results / "demo.png", dpi=110
    )


def of_kind(cases: list[Row], kind: str) -> list[Row]:
    """The cases of a kind: good, or with a defect."""
    return [case for case in cases if case["kind"] == kind]


def predict(checkpoint: Path, data: DemoData) -> list[Row]:
    """Score the test images."""
    model = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data.setup()
    cases = []
    for item in data.test_data:
        with torch.inference_mode():
            made = model(item.image[None])
        case = {"path": item.image_path, "kind": Path(item.image_path).parent.name, "mask": item.gt_mask.squeeze()}
        case |= {"score": float(made.pred_score), "map": made.anomaly_map.squeeze().float()}
        cases.append(case | {"found": bool(made.pred_label)})
    return cases


def draw(cases: list[Row]) -> plt.Figure:
    """Draw a column for each case: the image, the truth, the map and the verdict."""
    figure, axes = plt.subplots(3, len(cases), figsize=(1.43 * len(cases), 4.71), layout="constrained", squeeze=False)
    for (top, truth, found), case in zip(axes.T, cases, strict=True):
        image, heat = Image.open(case["path"]).convert("RGB").resize(case["map"].shape[::-1]), case["map"]
        top.imshow(image)
        top.set_title(case["kind"].replace("_", " "), fontsize=11)
        truth.imshow(case["mask"], cmap="gray", vmin=0, vmax=1)
        found.imshow(image)
        shown = ((heat - CALM) / (LIT - CALM)).clamp(0, 1)
        found.imshow(heat, cmap="inferno", vmin=0, vmax=1.4 * LIT, alpha=0.85 * shown)
        found.contour(heat, [LIT], colors="white", linewidths=1.2)
        label, colour = ("anomalous", RED) if case["found"] else ("normal", GREEN)
        found.set_xlabel(f"{label}, {case['score']:.2f}", fontsize=10, color=colour)
    for axis, name in zip(axes[:, 0], ["image", "truth", "heat map"], strict=True):
        axis.set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    main()
