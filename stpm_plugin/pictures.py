"""An image with its anomalous regions tinted and outlined, and a line of text on it."""

from __future__ import annotations

import cv2
import numpy as np

STRONGEST = 0.6  # share of the tint where the map is highest
OUTLINE, INK = (255, 255, 255), (255, 255, 255)  # BGR


def overlay(image: np.ndarray, anomaly_map: np.ndarray, limit: float) -> np.ndarray:
    """Tint an image where its map comes near the threshold, and outline what lies above it.

    Up to half the threshold an image keeps its colours, so that good images stay calm.

    Args:
        image: The image (H, W, 3), BGR, uint8.
        anomaly_map: Its map (h, w), at least 0.
        limit: The threshold, on the map's scale; above 0.
    """
    size = image.shape[1::-1]
    relative = cv2.resize(anomaly_map / np.float32(limit), size)
    colours = cv2.applyColorMap(np.clip(relative * 127.5, 0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    tint = STRONGEST * np.clip(relative - 0.5, 0, 1)[:, :, None]
    laid = np.round(image * (1 - tint) + colours * tint).astype(np.uint8)
    outlines, _ = cv2.findContours((relative > 1).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(laid, outlines, -1, OUTLINE, max(1, min(size) // 256))
    return laid


def caption(picture: np.ndarray, text: str) -> None:
    """Write a line on the upper left of a picture (H, W, 3), at most as wide as the picture."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    (width, height), base = cv2.getTextSize(text, font, 1, 1)
    scale = min(0.9 * picture.shape[1] / width, max(0.4, picture.shape[0] / 20 / height))
    thickness = max(1, round(scale))
    margin = round(0.4 * scale * height)
    right, bottom = round(scale * width) + 2 * margin, round(scale * (height + base)) + 2 * margin
    cv2.rectangle(picture, (0, 0), (right, bottom), (0, 0, 0), cv2.FILLED)
    cv2.putText(picture, text, (margin, margin + round(scale * height)), font, scale, INK, thickness, cv2.LINE_AA)
