"""STPM, Student-Teacher Feature Pyramid Matching, as a model plugin for anomalib.

Public names are imported at their first use, so that ``import stpm_plugin`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo.demo_data import DemoData
    from .deployment.openvino_export import OpenVINOExport
    from .model.network import STPMModel
    from .model.pre_processing import STPMPreProcessor
    from .training.lightning_model import STPM
    from .training.thresholds import STPMPostProcessor

_HOMES = {
    "DemoData": "demo.demo_data",
    "OpenVINOExport": "deployment.openvino_export",
    "STPM": "training.lightning_model",
    "STPMModel": "model.network",
    "STPMPostProcessor": "training.thresholds",
    "STPMPreProcessor": "model.pre_processing",
}
__all__ = ["STPM", "DemoData", "OpenVINOExport", "STPMModel", "STPMPostProcessor", "STPMPreProcessor"]
__version__ = "0.3.0"


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted([*globals(), *__all__])
