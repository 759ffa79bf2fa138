"""Training's resize in NumPy: bilinear with antialiasing, as torchvision and Pillow do it.

Exported models carry this resize too, as two matrix products in their graph. The scorer does it before the graph, for
three reasons: on a large image OpenVINO's CPU plugin returned wrong scores when bytes were converted in the graph
(docs/openvino-report.md), bfloat16 rounds the products' weights so that scores moved by a tenth at 4K, and the graph
was compiled again for each new size of image.
"""

from __future__ import annotations

import numpy as np

BLOCK = 4  # pixels made by one matrix product: with fewer, calls cost more; with more, weights that are zero do
PRODUCT = 2**18  # multiplications up to which OpenBLAS starts no threads, which took 20 times longer next to decoders


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, C) of any type to (*size, C), float32, on the same scale."""
    height, width = image.shape[:2]
    if height >= size[0] or width < size[1]:  # an axis that grows goes last, else the other costs more
        return _resize_columns(_resize_rows(image, size[0]), size[1])
    return _resize_rows(_resize_columns(image, size[1]), size[0])


def _resize_rows(image: np.ndarray, wanted: int) -> np.ndarray:
    """Resize an image (H, W, C) to (wanted, W, C), float32."""
    height, width, channels = image.shape
    return _reduce(image.reshape(height, -1), wanted).reshape(wanted, width, channels)


def _resize_columns(image: np.ndarray, wanted: int) -> np.ndarray:
    """Resize an image (H, W, C) to (H, wanted, C), float32."""
    height, width, channels = image.shape
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).reshape(-1, width)  # (C * H, W)
    return _reduce(planes.T, wanted).reshape(wanted, channels, height).transpose(2, 0, 1)


def _reduce(rows: np.ndarray, wanted: int) -> np.ndarray:
    """Resize the first axis of (L, M) to ``wanted``, float32; each output is a weighted mean of a few rows."""
    length, across = rows.shape
    if length == wanted:
        return rows.astype(np.float32)
    made = np.empty((wanted, across), np.float32)
    scale = length / wanted
    reach = max(scale, 1.0)  # a triangle as wide as the reduction; two neighbours where the image is enlarged
    for start in range(0, wanted, BLOCK):
        centers = (np.arange(start, min(start + BLOCK, wanted)) + 0.5) * scale
        first, last = max(0, int(centers[0] - reach + 0.5)), min(length, int(centers[-1] + reach + 0.5))
        weights = np.maximum(1 - np.abs(np.arange(first, last) + 0.5 - centers[:, None]) / reach, 0)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        step = max(1, PRODUCT // weights.size)
        for left in range(0, across, step):
            taken = rows[first:last, left : left + step].astype(np.float32, copy=False)
            np.matmul(weights, taken, out=made[start : start + BLOCK, left : left + step])
    return made
