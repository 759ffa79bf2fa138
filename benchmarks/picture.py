"""Draw the README's picture: one demo image of each defect, its mask and its heat map.

anomalib train -c configs/demo.yaml
python -m benchmarks.picture results/STPM/DemoData/plate-v1-80-10-0/latest/weights/lightning/model.ckpt out.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from stpm_plugin import STPM, DemoData
from stpm_plugin.demo.demo_data import DEFECTS


def main(checkpoint: str, target: str) -> None:
    """Predict and draw."""
    model = STPM.load_from_checkpoint(checkpoint).eval()
    datamodule = DemoData(val_split_mode="none")
    datamodule.setup()
    items = {Path(item.image_path).parent.name: item for item in datamodule.test_data}  # the last of each kind
    figure, axes = plt.subplots(3, len(DEFECTS) + 1, figsize=(9, 4.8), layout="constrained")
    for column, kind in zip(axes.T, ["good", *DEFECTS], strict=True):
        item = items[kind]
        with torch.inference_mode():
            prediction = model(item.image.unsqueeze(0))
        image = item.image.permute(1, 2, 0)
        column[0].imshow(image)
        column[0].set_title(kind.replace("_", " "), fontsize=11)
        column[1].imshow(item.gt_mask, cmap="gray", vmin=0, vmax=1)
        column[2].imshow(image.mean(dim=2), cmap="gray")
        column[2].imshow(prediction.anomaly_map[0, 0], cmap="inferno", vmin=0, vmax=1, alpha=0.65)
        column[2].set_xlabel(f"score {prediction.pred_score.item():.2f}", fontsize=10)
    for row, name in zip(axes, ["image", "truth", "anomaly map"], strict=True):
        row[0].set_ylabel(name, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
