"""One run of `stpm score`: a worker, a table, and the messages about them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding import UNREADABLE
from ..deployment.drift import Drift
from ..deployment.heatmaps import belongs, file_of, mark
from ..deployment.images import VIDEOS, find_images
from ..deployment.scorer import Scored, Scorer
from ..deployment.table import Stamp, Table, cell, stamp, video_of
from ..deployment.watch import arrivals, check
from ..deployment.worker import Worker
from ..errors import STPMError
from .score import OutputError
from .terminal import Progress

if TYPE_CHECKING:
    from ..deployment.cluster import Cluster
    from .score import Score

UNREAD, ANOMALOUS = 2, 3  # exit codes
AGAIN = 5.0  # seconds until a watch tries again what failed


class Run:
    """One run of the command: a worker, a table, and the messages about them."""

    def __init__(self, options: Score) -> None:
        self.options = options
        if options.watch:
            check(options.images)
        self.paths = [] if options.watch else find_images(options.images)
        folders = options.images if options.watch else [Path(path).parent for path in self.paths]
        self.root = common_folder(folders)
        self.worker = self._worker()
        scorer = self.worker.scorer
        if options.fail_on_anomaly and not scorer.judges:
            msg = f"{options.model} calls no image anomalous, since it has no threshold: omit --fail-on-anomaly."
            raise STPMError(msg)
        self.table = Table(options.csv, scorer.digest, scorer.settings, options.restart, self.paths, options.watch)
        self.drift = Drift(scorer.verdict.held_out_scores if scorer.verdict else ())
        self.stamps: dict[str, Stamp | None] = {}
        self.broken: dict[str, str] = {}  # images without a row, and why
        self.refused: dict[str, Stamp | None] = {}  # those that another try would not score, as they were
        self.counts = {"": 0, "normal": 0, "anomalous": 0}

    def score(self) -> int:
        """Score the images that have no row, or no heat map; returns the exit code."""
        left = [path for path in self.paths if not self._done(path)]
        if self.table.replaced:
            print(f"{self.table.replaced} images have changed or are gone: their rows were dropped.", file=sys.stderr)
        with self.table:
            progress = Progress(len(left))
            try:
                for scored in self.worker.rows(
                    self._stamped(left), self._note_unreadable, self._note_refused, self._kept
                ):
                    self._keep(scored)
                    progress.step()
            finally:
                progress.end()
            if not progress.done and not self.broken:
                print("all images are scored already.", file=sys.stderr)
            names = set(map(cell, self.paths))
            for row in self.table.rows.values():
                if video_of(row[0]) in names:
                    self.counts[row[3]] += 1
        for why in self.broken.values():
            print(why, file=sys.stderr)
        return self._end()

    def watch(self) -> int:
        """Score what is dropped into the folders, until Ctrl-C; returns the exit code."""
        said = ""
        print(f"watching {', '.join(self.options.images)}; Ctrl-C ends it.", file=sys.stderr)
        with self.table:
            try:
                for paths in arrivals(self.options.images, self._done, self._report, self._report_folder):
                    try:
                        for scored in self.worker.rows(self._stamped(paths), self._report_once, self._report_refused):
                            self._keep(scored)
                            self.counts[scored.label] += 1
                        said = ""
                    except (OSError, STPMError) as error:  # nothing is lost: what has no row is tried again
                        if str(error) != said:
                            said = str(error)
                            print(f"{said}; trying again every {AGAIN:.0f} s.", file=sys.stderr)
                        time.sleep(AGAIN)
            except KeyboardInterrupt:
                print(file=sys.stderr)
        return self._end()

    def _worker(self) -> Cluster | Worker:
        """Load the model, here or over a cluster."""
        names = ["model", "device", "hint", "batch", "precision", "threads"]
        names += ["threshold", "sensitivity", "ignore", "reduced_decode"]
        options: dict[str, Any] = {name: getattr(self.options, name) for name in names}
        if self.options.ray:
            from ..deployment.cluster import Cluster  # Ray takes a second to import, and few have it

            return Cluster(self.options.ray, options, self.options.heatmaps, self.root, self.options.json)
        return Worker(Scorer(**options), self.options.heatmaps, self.root, self.options.json)

    def _done(self, path: str) -> bool:
        """Whether there is nothing left to do for a file."""
        if Path(path).suffix.lower() in VIDEOS:
            return False  # its frames are counted while it is read
        if path in self.refused and self.refused[path] == stamp(path):
            return True
        return self._kept(path)

    def _kept(self, name: str) -> bool:
        """Whether an image or a video's frame has a row, and its own heat map if one is wanted."""
        folder, scorer = self.options.heatmaps, self.worker.scorer
        if folder is None or not self.table.has(name):
            return self.table.has(name)
        return belongs(file_of(name, folder, self.root), mark(name, stamp(name), scorer.digest, scorer.settings))

    def _stamped(self, paths: Sequence[str]) -> Any:
        """Note each image's stamp before it is read."""
        for path in paths:
            self.stamps[path] = stamp(path)
            yield path

    def _keep(self, scored: Scored) -> None:
        """Write a verdict to the table, print it if asked to, and warn if the scores have left the held-out ones."""
        self.broken.pop(scored.path, None)
        if not self.table.has(scored.path):
            self.table.append(scored, self.stamps.get(video_of(scored.path)))
        if self.options.json:
            try:
                print(json.dumps(as_dictionary(scored)), flush=True)
            except OSError as error:  # told apart from the table's, which a watch waits for
                raise OutputError from error
        if warning := self.drift.add(scored.raw):
            print(f"\nwarning: {warning}", file=sys.stderr)

    def _note_unreadable(self, path: str) -> None:
        """Note a file that cannot be read."""
        self.broken[path] = f"{cell(path)} {UNREADABLE}; no row was written."

    def _note_refused(self, path: str, why: str) -> None:
        """Note an image that cannot be scored."""
        self.broken[path] = f"{cell(why)} No row was written."
        self.refused[path] = self.stamps.get(video_of(path))

    def _report(self, path: str) -> None:
        """Note a file that cannot be read, and say so."""
        self._note_unreadable(path)
        print(self.broken[path], file=sys.stderr)

    def _report_folder(self, error: OSError) -> None:
        """Say that the folders cannot be listed."""
        print(f"{error.filename}: {error.strerror or error}; trying again.", file=sys.stderr)

    def _report_once(self, path: str) -> None:
        """Report a file that was an image a moment ago, and may be one again."""
        if path not in self.broken:
            self._report(path)

    def _report_refused(self, path: str, why: str) -> None:
        """Note an image that cannot be scored, and say so."""
        self._note_refused(path, why)
        print(self.broken[path], file=sys.stderr)

    def _end(self) -> int:
        """Say what was found; returns the exit code."""
        total = sum(self.counts.values())
        found = f"{self.counts['anomalous']} of {total} anomalous" if total > self.counts[""] else f"{total} scored"
        print(f"{found}, {self.options.csv}", file=sys.stderr)
        if self.broken:
            return UNREAD
        return ANOMALOUS if self.options.fail_on_anomaly and self.counts["anomalous"] else 0


def common_folder(folders: Sequence[str | Path]) -> Path:
    """The folder that all folders are in; an empty path if they are on several drives."""
    try:
        return Path(os.path.commonpath([Path(folder).resolve() for folder in folders]))
    except ValueError:
        return Path()


def as_dictionary(scored: Scored) -> dict[str, Any]:
    """A verdict as JSON has it."""
    found = [region._asdict() for region in scored.regions]
    return {
        "path": cell(scored.path),
        "score": scored.score,
        "raw": None if scored.raw != scored.raw else scored.raw,
        "label": scored.label or None,
        "percentile": scored.percentile,
        "latency_ms": 1000 * scored.latency,
        "regions": found,
    }
