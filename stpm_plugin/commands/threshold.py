"""`stpm threshold`: show or move the thresholds of an exported model, without training and without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import openvino as ov

from ..decoding import UNREADABLE
from ..deployment.exported_model import TRAINED, images_of, read_model, rejudged, write
from ..deployment.images import find_images
from ..deployment.scorer import Scorer
from ..deployment.table import cell
from ..deployment.verdict import Scale, Verdict, read_verdict
from ..errors import STPMError
from ..false_alarms import found, in_words, limit
from ..training.data_record import SHORT, identify

NEW_IMAGES = "new good images"  # the basis that is written down


@dataclass
class Threshold:
    """Show the thresholds of an exported model, or write a model with others.

    With --good, the thresholds are set again from good images that did not train the model, such as later ones from
    the line. The image threshold comes from their scores and the pixel threshold from the maxima of their maps, by the
    rule of docs/thresholds.md. Every host reads the new model; its scores are s / (s + threshold).

    Args:
        model: .xml file that `stpm train` or `stpm export` wrote.
        good: Good images to set the thresholds from: folders, files or patterns.
        false_alarms: Share of good images to call anomalous, with --good; by default 0.01.
        value: Raw image score to take as the threshold instead.
        sensitivity: Moves the thresholds instead; in (0, 1), above 0.5 finds more.
        out: .xml file to write; by default MODEL_threshold.xml next to the model.
        device: OpenVINO's device.
    """

    model: Path
    good: list[str] = field(default_factory=list)
    false_alarms: float | None = None
    value: float | None = None
    sensitivity: float | None = None
    out: Path | None = None
    device: str = "CPU"

    def run(self) -> int:
        """Do it; returns 0."""
        ways = {"--good": self.good or None, "--value": self.value, "--sensitivity": self.sensitivity}
        stated = [name for name, value in ways.items() if value is not None]
        if len(stated) > 1:
            msg = f"{' and '.join(stated)} each set the threshold: pass only one."
            raise STPMError(msg)
        if self.false_alarms is not None and not self.good:
            msg = "--false-alarms needs good images: pass a folder of them with --good."
            raise STPMError(msg)
        if self.out is not None and not stated:
            msg = "--out needs a threshold to write: pass --good, --value or --sensitivity."
            raise STPMError(msg)
        if self.device != "CPU" and not self.good:
            msg = "--device is used only with --good: omit it."
            raise STPMError(msg)
        check_target(self.out)
        verdict, digests = verdict_of(self.model), list[str]()
        if self.good:
            verdict, digests = renewed(verdict, self)
        elif self.value is not None:
            verdict = verdict.with_threshold(self.value)
        elif self.sensitivity is not None:
            verdict = verdict.with_sensitivity(self.sensitivity)
        else:
            print(in_words_of(verdict))
            return 0
        write_with(verdict, self, digests)
        return 0


def check_target(out: Path | None) -> None:
    """Refuse to write anything but an .xml file, before images are scored.

    Raises:
        STPMError: It has another suffix, or is a folder.
    """
    if out is not None and (out.is_dir() or out.suffix != ".xml"):
        better = out / "model.xml" if out.is_dir() else out.with_suffix(".xml")
        msg = f"--out {out} must be the model's .xml file, such as {better}."
        raise STPMError(msg)


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
    """A verdict's thresholds, and the false alarms to expect by the good images that it holds."""
    said = (
        f"image threshold {verdict.image.raw_limit:.4g}, pixel threshold {verdict.pixel.raw_limit:.4g} (raw scores), "
    )
    said += f"from the {verdict.basis}, sensitivity {verdict.image.sensitivity:g}"
    if not verdict.held_out_scores:
        return said
    scores = np.array(verdict.held_out_scores)
    if verdict.quantile is not None and verdict.image.sensitivity == 0.5:  # the scores themselves set the threshold
        return f"{said}; {in_words(limit(scores, verdict.quantile), verdict.quantile)}"
    return f"{said}; {in_words(found(scores, verdict.image.raw_limit))}"


def renewed(verdict: Verdict, options: Threshold) -> tuple[Verdict, list[str]]:
    """A verdict with thresholds from good images and their scores in place of the held-out ones; and their digests.

    Raises:
        STPMError: The share is out of range, or an image cannot be read.
    """
    share = 0.01 if options.false_alarms is None else options.false_alarms
    if not 0 < share < 1:
        msg = f"--false-alarms {share} must be between 0 and 1, such as 0.01."
        raise STPMError(msg)
    quantile = 1 - share
    broken: list[str] = []
    paths = find_images(options.good)
    _, _, digests = identify([Path(path) for path in paths])
    known = images_of(read_model(ov.Core(), options.model), TRAINED)
    trained = {path for path, digest in zip(paths, digests, strict=True) if digest[:SHORT] in known}
    if trained:
        msg = (
            f"{len(trained)} of the {len(paths)} images trained the model, such as {min(trained)}: their scores are "
            "lower than those of other good images. Pass good images that did not train it."
        )
        raise STPMError(msg)
    scores, maxima = raw_scores(options.model, options.device, paths, broken)
    if broken:
        msg = f"{cell(broken[0])} {UNREADABLE}; no threshold was set."
        raise STPMError(msg)
    alarms = limit(scores, quantile)
    print(f"image threshold {alarms.value:.4g}; {in_words(alarms, quantile)}")
    verdict = dataclasses.replace(
        verdict,
        basis=NEW_IMAGES,
        image=Scale(alarms.value),
        pixel=Scale(limit(maxima, quantile).value),
        normalize=True,
        label=True,
        held_out_scores=tuple(sorted(scores.tolist())),
        held_out_maxima=tuple(sorted(maxima.tolist())),
        quantile=quantile,
    )
    return verdict, digests


def write_with(verdict: Verdict, options: Threshold, digests: Collection[str]) -> None:
    """Write the model with another verdict, and the digests of the images that set its thresholds."""
    target = options.out or options.model.with_name(f"{options.model.stem}_threshold.xml")
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the target may be the model
    write(rejudged(read_model(core, options.model), verdict, digests), target)
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
