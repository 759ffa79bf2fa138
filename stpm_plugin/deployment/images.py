"""Find image files, and decode several at a time."""

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

from ..decoding import decode
from ..errors import STPMError
from .refusals import ImageError, Refused, raising

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".mkv", ".mov", ".mp4"}  # scored frame by frame, if a source names one
HEATMAP = ".heatmap.jpg"  # ends the names of pictures that are drawn here, which are not input
DECODERS = min(4, os.cpu_count() or 1)  # threads: decoding a megapixel takes as long as scoring it
AHEAD = 4 * DECODERS  # decoded images that may wait


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
            try:
                matched = list(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            except ValueError as error:
                msg = f"{source} is not a pattern ({error}): use one such as 'parts/**/*.png'."
                raise STPMError(msg) from None
            chosen = _chosen(matched, SUFFIXES | VIDEOS)
        if not chosen:
            msg = f"no image found at {source} ({', '.join(sorted(SUFFIXES))}): pass a folder, a file or a pattern."
            raise STPMError(msg)
        found += chosen
    return list(dict.fromkeys(found))


def images_below(folder: Path) -> list[str]:
    """List the image files below a folder, as :func:`find_images` does; the list may be empty."""

    def failed(error: OSError) -> None:
        raise error

    walked = os.walk(folder, onerror=failed)  # rglob passes over what cannot be listed
    return _chosen((Path(at, name) for at, _, names in walked for name in names), SUFFIXES)


def _chosen(files: Iterable[Path], suffixes: set[str]) -> list[str]:
    """Canonical paths of the files that are input, sorted by the numbers in their names."""
    chosen = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    paths = [canonical(file) for file in chosen if file.is_file() and not file.name.endswith(HEATMAP)]
    return sorted(paths, key=_by_number)


def canonical(file: Path) -> str:
    """The one spelling of a file's path: absolute, its folder's links resolved; a link to an image keeps its name."""
    return str(_resolved(file.parent) / file.name)


@functools.lru_cache(maxsize=1024)
def _resolved(folder: Path) -> Path:
    """A folder with its links resolved, once per folder, since a folder may hold many images."""
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
    refused: Refused = raising,
) -> Iterator[tuple[str, Made]]:
    """Decode images in several threads, a few ahead.

    Args:
        paths: Image files, and videos.
        unreadable: Called with the path of each file that :func:`~stpm_plugin.decoding.decode` refuses.
        then: Turns an image (H, W, 3), BGR, uint8, and its name into what is yielded; runs in the threads.
        skip: Whether to leave out a frame, by its name.
        reduce_to: As for :func:`~stpm_plugin.decoding.decode`.
        refused: Called with each name for which ``then`` raises ``ImageError``, and its message; by default raises.

    Yields:
        Names and what ``then`` made, in the order of the paths. A name is an image's path, or ``VIDEO#N`` for a
        video's frame N, from 0. As in training, EXIF rotation is ignored.
    """

    def work(path: str, image: np.ndarray | None) -> Made | None:
        image = decode(path, reduce_to) if image is None else image
        return None if image is None else then(image, path)

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[str, Future[Made | None]] | None] = deque()
        for asked in itertools.chain(_items(paths, unreadable, refused, skip), [None] * AHEAD):
            waiting.append(asked and (asked[0], pool.submit(work, *asked)))
            if len(waiting) > AHEAD and (oldest := waiting.popleft()):
                name, future = oldest
                try:
                    made = future.result()
                except ImageError as error:
                    refused(name, str(error))
                    continue
                if made is not None:
                    yield name, made
                else:
                    unreadable(name)


def _items(
    paths: Iterable[str], unreadable: Callable[[str], None], refused: Refused, skip: Callable[[str], bool] | None
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
        said = 0 if path.lower().endswith(".mkv") else int(video.get(cv2.CAP_PROP_FRAME_COUNT))  # there an estimate
        if video.isOpened() and (not index or index < 0.99 * said - 1):
            refused(path, f"{path} ends after {index} of {said} frames: copy it again.")
        video.release()
