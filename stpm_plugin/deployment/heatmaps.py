"""Heat maps as files: an image, its anomalous regions tinted and outlined, its score and label on it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import cv2
import numpy as np

from ..pictures import caption, overlay
from ..writing import write_whole
from .images import HEATMAP
from .scorer import Scored
from .table import Stamp, cell

COMMENT = b"\xff\xfe\x00\x12"  # JPEG's marker of a comment of 16 bytes


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
    relative = Path(drive_of(whole), *whole.parts[1:]) if root == Path() else whole.relative_to(root)
    return folder / relative.with_name(relative.name + HEATMAP)


def drive_of(path: Path) -> str:
    """The name of the folder that stands for a drive; empty where paths have none."""
    return re.sub(r"\W+", "_", path.drive).strip("_")


def mark(name: str, seen: Stamp | None, model: str, settings: str) -> bytes:
    """What a picture belongs to, as 16 bytes: an image, as it was, and what scored it, as its row has them."""
    owner = json.dumps([cell(name), seen, model, settings])
    return hashlib.blake2b(owner.encode(), digest_size=8).hexdigest().encode()


def write(picture: np.ndarray, target: Path, owner: bytes) -> None:
    """Write a picture, with the mark of what it belongs to as a comment.

    Raises:
        STPMError: It cannot be written.
    """
    content = cv2.imencode(".jpg", picture)[1].tobytes()
    write_whole(target, content[:2] + COMMENT + owner + content[2:], "choose another folder with --heatmaps")


def belongs(target: Path, owner: bytes) -> bool:
    """Whether there is a picture, and it has this mark."""
    try:
        with target.open("rb") as file:
            return file.read(2 + len(COMMENT) + len(owner))[2:] == COMMENT + owner
    except OSError:
        return False
