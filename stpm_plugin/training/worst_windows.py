"""Windows of training images where the student does worst: what is rare on a part needs more than its share of windows.

A window drawn at random shows a hundredth of a large image, so a structure that is there once, such as the corner of a
label, is seen in few steps, and every good image then scores highest at that structure. ``hard_share`` cannot help: it
chooses among the positions of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.windows import Window, drawn

if TYPE_CHECKING:
    from .lightning_model import STPM

PIXELS = 2 * 2048**2  # of the images that are looked at before a pass, at least one: 12 s on two cores in float32


@torch.no_grad()
def worst_windows(
    module: STPM, images: Iterable[tuple[int, Tensor]], count: int, generator: torch.Generator
) -> list[tuple[int, Window]]:
    """Choose windows around the most anomalous positions of good images, by the student as it is.

    Args:
        module: The model.
        images: Numbers of images, and the images themselves, pre-processed (1, 3, H, W); the first ones are used, up to
            ``PIXELS``.
        count: Number of windows.
        generator: Of the windows' exact positions, and of their order.

    Returns:
        An image's number and a window of it, ``count`` times.
    """
    maps: list[tuple[int, Tensor]] = []
    pixels = 0
    module.model.eval()
    for number, image in images:
        with module.autocast():
            maps.append((number, module.model(image).anomaly_map[0, 0].float().cpu()))
        pixels += maps[-1][1].numel()
        if pixels >= PIXELS or len(maps) == count:
            break
    module.model.train()
    each = -(-count // max(1, len(maps)))
    found = [(number, window) for number, one in maps for window in around_peaks(one, each, module, generator)]
    return [found[index] for index in torch.randperm(len(found), generator=generator)[:count]]


def around_peaks(anomalies: Tensor, count: int, module: STPM, generator: torch.Generator) -> list[Window]:
    """Windows around the highest peaks of an anomaly map (H, W), a quarter of a crop apart, at random offsets."""
    reaches, side, (height, width) = module.model.reaches or [], module.crop_size or 0, anomalies.shape
    step, free, made = reaches[-1].stride, anomalies.clone(), []

    def near(position: int) -> Callable[[int], int]:
        offset = int(torch.randint(max(1, side // step), (), generator=generator))
        return lambda positions: min(max(position // step - offset, 0), positions - 1)

    for _ in range(count):
        row, column = divmod(int(free.argmax()), width)
        made.append(Window(drawn(height, side, reaches, near(row)), drawn(width, side, reaches, near(column))))
        free[max(0, row - side // 4) : row + side // 4 + 1, max(0, column - side // 4) : column + side // 4 + 1] = -1
    return made
