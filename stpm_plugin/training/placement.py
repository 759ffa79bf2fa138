"""Whether the parts of the training images lie alike, and what is usual at each place if they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..errors import STPMError
from ..model.usual_places import UsualPlaces, smoothed

if TYPE_CHECKING:
    from .lightning_model import STPM
    from .normal_images import NormalImages

ALIGNED = 0.5  # parts lie alike if the position explains more of the features' variance (benchmarks/results/places.md)
FEWEST = 16  # images: with fewer, chance looks like alignment
FLOOR = 0.1  # share of the mean variance added to each, so that trifles in a steady channel do not count
STILL = 1e-6  # lowest mean variance, for images that are all the same
QUANTILE = 0.75  # of the good images' most odd places: three of four good images are raised nowhere

Features = Callable[[], Iterator[Tensor]]  # the deepest level's unit vectors of all training images, (B, C, h, w) each


def learn(module: STPM, images: NormalImages) -> UsualPlaces | None:
    """Learn what is usual at each place, from a run's training images.

    Args:
        module: The model; its ``aligned`` says whether parts lie alike, or is ``None`` to decide from the images.
        images: The run's images.

    Returns:
        The module that raises anomaly maps, on the model's device; ``None`` if parts do not lie alike.

    Raises:
        STPMError: ``aligned`` is ``True``, but there are too few images or they are not resized to one size.
    """
    if module.aligned is False:
        return None
    if module.network_size is None:
        _refuse_if_stated(module, "images are not resized to one size: set image_size")
        return None

    if images.trained < FEWEST:
        _refuse_if_stated(module, f"it needs at least {FEWEST} training images, not {images.trained}: add images")
        return None

    def features() -> Iterator[Tensor]:
        return (good.teacher[-1].float() for good in images.training() if good.teacher is not None)

    count, mean, variance = moments(features, module)
    reached = torch.ones_like(mean[0], dtype=torch.bool)
    if module.model.ignored is not None:
        reached = module.model.ignored.reached((mean.shape[1], mean.shape[2]))
    share = alignment(mean[:, reached], variance[:, reached])
    aligned = module.aligned or share > ALIGNED
    word = "the parts are aligned" if share > ALIGNED else "the parts are not aligned"
    does = "missing and misplaced parts count" if aligned else "their positions are ignored"
    rank_zero_info(f"STPM: {word} ({share:.0%} of the features' variance depends on the position): {does}.")
    if not aligned:
        return None
    variance[:, ~reached] = torch.inf
    maxima = torch.cat([left_out(one, count, mean, variance)[:, 0, reached].amax(1) for one in features()])
    return usual(mean, variance, _everywhere(maxima, module))


def usual(mean: Tensor, variance: Tensor, maxima: Tensor) -> UsualPlaces:
    """Make the module from the training images' statistics.

    Args:
        mean: Of their unit vectors, at each position (C, h, w).
        variance: Of each channel, at each position (C, h, w); infinite where nothing is odd.
        maxima: Oddness of each image's most odd place against the other images (N,).

    Returns:
        On the mean's device; its ordinary score is still to be set.
    """
    places = UsualPlaces(cast("tuple[int, int, int]", tuple(mean.shape))).to(mean.device)
    places.mean.copy_(mean)
    places.variance.copy_(variance + floor(variance))
    places.limit.copy_(maxima.quantile(QUANTILE).clamp(min=1))  # a deviation of one variance is never odd
    return places


def alignment(mean: Tensor, variance: Tensor) -> float:
    """Share of the unit vectors' variance over images and positions that goes with the position, in [0, 1].

    Args:
        mean: Of the images, at each position (C, ...).
        variance: Of each channel over the images, at each position (C, ...).
    """
    within = variance.sum(0).mean()
    mean = mean.flatten(1)
    between = (mean - mean.mean(dim=1, keepdim=True)).square().sum(0).mean()
    return float(between / (between + within).clamp(min=torch.finfo().tiny))


def left_out(features: Tensor, count: int, mean: Tensor, variance: Tensor) -> Tensor:
    """Oddness of training images, each against all others, in closed form.

    Args:
        features: Unit vectors of some of them (B, C, h, w).
        count: Number of all of them, N.
        mean: Of all (C, h, w).
        variance: Of all, over N - 1 (C, h, w); infinite where nothing is odd.

    Returns:
        As :meth:`UsualPlaces.oddness` gives it (B, 1, h, w).
    """
    squares = (features - mean).square() * (count / (count - 1))
    others = ((count - 1) * variance - squares) / (count - 2)  # variance of the others
    deviation = squares * (count / (count - 1))  # from the others' mean
    return smoothed((deviation / (others.clamp(min=0) + floor(variance))).mean(dim=1, keepdim=True))


def floor(variance: Tensor) -> Tensor:
    """What is added to each variance (C, h, w), a scalar; infinite ones do not count."""
    return FLOOR * variance[variance.isfinite()].mean().clamp(min=STILL)


def moments(features: Features, module: STPM) -> tuple[int, Tensor, Tensor]:
    """Number, mean (C, h, w) and unbiased variance (C, h, w) of the unit vectors of all processes' images."""
    count = total = squares = torch.zeros((), dtype=torch.float64)  # on the CPU: not every device has it
    for one in features():
        part = one.cpu().double()
        count, total, squares = count + len(part), total + part.sum(0), squares + part.square().sum(0)
    count, total, squares = (_summed(value, module) for value in (count, total, squares))
    mean = total / count
    variance = ((squares - count * mean.square()) / (count - 1)).clamp(min=0)
    return int(count), mean.float().to(module.device), variance.float().to(module.device)


def _summed(value: Tensor, module: STPM) -> Tensor:
    if module.trainer.world_size == 1:
        return value
    return cast("Tensor", module.trainer.strategy.reduce(value.to(module.device), reduce_op="sum")).cpu()


def _everywhere(values: Tensor, module: STPM) -> Tensor:
    """One process's values (N,) joined with the others', which have as many."""
    return cast("Tensor", module.all_gather(values)).flatten()


def _refuse_if_stated(module: STPM, why: str) -> None:
    """Refuse ``aligned=True`` where it cannot be done.

    Raises:
        STPMError: It was stated.
    """
    if module.aligned:
        msg = f"aligned=True is impossible here, because {why}, or omit aligned."
        raise STPMError(msg)
