"""Which parts of an image are anomalous, as boxes, and which are ignored, by a mask."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import STPMError
from .images import UNREADABLE, decode
from .resize import resize

WHITE = 127  # values of a mask above it are white


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


def read_ignored(path: str | Path) -> np.ndarray:
    """Read a mask (H, W): true where images are ignored, the white parts of the file.

    Raises:
        STPMError: It is no image, or ignores everything.
    """
    mask = decode(str(path))
    if mask is None:
        msg = f"{path} {UNREADABLE}."
        raise STPMError(msg)
    ignored = mask[:, :, 0] > WHITE
    if ignored.all():
        msg = f"{path} is white everywhere: every pixel would be ignored; white is what to ignore."
        raise STPMError(msg)
    return ignored


def shrunk(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask (H, W) at a map's size (h, w): true where any of the pixels is."""
    return resize(mask[:, :, None].astype(np.float32), (shape[0], shape[1]))[:, :, 0] > 0
