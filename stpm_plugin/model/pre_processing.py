"""Resize and normalise alike in training, in prediction and in the exported graph.

anomalib antialiases the resize in its Lightning path but not in the exported graph, so their scores differ. An
antialiased bilinear resize is two matrix products, which every runtime can compute: the exported graph carries these.
"""

from __future__ import annotations

from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class STPMPreProcessor(PreProcessor):
    """anomalib's pre-processor whose exported form antialiases as its Lightning form does.

    Args:
        transform: As in anomalib; ``None`` means antialiased resize to ``image_size``, then normalisation.
        image_size: Height and width of the network's input, pixels, or ``None`` for the images' own; used when
            ``transform`` is ``None``.
        mean: The channels' means, for images in [0, 1]; used when ``transform`` is ``None``.
        std: The channels' standard deviations; used when ``transform`` is ``None``.
    """

    def __init__(
        self,
        transform: Transform | None = None,
        image_size: tuple[int, int] | None = (256, 256),
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        if transform is None:
            resized = [] if image_size is None else [Resize(tuple(image_size), antialias=True)]
            transform = Compose([*resized, Normalize(list(mean), list(std))])
        super().__init__(transform)
        self.export_transform = exportable(self.transform, self.export_transform)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform that a checkpoint describes, and its exported form."""
        super().load_checkpoint_config(config)
        if self.transform is not None:
            self.export_transform = exportable(self.transform, self.export_transform)


def exportable(transform: Transform, fallback: Transform) -> nn.Module:
    """Replace each antialiased bilinear ``Resize`` to a fixed size by matrix products.

    Args:
        transform: The transform of the Lightning path.
        fallback: anomalib's exportable form of it, whose other parts are kept.
    """
    if isinstance(transform, Compose):
        parts = [exportable(*pair) for pair in zip(transform.transforms, fallback.transforms, strict=True)]
        return nn.Sequential(*parts)
    fixed = isinstance(transform, Resize) and transform.size is not None and len(transform.size) == 2
    if fixed and transform.antialias and InterpolationMode(transform.interpolation) == InterpolationMode.BILINEAR:
        return AntialiasedResize(tuple(transform.size))
    return fallback


class AntialiasedResize(nn.Module):
    """Bilinear resize with antialiasing, equal to torchvision's, made of operations that any runtime has.

    Args:
        size: Output height and width, pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize images (B, C, H, W) to (B, C, size[0], size[1])."""
        size = tuple(images.shape[-2:])
        if all(isinstance(length, int) for length in size) and size == self.size:  # an export's may be symbols
            return images
        rows = resize_weights(images.shape[-2], self.size[0], images)  # (h, H)
        columns = resize_weights(images.shape[-1], self.size[1], images)  # (w, W)
        return rows @ images @ columns.transpose(0, 1)


def resize_weights(length: int, wanted: int, like: Tensor) -> Tensor:
    """Weights of each of ``length`` pixels in each of ``wanted`` pixels: a triangle as wide as the reduction.

    Args:
        length: Pixels along the axis before.
        wanted: Pixels along the axis after.
        like: A tensor of the wanted type and device.

    Returns:
        Weights (wanted, length); each row sums to 1.
    """
    # In whole numbers, so that a device that computes in bfloat16 still knows one pixel from the next.
    centers = (2 * torch.arange(wanted, device=like.device) + 1) * length  # in halves of a pixel, times `wanted`
    pixels = (2 * torch.arange(length, device=like.device) + 1) * wanted
    reach = 2 * (torch.zeros_like(pixels[0]) + length).clamp(min=wanted)
    weights = (reach - (pixels - centers.unsqueeze(1)).abs()).clamp(min=0).to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
