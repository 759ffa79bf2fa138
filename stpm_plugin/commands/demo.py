"""`stpm demo`: the whole way on images that the package draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .train import run_recipe


@dataclass
class Demo:
    """Train, test, export and report on images that the package draws, with the light teacher's installed weights.

    Needs no data set, no hub and no GPU, and takes some minutes. The settings are `stpm config demo`; options that
    begin with --model., --data. or --trainer. go to `anomalib train`.

    Args:
        results: Folder for runs.
    """

    results: Path = Path("results")
    passed_on: list[str] = field(default_factory=list, init=False)

    def run(self) -> int:
        """Run it; returns 0."""
        folder = run_recipe("demo", "demo", self.results, self.passed_on, test=True)
        from .report import Report  # OpenVINO, which a demo that fails early need not wait for

        return Report(folder).run()
