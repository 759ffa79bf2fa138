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

MIN_MEAN = 1e-6  # of a map: no real map is this calm, and half precision can hold the number


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
        hard_share: Share of the batch's positions in each level to average over: those of the largest distances.

    Returns:
        Scalar in [0, 4 L] for L levels.
    """
    return loss_of(distances(teacher, student), hard_share)


def loss_of(levels: Sequence[Tensor], hard_share: float = 1.0) -> Tensor:
    """:func:`matching_loss` of distances, one tensor of any shape for each level."""
    return torch.stack([2 * mean_of_largest(level, hard_share) for level in levels]).sum()


def mean_of_largest(values: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of all values, at least of one value."""
    if share == 1:
        return values.mean()
    return values.flatten().topk(max(1, round(share * values.numel())), sorted=False).values.mean()


def anomaly_map(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The levels' distances, upsampled and multiplied, on the scale of one distance.

    The paper multiplies the levels; here the product's root is taken, their geometric mean. The root keeps the order of
    all values, and so AUROC and PRO; its values survive half precision and look right as colours.

    Args:
        levels: One map of distances (B, H_l, W_l) for each level, as :func:`distances` gives them.
        size: Height and width of the map, those of the images, pixels.

    Returns:
        Anomaly map in [0, 2], (B, 1, H, W), float32.
    """
    maps = (F.interpolate(level.unsqueeze(1), size=size, mode="bilinear", align_corners=False) for level in levels)
    return functools.reduce(torch.mul, maps).pow(1 / len(levels))  # (B, 1, H, W)


def image_score(anomalies: Tensor, area: int, stride: int, counted: float | Tensor = 1.0) -> Tensor:
    """Image scores (B,) of anomaly maps (B, 1, H, W): the maximum, or how far the most anomalous part stands out.

    The latter is the geometric mean of two numbers: the part's mean distance, and its ratio to the whole map's mean.
    An image that matches a little worse everywhere, because of its light or its angle, then scores below one with a
    defect on a calm map. An image on which nothing matches still scores high.

    Args:
        anomalies: Anomaly maps.
        area: Size of that part in blocks of ``stride`` x ``stride`` pixels, whatever the map's size, since a defect
            does not grow with the image. A smaller map counts as a whole. 0 for the maximum.
        stride: Input pixels per position of the shallowest level: the map is smooth below this.
        counted: Share of the maps that counts, in (0, 1]; the rest is 0, and the mean is over what counts.

    Returns:
        Scores of at least 0: the maximum is at most 2, the other at most the root of twice the map's blocks over those
        of the part.
    """
    if not area:
        return torch.amax(anomalies, dim=(1, 2, 3))
    blocks = F.avg_pool2d(anomalies, stride).flatten(1)
    count = torch.sym_min(area, blocks.shape[1])
    part = blocks.topk(count, dim=1, sorted=False).values.mean(1)
    return part / (blocks.mean(1) / counted).clamp(min=MIN_MEAN).sqrt()
