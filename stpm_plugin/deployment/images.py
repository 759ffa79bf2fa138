"""Find image files and decode them to the pixels that training sees."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from ..errors import STPMError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".mkv", ".mov", ".mp4"}  # scored by frames where a source names one
HEATMAP = ".heatmap.jpg"  # ends the names of pictures that are drawn here, which are no input
DECODERS = min(4, os.cpu_count() or 1)  # threads: decoding a megapixel takes as long as scoring it
AHEAD = 4 * DECODERS  # decoded images that may wait
UNREADABLE = "cannot be read as an image, or not as training reads it: convert it to a plain PNG of 8 bits a channel"
PNG, TIFF = b"\x89PNG", (b"II*\0", b"MM\0*")  # first bytes
JPEG, JPEG_FRAMES = b"\xff\xd8", {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # first bytes; markers that tell the size
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
MARGIN = 3  # a reduced image keeps so many pixels for one of the network's, along a side
AS_STORED = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


def find_images(sources: Sequence[str]) -> list[str]:
    """List image files: those given, those below folders given, and those that patterns match.

    Files of one source are sorted by the numbers in their names: 2 before 10. A file that several sources lead to is
    listed once, by its absolute path. Heat maps are left out, and videos below folders.

    Raises:
        STPMError: A source holds or matches no image.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            chosen = images_below(path)
        elif path.is_file():
            chosen = _chosen([path], SUFFIXES | VIDEOS)
        else:
            chosen = _chosen(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))), SUFFIXES | VIDEOS)
        if not chosen:
            msg = f"{source} leads to no image ({', '.join(sorted(SUFFIXES))}): give a folder, a file or a pattern."
            raise STPMError(msg)
        found += chosen
    return list(dict.fromkeys(found))


def images_below(folder: Path) -> list[str]:
    """List the image files below a folder, as :func:`find_images` does; none is no error."""
    return _chosen(folder.rglob("*"), SUFFIXES)


def _chosen(files: Iterable[Path], suffixes: set[str]) -> list[str]:
    """Canonical paths of the files that are input, sorted by the numbers in their names."""
    chosen = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    paths = [canonical(file) for file in chosen if file.is_file() and not file.name.endswith(HEATMAP)]
    return sorted(paths, key=_by_number)


def canonical(file: Path) -> str:
    """The one spelling of a file's path: absolute, its folder without links; a link to an image stays a name."""
    return str(_resolved(file.parent) / file.name)


@functools.lru_cache(maxsize=1024)
def _resolved(folder: Path) -> Path:
    """A folder without links; asked once per folder, since a folder may hold many images."""
    return folder.resolve()


def _by_number(name: str) -> list[str | int]:
    """Sort key of a name: by the numbers in it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


Made = TypeVar("Made")


def read_images(
    paths: Iterable[str],
    unreadable: Callable[[str], None],
    then: Callable[[np.ndarray, str], Made],
    skip: Callable[[str], bool] | None = None,
    reduce_to: tuple[int, int] | None = None,
) -> Iterator[tuple[str, Made]]:
    """Decode images in several threads, a few ahead.

    Args:
        paths: Image files, and videos.
        unreadable: Called with the path of each file that :func:`decode` refuses.
        then: Makes of an image (H, W, 3), BGR, uint8, and its name what is yielded; runs in the threads.
        skip: Whether to leave out a frame, by its name.
        reduce_to: As for :func:`decode`.

    Yields:
        Names and what ``then`` made, in the order of the paths. A name is an image's path, or ``VIDEO#N`` for a
        video's frame N, from 0. As in training, EXIF rotation is ignored.
    """

    def work(path: str, image: np.ndarray | None) -> Made | None:
        image = decode(path, reduce_to) if image is None else image
        return None if image is None else then(image, path)

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[str, Future[Made | None]] | None] = deque()
        for asked in itertools.chain(_items(paths, unreadable, skip), [None] * AHEAD):
            waiting.append(asked and (asked[0], pool.submit(work, *asked)))
            if len(waiting) > AHEAD and (oldest := waiting.popleft()):
                name, future = oldest
                if (made := future.result()) is not None:
                    yield name, made
                else:
                    unreadable(name)


def _items(
    paths: Iterable[str], unreadable: Callable[[str], None], skip: Callable[[str], bool] | None
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield images to decode by their paths, and the frames of videos."""
    for path in paths:
        if Path(path).suffix.lower() not in VIDEOS:
            yield path, None
            continue
        video, index = cv2.VideoCapture(path), 0
        if not video.isOpened():
            unreadable(path)
        while video.grab():
            name = f"{path}#{index}"
            if skip is None or not skip(name):
                yield name, video.retrieve()[1]
            index += 1
        video.release()


def decode(path: str, reduce_to: tuple[int, int] | None = None) -> np.ndarray | None:
    """Read an image (H, W, 3), BGR, uint8, with the pixels that training sees; ``None`` if that is not possible.

    A JPEG that is much larger than ``reduce_to``, the network's height and width, is decoded to a half, a quarter or an
    eighth of its size, and its pixels are other ones then.

    16-bit colours keep their upper eight bits. Refused, besides files that are no image: grey of more than 8 bits, and
    two kinds that OpenCV and Pillow decode to different pictures: a TIFF with transparency, and an animated PNG whose
    still image is not one of its frames.
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
    head = content[: content.find(b"IDAT")] if content[:4] == PNG else b""  # of other files it would be all
    if b"acTL" in head and b"fcTL" not in head:
        return None
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image if image.dtype == np.uint8 else np.right_shift(image, 8, dtype=np.uint16).astype(np.uint8)


def _reducing(content: bytes, size: tuple[int, int]) -> int:
    """OpenCV's flags that decode a JPEG to the smallest size that keeps ``MARGIN``; the usual ones of other files."""
    height, width = jpeg_size(content) or (0, 0)
    for factor, flag in REDUCED.items():
        if min(height / size[0], width / size[1]) >= MARGIN * factor:
            return flag | cv2.IMREAD_IGNORE_ORIENTATION
    return AS_STORED


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG by its header; ``None`` of other files."""
    at = 2 if content[:2] == JPEG else len(content)
    while content[at : at + 1] == b"\xff":
        marker, length = content[at + 1 : at + 2], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker and marker[0] in JPEG_FRAMES:
            return int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        at += 1 if marker == b"\xff" else 2 + length  # bytes between the parts may be 0xff
    return None
