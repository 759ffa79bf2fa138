"""What a trained STPM carries with it, so that every route that loads it gives the same verdict.

All that turns pixels into a verdict is saved as the module's extra state, beside the tensors: `Engine`, the command
line with a bare `--model STPM`, `load_from_checkpoint` and `load_state_dict` all restore it from there. What the caller
states explicitly against it is refused, or honoured and reported in a line. An argument counts as stated if it differs
from the constructor's default, or was given to `load_from_checkpoint`: the command line passes defaults as if given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..errors import STPMError
from ..model.network import STPMModel, check_head
from .data_record import DataRecord
from .thresholds import STPMPostProcessor

if TYPE_CHECKING:
    from .lightning_model import STPM

FORMAT = 1
KEY = "_extra_state"  # torch's name in a state dict
ARCHITECTURE = ("backbone", "layers")
HEAD = ("score_share", "level_power", "finest_weight")
INTERCHANGEABLE = (PostProcessor.__name__, STPMPostProcessor.__name__)


def describe(module: STPM) -> dict[str, Any]:
    """Plain data of all that decides a verdict, but for the tensors."""
    network = module.model
    return {
        "format": FORMAT,
        "backbone": network.backbone,
        "layers": list(network.teacher.layers),
        **{name: getattr(network, name) for name in HEAD},
        "tiler": tiler_settings(network.tiler),
        "pre_processor": _config(module.pre_processor),
        "post_processor": _config(module.post_processor),
        "teacher_ready": module.teacher_ready,
        "trained": module.trained,
        "data": module.data_record and module.data_record.to_state(),
    }


def restore(module: STPM, state: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """Make a module what a saved state describes; its tensors are loaded afterwards.

    Args:
        module: It is changed in place: Lightning holds its parts already.
        state: As :func:`describe` made it.
        stated: Arguments that the caller gave explicitly.

    Raises:
        STPMError: The state is of a newer version, or the caller stated another architecture, size or pre-processor.
    """
    if state["format"] > FORMAT:
        msg = f"the checkpoint's format {state['format']} is newer than this package's ({FORMAT}): upgrade stpm_plugin."
        raise STPMError(msg)
    _refuse_another_architecture(module, state, stated)
    _restore_pre_processor(module, state["pre_processor"], stated)
    _restore_post_processor(module, state["post_processor"])
    taken = _restore_network(module, state, stated)
    if taken:
        rank_zero_info(f"STPM: from the checkpoint: {', '.join(taken)}.")
    module.model.tiler = module.model.tiler or _tiler(state["tiler"])
    module.teacher_ready, module.trained = state["teacher_ready"], state["trained"]
    module.data_record = DataRecord(**state["data"]) if state["data"] else None
    module.hparams.update(
        {name: state[name] for name in ARCHITECTURE} | {name: getattr(module.model, name) for name in HEAD}
    )
    size = module.network_size
    if size is not None:
        module.hparams["image_size"] = size


def stated_arguments(module: STPM, components: Iterable[str]) -> dict[str, Any]:
    """The constructor's arguments that differ from its defaults, and the components that were given as objects."""
    signatures = [inspect.signature(one.__init__) for one in reversed(type(module).__mro__)]  # a subclass's last
    defaults = {name: one.default for signature in signatures for name, one in signature.parameters.items()}
    stated = {name: value for name, value in module.hparams.items() if not _same(name, value, defaults.get(name))}
    return stated | dict.fromkeys(components)


def tiler_settings(tiler: Tiler | None) -> dict[str, Any] | None:
    """Plain data of anomalib's tiler."""
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": ImageUpscaleMode(tiler.mode).value,
    }


def _tiler(settings: Mapping[str, Any] | None) -> Tiler | None:
    if settings is None:
        return None
    return Tiler(**{**settings, "mode": ImageUpscaleMode(settings["mode"])})


def _config(component: Any) -> dict[str, Any] | None:
    """Settings of a pre- or post-processor, and its class's name; ``None`` for none."""
    if component is None:
        return None
    made = component.checkpoint_config() if hasattr(component, "checkpoint_config") else {}
    return {"class": type(component).__name__, "config": made}


def _refuse_another_architecture(module: STPM, state: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    for name in ARCHITECTURE:
        own = list(module.model.teacher.layers) if name == "layers" else stated.get(name)
        if name in stated and not _same(name, own, state[name]):
            msg = f"{name}={stated[name]} was stated, and the checkpoint has {name}={state[name]}: leave {name} out."
            raise STPMError(msg)


def _restore_pre_processor(module: STPM, saved: Mapping[str, Any] | None, stated: Mapping[str, Any]) -> None:
    own, before = module.pre_processor, _config(module.pre_processor)
    wanted = saved["config"] if saved else {"transform": None}
    name = next((name for name in ("pre_processor", "image_size") if name in stated), None)
    if name is not None and (before or {"config": {"transform": None}})["config"] != wanted:
        msg = (
            f"{name} was stated ({'another transform' if name == 'pre_processor' else stated[name]}), and the "
            f"checkpoint's model was trained on images that were prepared another way: leave {name} out."
        )
        raise STPMError(msg)
    if own is not None and before and before["config"] != wanted:
        cast("Any", own).load_checkpoint_config(wanted)
    elif own is None and saved and wanted.get("transform") is not None:
        msg = (
            "pre_processor=False was stated, and the checkpoint's model was trained with a pre-processor: leave it out."
        )
        raise STPMError(msg)


def _restore_post_processor(module: STPM, saved: Mapping[str, Any] | None) -> None:
    own = module.post_processor
    if own is None:
        return
    if saved is None:  # Lightning may hold ours as a callback already, so it stays and does nothing
        own.enable_normalization = own.enable_thresholding = False
        return
    if saved["class"] != type(own).__name__ and not (
        saved["class"] in INTERCHANGEABLE and isinstance(own, STPMPostProcessor)
    ):
        msg = (
            f"the checkpoint's post-processor is a {saved['class']} and this model's a {type(own).__name__}, which "
            f"would label images another way: give post_processor={saved['class']}."
        )
        raise STPMError(msg)
    own.load_checkpoint_config(saved["config"])


def _restore_network(module: STPM, state: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Rebuild the network if its architecture differs, set the head; returns what was taken from the state."""
    network, head = module.model, {}
    taken = []
    for name in HEAD:
        head[name] = state[name]
        if name in stated and stated[name] != state[name]:
            head[name] = stated[name]
            rank_zero_warn(
                f"STPM: {name}={stated[name]} as stated, instead of the checkpoint's {state[name]}: its thresholds "
                "were set for that, so labels mean little until `anomalib validate` or a training sets them anew."
            )
        elif getattr(network, name) != state[name]:
            taken.append(f"{name}={state[name]}")
    check_head(**head)
    if network.backbone != state["backbone"] or list(network.teacher.layers) != list(state["layers"]):
        taken += [
            f"{name}={state[name]}" for name in ARCHITECTURE if not _same(name, module.hparams[name], state[name])
        ]
        module.model = STPMModel(state["backbone"], state["layers"], **head).to(module.device).train(network.training)
        module.model.tiler = network.tiler
    for name, value in head.items():
        setattr(module.model, name, value)
    return taken


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an argument mean the same."""
    if name == "backbone" and isinstance(one, str) and isinstance(other, str):
        return one.split(".")[0] == other.split(".")[0]  # the tag names weights, and those come from the checkpoint
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


# Checkpoints


def refuse_foreign(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        STPMError: It holds no student of this package.
    """
    names = checkpoint.get("state_dict", {})
    if not any(name.startswith("model.student.net.") for name in names):
        first = ", ".join(list(names)[:2]) or "none"
        where = f" {path}" if path else ""
        msg = (
            f"the checkpoint{where} holds another model than STPM ({first}, ...): give a checkpoint that STPM trained."
        )
        raise STPMError(msg)


def upgraded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Make the extra state that version 0.1.0 did not save, from what it did."""
    settings, kept = checkpoint["hyper_parameters"], checkpoint.get("stpm")
    components = checkpoint.get("anomalib_components_enabled", {})
    configs = {
        name: {"class": STPMPostProcessor.__name__, "config": checkpoint.get(f"anomalib_{name}_config") or {}}
        if components.get(name, True)
        else None
        for name in ("pre_processor", "post_processor")
    }
    if kept is not None:
        kept.setdefault("scores", [])
    return {
        "format": 0,
        "backbone": settings["backbone"],
        "layers": list(settings["layers"]),
        **{name: settings[name] for name in HEAD},
        "tiler": None,
        **configs,
        "teacher_ready": True,
        "trained": kept is not None,
        "data": None,
    }
