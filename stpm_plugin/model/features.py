"""Feature pyramids of timm backbones: what the teacher and the student both are.

A pyramid is any timm model that offers ``features_only``, cut after its last used layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import STPMError

STRIDES = (4, 8, 16)  # of the paper's layers, those of ResNet-18's layer1 to layer3


class FeaturePyramid(nn.Module):
    """The chosen layers' features of a randomly initialised timm backbone.

    Args:
        backbone: timm model name, with or without its weights' tag (``resnet18.tv_in1k``).
        layers: timm's names of the layers (``layer1``) or their indices among the backbone's feature
            levels (for ResNet ``0`` is the stem, ``1`` is ``layer1``), from shallow to deep; ``None`` for those of
            :data:`STRIDES`.

    Attributes:
        layers: Names of the chosen layers.
        channels: Channels of each chosen layer.
        strides: Input pixels per feature position, one for each chosen layer.

    Raises:
        STPMError: The backbone is unknown to timm or has no ``features_only``; or a layer is unknown,
            named twice or out of order; or no layer is named and the backbone lacks one of the strides.
    """

    net: nn.Module

    def __init__(self, backbone: str, layers: Sequence[str | int] | None = None) -> None:
        super().__init__()
        levels = _levels(backbone)
        names = [name for name, _ in levels]
        if layers is None:
            layers = _usual_layers(backbone, {stride: name for name, stride in levels})
        self.indices = _indices(backbone, layers, names)
        self.net = net = _create(backbone, out_indices=self.indices)
        _drop_after(net, names[self.indices[-1]])
        info = net.feature_info
        self.layers: list[str] = [names[index] for index in self.indices]
        self.channels: list[int] = info.channels()
        self.strides: list[int] = info.reduction()
        self.channels_last_output = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to one feature map (B, C_l, H_l, W_l) for each chosen layer.

        Raises:
            STPMError: The images do not have 3 channels, or are smaller than the deepest layer's stride.
        """
        channels, height, width = images.shape[1:]
        if channels != 3:
            msg = (
                f"STPM takes images of 3 channels, got {channels}: convert grey images to RGB by repeating the channel."
            )
            raise STPMError(msg)
        if not torch.compiler.is_compiling() and min(height, width) < self.strides[-1]:
            msg = (
                f"image of {height} x {width} pixels is smaller than the stride {self.strides[-1]} of layer "
                f"{self.layers[-1]}: raise image_size or leave out the deepest layers."
            )
            raise STPMError(msg)
        features = self.net(images)
        if self.channels_last_output:
            return [level.permute(0, 3, 1, 2) for level in features]  # NHWC families: Swin and its kin
        return list(features)


class FrozenPyramid(FeaturePyramid):
    """A pyramid that is never trained: the teacher.

    It stays in eval mode, so no BatchNorm statistic moves, and its features carry no gradient.
    """

    def __init__(self, backbone: str, layers: Sequence[str | int] | None = None) -> None:
        super().__init__(backbone, layers)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenPyramid:
        """Stay in eval mode, whatever ``mode`` says."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to one feature map (B, C_l, H_l, W_l) for each chosen layer, without gradient."""
        return super().forward(images)


def _create(backbone: str, **arguments: Any) -> Any:
    """Build timm's ``features_only`` network, a module with ``feature_info``, without weights."""
    if not timm.is_model(backbone):
        near = ", ".join(timm.list_models(f"*{backbone.split('.')[0].split('_')[0]}*")[:5])
        hint = f"; similar names: {near}" if near else ""
        msg = f"backbone={backbone!r} is not a timm model{hint}. `timm.list_models()` lists them all."
        raise STPMError(msg)
    try:
        return timm.create_model(backbone, pretrained=False, features_only=True, **arguments)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        msg = (
            f"backbone={backbone!r} offers no features_only in timm, so it has no feature pyramid; "
            f"choose another backbone, such as resnet18.tv_in1k. timm says: {error}"
        )
        raise STPMError(msg) from error


@functools.cache
def _levels(backbone: str) -> list[tuple[str, int]]:
    """Names and strides of a backbone's feature levels; the call does not change later random numbers."""
    with torch.random.fork_rng(devices=[]):
        return [(level["module"], level["reduction"]) for level in _create(backbone).feature_info.info]


def _usual_layers(backbone: str, of_stride: Mapping[int, str]) -> list[str]:
    """The layers of :data:`STRIDES`."""
    if not of_stride.keys() >= set(STRIDES):
        listed = ", ".join(f"{name} (stride {stride})" for stride, name in of_stride.items())
        msg = f"layers is not set, and {backbone} has no layers of strides 4, 8 and 16; it has {listed}: set layers."
        raise STPMError(msg)
    return [of_stride[stride] for stride in STRIDES]


def _drop_after(net: nn.Module, last: str) -> None:
    """Drop the stages after the last used layer, which timm keeps and runs in EfficientNet's family.

    Saved states that still have them can be loaded.
    """
    parent, _, index = last.rpartition(".")
    stages = getattr(net, parent, None)
    if isinstance(stages, nn.Sequential) and index.isdigit():
        del stages[int(index) + 1 :]
        stages.register_load_state_dict_pre_hook(_without_dropped)


def _without_dropped(stages: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave stages out of a state that `stages` no longer has."""
    kept = dict(stages.named_children())
    for name in [name for name in state if name.startswith(prefix)]:
        if name[len(prefix) :].partition(".")[0] not in kept:
            del state[name]


def _indices(backbone: str, layers: Sequence[str | int], names: list[str]) -> tuple[int, ...]:
    """Resolve layer names and indices to feature-level indices, in ascending order."""
    indices = []
    for layer in layers:
        if isinstance(layer, str) and layer in names:
            indices.append(names.index(layer))
        elif not isinstance(layer, str) and 0 <= layer < len(names):
            indices.append(layer)
        else:
            listed = ", ".join(f"{name} ({index})" for index, name in enumerate(names))
            msg = f"layers={list(layers)!r}: {backbone} has no layer {layer!r}; it has {listed}."
            raise STPMError(msg)
    if not indices or indices != sorted(set(indices)):
        msg = f"layers={list(layers)!r} must name at least one layer, each once, from shallow to deep."
        raise STPMError(msg)
    return tuple(indices)
