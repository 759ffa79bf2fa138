"""What a blurred difference image scores on the demo data.

The mean good image is the reference, the largest blurred difference the image score.

    python -m benchmarks.demo_baseline
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import gaussian_blur

from stpm_plugin import DemoData

RESULT = Path(__file__).parent / "results" / "demo_baseline.json"


def main() -> None:
    """Score the test images with each blur and write one JSON row."""
    datamodule = DemoData(val_split_mode="none")
    datamodule.setup()
    reference = torch.stack([item.image for item in datamodule.train_data]).mean(dim=0)
    row = {"command": "python -m benchmarks.demo_baseline", "test_images": len(datamodule.test_data)}
    for sigma in (1.0, 2.0, 4.0, 8.0):
        scores, labels, pixels, masks = [], [], [], []
        for item in datamodule.test_data:
            difference = gaussian_blur((item.image - reference).abs().mean(dim=0, keepdim=True), 33, sigma)
            scores.append(difference.max())
            labels.append(item.gt_label)
            pixels.append(difference.flatten())
            masks.append(item.gt_mask.flatten())
        row[f"sigma {sigma:g}"] = {
            "image_AUROC": round(float(binary_auroc(torch.stack(scores), torch.stack(labels).int())), 4),
            "pixel_AUROC": round(float(binary_auroc(torch.cat(pixels), torch.cat(masks).int())), 4),
        }
    RESULT.write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
