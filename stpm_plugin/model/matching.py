"""The mathematics of STPM: one distance, and its two reductions, the loss and the anomaly map.

Reference: Wang, Han, Ding, Huang, "Student-Teacher Feature Pyramid Matching for Anomaly Detection", BMVC 2021,
arXiv 2103.04257, equations 1 to 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Of a level's normal distance: smaller ones say nothing, and powers of this down to -2 fit half precision.
MIN_RELATIVE_DISTANCE = 0.01


def normalize(features: Tensor) -> Tensor:
    """Scale each position's channel vector of (B, C, H, W) features to unit length, in float32."""
    return F.normalize(features.float(), dim=1)


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the squared Euclidean distance of the channel vectors' directions, at each position.

    It equals one minus their cosine, but keeps its precision where the two nearly agree.

    Args:
        teacher: Unit vectors over channels, as :func:`normalize` gives them, (B, C, H, W).
        student: Features of any length over channels, (B, C, H, W).

    Returns:
        Distances in [0, 2], (B, H, W), float32: 0 for equal directions, 1 for orthogonal, 2 for opposite.
    """
    return 0.5 * (teacher.float() - normalize(student)).square().sum(dim=1)


def distances(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """:func:`distance` at each level: one map (B, H_l, W_l) for each, from shallow to deep."""
    return [distance(t, s) for t, s in zip(teacher, student, strict=True)]


def matching_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], hard_share: float = 1.0) -> Tensor:
    """Training loss: the squared distance of unit vectors, averaged over batch and positions, summed over levels.

    This is the loss of the authors' code, twice the sum of :func:`distance`'s means, so that their learning rate
    (0.4) and weight decay (1e-4) act as they do there. anomalib's ``Stfpm`` has B / 2 times this loss. With a
    ``hard_share`` below 1 a student stops learning where it already matches, so that it matches less of what it has
    never seen (as in EfficientAD, Batzner et al., arXiv 2303.14535).

    Args:
        teacher: One map of unit vectors (B, C_l, H_l, W_l) for each level.
        student: One feature map (B, C_l, H_l, W_l) for each level.
        hard_share: Share of the batch's positions in each level, those of the largest distances, to average over.

    Returns:
        Scalar in [0, 4 L] for L levels.
    """
    return torch.stack([2 * mean_of_largest(level, hard_share) for level in distances(teacher, student)]).sum()


def mean_of_largest(values: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of all values, at least of one; of all where the share is 1."""
    if share == 1:
        return values.mean()
    return values.flatten().topk(max(1, round(share * values.numel())), sorted=False).values.mean()


def anomaly_map(
    levels: Sequence[Tensor],
    size: tuple[int, int],
    power: float = 0.0,
    scales: Tensor | None = None,
    finest_weight: float = 1.0,
) -> Tensor:
    """The levels' distances, upsampled and averaged, on the scale of one distance.

    With a ``power`` of 0 the mean is the geometric one: the paper multiplies the levels, and here the product's root
    is taken. The order of all scores, so AUROC and PRO, is the product's, and the values survive half precision and
    look right as colours. Below 0 it is a power mean of the levels over their ``scales``, so that the lower levels
    count more: what is anomalous is so at all levels. The levels are then upsampled as powers of twice that, so that
    between two positions the lower one counts more, and a coarse level's halo around a defect stays narrow.

    Args:
        levels: One map of distances (B, H_l, W_l) for each level, as :func:`distances` gives them.
        size: Height and width of the map, those of the images, pixels.
        power: Power of the mean, at most 0.
        scales: Mean distance of each level on normal images (L,), as :func:`level_means` gives them; for powers
            below 0. ``None`` for equal ones.
        finest_weight: Weight of the first level in the mean; the others have 1.

    Returns:
        Anomaly map in [0, 2], (B, 1, H, W), float32; a power mean is at most the geometric one.
    """
    maps = [level.unsqueeze(1) for level in levels]  # (B, 1, H_l, W_l)
    weights = [finest_weight, *[1.0] * (len(maps) - 1)]
    if not power:
        product = functools.reduce(torch.mul, (_upsample(x, size).pow(w) for x, w in zip(maps, weights, strict=True)))
        return product.pow(1 / sum(weights))  # (B, 1, H, W)
    scales = maps[0].new_ones(len(maps)) if scales is None else scales
    relative = [(level / scale).clamp(min=MIN_RELATIVE_DISTANCE) for level, scale in zip(maps, scales, strict=True)]
    upsampled = [_upsample(level.pow(2 * power), size).sqrt() for level in relative]  # (B, 1, H, W) each
    total = functools.reduce(torch.add, (level * w for level, w in zip(upsampled, weights, strict=True)))
    scale = (scales.log() * scales.new_tensor(weights)).sum() / sum(weights)
    return (total / sum(weights)).pow(1 / power) * scale.exp()


def _upsample(level: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(level, size=size, mode="bilinear", align_corners=False)


def level_means(levels: Sequence[Tensor]) -> Tensor:
    """Mean over batch and positions of each level's distances (B, H_l, W_l): (L,), in [0, 2]."""
    return torch.stack([level.mean() for level in levels])


def image_score(anomalies: Tensor, share: float, stride: int) -> Tensor:
    """Image scores (B,) of anomaly maps (B, 1, H, W): the maximum, or the mean over the most anomalous part.

    Args:
        anomalies: Anomaly maps.
        share: Share of the map to average over, after blocks of ``stride`` pixels were averaged; 0 for the maximum.
        stride: Input pixels per position of the shallowest level: the map is smooth below this.
    """
    if not share:
        return torch.amax(anomalies, dim=(1, 2, 3))
    blocks = F.avg_pool2d(anomalies, min(stride, *anomalies.shape[-2:])).flatten(1)
    count = torch.sym_max(1, blocks.shape[1] * round(share * 1e6) // 10**6)  # whole numbers, as sizes in exports are
    return blocks.topk(count, dim=1, sorted=False).values.mean(1)
