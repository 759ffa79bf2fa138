"""The CSV of verdicts: one row per image, each with the model and the image that it belongs to.

Nothing is written before the file is known to be a table. It changes in two ways: rows are appended, or a complete new
file replaces it. After a crash, a full disk or Ctrl-C every complete row is still there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import STPMError
from .images import VIDEOS
from .scorer import Scored

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from writing one table
    fcntl = None  # type: ignore[assignment]

COLUMNS = ("path", "score", "raw", "label", "percentile", "latency_ms", "bytes", "modified", "model", "settings")
HEADER = ",".join(COLUMNS).encode()
OLD_HEADER = b"path,score,label,latency_ms"  # of version 0.1.0


class Stamp(NamedTuple):
    """What tells an image from a later one of the same name: bytes, and time of change in seconds, as text."""

    bytes: str
    modified: str


def stamp(name: str | bytes) -> Stamp | None:
    """The stamp of an image's file, or of the video of a frame; ``None`` if there is none."""
    try:
        found = os.stat(video_of(name) if isinstance(name, str) else name)  # noqa: PTH116  # for bytes too
    except OSError:
        return None
    return Stamp(str(found.st_size), f"{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}")


def video_of(name: str) -> str:
    """The file of an image or of a video's frame."""
    file, mark, frame = name.rpartition("#")
    return file if mark and frame.isdecimal() and Path(file).suffix.lower() in VIDEOS else name


def cell(name: str) -> str:
    """A name as its cell has it: bytes that are no text, and line ends, are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\r", "\\r").replace("\n", "\\n")


class Table:
    """The CSV of a model's verdicts, open for appending.

    Args:
        path: The file; a new one is made where there is none.
        model: Hash of the model.
        settings: What else decides a verdict, in words.
        restart: Start over: all rows are dropped, also those of another model or other settings.
        names: The images of this run.
        log: Keep rows of images that have changed or are gone, for the log of a watched folder.

    Attributes:
        rows: The newest row of each name, as cells.
        replaced: Number of rows that were dropped because their images have changed.

    Raises:
        STPMError: The file is not a table, or is of another model or other settings, or another process writes it.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        settings: str,
        restart: bool = False,
        names: Iterable[str] = (),
        log: bool = False,
    ) -> None:
        self.path, self.model, self.settings = path.resolve(), model, settings
        self.replaced = 0
        with _locked(self.path) as old:
            kept = self._read(old, restart)
            here = {cell(name): name for name in names}
            fresh = kept if log else [row for row in kept if _stamp_of(row[0], here) == Stamp(row[6], row[7])]
            self.replaced = len(kept) - len(fresh)
            self.rows = {row[0]: row for row in fresh}
            if self._torn or len(fresh) < len(kept) or restart:
                if fcntl is None:
                    old.close()  # Windows replaces no open file; elsewhere closing it would unlock it
                self._replace(fresh)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            _lock(self.file, self.path)
        except STPMError:
            os.close(self.file)
            raise
        self.length = os.fstat(self.file).st_size

    def has(self, name: str) -> bool:
        """Whether an image, as it is now, has a row."""
        row = self.rows.get(cell(name))
        return row is not None and stamp(name) == Stamp(row[6], row[7])

    def append(self, scored: Scored, seen: Stamp | None) -> None:
        """Write a verdict's row; a row that does not fit on the disk is removed.

        Args:
            scored: The verdict.
            seen: Stamp of the image before it was read.
        """
        percentile = "" if scored.percentile is None else f"{scored.percentile:.4g}"
        row = [
            cell(scored.path),
            f"{scored.score:.6g}",
            "" if math.isnan(scored.raw) else f"{scored.raw:.6g}",
            scored.label,
            percentile,
        ]
        row += [f"{1000 * scored.latency:.2f}", *(seen or Stamp("", "")), self.model, self.settings]
        line = _line(row)
        try:
            written = 0
            while written < len(line):
                written += os.write(self.file, line[written:])
        except OSError:
            os.ftruncate(self.file, self.length)
            raise
        self.length += len(line)
        self.rows[row[0]] = row

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def __enter__(self) -> Table:
        """Return itself."""
        return self

    def __exit__(self, *args: object) -> None:
        """Close the file."""
        self.close()

    def _read(self, old: BinaryIO, restart: bool) -> list[list[str]]:
        """Read the complete rows of a file, after a check of its first line.

        Raises:
            STPMError: It is not a table, or one of another model or other settings.
        """
        whole, self._torn = _whole_rows(old, self.path, restart)
        others = {(row[8], row[9]) for row in whole} - {(self.model, self.settings)}
        if others:
            model, settings = sorted(others)[0]
            what = f"another model ({model};" if model != self.model else f"other settings ({settings};"
            mine = f"this one is {self.model})" if model != self.model else f"these are {self.settings})"
            msg = (
                f"{self.path} contains scores from {what} {mine}: choose another file with --csv, or replace it with "
                "--restart."
            )
            raise STPMError(msg)
        return whole

    def _replace(self, rows: Iterable[list[str]]) -> None:
        """Write a new file next to the old one, then replace the old one with it."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as new:
                new.write(HEADER + b"\r\n")
                new.writelines(_line(row) for row in rows)
                new.flush()
                os.fsync(new.fileno())
            if self.path.exists():
                shutil.copymode(self.path, beside)
            beside.replace(self.path)
        except OSError as error:
            error.filename = str(self.path)  # the name that the user gave
            raise
        finally:
            beside.unlink(missing_ok=True)


def read_rows(path: Path) -> list[list[str]]:
    """Read the newest row of each name, as cells.

    Raises:
        STPMError: There is no such file, or it is not a table.
    """
    if not path.is_file():
        msg = f"{path} does not exist: pass a CSV that `stpm score` wrote."
        raise STPMError(msg)
    with path.open("rb") as file:
        return list({row[0]: row for row in _whole_rows(file, path, restart=False)[0]}.values())


def _whole_rows(file: BinaryIO, path: Path, restart: bool) -> tuple[list[list[str]], bool]:
    """Read the complete rows of a file, after a check of its first line; returns whether there were others too.

    Raises:
        STPMError: It is not a table.
    """
    first = file.readline(4 * len(HEADER)).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if first == OLD_HEADER:
        msg = f"{path} is of version 0.1.0, which did not record the model of a score: choose a new file with --csv."
        raise STPMError(msg)
    empty = file.tell() == 0
    if not empty and first != HEADER:
        msg = f"{path} is not a CSV of scores (its first row is not {HEADER.decode()}): choose another file with --csv."
        raise STPMError(msg)
    if restart:
        return [], False
    content = file.read()
    torn = empty or (bool(content) and not content.endswith(b"\n"))
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline="")) if row]
    except csv.Error as error:
        msg = f"{path} is damaged ({error}): choose another file with --csv, or replace it with --restart."
        raise STPMError(msg) from None
    if torn and rows:
        rows = rows[:-1]
    whole = [row for row in rows if len(row) == len(COLUMNS)]
    return whole, torn or len(whole) < len(rows)


def _stamp_of(text: str, here: dict[str, str]) -> Stamp | None:
    """The stamp of a cell's image, by its name in ``here`` or else by the cell, whatever the locale."""
    file = video_of(text)
    return stamp(here.get(file) or (file if os.name == "nt" else file.encode()))


def _line(row: list[str]) -> bytes:
    """A row as it stands in the file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(row)
    return text.getvalue().encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file while no other process writes it; where there is none, an empty one is made.

    Raises:
        STPMError: Another process writes it, or it is a device or a folder.
    """
    if path.exists() and not path.is_file():
        msg = f"{path} is not a regular file: choose a file with --csv."
        raise STPMError(msg)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "rb") as file:
        _lock(file.fileno(), path)
        yield file


def _lock(file: int, path: Path) -> None:
    """Lock an open file for this process.

    Raises:
        STPMError: Another process has it, or has replaced it since it was opened; or its file system has no locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists() and os.path.samestat(os.fstat(file), path.stat())
    except BlockingIOError:
        free = False
    except OSError as error:
        msg = f"{path} cannot be locked ({error.strerror}): choose a file on a local disk with --csv."
        raise STPMError(msg) from None
    if not free:
        msg = f"{path} is being written by another process: wait for it, or choose another file with --csv."
        raise STPMError(msg)
