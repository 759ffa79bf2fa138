"""Make STPM known to anomalib by its short name, without importing torch, anomalib or Lightning.

anomalib finds a model by its short name only when the class was imported before the command line is parsed, and
it has no entry point for that. :func:`autoload` is therefore called at the end of ``import torch`` (group
``torch.backends``) and installs a hook: once anomalib's models are imported, this package's are imported too.

The hook watches two modules. Where torch is first imported by ``anomalib.models`` itself, the hook arrives while that
package is half initialised; its last import, ``anomalib.models.video``, is then the moment at which the model's base
class exists.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from types import ModuleType

WATCHED = ("anomalib.models", "anomalib.models.video")
PROVIDED = ("stpm_plugin.training.lightning_model", "stpm_plugin.demo.demo_data")


def autoload() -> None:
    """Install the hooks, unless ``STPM_PLUGIN_AUTOLOAD=0``; never raise, since torch would fail to import."""
    if os.environ.get("STPM_PLUGIN_AUTOLOAD", "1") == "0":
        return
    try:
        from wrapt import register_post_import_hook

        for name in WATCHED:
            register_post_import_hook(_on_import, name)
    except Exception as error:
        _warn(error)


def publish(model: type, home: str) -> None:
    """Set a class as an attribute of an anomalib package, where ``get_model`` and ``get_datamodule`` look.

    Args:
        model: The class.
        home: ``anomalib.models`` or ``anomalib.data``.
    """
    setattr(sys.modules.get(home) or import_module(home), model.__name__, model)


def _on_import(module: ModuleType) -> None:
    """Import the plugin's classes after ``module``; each publishes itself, so a second call changes nothing."""
    half_initialised = getattr(module.__spec__, "_initializing", False)
    if half_initialised and module.__name__ == "anomalib.models" and not hasattr(module, "get_model"):
        return
    try:
        for name in PROVIDED:
            import_module(name)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    said = (
        f"stpm_plugin could not register STPM with anomalib ({type(error).__name__}: {error}). Install "
        "the package again, or set STPM_PLUGIN_AUTOLOAD=0 to continue without it."
    )
    try:
        warnings.warn(said, stacklevel=2)
    except UserWarning:  # `python -W error` raises it, here in the middle of `import torch`
        print(said, file=sys.stderr)
