"""What is trained and exported: teacher, student, and the map of their disagreement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from .errors import STPMError
from .features import FeaturePyramid, FrozenPyramid
from .matching import anomaly_map, image_score, normalize


class STPMModel(nn.Module):
    """Teacher and student of one architecture; the student starts at random, the teacher never changes.

    Args:
        backbone: timm model name.
        layers: Names or indices of the matched layers, from shallow to deep.
        score_share: Share of the anomaly map, its highest values, whose mean is the image score; 0 for its maximum.
        level_power: Power of the mean over the levels, at most 0; 0 for the paper's product.
        finest_weight: Weight of the shallowest level in that mean, above 0; the others have 1.

    Raises:
        STPMError: A number is out of range, or the backbone or a layer does not exist.
    """

    teacher: FrozenPyramid
    student: FeaturePyramid
    level_scales: Tensor

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str | int] = ("layer1", "layer2", "layer3"),
        score_share: float = 0.0,
        level_power: float = 0.0,
        finest_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= score_share <= 1:
            msg = f"score_share={score_share} must be a share of the anomaly map, or 0 for its maximum."
            raise STPMError(msg)
        if not -4 <= level_power <= 0:
            msg = f"level_power={level_power} must be 0 (the levels' product) or below, down to -4 (nearly the lowest)."
            raise STPMError(msg)
        if not 0 < finest_weight < float("inf"):
            msg = (
                f"finest_weight={finest_weight} must be above 0 (1: all levels alike); `layers` can leave a level out."
            )
            raise STPMError(msg)
        self.teacher = FrozenPyramid(backbone, layers)
        self.student = FeaturePyramid(backbone, layers)
        self.score_share, self.level_power, self.finest_weight = score_share, level_power, finest_weight
        self.register_buffer("level_scales", torch.ones(len(layers)))  # normal distances, once the student is trained
        self.to(memory_format=torch.channels_last)  # twice as fast on CPUs, and no slower elsewhere

    def teach(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to the teacher's unit vectors, (B, C_l, H_l, W_l) for each level."""
        return [normalize(level) for level in self.teacher(images)]

    def score(self, teacher: Sequence[Tensor], student: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Turn two pyramids into the anomaly map (B, 1, H, W) and the image scores (B,), both in [0, 2]."""
        anomalies = anomaly_map(
            teacher, student, size, self.level_power, self.level_scales, finest_weight=self.finest_weight
        )
        scores = image_score(anomalies, self.score_share, self.teacher.strides[0])
        return InferenceBatch(pred_score=scores, anomaly_map=anomalies)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Map normalised images (B, 3, H, W) to anomaly maps (B, 1, H, W) and image scores (B,), both in [0, 2]."""
        height, width = images.shape[-2:]
        return self.score(self.teach(images), self.student(images), (height, width))
