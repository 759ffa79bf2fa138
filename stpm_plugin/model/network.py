"""What is trained and exported: teacher, student, and the map of their disagreement."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..errors import STPMError
from .features import FeaturePyramid, FrozenPyramid
from .ignored import Ignored
from .matching import anomaly_map, distances, image_score, normalize
from .reach import reaches, stitched
from .usual_places import UsualPlaces
from .windows import LARGEST, Reach

BYTES_A_PIXEL = 240  # memory that networks take for each pixel of a window, in float32 (docs/own-size.md)


class STPMModel(nn.Module):
    """Teacher and student of one architecture; the student starts at random, the teacher never changes.

    Args:
        backbone: timm model name.
        layers: Names or indices of the matched layers, from shallow to deep; ``None`` for those of strides 4, 8, 16.
        score_area: Number of most anomalous positions of the finest level that make the image score
            (:func:`~stpm_plugin.model.matching.image_score`); 0 for the map's maximum.

    Attributes:
        usual_places: Raises maps where the teacher's features are unusual for the place; ``None`` if parts are not
            aligned.
        ignored: Clears maps where images are ignored; ``None`` if nothing is ignored.
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
        score_area: int = 0,
    ) -> None:
        super().__init__()
        check_head(score_area)
        self.backbone = backbone
        self.teacher = FrozenPyramid(backbone, layers)
        self.student = FeaturePyramid(backbone, layers)
        self.score_area = score_area
        self.usual_places: UsualPlaces | None = None
        self.ignored: Ignored | None = None
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
        anomalies = anomaly_map(levels, size)
        if self.ignored is not None:
            anomalies = self.ignored(anomalies)
        scores = self._image_score(anomalies)
        if self.usual_places is not None and deepest is not None:
            anomalies = self.usual_places(anomalies, scores, deepest)
            scores = self._image_score(anomalies)
        return InferenceBatch(pred_score=scores, anomaly_map=anomalies)

    def match(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compare both networks on normalised images (B, 3, H, W), on large ones in windows, with the same result.

        Returns:
            Distances (B, H_l, W_l) for each level, and the teacher's unit vectors of the deepest (B, C, h, w).
        """
        if self._whole(images):
            teacher = self.teach(images)
            return distances(teacher, self.study(images)), teacher[-1]
        seen = self.reaches or []

        def levels(window: Tensor) -> list[Tensor]:
            teacher = self.teach(window)
            return [*distances(teacher, self.study(window)), teacher[-1]]

        *made, deepest = stitched(levels, images, LARGEST, [*seen, seen[-1]])
        return made, deepest

    def forward(self, images: Tensor) -> InferenceBatch:
        """Map normalised images (B, 3, H, W) to anomaly maps (B, 1, H, W) and image scores (B,), at least 0."""
        height, width = images.shape[-2:]
        levels, deepest = self.match(images)
        return self.score(levels, (height, width), deepest)

    @functools.cached_property
    def reaches(self) -> list[Reach] | None:
        """How far each level sees; ``None`` for a network that cannot take an image in windows."""
        return reaches(self.teacher)

    def _image_score(self, anomalies: Tensor) -> Tensor:
        counted = 1.0 if self.ignored is None else self.ignored.share
        return image_score(anomalies, self.score_area, self.teacher.strides[0], counted)

    def _whole(self, images: Tensor) -> bool:
        """Whether the networks take images whole: always in an exported graph, and with a tiler."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.tiler is not None:
            return True
        return max(images.shape[-2:]) <= LARGEST or self.reaches is None

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


def check_head(score_area: int) -> None:
    """Refuse a number that is out of range.

    Raises:
        STPMError: ``score_area`` is negative or not a whole number.
    """
    if score_area < 0 or score_area != int(score_area):
        msg = f"score_area={score_area} must be a number of positions, such as 12, or 0 for the map's maximum."
        raise STPMError(msg)
