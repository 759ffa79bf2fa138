"""Score folders of images with an exported model: OpenVINO, OpenCV and NumPy, no torch and no anomalib.

    python -m stpm_plugin.score model.xml FOLDER --csv scores.csv --heatmaps maps

Writes one CSV row per image, in the order of the paths: path, score in [0, 1] (0.5 is the threshold), label, latency in
milliseconds. Run again, it resumes an interrupted CSV. Images that cannot be read are skipped and named at the end; the
exit code is then 2.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ..deployment.images import UNREADABLE, find_images
from ..deployment.scorer import Scorer
from ..deployment.worker import Worker
from ..errors import STPMError

COLUMNS = ("path", "score", "label", "latency_ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after an error, 2 if images were unreadable, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m stpm_plugin.score", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help=".xml or .onnx file that `anomalib export` wrote")
    parser.add_argument("images", nargs="+", help="folders, files, or quoted patterns such as 'parts/**/*.png'")
    parser.add_argument("--csv", type=Path, default=Path("scores.csv"), help="rows are appended (default %(default)s)")
    parser.add_argument("--heatmaps", type=Path, help="folder for the images with their anomaly maps laid over")
    parser.add_argument("--device", default="CPU", help="CPU, GPU, AUTO ... (default %(default)s)")
    parser.add_argument("--hint", choices=["latency", "throughput"], default="throughput", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images of one size in a request (default %(default)s)")
    parser.add_argument(
        "--precision", choices=["f32", "bf16", "f16"], help="to compute in; by default the device's own"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="score over a Ray cluster: its address, `auto` or `local`")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print(f"\nstopped; run the command again to resume {options.csv}.", file=sys.stderr)
        return 130
    except STPMError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:  # an error without a file name is the open CSV's
        place = error.filename or options.csv
        print(f"\n{place}: {error.strerror or error}; fix this, then run the command again to resume.", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """Score the images that are not yet in the CSV; returns 0, or 2 if some were unreadable."""
    paths = find_images(options.images)
    root = Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))
    settings = (options.model, options.device, options.hint, options.batch, options.precision)
    if options.ray:
        from ..deployment.cluster import Cluster  # Ray takes a second to import, and few have it

        worker: Cluster | Worker = Cluster(options.ray, settings, options.heatmaps, root)
    else:
        worker = Worker(Scorer(*settings), options.heatmaps, root)
    file, have = open_csv(options.csv)
    broken: list[str] = []
    left = [path for path in paths if path not in have]
    with file:
        rows, progress = csv.writer(file), Progress(len(left))
        for row in worker.rows(left, broken.append):
            rows.writerow([row[0], f"{row[1]:.6g}", row[2], f"{row[3]:.2f}"])
            file.flush()
            progress.step()
    progress.end()
    for path in broken:
        print(f"{path} {UNREADABLE}; no row was written.", file=sys.stderr)
    return 2 if broken else 0


def open_csv(path: Path) -> tuple[IO[str], set[str]]:
    """Open a CSV to append to; returns it and the paths it already has.

    A last row that a crash cut off is removed.

    Raises:
        STPMError: The file is not a CSV of scores.
    """
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as raw:
            content = raw.read()
            raw.truncate(content.rfind(b"\n") + 1)
        with path.open(newline="") as text:
            kept = list(csv.reader(text))
        if kept and tuple(kept[0]) != COLUMNS:
            msg = f"{path} is not a CSV of scores (its first row is not {','.join(COLUMNS)}): give --csv another file."
            raise STPMError(msg)
        if kept:
            return path.open("a", newline=""), {row[0] for row in kept[1:]}
    file = path.open("w", newline="")
    csv.writer(file).writerow(COLUMNS)
    return file, set()


class Progress:
    """One line on the terminal: images done, images per second, seconds left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started, self.shown = total, 0, time.monotonic(), 0.0

    def step(self) -> None:
        """Count an image."""
        self.done += 1
        if time.monotonic() - self.shown > 0.5:
            self.show()

    def show(self, end: str = "") -> None:
        """Rewrite the line."""
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.started, 1e-9)
        left = (self.total - self.done) / rate if self.done else 0.0
        print(f"\r{self.done}/{self.total} images, {rate:.1f} a second, {left:.0f} s left ", end=end, file=sys.stderr)

    def end(self) -> None:
        """Show the line a last time and end it."""
        self.show("\n")
