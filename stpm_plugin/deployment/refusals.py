"""What one image is refused for, while the others are scored: its size, or a score that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import STPMError

Refused = Callable[[str, str], None]  # called with an image's name, and a sentence that says why it was refused


class ImageError(STPMError):
    """One image cannot be scored; others may be."""


def raising(name: str, why: str) -> NoReturn:
    """Raise for an image that was refused.

    Raises:
        ImageError: Always.
    """
    del name
    raise ImageError(why) from None


def require_masks_size(name: str, size: tuple[int, ...], mask: tuple[int, ...], file: str | Path) -> None:
    """Refuse an image of another height and width than the mask of a file.

    Raises:
        ImageError: They differ.
    """
    if size != mask:
        sizes = ["{} x {}".format(*each) for each in (size, mask)]
        msg = f"{name} has {sizes[0]} pixels and the mask {file} has {sizes[1]}: they must be equal."
        raise ImageError(msg)


def require_size(name: str, size: tuple[int, ...], only: tuple[int, int] | None, smallest: int) -> None:
    """Refuse an image whose height and width the model cannot take.

    Raises:
        ImageError: They are not ``only``, or one of them is below ``smallest``.
    """
    if only is not None and only != size:
        msg = (
            f"{name} has {size[0]} x {size[1]} pixels, and the model was exported for images of "
            f"{only[0]} x {only[1]}: export it without --input-size."
        )
        raise ImageError(msg)
    if min(size) < smallest:
        msg = (
            f"{name} has {size[0]} x {size[1]} pixels, and the model, which does not resize, needs "
            f"at least {smallest} along each side: leave this image out."
        )
        raise ImageError(msg)


def finite(name: str, score: float, refused: Refused) -> bool:
    """Whether a score is finite; if not, the image is refused."""
    if math.isfinite(score):
        return True
    refused(name, f"{name} has the score {score}: the model is damaged; export its checkpoint again.")
    return False
