"""Training's resize in NumPy: bilinear with antialiasing, as torchvision and Pillow do it.

Exported models carry this resize too, as two matrix products in their graph. The scorer does it before the graph, for
three reasons: on a large image OpenVINO's CPU plugin returned wrong scores when bytes were converted in the graph
(docs/openvino-report.md), bfloat16 rounds the products' weights so that scores moved by a tenth at 4K, and the graph
was compiled again for each new size of image.
"""

from __future__ import annotations

import numpy as np


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, C) of any type to (*size, C), float32, on the same scale."""
    height, width = image.shape[:2]
    rows_first = height >= size[0] or width < size[1]  # an axis that grows goes last, else the other costs more
    for axis in (0, 1) if rows_first else (1, 0):
        image = _reduce(image.swapaxes(0, axis), size[axis]).swapaxes(0, axis)
    return image


def _reduce(values: np.ndarray, wanted: int) -> np.ndarray:
    """Resize the first axis of (L, M, C) to ``wanted``, float32; each output is a weighted mean of a few rows."""
    length = len(values)
    if length == wanted:
        return values.astype(np.float32)
    rows = np.ascontiguousarray(values).reshape(length, -1)
    made = np.empty((wanted, rows.shape[1]), np.float32)
    scale = length / wanted
    reach = max(scale, 1.0)  # a triangle as wide as the reduction; two neighbours where the image is enlarged
    for index in range(wanted):
        center = (index + 0.5) * scale
        first, last = max(0, int(center - reach + 0.5)), min(length, int(center + reach + 0.5))
        weights = 1 - np.abs(np.arange(first, last) + 0.5 - center) / reach
        weights = np.maximum(weights, 0)
        made[index] = (weights / weights.sum()).astype(np.float32) @ rows[first:last].astype(np.float32)
    return made.reshape(wanted, *values.shape[1:])
