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
    """Write one of the packaged YAML files of settings, for `anomalib train -c FILE` and to change it.

    stpm is the default recipe on MVTec AD, paper the paper's, folder your own images, native your own images at their
    own size, demo drawn ones, and benchmark a comparison with other models by `anomalib benchmark --config FILE`.

    Args:
        name: Which one.
        out: File to write; NAME.yaml here, if not given.
    """

    name: Name
    out: Path | None = None

    def run(self) -> int:
        """Write it; returns 0."""
        target = self.out or Path(f"{self.name}.yaml")
        if target.exists():
            msg = f"{target} exists: remove it, or name another file with --out."
            raise STPMError(msg)
        target.write_text(packaged(self.name).read_text(encoding="utf-8"), encoding="utf-8")
        print(f"wrote {target}")
        return 0


def packaged(name: str) -> Path:
    """The file of a packaged config: in the wheel, or in the checkout that is installed in place."""
    installed = Path(str(files("stpm_plugin"))) / "configs" / f"{name}.yaml"
    return installed if installed.is_file() else Path(__file__).parents[2] / "configs" / f"{name}.yaml"
