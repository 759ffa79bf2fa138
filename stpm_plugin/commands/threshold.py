"""Set the thresholds of an exported model anew from good images, without training and without torch.

    python -m stpm_plugin.threshold model.xml GOOD_FOLDER --false-alarms 0.01

Use images that trained nothing: later ones of the line, all good. The image threshold is set from their scores and the
pixel threshold from the maxima of their maps, by the rule of docs/thresholds.md. A new model is written, which every
host reads; its scores are s / (s + threshold). `--value` and `--sensitivity` move the present thresholds instead of
images; with none of these they are shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import openvino as ov

from ..deployment.exported_model import read_model, rejudged, write
from ..deployment.images import UNREADABLE, find_images
from ..deployment.scorer import Scorer
from ..deployment.table import cell
from ..deployment.verdict import Scale, Verdict, read_verdict
from ..errors import STPMError
from ..false_alarms import found, in_words, limit

NEW_IMAGES = "new good images"  # the basis that is written down


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after an error."""
    parser = argparse.ArgumentParser("python -m stpm_plugin.threshold", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, help=".xml file that `anomalib export` wrote")
    parser.add_argument("images", nargs="*", help="good images: folders, files or patterns")
    moved = parser.add_mutually_exclusive_group()
    moved.add_argument("--value", type=float, help="raw image score to take as the threshold, instead of images")
    moved.add_argument("--sensitivity", type=float, help="in (0, 1), above 0.5 finds more, instead of images")
    parser.add_argument(
        "--false-alarms", type=float, default=0.01, help="share of good images to call anomalous (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="model to write (default: MODEL_threshold.xml beside it)")
    parser.add_argument("--device", default="CPU", help="OpenVINO's device (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.images and (options.value is not None or options.sensitivity is not None):
            parser.error("images set the threshold: leave out --value and --sensitivity")
        verdict = verdict_of(options.model)
        if options.images:
            verdict = renewed(verdict, options)
        elif options.value is not None:
            verdict = verdict.with_threshold(options.value)
        elif options.sensitivity is not None:
            verdict = verdict.with_sensitivity(options.sensitivity)
        else:
            print(in_words_of(verdict))
            return 0
        write_with(verdict, options)
    except (STPMError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def verdict_of(model: Path) -> Verdict:
    """Read a model's verdict.

    Raises:
        STPMError: There is no such model, or it describes none.
    """
    verdict = read_verdict(read_model(ov.Core(), model), model)
    if verdict is None:
        msg = f"{model} describes no thresholds: export its checkpoint again to OpenVINO."
        raise STPMError(msg)
    return verdict


def in_words_of(verdict: Verdict) -> str:
    """A verdict's thresholds, and what the good images that it holds say of them."""
    said = (
        f"image threshold {verdict.image.raw_limit:.4g}, pixel threshold {verdict.pixel.raw_limit:.4g} (raw scores), "
    )
    said += f"from the {verdict.basis}, sensitivity {verdict.image.sensitivity:g}"
    if not verdict.held_out_scores:
        return said
    return f"{said}; {in_words(found(np.array(verdict.held_out_scores), verdict.image.raw_limit), 0.5)}"


def renewed(verdict: Verdict, options: argparse.Namespace) -> Verdict:
    """A verdict with thresholds from good images, and their scores in place of the held-out ones.

    Raises:
        STPMError: The share is out of range, or an image cannot be read.
    """
    if not 0 < options.false_alarms < 1:
        msg = f"--false-alarms {options.false_alarms} must lie between 0 and 1, such as 0.01."
        raise STPMError(msg)
    quantile = 1 - options.false_alarms
    broken: list[str] = []
    scores, maxima = raw_scores(options.model, options.device, find_images(options.images), broken)
    if broken:
        msg = f"{cell(broken[0])} {UNREADABLE}; no threshold was set."
        raise STPMError(msg)
    alarms = limit(scores, quantile)
    print(f"image threshold {alarms.value:.4g}; {in_words(alarms, quantile)}")
    return dataclasses.replace(
        verdict,
        basis=NEW_IMAGES,
        image=Scale(alarms.value),
        pixel=Scale(limit(maxima, quantile).value),
        normalize=True,
        label=True,
        held_out_scores=tuple(sorted(scores.tolist())),
        held_out_maxima=tuple(sorted(maxima.tolist())),
    )


def write_with(verdict: Verdict, options: argparse.Namespace) -> None:
    """Write the model with another verdict."""
    target = options.out or options.model.with_name(f"{options.model.stem}_threshold.xml")
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the target may be the model
    write(rejudged(read_model(core, options.model), verdict), target)
    print(f"wrote {target}")


def raw_scores(model: Path, device: str, paths: Sequence[str], broken: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Raw image scores (N,) of images and maxima (N,) of their raw maps; ``broken`` gets those that cannot be read."""
    scorer = Scorer(model, device)
    if scorer.verdict is not None:
        scorer.verdict = dataclasses.replace(scorer.verdict, normalize=False)
    made = [
        (one.raw, float(np.max(cast("np.ndarray", one.anomaly_map))))
        for one in scorer.score(paths, True, broken.append)
    ]
    scores, maxima = np.array(made, np.float64).reshape(-1, 2).T
    return scores, maxima
