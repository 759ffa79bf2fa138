"""What a person sees while a command runs: one line of progress, and none of other libraries' chatter."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

OFTEN, SELDOM = 0.5, 30.0  # seconds between two states of a line that is rewritten, and between two lines of a file


class Progress:
    """One line: what is done, how fast, and the time left. A terminal's is rewritten; a file gets a new one seldom.

    Args:
        total: Number of steps.
        what: Their name, in the plural.
        stream: Where the line goes; ``None`` for standard error.
    """

    def __init__(self, total: int, what: str = "images", stream: IO[str] | None = None) -> None:
        self.total, self.what, self.stream = total, what, stream or sys.stderr
        self.done, self.started = 0, time.monotonic()
        self.rewrites = self.stream.isatty()
        self.pause = OFTEN if self.rewrites else SELDOM
        self.shown = 0.0 if self.rewrites else self.started

    def step(self, count: int = 1) -> None:
        """Count steps."""
        self.done += count
        if time.monotonic() - self.shown > self.pause:
            self.show()

    def show(self, last: bool = False) -> None:
        """Write the line."""
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.started, 1e-9)
        total = max(self.total, self.done)
        left = in_words((total - self.done) / rate) if self.done else "unknown time"
        speed = f"{rate:.1f} a second" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
        line = f"{self.done}/{total} {self.what}, {speed}" + ("" if last else f", {left} left")
        if self.rewrites:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)

    def end(self) -> None:
        """Show the line a last time and end it, if anything was done."""
        if self.done:
            self.show(last=True)


def in_words(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Quiet:
    """Prints a command's own words to the terminal, while all other output goes to a file.

    Attributes:
        terminal: The terminal, or what standard error was redirected to.
        log: The file.
    """

    def __init__(self, terminal: IO[str], log: Path) -> None:
        self.terminal, self.log = terminal, log

    def say(self, text: str) -> None:
        """Print a line to the terminal."""
        print(text, file=self.terminal, flush=True)

    def line(self, total: int) -> Progress:
        """A line of progress on the terminal."""
        return Progress(total, "steps", self.terminal)


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Quiet]:
    """Send all that this process and its children print to a file, tracebacks too; yields a way past it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with (
        log.open("w", encoding="utf-8", errors="replace") as file,
        os.fdopen(os.dup(2), "w", errors="backslashreplace") as terminal,
    ):
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield Quiet(terminal, log)
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            file.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


@contextlib.contextmanager
def with_warnings(terminal: Quiet) -> Iterator[None]:
    """Print this package's warnings to the terminal, besides to the log.

    To be entered after anomalib's ``configure_logger``, which sends all warnings to the log alone.
    """
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, *where: Any, **more: Any) -> None:
            plain(message, *where, **more)
            if str(message).startswith("STPM: "):
                terminal.say(str(message).replace("STPM", "warning", 1))

        warnings.showwarning = show
        yield
