"""Which parts of an image are anomalous, as boxes, and a mask at a map's size."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from .resize import resize


class Region(NamedTuple):
    """A connected region of an anomaly map above the threshold, in pixels of the image.

    Attributes:
        x: Left edge.
        y: Upper edge.
        w: Width.
        h: Height.
        area: Area.
        peak: Highest value of the map in it, on the map's scale.
    """

    x: int
    y: int
    w: int
    h: int
    area: int
    peak: float


def regions(anomaly_map: np.ndarray, limit: float, size: tuple[int, int]) -> list[Region]:
    """Find the regions of a map (h, w) above ``limit``, the highest peak first.

    Args:
        anomaly_map: The map.
        limit: Values above it are anomalous.
        size: Height and width of the image, pixels; the map may be smaller.
    """
    mask = (anomaly_map > limit).astype(np.uint8)
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    down, across = size[0] / mask.shape[0], size[1] / mask.shape[1]
    made = []
    for index in range(1, count):
        x, y, w, h, area = (int(number) for number in statistics[index])
        left, top, right, bottom = round(x * across), round(y * down), round((x + w) * across), round((y + h) * down)
        peak = float(anomaly_map[y : y + h, x : x + w][labels[y : y + h, x : x + w] == index].max())
        box = (left, top, max(1, right - left), max(1, bottom - top))
        made.append(Region(*box, max(1, round(area * down * across)), peak))
    return sorted(made, key=lambda region: -region.peak)


def shrunk(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask (H, W) at a map's size (h, w): true where any of the pixels is."""
    return resize(mask[:, :, None].astype(np.float32), (shape[0], shape[1]))[:, :, 0] > 0
