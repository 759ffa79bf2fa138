"""Draw the README's picture: demo images, good and with each defect, and what the model makes of them.

stpm demo
python -m benchmarks.picture results/STPM/DemoData/plate-v1-80-10-0/latest/weights/lightning/model.ckpt out.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from stpm_plugin import STPM, DemoData
from stpm_plugin.demo.demo_data import DEFECTS

CALM, LIT = 0.3, 0.5  # of the normalised map: below the first no colour; the second is the threshold
GREEN, RED = "#2e8b57", "#c0392b"


def main(checkpoint: str, target: str) -> None:
    """Predict and draw."""
    model = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    datamodule = DemoData(val_split_mode="none")
    datamodule.setup()
    kinds: dict[str, list] = {}
    for item in datamodule.test_data:
        kinds.setdefault(Path(item.image_path).parent.name, []).append(item)
    items = [*kinds["good"][-2:], *(kinds[kind][-1] for kind in DEFECTS)]
    figure, axes = plt.subplots(3, len(items), figsize=(10, 4.7), layout="constrained")
    for column, item in zip(axes.T, items, strict=True):
        with torch.inference_mode():
            prediction = model(item.image.unsqueeze(0))
        image, heat = item.image.permute(1, 2, 0), prediction.anomaly_map[0, 0]
        column[0].imshow(image)
        column[0].set_title(Path(item.image_path).parent.name.replace("_", " "), fontsize=11)
        column[1].imshow(item.gt_mask, cmap="gray", vmin=0, vmax=1)
        column[2].imshow(image)
        shown = ((heat - CALM) / (LIT - CALM)).clamp(0, 1)
        column[2].imshow(heat, cmap="inferno", vmin=0, vmax=1.4 * LIT, alpha=0.85 * shown)
        column[2].contour(heat, [LIT], colors="white", linewidths=1.2)
        label = "anomalous" if prediction.pred_label.item() else "normal"
        column[2].set_xlabel(
            f"{label}, {prediction.pred_score.item():.2f}", fontsize=10, color=RED if label == "anomalous" else GREEN
        )
    for row, name in zip(axes, ["image", "truth", "heat map"], strict=True):
        row[0].set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
