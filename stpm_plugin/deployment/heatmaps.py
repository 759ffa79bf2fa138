"""Heat maps as files: an image, its anomalous regions tinted and outlined, its score and label on it."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np

from ..pictures import caption, overlay
from ..writing import write_whole
from .images import HEATMAP
from .scorer import Scored


def draw(scored: Scored, limit: float) -> np.ndarray:
    """Draw a verdict that was given with its map: a picture of the image's size, BGR, uint8."""
    assert scored.image is not None  # noqa: S101  # for the type checker
    assert scored.anomaly_map is not None  # noqa: S101
    picture = overlay(scored.image, scored.anomaly_map, limit)
    caption(picture, f"{scored.score:.3f} {scored.label}".strip())
    return picture


def file_of(path: str, folder: Path, root: Path) -> Path:
    """Where an image's picture goes: its path below ``root``, in ``folder``.

    If ``root`` is empty, since images are on several drives, the drive's name is the first folder.
    """
    whole = Path(path)
    if root == Path():
        relative = Path(re.sub(r"\W+", "_", whole.drive).strip("_"), *whole.parts[1:])
    else:
        relative = whole.relative_to(root)
    return folder / relative.with_name(relative.name + HEATMAP)


def write(picture: np.ndarray, target: Path) -> None:
    """Write a picture.

    Raises:
        STPMError: It cannot be written.
    """
    content = cv2.imencode(".jpg", picture)[1].tobytes()
    write_whole(target, content, "choose another folder with --heatmaps")
