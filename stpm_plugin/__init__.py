"""STPM, Student-Teacher Feature Pyramid Matching, as a model plugin for anomalib.

Public names are imported at their first use, so that ``import stpm_plugin`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo_data import DemoData
    from .lightning_model import STPM
    from .openvino_export import OpenVINOExport
    from .pre_processing import STPMPreProcessor
    from .thresholds import STPMPostProcessor
    from .torch_model import STPMModel

_HOMES = {
    "DemoData": "demo_data",
    "OpenVINOExport": "openvino_export",
    "STPM": "lightning_model",
    "STPMModel": "torch_model",
    "STPMPostProcessor": "thresholds",
    "STPMPreProcessor": "pre_processing",
}
__all__ = ["STPM", "DemoData", "OpenVINOExport", "STPMModel", "STPMPostProcessor", "STPMPreProcessor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted([*globals(), *__all__])
