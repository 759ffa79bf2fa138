"""What a network changes while torch traces it for an exported graph; its results stay the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F


@contextlib.contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Let torch trace a network within minutes, also for images of any size.

    Activations write to memory of their own, since tracing an in-place ReLU6 is slow. TensorFlow's padding, which
    depends on the image's size, is computed in whole numbers (:func:`padded_alike`), since torch cannot derive unknown
    sizes from timm's rounded-up division.
    """
    in_place: list[Any] = [part for part in network.modules() if getattr(part, "inplace", False)]
    padded: list[Any] = [part for part in network.modules() if isinstance(part, Conv2dSame)]
    for part in in_place:
        part.inplace = False
    for part in padded:
        part.forward = functools.partial(padded_alike, part)
    try:
        yield
    finally:
        for part in in_place:
            part.inplace = True
        for part in padded:
            del part.forward  # the class's own again


def padded_alike(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """Convolve as timm's ``Conv2dSame``: features (B, C, H, W) to (B, D, H / stride, W / stride), rounded up.

    An axis is padded by ``dilation * (kernel - 1) + 1 - stride``, plus what is missing to the next multiple of the
    stride; an odd pixel goes to its end.
    """
    padding: list[int] = []
    sides = (features.shape[-2:], convolution.kernel_size, convolution.stride, convolution.dilation)
    for length, kernel, stride, dilation in zip(*sides, strict=True):
        both = max(dilation * (kernel - 1) + 1 - stride + -length % stride, 0)
        padding = [both // 2, both - both // 2, *padding]  # of the last side first
    features = F.pad(features, padding)
    weights, numbers = (convolution.weight, convolution.bias), (convolution.dilation, convolution.groups)
    return F.conv2d(features, *weights, convolution.stride, 0, *numbers)
