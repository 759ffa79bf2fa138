"""`stpm score`: verdicts on images by an exported model, without torch and anomalib."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..deployment.settings import Hint, Precision
from ..errors import STPMError

STOPPED = 130  # exit code after Ctrl-C


class OutputError(Exception):
    """Standard output cannot be written to; the cause is the ``OSError``."""


@dataclass
class Score:
    """Score images with an exported model, to a CSV.

    A row has the image's path, its score in [0, 1] (0.5 is the threshold), raw score and label, the percentage of the
    held-out good images with a lower score, the latency, the image's size and time of change, the model's hash and the
    settings. Run the command again to resume it; images that have changed are scored again.

    The exit code is 0, 1 after an error, 2 if images could not be read or scored, and with --fail-on-anomaly 3 if one
    is anomalous.

    Args:
        model: .xml or .onnx file that `stpm train` or `stpm export` wrote.
        images: Folders, files, videos, or quoted patterns such as 'parts/**/*.png'.
        csv: The table to write or to resume.
        restart: Start the table over, whichever model wrote it.
        json: Also print each new verdict as JSON, with anomalous regions.
        heatmaps: Folder for pictures with anomalous regions, score and label.
        threshold: Raw score above which an image is anomalous, instead of the model's.
        sensitivity: In (0, 1), instead of the model's; above 0.5 finds more.
        ignore: Mask, an image of the images' size; its white parts are ignored.
        reduced_decode: Decode JPEGs at half their size or less, if 3 pixels are left for each of the model's along a
            side. Faster, but scores move (docs/deploy.md). Not with --json, --heatmaps or --ignore.
        watch: Score what is dropped into the folders, until Ctrl-C.
        fail_on_anomaly: Exit code 3 if an image is anomalous.
        device: OpenVINO's device: CPU, GPU, AUTO ...
        hint: Whether to score many images a second, or one image as soon as possible.
        batch: Images per request.
        precision: Precision to compute in; f32 keeps the verdicts of training.
        threads: CPU threads; by default all.
        ray: Score over a Ray cluster: its address, `auto` or `local`.
    """

    model: str
    images: list[str]
    csv: Path = Path("scores.csv")
    restart: bool = False
    json: bool = False
    heatmaps: Path | None = None
    threshold: float | None = None
    sensitivity: float | None = None
    ignore: str | None = None
    reduced_decode: bool = False
    watch: bool = False
    fail_on_anomaly: bool = False
    device: str = "CPU"
    hint: Hint = "throughput"
    batch: int = 1
    precision: Precision = "f32"
    threads: int | None = None
    ray: str | None = None

    def run(self) -> int:
        """Score; returns the exit code."""
        if self.watch and self.ray:
            msg = "--watch runs on one machine: omit --ray."
            raise STPMError(msg)
        if self.reduced_decode and (self.json or self.heatmaps or self.ignore):
            msg = "--reduced-decode gives only scores and labels: omit --json, --heatmaps and --ignore."
            raise STPMError(msg)
        from .scoring import Run  # OpenVINO and OpenCV, which --help need not wait for

        try:
            return Run(self).watch() if self.watch else Run(self).score()
        except KeyboardInterrupt:
            print(f"stopped; run the command again to resume {self.csv}.", file=sys.stderr)
            return STOPPED
        except BrokenPipeError:  # standard error goes to a reader that has ended
            return 1
        except OutputError as error:
            discard_output()
            cause = error.__cause__
            if not isinstance(cause, BrokenPipeError):  # else its reader has seen enough, as `head` has
                why = getattr(cause, "strerror", None) or cause
                print(
                    f"standard output: {why}; fix this, then run the command again to resume {self.csv}.",
                    file=sys.stderr,
                )
            return 1
        except OSError as error:  # an error without a file name is the open CSV's
            where = error.filename or self.csv
            print(
                f"{where}: {error.strerror or error}; fix this, then run the command again to resume.", file=sys.stderr
            )
            return 1


def discard_output() -> None:
    """Send what standard output still holds nowhere, since Python would try again at its end and report that."""
    with contextlib.suppress(OSError):  # in a test or a notebook it may be no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
