"""Find image files and decode them to the pixels that training sees."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from ..errors import STPMError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DECODERS = min(4, os.cpu_count() or 1)  # threads: decoding a megapixel takes as long as scoring it
AHEAD = 4 * DECODERS  # decoded images that may wait
UNREADABLE = "cannot be read as an image, or not as training reads it: convert it to a plain PNG of 8 bits a channel"
TIFF = (b"II*\0", b"MM\0*")  # first bytes
AS_STORED = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


def find_images(sources: Sequence[str]) -> list[str]:
    """List image files: those given, those below folders given, and those that patterns match.

    Files of one source are sorted by the numbers in their names: 2 before 10.

    Raises:
        STPMError: A source holds or matches no image.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files: Iterable[Path] = path.rglob("*")
        elif path.is_file():
            files = [path]
        else:
            files = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
        chosen = [str(file) for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not chosen:
            msg = f"{source} leads to no image ({', '.join(sorted(SUFFIXES))}): give a folder, a file or a pattern."
            raise STPMError(msg)
        found += sorted(chosen, key=_by_number)
    return list(dict.fromkeys(found))


def _by_number(name: str) -> list[str | int]:
    """Sort key of a name: by the numbers in it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def read_images(paths: Iterable[str], unreadable: Callable[[str], None]) -> Iterator[tuple[str, np.ndarray]]:
    """Decode images in several threads, a few ahead.

    Args:
        paths: Image files.
        unreadable: Called with the path of each file that :func:`decode` refuses.

    Yields:
        Paths and images (H, W, 3), BGR, uint8, in the order of the paths. As in training, EXIF rotation is ignored.
    """
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[str, Future[np.ndarray | None]] | None] = deque()
        for path in [*paths, *[None] * AHEAD]:
            waiting.append(None if path is None else (path, pool.submit(decode, path)))
            if len(waiting) > AHEAD and (oldest := waiting.popleft()):
                name, image = oldest
                if (pixels := image.result()) is not None:
                    yield name, pixels
                else:
                    unreadable(name)


def decode(path: str) -> np.ndarray | None:
    """Read an image (H, W, 3), BGR, uint8, with the pixels that training sees; ``None`` if that is not possible.

    16-bit colours keep their upper eight bits. Refused, besides files that are no image: grey of more than 8 bits, and
    two kinds that OpenCV and Pillow decode to different pictures: a TIFF with transparency, and an animated PNG whose
    still image is not one of its frames.
    """
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, AS_STORED)
    except (OSError, cv2.error):
        return None
    if image is None or (image.dtype, image.ndim) not in [(np.uint8, 2), (np.uint8, 3), (np.uint16, 3)]:
        return None
    whole = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data[:4].tobytes() in TIFF else None
    if whole is not None and whole.shape[2:] == (4,):
        return None
    head = data.tobytes().partition(b"IDAT")[0]
    if b"acTL" in head and b"fcTL" not in head:
        return None
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image if image.dtype == np.uint8 else np.right_shift(image, 8, dtype=np.uint16).astype(np.uint8)
