"""Run anomalib's command line inside another command: its output goes to a log, and a failure becomes a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import STPMError
from .terminal import Quiet, quiet, with_warnings

if TYPE_CHECKING:
    from anomalib.cli.cli import AnomalibCLI

Made = TypeVar("Made")
IN_VAIN = ("Expected a <class", "Does not validate", "Subtypes:", "Errors:", "Given value")  # of jsonargparse's lines
LONGEST = 300  # characters of another library's error that are repeated


def logged(log: Path, what: str, work: Callable[[Quiet], Made]) -> Made:
    """Do work whose output goes to a log.

    Args:
        log: The file.
        what: The work's name in an error.
        work: Called with what prints to the terminal, past the log.

    Raises:
        STPMError: The work failed, in one sentence.
    """
    try:
        with quiet(log) as terminal:
            return work(terminal)
    except (STPMError, OSError):
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way to end
            raise KeyboardInterrupt from None
        msg = f"{what} failed: {_last_error(log)} (full log: {log})."
        raise STPMError(msg) from None
    except Exception as error:
        msg = f"{what} failed: {_shortened(str(error) or type(error).__name__)} (full log: {log})."
        raise STPMError(msg) from error


def anomalib(arguments: Sequence[str], terminal: Quiet) -> AnomalibCLI:
    """Run `anomalib` with a line of progress on the terminal; returns what it made."""
    terminal.say("starting anomalib (takes a few seconds) ...")
    from anomalib.cli.cli import AnomalibCLI
    from anomalib.loggers import configure_logger

    from ..demo import demo_data  # noqa: F401 - importing it registers it, whatever the environment says
    from ..training import lightning_model  # noqa: F401 - likewise
    from ..training.diagnostics import TrainingProgress

    class CommandLine(AnomalibCLI):
        def instantiate_engine(self) -> None:
            trainer = self.config_init[self.subcommand]["trainer"]
            given = trainer["callbacks"] or []
            trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), TrainingProgress(terminal.line)]
            super().instantiate_engine()

    configure_logger()
    with with_warnings(terminal):
        return CommandLine(arguments)


def _last_error(log: Path) -> str:
    """What a log's last error says."""
    text = log.read_text(encoding="utf-8", errors="replace")
    _, found, said = text.rpartition("error:")
    return _shortened(said.partition("Traceback")[0] if found else text[-LONGEST:])


def _shortened(text: str) -> str:
    """The beginning of another library's error on one line, without the kinds of values that were tried in vain."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    line = re.sub(r"\s+", " ", " ".join(line for line in lines if not line.startswith(IN_VAIN))).strip().rstrip(".")
    return line if len(line) <= LONGEST else line[:LONGEST].rsplit(" ", 1)[0] + " ..."
