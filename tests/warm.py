"""Commands in processes of their own that need not import anomalib and torch again.

Importing them takes ten seconds of a core, and most of the suite's commands would do nothing else. A server imports
them once (multiprocessing's fork server: nothing of the tests' own process is in it), and each command runs in a fork of
it, with its own arguments, folder, environment and output. What a fresh interpreter shows, the registration above all,
is tested with `conftest.run`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
if CONTEXT:
    # The command line, whose imports bring the plugin, and what torch imports to export.
    CONTEXT.set_forkserver_preload(["anomalib.cli.cli", "onnxscript", "torch._functorch.aot_autograd"])
ENTRIES = {
    "anomalib": "anomalib.cli.cli:main",
    "stpm": "stpm_plugin.commands.entry:main",
}  # as the packages' metadata have them
TIMEOUT = 600


def entry_of(command: list[str]) -> list[str] | None:
    """The console script or module that a command starts, with its arguments; ``None`` if it is something else."""
    if command[0] in ENTRIES:
        return command
    return command[2:] if command[:2] == ["python", "-m"] else None


def run(line: str | list[str], cwd: Path | None = None) -> tuple[int, str] | None:
    """Run a command; returns its exit code and all that it printed, or ``None`` if it cannot be run this way."""
    command = entry_of(shlex.split(line) if isinstance(line, str) else line)
    if command is None or CONTEXT is None:
        return None
    with tempfile.NamedTemporaryFile() as output:
        process = CONTEXT.Process(
            target=_enter, args=(command, str(cwd or Path.cwd()), dict(os.environ), output.name), daemon=False
        )
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, Path(output.name).read_text(errors="replace")


def _enter(command: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Become the command's process."""
    multiprocessing.set_start_method(None, force=True)  # the command's own workers start as they always do
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[:1] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code: object = 1
    try:
        if command[0] in ENTRIES:
            module, name = ENTRIES[command[0]].split(":")
            code = getattr(importlib.import_module(module), name)()
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]  # the server's exit handlers are not this process's
