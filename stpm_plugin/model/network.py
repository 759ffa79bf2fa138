"""What is trained and exported: teacher, student, and the map of their disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..errors import STPMError
from .features import FeaturePyramid, FrozenPyramid
from .matching import anomaly_map, distances, image_score, normalize
from .usual_places import UsualPlaces


class STPMModel(nn.Module):
    """Teacher and student of one architecture; the student starts at random, the teacher never changes.

    Args:
        backbone: timm model name.
        layers: Names or indices of the matched layers, from shallow to deep; ``None`` for those of strides 4, 8, 16.
        score_share: Share of the anomaly map, its highest values, that the image score is made of
            (:func:`~stpm_plugin.model.matching.image_score`); 0 for the map's maximum.

    Attributes:
        usual_places: What raises maps where the teacher sees what is not usual there; ``None`` where parts do not lie
            alike.
        tiler: anomalib's ``Tiler``, which its ``TilerConfigurationCallback`` sets: networks then see tiles of the
            pre-processed image, and features are joined before they are compared. ``None`` for whole images.

    Raises:
        STPMError: A number is out of range, or the backbone or a layer does not exist.
    """

    teacher: FrozenPyramid
    student: FeaturePyramid

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str | int] | None = None,
        score_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_head(score_share)
        self.backbone = backbone
        self.teacher = FrozenPyramid(backbone, layers)
        self.student = FeaturePyramid(backbone, layers)
        self.score_share = score_share
        self.usual_places: UsualPlaces | None = None
        self.tiler: Any = None
        self.to(memory_format=torch.channels_last)  # twice as fast on CPUs, and no slower elsewhere

    def teach(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to the teacher's unit vectors, (B, C_l, H_l, W_l) for each level."""
        return [normalize(level) for level in self._features(self.teacher, images)]

    def study(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to the student's features, (B, C_l, H_l, W_l) for each level."""
        return self._features(self.student, images)

    def score(self, levels: Sequence[Tensor], size: tuple[int, int], deepest: Tensor | None = None) -> InferenceBatch:
        """Turn the levels' distances into anomaly maps and image scores.

        Args:
            levels: One map of distances (B, H_l, W_l) for each level.
            size: Height and width of the anomaly maps, pixels.
            deepest: The teacher's unit vectors of the deepest level (B, C, h, w), for :attr:`usual_places`; ``None`` to
                leave those out.

        Returns:
            Anomaly maps (B, 1, *size), at least 0, and image scores (B,).
        """
        stride = self.teacher.strides[0]
        anomalies = anomaly_map(levels, size)
        scores = image_score(anomalies, self.score_share, stride)
        if self.usual_places is not None and deepest is not None:
            anomalies = self.usual_places(anomalies, scores, deepest)
            scores = image_score(anomalies, self.score_share, stride)
        return InferenceBatch(pred_score=scores, anomaly_map=anomalies)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Map normalised images (B, 3, H, W) to anomaly maps (B, 1, H, W) and image scores (B,), at least 0."""
        height, width = images.shape[-2:]
        teacher = self.teach(images)
        return self.score(distances(teacher, self.study(images)), (height, width), teacher[-1])

    def _features(self, network: FeaturePyramid, images: Tensor) -> list[Tensor]:
        if self.tiler is None:
            return network(images)
        tiles = self.tiler.tile(images)  # (B x tiles, 3, h, w)
        height, width = images.shape[-2:]
        if (self.tiler.resized_h, self.tiler.resized_w) != (height, width):
            msg = (
                f"tiles of {self.tiler.tile_size_h} x {self.tiler.tile_size_w} pixels every {self.tiler.stride_h} x "
                f"{self.tiler.stride_w} do not cover {height} x {width} evenly, and padding would shift the map: "
                "change tile_size and stride of TilerConfigurationCallback, or image_size."
            )
            raise STPMError(msg)
        return [self.tiler.untile(level) for level in network(tiles)]


def check_head(score_share: float) -> None:
    """Refuse a number that is out of range.

    Raises:
        STPMError: It is; names it and its range.
    """
    if not 0 <= score_share <= 1:
        msg = f"score_share={score_share} must be a share of the anomaly map, or 0 for its maximum."
        raise STPMError(msg)
