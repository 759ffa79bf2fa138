"""`stpm explain`: what a trained model sees."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoding import UNREADABLE
from ..deployment.images import find_images, read_images
from ..errors import STPMError
from .verify import load, tensor, trained_on

if TYPE_CHECKING:
    from ..training.lightning_model import STPM

TRAINED = "training images"  # in place of their folder
NORMAL, ANOMALOUS, OTHER = "#0072b2", "#d55e00", "#999999"  # Okabe and Ito's, safe for colour-blind readers


@dataclass
class Explain:
    """Draw what a trained model sees: the levels' maps next to the anomaly map, its training, and its scores.

    Writes training.png, the held-out score over the epochs with the selected one marked; scores.png, a histogram of
    image scores with the threshold; and one panel for each of the images with the highest scores.

    Args:
        checkpoint: .ckpt file of a trained STPM.
        images: Folders, files or patterns; folders named `good` are normal.
        out: Folder to write; one without the panels of an earlier run.
        most: Most images to draw a panel of.
    """

    checkpoint: str
    images: list[str]
    out: Path = Path("explained")
    most: int = 20

    def run(self) -> int:
        """Draw; returns 0, or 2 if images could not be read."""
        return explain(self.checkpoint, self.images, self.out, self.most)


class Seen(NamedTuple):
    """A model's verdict on an image, with what led to it."""

    path: Path
    image: np.ndarray  # (H, W, 3) RGB
    levels: list[np.ndarray]  # (H, W) each, distances in [0, 2]
    anomaly_map: np.ndarray  # (H, W), in [0, 1] where the model normalises
    score: float
    label: bool | None


class Limits(NamedTuple):
    """Above them a model's scores and map values are anomalous; ``None`` where it sets no threshold."""

    image: float | None
    pixel: float | None


def limits_of(post_processor: nn.Module | None) -> Limits:
    """The limits of a post-processor, at its sensitivities, on the scale of what it returns."""
    if not getattr(post_processor, "enable_thresholding", False):
        return Limits(None, None)
    values = [float(getattr(post_processor, f"normalized_{kind}_threshold", math.nan)) for kind in Limits._fields]
    return Limits(*(None if math.isnan(value) else value for value in values))


@torch.inference_mode()
def look(model: STPM, path: str, image: np.ndarray) -> Seen:
    """Score an image (H, W, 3) BGR and keep each level's distances, upsampled to the anomaly map's size."""
    x = tensor(image)
    made = model(x)
    ready = model.pre_processor(x) if model.pre_processor else x
    size = made.anomaly_map.shape[-2:]
    levels = [F.interpolate(level[None], size, mode="bilinear")[0, 0].numpy() for level in model.model.match(ready)[0]]
    label = None if made.pred_label is None else bool(made.pred_label)
    return Seen(Path(path), image[:, :, ::-1], levels, _plane(made.anomaly_map), float(made.pred_score), label)


def _plane(anomaly_map: Tensor) -> np.ndarray:
    return anomaly_map.reshape(anomaly_map.shape[-2:]).numpy()


def draw_image(seen: Seen, layers: Sequence[str | int], limit: float | None) -> Figure:
    """Draw an image, each level's distances on their own scale, and the anomaly map with a contour at its limit."""
    figure = Figure(figsize=(2.2 * (len(layers) + 2), 2.7), layout="constrained")
    axes = figure.subplots(1, len(layers) + 2)
    axes[0].imshow(seen.image)
    axes[0].set_title(f"{seen.path.parent.name}/{seen.path.name}"[-30:], fontsize=8)
    for axis, level, name in zip(axes[1:], seen.levels, layers, strict=False):
        axis.imshow(level, cmap="viridis")
        axis.set_title(f"{name}: at most {level.max():.2g}", fontsize=8)
    axes[-1].imshow(seen.anomaly_map, cmap="viridis", vmin=0, vmax=max(1.0, float(seen.anomaly_map.max())))
    if limit is not None and seen.anomaly_map.min() < limit < seen.anomaly_map.max():
        axes[-1].contour(seen.anomaly_map, [limit], colors="white", linewidths=1)
    word = {None: "", False: ", normal", True: ", anomalous"}[seen.label]
    axes[-1].set_title(f"anomaly map; score {seen.score:.2f}{word}", fontsize=8)
    for axis in axes:
        axis.set_axis_off()
    return figure


def draw_scores(scores: Sequence[float], folders: Sequence[str], limit: float | None) -> Figure:
    """Draw a histogram of image scores with their limit, good images apart if a folder is named `good`."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    bins = np.linspace(0, max(1.0, *scores), 41).tolist()
    values, names = np.array(scores), np.array(folders)
    good, trained = names == "good", names == TRAINED
    if trained.any():
        axis.hist(values[trained], bins, color=OTHER, alpha=0.5, label=TRAINED)
    if good.any():
        axis.hist(values[good], bins, color=NORMAL, alpha=0.7, label="good")
        axis.hist(values[~good & ~trained], bins, color=ANOMALOUS, alpha=0.7, label="others")
    elif not trained.all():
        axis.hist(values[~trained], bins, color=ANOMALOUS if trained.any() else OTHER, alpha=0.7, label="images")
    if limit is not None:
        axis.axvline(limit, color="black", linestyle="--", label="threshold")
    axis.set(xlabel="image score", ylabel="images")
    axis.legend()
    return figure


def draw_training(scores: Sequence[float], chosen: int, score: float) -> Figure:
    """Draw the held-out score over the epochs, the selected one marked.

    Args:
        scores: Score of each epoch since the choice began, which is not epoch 0 if it started over in a resumed run.
        chosen: The selected epoch.
        score: Its score, one of ``scores``.
    """
    first = chosen - scores.index(score)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(first, first + len(scores)), scores, "o-", ms=3, color=NORMAL, label="held-out score")
    axis.plot(chosen, score, "s", ms=8, color=ANOMALOUS, label=f"chosen: epoch {chosen}")
    axis.set(xlabel="epoch", ylabel="mean anomaly map, good images", yscale="log")
    axis.legend()
    return figure


def explain(checkpoint: str, images: Sequence[str], out: Path, most: int) -> int:
    """Write all panels into a folder; returns the exit code.

    Raises:
        STPMError: The folder holds other panels, or the checkpoint or an image does not exist.
    """
    from ..training.selection import CHECKPOINT_KEY

    old = sorted(out.glob("[0-9][0-9]-*.png"))
    if old:
        msg = f"{out} contains panels of an earlier run, such as {old[0].name}: remove them, or set another --out."
        raise STPMError(msg)
    model = load(checkpoint)
    paths: list[str] = find_images(images)
    trained = trained_on(model, paths)
    if trained:
        print(f"{len(trained)} of the images trained the model: their scores are lower than those of other good images")
    limits = limits_of(model.post_processor)
    broken: list[str] = []
    seen: list[Seen] = []
    scores: list[float] = []
    folders: list[str] = []
    for path, image in read_images(track(paths, "scoring"), broken.append, lambda image, _: image):
        found = look(model, path, image)
        scores.append(found.score)
        folders.append(TRAINED if path in trained else found.path.parent.name)
        seen = sorted([*seen, found], key=lambda one: -one.score)[:most]
    out.mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(seen):
        name = f"{number:02d}-{found.path.parent.name}-{found.path.stem}.png"
        draw_image(found, model.model.teacher.layers, limits.pixel).savefig(out / name, dpi=110)
    if scores:
        draw_scores(scores, folders, limits.image).savefig(out / "scores.png", dpi=110)
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(CHECKPOINT_KEY, {})
    if math.isfinite(kept.get("score", math.nan)):  # NaN without held-out images
        draw_training(kept["scores"], kept["epoch"], kept["score"]).savefig(out / "training.png", dpi=110)
    for path in broken:
        print(f"{path} {UNREADABLE}.", file=sys.stderr)
    print(f"wrote {len(seen)} panels to {out}")
    return 2 if broken else 0
