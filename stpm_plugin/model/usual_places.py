"""What the teacher usually sees at each place, for parts that lie alike in all images.

A student sees a small neighbourhood, in which an empty place looks like any other: missing, turned and misplaced parts
are STPM's known weakness. The teacher's features of the training images, which training has anyway, tell what is usual
*here*: a mean and a variance for each channel and position of the deepest level, as PaDiM keeps them (Defard et al.,
arXiv 2011.08785), without its covariances.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REACH = 2.25  # an image is raised to at most this many times an ordinary good image's score


class UsualPlaces(nn.Module):
    """Raises an anomaly map where the teacher's features are unusual for the place.

    Args:
        shape: Channels, height and width of the teacher's deepest level (C, h, w).

    Attributes:
        mean: Of the unit vectors of the training images, at each position (C, h, w).
        variance: Of each of their channels, at each position, above 0 (C, h, w); infinite where images are ignored.
        limit: Oddness up to which nothing is raised, a scalar.
        ordinary: Image score of an ordinary good image, before anything is raised, a scalar.
    """

    mean: Tensor
    variance: Tensor
    limit: Tensor
    ordinary: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("limit", torch.tensor(1.0))
        self.register_buffer("ordinary", torch.tensor(1.0))

    def oddness(self, features: Tensor) -> Tensor:
        """Squared deviations of unit vectors (B, C, h, w) from the usual, in variances: (B, 1, h, w)."""
        return smoothed(((features - self.mean).square() / self.variance).mean(dim=1, keepdim=True))

    def forward(self, anomalies: Tensor, scores: Tensor, features: Tensor) -> Tensor:
        """Raise anomaly maps.

        They are multiplied by the oddness over its limit, but an image's score rises to at most :data:`REACH` times an
        ordinary one. Where the student has already seen a defect, nothing is raised, so that its finer map stays as it
        is.

        Args:
            anomalies: Anomaly maps (B, 1, H, W).
            scores: Their image scores (B,).
            features: The teacher's unit vectors of the deepest level (B, C, h, w).

        Returns:
            Anomaly maps (B, 1, H, W), nowhere lower.
        """
        odd = (self.oddness(features) / self.limit).clamp(min=1)
        most = (REACH * self.ordinary / scores.clamp(min=torch.finfo(torch.float16).tiny)).clamp(min=1)
        factor = torch.minimum(odd, most.view(-1, 1, 1, 1))  # (B, 1, h, w)
        return anomalies * F.interpolate(factor, anomalies.shape[-2:], mode="bilinear", align_corners=False)


def smoothed(values: Tensor) -> Tensor:
    """Means of values (B, 1, h, w) over 3 x 3 positions, over fewer at the edges."""
    return F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)
