"""Decode image files to the pixels that training sees, and masks of what it ignores."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from .errors import STPMError

UNREADABLE = "cannot be read as an image the way training reads it: convert it to a plain PNG with 8 bits per channel"
PNG, TIFF = b"\x89PNG", (b"II*\0", b"MM\0*")  # first bytes
JPEG, JPEG_FRAMES = b"\xff\xd8", {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # first bytes; markers of the size
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
MARGIN = 3  # pixels along a side that a reduced image keeps for each pixel of the network's input
AS_STORED = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
WHITE = 127  # a mask is white where all its channels are above it


def decode(path: str, reduce_to: tuple[int, int] | None = None) -> np.ndarray | None:
    """Read an image (H, W, 3), BGR, uint8, with the pixels that training sees; ``None`` if that is not possible.

    A JPEG that is much larger than ``reduce_to``, the network's height and width, is decoded to a half, a quarter or an
    eighth of its size, so its pixels differ from those that training sees.

    16-bit colours keep their upper eight bits. Files that are not images are refused, and so are grey images of more
    than 8 bits and two kinds that OpenCV and Pillow decode differently: a TIFF with transparency, and an animated PNG
    whose still image is not one of its frames.
    """
    try:
        content = Path(path).read_bytes()
        data = np.frombuffer(content, np.uint8)
        image = cv2.imdecode(data, AS_STORED if reduce_to is None else _reducing(content, reduce_to))
    except (OSError, cv2.error):
        return None
    if image is None or (image.dtype, image.ndim) not in [(np.uint8, 2), (np.uint8, 3), (np.uint16, 3)]:
        return None
    whole = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if content[:4] in TIFF else None
    if whole is not None and whole.shape[2:] == (4,):
        return None
    head = content[: content.find(b"IDAT")] if content[:4] == PNG else b""  # else it would be the whole file
    if b"acTL" in head and b"fcTL" not in head:
        return None
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image if image.dtype == np.uint8 else np.right_shift(image, 8, dtype=np.uint16).astype(np.uint8)


def _reducing(content: bytes, size: tuple[int, int]) -> int:
    """OpenCV's flags that decode a JPEG to the smallest size that keeps ``MARGIN``; for other files the usual ones."""
    height, width = jpeg_size(content) or (0, 0)
    for factor, flag in REDUCED.items():
        if min(height / size[0], width / size[1]) >= MARGIN * factor:
            return flag | cv2.IMREAD_IGNORE_ORIENTATION
    return AS_STORED


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width from a JPEG's header; ``None`` for other files."""
    at = 2 if content[:2] == JPEG else len(content)
    while content[at : at + 1] == b"\xff":
        marker, length = content[at + 1 : at + 2], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker and marker[0] in JPEG_FRAMES:
            return int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        at += 1 if marker == b"\xff" else 2 + length  # bytes between the parts may be 0xff
    return None


def read_ignored(path: str | Path) -> np.ndarray:
    """Read a mask (H, W): true where images are ignored, the white parts of the file.

    Raises:
        STPMError: The file does not exist, is not an image, or ignores everything.
    """
    if not Path(path).is_file():
        msg = f"the mask {path} does not exist: pass an image file of the images' size, white where they are ignored."
        raise STPMError(msg)
    mask = decode(str(path))
    if mask is None:
        msg = f"the mask {path} {UNREADABLE}."
        raise STPMError(msg)
    ignored: np.ndarray = np.all(mask > WHITE, axis=2)
    if ignored.all():
        msg = f"the mask {path} is white everywhere: every pixel would be ignored. Paint white only what to ignore."
        raise STPMError(msg)
    return ignored
