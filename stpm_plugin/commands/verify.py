"""Compare an exported model with the checkpoint that it came from, on your own images.

    python -m stpm_plugin.verify model.ckpt model.xml FOLDER

The exit code is 0 if scores and labels agree within the limits, else 1. AUROC is compared too if there are images
inside and outside folders named `good`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from rich.progress import track
from torchmetrics.functional.classification import binary_auroc

from ..deployment.images import UNREADABLE, find_images, read_images
from ..deployment.scorer import Scorer
from ..errors import STPMError

if TYPE_CHECKING:
    from ..training.lightning_model import STPM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if the two agree, else 1."""
    parser = argparse.ArgumentParser("python -m stpm_plugin.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help=".ckpt file of a trained STPM")
    parser.add_argument("model", help=".xml or .onnx file that was exported from it")
    parser.add_argument("images", nargs="+", help="folders, files or patterns; folders named `good` are normal")
    parser.add_argument("--device", default="CPU", help="OpenVINO's device (default %(default)s)")
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16", "f16"], help="(default %(default)s)")
    parser.add_argument(
        "--scores", type=float, default=0.01, help="largest difference of a score; 0.1 suits INT8 (default %(default)s)"
    )
    parser.add_argument("--labels", type=float, default=0.99, help="least share of equal labels (default %(default)s)")
    parser.add_argument("--auroc", type=float, default=0.005, help="largest loss of AUROC (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return compare(options)
    except (STPMError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


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


def tensor(image: np.ndarray) -> torch.Tensor:
    """Turn an image as OpenCV reads it, (H, W, 3) BGR, into a model's input, (1, 3, H, W) RGB in [0, 1]."""
    return torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1).unsqueeze(0) / 255


def compare(options: argparse.Namespace) -> int:
    """Score each image with both and print how far they differ; returns the exit code."""
    eager = load(options.checkpoint)
    scorer = Scorer(options.model, options.device, "latency", precision=options.precision)
    paths = find_images(options.images)
    broken: list[str] = []
    before, after, labels_before, labels_after, defects = [], [], [], [], []
    read = read_images(track(paths, "scoring with both"), broken.append)
    for scored in scorer.score(read, maps=True):
        with torch.inference_mode():
            made = eager(tensor(cast("np.ndarray", scored.image)))  # set, since maps are requested
        before.append(float(made.pred_score))
        after.append(scored.score)
        labels_before.append(None if made.pred_label is None else bool(made.pred_label))
        labels_after.append({"normal": False, "anomalous": True}.get(scored.label))
        defects.append(Path(scored.path).parent.name != "good")
    if not before:
        msg = f"none of the images can be read, the first of them {paths[0]}."
        raise STPMError(msg)
    differences = [abs(a - b) for a, b in zip(after, before, strict=True)]
    equal = sum(a == b for a, b in zip(labels_after, labels_before, strict=True)) / len(before)
    mean = sum(differences) / len(differences)
    print(f"{len(before)} images; scores differ by {mean:.2g} on average, {max(differences):.2g} at most")
    print(f"equal labels: {equal:.1%}")
    agree = max(differences) <= options.scores and equal >= options.labels
    if len(set(defects)) == 2:
        old, new = (float(binary_auroc(torch.tensor(s), torch.tensor(defects).long())) for s in (before, after))
        print(f"image AUROC: {old:.4f} before, {new:.4f} after")
        agree = agree and new >= old - options.auroc
    for path in broken:
        print(f"{path} {UNREADABLE}.", file=sys.stderr)
    print("the two agree" if agree else "the two do NOT agree within the limits")
    return 0 if agree else 1
