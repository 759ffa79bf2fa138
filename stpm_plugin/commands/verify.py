"""`stpm verify`: does an exported model agree with its checkpoint, and at which precision?"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import openvino as ov
import torch
from rich.progress import track
from torchmetrics.functional.classification import binary_auroc

from ..decoding import UNREADABLE
from ..deployment.images import find_images, read_images
from ..deployment.scorer import Scorer
from ..deployment.settings import Precision, precisions
from ..deployment.table import cell, video_of
from ..errors import STPMError
from ..training.data_record import among

if TYPE_CHECKING:
    from ..training.lightning_model import STPM


@dataclass
class Verify:
    """Compare an exported model with its checkpoint on images.

    For each precision that the device offers, it prints how far scores and labels differ, how long an image takes, and
    whether the precision is safe. AUROC is compared too if there are images inside and outside folders named `good`;
    images that trained the model do not count for it. The exit code is 0 if scores and labels agree within the limits
    (in f32, or in all that --precision names), 2 if they agree but images were unreadable, else 1.

    Args:
        checkpoint: .ckpt file of a trained STPM.
        model: .xml or .onnx file that was exported from it.
        images: Folders, files, videos or patterns; folders named `good` are normal.
        device: OpenVINO's device.
        precision: Precisions to compare; by default all that the device offers.
        scores: Largest difference of a score that is allowed; 0.1 suits INT8.
        labels: Smallest share of equal labels that is allowed.
        auroc: Largest loss of AUROC that is allowed.
    """

    checkpoint: str
    model: str
    images: list[str]
    device: str = "CPU"
    precision: list[Precision] = field(default_factory=list)
    scores: float = 0.01
    labels: float = 0.99
    auroc: float = 0.005

    def run(self) -> int:
        """Compare; returns the exit code."""
        return compare(self)


def load(checkpoint: str) -> STPM:
    """Load a trained model on the CPU, ready to score.

    Raises:
        STPMError: There is no such file.
    """
    from ..training.lightning_model import STPM

    if not Path(checkpoint).is_file():
        msg = f"the checkpoint {checkpoint} does not exist."
        raise STPMError(msg)
    return STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()


def trained_on(model: STPM, paths: Sequence[str]) -> set[str]:
    """Which of the images trained the model: their scores say little about other images."""
    record = model.data_record
    found = set() if record is None else among([Path(path) for path in paths], record.trained_digests)
    return {str(path) for path in found}


def tensor(image: np.ndarray) -> torch.Tensor:
    """Turn an image as OpenCV reads it, (H, W, 3) BGR, into a model's input, (1, 3, H, W) RGB in [0, 1]."""
    return torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1).unsqueeze(0) / 255


class Verdicts(NamedTuple):
    """What a model says of images, in their order.

    Attributes:
        scores: Image scores.
        labels: Whether each is anomalous; ``None`` where the model sets no threshold.
        milliseconds: Mean time of the model for an image.
    """

    scores: np.ndarray
    labels: list[bool | None]
    milliseconds: float


def eager_verdicts(model: STPM, paths: Sequence[str], broken: dict[str, None]) -> tuple[list[str], Verdicts]:
    """Score images with a checkpoint; returns those that can be read, and the verdicts on them."""
    read, scores, labels, begin = [], [], [], time.perf_counter()
    for path, image in read_images(
        track(paths, "checkpoint"), lambda name: broken.update({name: None}), lambda image, _: image
    ):
        with torch.inference_mode():
            made = model(tensor(image))
        read.append(path)
        scores.append(float(made.pred_score))
        labels.append(None if made.pred_label is None else bool(made.pred_label))
    spent = 1000 * (time.perf_counter() - begin)
    return read, Verdicts(np.array(scores), labels, spent / max(len(read), 1))


def exported_verdicts(scorer: Scorer, paths: Sequence[str], name: str) -> Verdicts:
    """Score images with an exported model."""
    found = list(scorer.score(track(paths, name)))
    labels = [{"normal": False, "anomalous": True}.get(scored.label) for scored in found]
    spent = 1000 * float(np.mean([scored.latency for scored in found]))
    return Verdicts(np.array([scored.score for scored in found]), labels, spent)


def agree(
    before: Verdicts, after: Verdicts, defective: np.ndarray, unseen: np.ndarray, options: Verify
) -> tuple[bool, str]:
    """Whether two models' verdicts agree within the limits, and how far they do, in words; AUROC of unseen images."""
    differences = np.abs(after.scores - before.scores)
    equal = float(np.mean([a == b for a, b in zip(after.labels, before.labels, strict=True)]))
    within = bool(differences.max() <= options.scores and equal >= options.labels)  # no, where one is not a number
    words = f"scores differ by {differences.mean():.2g} on average, {differences.max():.2g} at most; "
    words += f"equal labels {equal:.1%}; {after.milliseconds:.1f} ms an image"
    if within and 0 < defective[unseen].sum() < unseen.sum():
        truth = torch.from_numpy(defective[unseen]).long()
        old, new = (float(binary_auroc(torch.from_numpy(one.scores[unseen]), truth)) for one in (before, after))
        words += f"; image AUROC {old:.4f} before, {new:.4f} after"
        within = new >= old - options.auroc
    return within, words


def compare(options: Verify) -> int:
    """Score each image with both and print how far they differ; returns the exit code."""
    eager, broken = load(options.checkpoint), dict[str, None]()
    wanted = options.precision or precisions(ov.Core(), options.device)
    scorers = {name: Scorer(options.model, options.device, "latency", precision=name) for name in wanted}
    paths = find_images(options.images)
    read, before = eager_verdicts(eager, paths, broken)
    if not read:
        msg = f"none of the {len(paths)} images can be read; the first is {paths[0]}."
        raise STPMError(msg)
    defective = np.array([Path(path).parent.name != "good" for path in read])
    trained = trained_on(eager, read)
    unseen = np.array([path not in trained for path in read])
    print(f"{len(read)} images, {options.model} against {options.checkpoint}")
    if trained:
        print(f"{len(trained)} of them trained the model: they are compared, but do not count for AUROC")
    files = list(dict.fromkeys(map(video_of, read)))
    safe = {}
    for name, scorer in scorers.items():
        safe[name], words = agree(before, exported_verdicts(scorer, files, name), defective, unseen, options)
        print(f"{name}: {words}: {'safe' if safe[name] else 'NOT safe'}")
    for path in broken:
        print(f"{cell(path)} {UNREADABLE}.", file=sys.stderr)
    right = all(safe.values()) if options.precision else safe[wanted[0]]
    print("checkpoint and export agree" if right else "checkpoint and export do NOT agree within the limits")
    return (2 if broken else 0) if right else 1
