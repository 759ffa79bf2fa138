"""What the measurements share: options, rows that are kept, where they were measured, fits, tables."""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "PRO"}
OPTIONS: dict[str, dict[str, Any]] = {
    "categories": {"nargs": "*", "type": Path, "help": "folders in MVTec AD's layout"},
    "--root": {"type": Path, "help": "folder of categories in MVTec AD's layout"},
    "--category": {"default": "bottle", "help": "of them"},
    "--teacher": {"type": Path, "help": "weights of torchvision's ResNet-18"},
    "--seed": {"type": int, "default": 0},
    "--results": {"type": Path, "default": RESULTS, "help": "folder of what is kept"},
}


def parser(doc: str | None, parts: list[str], *options: str) -> argparse.ArgumentParser:
    """A command line of a part to run, and of some of the common options."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        made.add_argument("part", choices=parts)
    for name in (*options, "--results"):
        made.add_argument(name, **OPTIONS[name])
    return made


def environment(command: str) -> Row:
    """Return the date, the command, the versions and the machine, to be kept with a figure."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "versions": {name: version(name) for name in ("anomalib", "torch", "torchvision", "timm", "lightning")},
        "machine": f"{platform.machine()} {torch.get_num_threads()} threads {torch.backends.cpu.get_cpu_capability()}",
        "processor": processor(),
        **({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def processor() -> str:
    """Name the processor, as far as the system tells; times on two kinds cannot be compared."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor()


def rows(file: Path) -> dict[str, Row]:
    """Return the rows of a file of results."""
    return json.loads(file.read_text()) if file.exists() else {}


def missing(file: Path, jobs: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield the jobs, by the names of their rows, that have no row yet."""
    return ((key, job) for key, job in jobs if key not in rows(file))


def keep(file: Path, key: str, row: Row) -> None:
    """Add a row to a file of results, each on a line of its own, and print it."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**rows(file), key: row}.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{key}: {json.dumps(row)[:800]}", flush=True)


def fit(model: Any, data: Any, folder: Path | str, **options: Any) -> tuple[Any, float]:
    """Fit once by anomalib's Engine; returns it, and the seconds."""
    from anomalib.engine import Engine

    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, **options)
    begin = time.perf_counter()
    engine.fit(model, datamodule=data)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return engine, time.perf_counter() - begin


def summary(milliseconds: list[float], digits: int = 2) -> dict[str, float]:
    """What is kept of the times of many calls."""
    ends = {f"p{share}_ms": np.percentile(milliseconds, share) for share in (50, 95)}
    figures = ends | {"mean_ms": np.mean(milliseconds), "sd_ms": np.std(milliseconds, ddof=1)}
    return {name: round(float(value), digits) for name, value in figures.items()} | {"calls": len(milliseconds)}


def grouped(kept: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by what they say under these names."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in kept:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and standard deviation of the values that are there; empty where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def markdown(lines: Iterable[Iterable[object]]) -> str:
    """A table of a heading and rows."""
    cells = [[str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    heading, *others = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([heading, "|---" * len(cells[0]) + "|", *others])
