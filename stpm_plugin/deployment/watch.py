"""Wait for the images that a camera drops into folders, until each is completely written."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..decoding import decode
from ..errors import STPMError
from .images import images_below
from .table import Stamp, stamp

SETTLED = 0.5  # seconds without a change after which a file counts as written: most writers pause for less
PATIENCE = 10.0  # seconds after which a file that still cannot be read is reported
LOOK = 1000  # milliseconds between two looks at files that are not yet whole
UNTOLD = 5.0  # seconds between two looks if the system reports no change: a network drive may not report it


def check(folders: Sequence[str]) -> None:
    """Refuse what cannot be watched.

    Raises:
        STPMError: A source is not a folder, or watchfiles is not installed.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            msg = f"--watch takes folders, and {folder} is not one."
            raise STPMError(msg)
    if importlib.util.find_spec("watchfiles") is None:
        msg = "--watch needs watchfiles: pip install watchfiles."
        raise STPMError(msg)


def arrivals(
    folders: Sequence[str],
    known: Callable[[str], bool],
    unreadable: Callable[[str], None],
    failed: Callable[[OSError], None],
) -> Iterator[list[str]]:
    """Yield the image files that are new and whole, as they come; it does not end by itself.

    A file is whole once it has not changed for half a second and can be read as an image.

    Args:
        folders: Where to look, below them too.
        known: Whether a file, as it is now, was dealt with.
        unreadable: Called once with the path of each file that has not changed for ten seconds and cannot be read.
        failed: Called with an error of the folders, once until they can be listed again; they are tried on.

    Raises:
        STPMError: A folder is a link that was switched to another folder.
    """
    from watchfiles import watch

    seen: dict[str, tuple[Stamp, float]] = {}  # stamp, and when it was new
    settled: dict[str, Stamp] = {}  # files that need no other look until they change
    looked, said = 0.0, ""
    begun = {folder: Path(folder).resolve() for folder in folders}
    for changes in watch(*folders, rust_timeout=LOOK, yield_on_timeout=True, debounce=200, raise_interrupt=True):
        if not changes and not seen and time.monotonic() - looked < UNTOLD:
            continue
        whole, looked = [], time.monotonic()
        for folder, at_first in begun.items():
            if (now_at := Path(folder).resolve()) != at_first:
                msg = f"{folder} now leads to {now_at} instead of {at_first}: start --watch again."
                raise STPMError(msg)
        try:
            paths = dict.fromkeys(path for folder in folders for path in images_below(Path(folder)))
        except OSError as error:  # a folder was deleted while it was listed, or a network drive failed
            if str(error) != said:
                said = str(error)
                failed(error)
            looked = 0.0
            continue
        said = ""
        for gone in seen.keys() - paths.keys():
            del seen[gone]
        for path in paths:
            now, found = time.monotonic(), stamp(path)
            if found is None or settled.get(path) == found:
                continue
            if known(path):
                settled[path] = found
            elif path not in seen or seen[path][0] != found:
                seen[path] = (found, now)
            elif now - seen[path][1] >= SETTLED:
                if decode(path) is not None:
                    whole.append(path)
                    del seen[path]
                elif now - seen[path][1] >= PATIENCE:
                    settled[path] = found
                    del seen[path]
                    unreadable(path)
        if whole:
            yield whole
