"""What the measurements share: rows that are kept, where they were measured, and tables."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch


def environment(command: str) -> dict[str, Any]:
    """Return the date, the command, the versions and the machine, to be kept beside a figure."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "versions": {name: version(name) for name in ("anomalib", "torch", "torchvision", "timm", "lightning")},
        "machine": " ".join(
            [platform.machine(), f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
        ),
        "processor": processor(),
        **({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def processor() -> str:
    """Name the processor, as far as the system tells; times on two kinds do not compare."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def rows(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file of results."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(file: Path, key: str, row: dict[str, Any]) -> None:
    """Add a row to a file of results, each on a line of its own."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**rows(file), key: row}.items())
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and standard deviation of the values that are there; empty where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def markdown(lines: Iterable[Iterable[object]]) -> str:
    """A table of a heading and rows."""
    cells = [[str(cell) for cell in line] for line in lines]
    heading, *others = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([heading, "|---" * len(cells[0]) + "|", *others])
