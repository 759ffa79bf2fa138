"""The part of all images that is neither trained on nor scored, such as a bench around the part.

The mask acts on the anomaly map. A level's position is trained if the map's upsampling carries its distance into a
pixel that counts: exactly what the verdict uses is trained. If positions across the mask's edge stayed untrained,
their distances would leak into pixels that count, and the edge would be the most anomalous place of each good image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pre_processing import AntialiasedResize


class Ignored(nn.Module):
    """Clears what is ignored out of anomaly maps.

    Args:
        size: Height and width of the maps, pixels.
        digest: Hash of the mask's file.

    Attributes:
        counted: 1 where maps count, 0 where they are ignored, (1, 1, H, W).
    """

    counted: Tensor

    def __init__(self, size: tuple[int, int], digest: str) -> None:
        super().__init__()
        self.size, self.digest = size, digest
        self.register_buffer("counted", torch.ones(1, 1, *size))

    def take(self, mask: Tensor) -> None:
        """Take a mask (H', W') of the images' own size, true where they are ignored.

        A pixel of the map is ignored if the resize makes it from any ignored pixel.
        """
        shrunk = AntialiasedResize(self.size)(mask[None, None].float())
        self.counted.copy_(shrunk == 0)

    def forward(self, maps: Tensor) -> Tensor:
        """Clear maps (B, 1, H, W) where they are ignored."""
        return maps * self.counted

    @property
    def share(self) -> Tensor:
        """Share of the map that counts, a scalar in (0, 1]."""
        return self.counted.mean()

    def mean(self, maps: Tensor) -> Tensor:
        """Mean of maps (B, 1, H, W) over what counts, a scalar."""
        return self(maps).mean() / self.share

    def reached(self, shape: tuple[int, int]) -> Tensor:
        """Positions of a level (h, w) whose values reach a pixel that counts, bool (h, w)."""
        rows, columns = (
            F.interpolate(torch.eye(count, device=self.counted.device)[None], length, mode="linear")[0]
            for count, length in zip(shape, self.size, strict=True)
        )  # (h, H) and (w, W): weights of each position in each pixel
        return rows @ self.counted[0, 0] @ columns.T > 0

    def kept(self, level: Tensor) -> Tensor:
        """Keep those values of a level (B, ..., h, w) that reach a pixel that counts: (B, ..., N)."""
        return level[..., self.reached((level.shape[-2], level.shape[-1]))]
