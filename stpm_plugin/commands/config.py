"""`stpm config`: the YAML files of settings that are in the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from ..errors import STPMError

Name = Literal["stpm", "paper", "folder", "native", "demo", "benchmark"]


@dataclass
class Config:
    """Write one of the packaged YAML files of settings, to change it and run it with `anomalib train -c FILE`.

    stpm is the default recipe on MVTec AD, and paper the paper's. folder is for your own images, native for them at
    their own size, demo for drawn ones. benchmark compares models with `anomalib benchmark --config FILE`.

    Args:
        name: Name of the file of settings.
        out: File to write; by default NAME.yaml in the current folder.
    """

    name: Name
    out: Path | None = None

    def run(self) -> int:
        """Write it; returns 0."""
        target = self.out or Path(f"{self.name}.yaml")
        if target.exists():
            msg = f"{target} exists: remove it, or choose another file with --out."
            raise STPMError(msg)
        target.write_text(packaged(self.name).read_text(encoding="utf-8"), encoding="utf-8")
        print(f"wrote {target}")
        return 0


def packaged(name: str) -> Path:
    """The file of a packaged config: in the wheel, or in the checkout that is installed in place."""
    installed = Path(str(files("stpm_plugin"))) / "configs" / f"{name}.yaml"
    return installed if installed.is_file() else Path(__file__).parents[2] / "configs" / f"{name}.yaml"
