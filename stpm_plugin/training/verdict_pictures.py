"""The pictures of a test or a prediction: the image, and its heat map with score and label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from anomalib.data.utils import read_image
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import Visualizer
from lightning.pytorch import Trainer

from ..pictures import caption, overlay
from ..writing import write_whole

LONGEST = 512  # pixels of a picture's longer side
TRUE = (80, 200, 80)  # BGR of the outline of a true mask


class VerdictPictures(Visualizer):
    """Draws each tested or predicted image next to its heat map, as `stpm score` does.

    Up to half the threshold a heat map keeps the image's colours, so that good images stay calm. True masks are
    outlined on the image.

    Args:
        output_dir: Folder for the pictures; ``None`` for ``images`` in the run's.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        super().__init__()
        self.output_dir = None if output_dir is None else Path(output_dir)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw a batch."""
        del outputs, batch_idx, dataloader_idx
        folder = self.output_dir or Path(trainer.default_root_dir) / "images"
        limit = float(getattr(pl_module.post_processor, "normalized_pixel_threshold", 0.5))
        data = getattr(trainer, "datamodule", None)
        for item in batch:
            if item.image_path and item.anomaly_map is not None:
                target = generate_output_filename(
                    item.image_path, folder, getattr(data, "name", None), getattr(data, "category", None)
                )
                write(draw(item, limit), target)

    on_predict_batch_end = on_test_batch_end


def write(picture: np.ndarray, target: Path) -> None:
    """Write a picture (H, W, 3), BGR, uint8, in the format of the target's suffix; the path may hold any letters.

    Raises:
        STPMError: It cannot be written.
    """
    write_whole(target, cv2.imencode(target.suffix, picture)[1].tobytes(), "set output_dir to another folder")


def draw(item: Any, limit: float) -> np.ndarray:
    """Draw an item of a batch: a picture (H, 2 W, 3), BGR, uint8.

    Args:
        item: An image with its file, map, score, and mask if there is one.
        limit: Threshold of the map.
    """
    pixels = np.round(255 * np.asarray(read_image(item.image_path, as_tensor=False))).astype(np.uint8)
    factor = min(1.0, LONGEST / max(pixels.shape[:2]))
    whole = np.ascontiguousarray(pixels[:, :, ::-1])
    image = cv2.resize(whole, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA).astype(np.uint8)
    anomaly_map = item.anomaly_map.float().cpu().numpy().reshape(item.anomaly_map.shape[-2:])
    heat = overlay(image, anomaly_map, max(limit, 1e-12))
    label = "" if item.pred_label is None else "anomalous" if bool(item.pred_label) else "normal"
    caption(heat, f"{float(item.pred_score):.3f} {label}".strip())
    if item.gt_mask is not None and bool(item.gt_mask.any()):
        truth = item.gt_mask.cpu().numpy().reshape(item.gt_mask.shape[-2:]).astype(np.uint8)
        mask = cv2.resize(truth, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(image, outlines, -1, TRUE, max(1, max(image.shape) // 256))
    return np.hstack([image, heat])
