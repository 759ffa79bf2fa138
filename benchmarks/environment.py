"""Where and with what a figure was measured."""

from __future__ import annotations

import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
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
