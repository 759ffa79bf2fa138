"""How far a network sees, and its levels of large images, computed in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .features import FeaturePyramid
from .windows import Reach, over

PROBES = (1024, 1025)  # pixels: even at each stride, and odd at each


@torch.no_grad()
def reaches(network: FeaturePyramid) -> list[Reach] | None:
    """Find how far each level of a network sees: which outputs become NaN if a part of the input is NaN.

    Args:
        network: In eval mode; it is run on two narrow images.

    Returns:
        One for each level; ``None`` if a level sees the whole image (squeeze-and-excitation, attention), or if the
        network only takes images of certain sizes.
    """
    found = [_probed(network, length) for length in PROBES]
    if None in found:
        return None
    pairs = zip(*(each for each in found if each is not None), strict=True)
    return [Reach(one.stride, max(one.before, other.before), max(one.after, other.after)) for one, other in pairs]


def _probed(network: FeaturePyramid, length: int) -> list[Reach] | None:
    """How far each level sees in an image of so many rows."""
    strides, weight = network.strides, next(network.parameters())
    middle = length // 2 // strides[-1] * strides[-1]
    image = torch.zeros(1, 3, length, 2 * strides[-1], device=weight.device, dtype=weight.dtype)
    lower, upper = image.clone(), image.clone()
    lower[:, :, middle:], upper[:, :, :middle] = torch.nan, torch.nan
    try:
        unknown = [[_unknown_rows(level) for level in network(each)] for each in (lower, upper)]
    except (AssertionError, RuntimeError):  # timm's, of networks that take one size
        return None
    made = []
    for stride, below, above in zip(strides, *unknown, strict=True):
        cut = middle // stride
        if len(below) != -(-length // stride) or below[0] or above[-1]:
            return None
        made.append(Reach(stride, int(above.nonzero().max()) + 1 - cut, cut - int(below.nonzero().min())))
    return made


def _unknown_rows(level: Tensor) -> Tensor:
    """Rows (h,) of a level (1, C, h, w) with a value that is not a number."""
    return level.isnan().any(dim=1).any(dim=-1)[0]


def stitched(
    levels_of: Callable[[Tensor], Sequence[Tensor]], images: Tensor, largest: int, seen: Sequence[Reach]
) -> list[Tensor]:
    """Compute levels of large images in windows.

    Args:
        levels_of: Maps a window's images (B, 3, h, w) to levels (B, ..., h_l, w_l).
        images: Images (B, 3, H, W).
        largest: Pixels along a side of a window, at most.
        seen: How far the levels see; one for each that ``levels_of`` returns.

    Returns:
        The levels of the whole images (B, ..., H_l, W_l).
    """
    made: list[Tensor] = []
    for window in over(images.shape[-2], images.shape[-1], largest, seen):
        for index, (level, reach) in enumerate(zip(levels_of(window.of(images)), seen, strict=True)):
            if index == len(made):
                size = (-(-length // reach.stride) for length in images.shape[-2:])
                made.append(level.new_empty(*level.shape[:-2], *size))
            rows, columns = window.within(reach)
            made[index][..., rows, columns] = window.kept(level, reach)
    return made
