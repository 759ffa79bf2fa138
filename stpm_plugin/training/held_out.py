"""The student's scores of the held-out good images, over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor
from torch.nn import functional as F

from ..model.matching import anomaly_map, distances
from .crops import common
from .normal_images import Good
from .thresholds import HeldOut, of_held_out

if TYPE_CHECKING:
    from .lightning_model import STPM


class Matched(NamedTuple):
    """A batch of good images, as teacher and student see it.

    Attributes:
        levels: Distances (B, H_l, W_l) for each level.
        size: Height and width of the images, pixels.
        deepest: The teacher's unit vectors of the deepest level (B, C, h, w).
    """

    levels: list[Tensor]
    size: tuple[int, int]
    deepest: Tensor


@torch.no_grad()
def score(module: STPM, batches: Iterable[Good]) -> tuple[float, list[Matched]]:
    """Score good images of all processes with the student as it is.

    Args:
        module: The model.
        batches: This process's images.

    Returns:
        The levels' product, as the authors take it, averaged over images and the pixels that count, and brought back to
        the scale of one distance, in [0, 2]; and this process's matched images.
    """
    count = len(module.model.teacher.layers)
    sums = torch.zeros(2, device=module.device)  # images, and their products
    kept = []
    module.model.eval()
    for good in batches:
        with module.autocast():
            one = matched(module, good)
        product, ignored = anomaly_map(one.levels, one.size).pow(count), module.model.ignored
        product = (product.mean() if ignored is None else ignored.mean(product)).unsqueeze(0)
        sums += len(good.images) * torch.cat([product.new_ones(1), product])
        kept.append(one)
    module.model.train()
    seen, product = module.trainer.strategy.reduce(sums, reduce_op="sum")
    return float((product / seen).pow(1 / count)), kept


@torch.no_grad()
def predicted(module: STPM, batches: Iterable[Good]) -> Iterator[InferenceBatch]:
    """Predict this process's held-out images in full precision, as a deployed model does."""
    module.model.eval()
    for good in batches:
        yield module.model.score(*matched(module, good))
    module.model.train()


def matched(module: STPM, good: Good) -> Matched:
    """Match teacher and student on a batch of good images."""
    height, width = good.images.shape[-2:]
    if good.teacher is None:
        levels, deepest = module.model.match(good.images)
    else:
        levels, deepest = distances(good.teacher, module.model.study(good.images)), good.teacher[-1]
    if good.window is None:
        return Matched(levels, (height, width), deepest)
    return Matched(*common(levels, good.window, module.model), deepest)


def ordinary_score(module: STPM, matched: Iterable[Matched], count: int) -> Tensor:
    """Median image score of all processes' ``count`` good images, before maps are raised; a scalar."""
    own = of_held_out(module.model.score(one.levels, one.size) for one in matched)
    return gathered(module, own, count)[0].median()


def gathered(module: STPM, own: HeldOut, held: int) -> HeldOut:
    """Join the scores of all processes' held-out images; some processes hold out one more than others."""
    if not held:
        return own
    most = -(-held // module.trainer.world_size)
    padded = torch.stack([F.pad(values, (0, most - len(values)), value=torch.nan) for values in own])
    every = cast("Tensor", module.all_gather(padded.to(module.device))).reshape(-1, 2, most).transpose(0, 1).flatten(1)
    scores, maxima = every[:, ~every[0].isnan()].cpu()
    return scores, maxima


def share_statistics(module: STPM) -> None:
    """Give all processes the mean of their BatchNorm statistics, so that there is one student."""
    if module.trainer.world_size > 1:
        for statistic in module.model.student.buffers():
            if statistic.is_floating_point():
                statistic.copy_(module.trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))
