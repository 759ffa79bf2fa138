"""Windows of an image in which a network computes the same features as in the whole image.

A convolutional network's feature depends only on the pixels around its position. So an image of any size can be
processed in windows: positions that see across a cut edge are dropped, and the rest equals the whole image's features.
Training draws such windows, and large images are scored through them.

Windows start at multiples of the deepest stride and end as far past a multiple as the whole image, so that a network
whose padding depends on the size (TensorFlow's) pads them as it pads the whole image. This module is geometry,
without torch, for arrays and tensors alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

LARGEST = 1536  # pixels along a side that networks take at once


class Reach(NamedTuple):
    """How far a level sees, in its own positions.

    Attributes:
        stride: Input pixels per position.
        before: Positions that a cut at the start of a window spoils.
        after: Positions that a cut at its end spoils.
    """

    stride: int
    before: int
    after: int


class Span(NamedTuple):
    """A window along one axis of an image, pixels.

    Attributes:
        start: First pixel.
        stop: Pixel after the last.
        length: Of the whole axis.
    """

    start: int
    stop: int
    length: int

    def valid(self, reach: Reach) -> slice:
        """Positions of the whole level at which the window equals the whole image."""
        first = self.start // reach.stride + (reach.before if self.start else 0)
        last = self.stop // reach.stride - reach.after if self.stop < self.length else -(-self.length // reach.stride)
        return slice(first, last)


class Window(NamedTuple):
    """A window of an image.

    Attributes:
        rows: Along the height.
        columns: Along the width.
    """

    rows: Span
    columns: Span

    def of(self, images: Any) -> Any:
        """Cut the window out of images (..., H, W)."""
        return images[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def within(self, reach: Reach) -> tuple[slice, slice]:
        """Rows and columns of the whole level at which it equals the whole image."""
        return self.rows.valid(reach), self.columns.valid(reach)

    def kept(self, level: Any, reach: Reach) -> Any:
        """Drop from the window's level (..., h, w) what its cut edges spoil."""
        offsets = (self.rows.start // reach.stride, self.columns.start // reach.stride)
        rows, columns = (
            slice(part.start - offset, part.stop - offset)
            for part, offset in zip(self.within(reach), offsets, strict=True)
        )
        return level[..., rows, columns]


def cut(length: int, largest: int, seen: Sequence[Reach]) -> list[Span]:
    """Cover an axis by windows of one size whose valid parts leave no gap.

    Args:
        length: Of the axis, pixels.
        largest: Most pixels of a window, unless that leaves no valid part.
        seen: How far the levels see.
    """
    step = seen[-1].stride
    overlap = margin(seen)
    largest = max(largest, overlap + 2 * step)
    if length <= largest:
        return [Span(0, length, length)]
    count = -(-(length - overlap) // (largest - step - overlap))
    size = -(-(length + (count - 1) * overlap) // count) + step  # starts are rounded
    size += (length - size) % step  # as many pixels past a multiple of the stride as the whole axis has
    if size >= length:
        return [Span(0, length, length)]
    last = length - size
    starts = [round(index * last / (count - 1) / step) * step for index in range(count)]
    return [Span(start, start + size, length) for start in dict.fromkeys(starts)]


def margin(seen: Sequence[Reach]) -> int:
    """Pixels that two neighbouring windows share, so that no level has a gap between their valid parts."""
    step = seen[-1].stride
    widest = max((reach.before + reach.after + 1) * reach.stride for reach in seen)
    return -(-widest // step) * step


def drawn(length: int, inside: int, seen: Sequence[Reach], draw: Callable[[int], int]) -> Span:
    """Draw a window along an axis, of which at least ``inside`` pixels are valid at each level.

    Args:
        length: Of the axis, pixels; an axis that is not longer than the window is taken whole.
        inside: Pixels.
        seen: How far the levels see.
        draw: Gives a number from 0 to below its argument.
    """
    step, whole = seen[-1].stride, margin(seen)
    size = inside + whole
    size += (length - size) % step
    if length <= size:
        return Span(0, length, length)
    places = (length - inside) // step + 1  # of the inside; at an edge the window stays within the image
    first = draw(places) * step - whole // 2 // step * step
    start = min(max(first, 0), length - size)
    return Span(start, start + size, length)


def over(height: int, width: int, largest: int, seen: Sequence[Reach]) -> Iterator[Window]:
    """Windows that cover an image of so many pixels."""
    pairs = itertools.product(cut(height, largest, seen), cut(width, largest, seen))
    return (Window(rows, columns) for rows, columns in pairs)
