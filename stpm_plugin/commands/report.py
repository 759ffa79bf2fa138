"""`stpm report`: a page of scores and pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..deployment.images import canonical
from ..deployment.report import contents, page
from ..errors import STPMError
from .export import CONFIG, EXPORTED, datamodule_of
from .running import logged
from .score import Score
from .terminal import Progress, Quiet


@dataclass
class Report:
    """Make a page of scores and pictures, to look at and to choose the threshold.

    The page is one HTML file that needs no network: a histogram of the scores with a threshold to move, what it would
    find and miss, and the images by their scores. Images that trained the model or set its threshold are left out.

    Args:
        source: A run's folder, whose test images are then scored, or a CSV that `stpm score` wrote.
        model: The exported model that wrote the CSV; for a run, the model to score with, by default its float export.
        heatmaps: For a CSV, the folder of the pictures that `stpm score --heatmaps` drew.
        out: The page to write; by default report.html in the run's folder or next to the CSV.
    """

    source: Path
    model: Path | None = None
    heatmaps: Path | None = None
    out: Path | None = None

    def run(self) -> int:
        """Make it; returns 0."""
        if self.source.is_dir():
            if self.heatmaps is not None:
                msg = f"--heatmaps is only for a CSV: omit it, because the heat maps of {self.source} are drawn again."
                raise STPMError(msg)
            return self.of_run(self.source)
        if self.model is None:
            msg = f"{self.source} identifies its model only by a hash: pass the model's .xml file with --model."
            raise STPMError(msg)
        self.write(self.source, self.model, self.heatmaps, self.out or self.source.with_name("report.html"), None)
        return 0

    def of_run(self, run: Path) -> int:
        """Score a run's test images, and make the page."""
        model = self.model or run / EXPORTED
        saved = run / CONFIG
        for needed, remedy in ((saved, "pass a run's folder"), (model, f"`stpm export {run}` writes it")):
            if not needed.is_file():
                msg = f"{needed} is missing: {remedy}, or pass a CSV of `stpm score`."
                raise STPMError(msg)
        kinds = logged(run / "report.log", "reading the run's data", lambda terminal: test_images(saved, terminal))
        if not kinds:
            msg = f"{run} was trained without test images: score others with `stpm score {model} IMAGES`."
            raise STPMError(msg)
        folder = run / "report"
        table, drawn = folder / "scores.csv", folder / "heatmaps"
        folder.mkdir(exist_ok=True)
        code = Score(str(model), list(kinds), table, restart=True, heatmaps=drawn).run()
        if code not in (0, 2):
            return code
        self.write(table, model, drawn, self.out or run / "report.html", kinds)
        return code

    def write(
        self, table: Path, model: Path, heatmaps: Path | None, out: Path, kinds: Mapping[str, str] | None
    ) -> None:
        """Write the page and say where it is."""
        if heatmaps is not None and not heatmaps.is_dir():
            msg = f"--heatmaps {heatmaps} is not a folder: pass the one that `stpm score --heatmaps` wrote."
            raise STPMError(msg)
        found = contents.contents_of(table, model, kinds)
        if not found.images:
            msg = f"all images of {table} trained the model or set its threshold: score others."
            raise STPMError(msg)
        if found.stale:
            said = f"{found.stale} images have changed or are gone since they were scored: score them again."
            print(f"warning: {said}", file=sys.stderr)
        line = Progress(len(found.images), "pictures")
        drawn = contents.pictures(found.images, heatmaps, line.step)
        line.end()
        name = out.resolve().parent.name if self.source.is_file() else self.source.resolve().parent.name
        page.write(out, found, drawn, name)
        print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB); open it in a browser")


def test_images(saved: Path, terminal: Quiet) -> dict[str, str]:
    """The test images of a run, with their kinds.

    Args:
        saved: The run's settings.
        terminal: Prints to the terminal, past the log.
    """
    terminal.say("reading the run's data ...")
    settings: dict[str, Any] = yaml.safe_load(saved.read_text(encoding="utf-8"))["data"]
    data = datamodule_of(settings)
    data.prepare_data()
    data.setup()
    samples = data.test_data.samples
    labels = zip(samples.image_path, samples.label_index, strict=True)
    return {canonical(Path(path)): Path(path).parent.name if label else contents.GOOD for path, label in labels}
