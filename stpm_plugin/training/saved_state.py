"""What a trained STPM carries with it, so that every route that loads it gives the same verdict.

All that turns pixels into a verdict is saved as the module's extra state, next to the tensors: `Engine`, the command
line with a bare `--model STPM`, `load_from_checkpoint` and `load_state_dict` all restore it from there. If the caller
states something else, that is refused, or honoured and reported in a line. An argument counts as stated if it differs
from the constructor's default, or was given to `load_from_checkpoint`: the command line passes defaults as if given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..errors import STPMError
from ..model.features import FeaturePyramid
from ..model.network import STPMModel, check_head
from ..model.usual_places import UsualPlaces
from .data_record import DataRecord
from .mask import describe_mask, restore_mask
from .thresholds import STPMPostProcessor

if TYPE_CHECKING:
    from .lightning_model import STPM

# 1: of versions 0.1 and 0.2, which could weigh levels, and whose scores were means; 2: with `score_share`; 3: without
# `ignored`
FORMAT = 4
KEY = "_extra_state"  # torch's name in a state dict
ARCHITECTURE = ("backbone", "layers")
HEAD = ("score_area",)
GONE = ("model.level_scales",)  # tensors that versions 0.1 and 0.2 saved
PAPERS_HEAD = {"score_share": 0.0, "level_power": 0.0, "finest_weight": 1.0}
INTERCHANGEABLE = (PostProcessor.__name__, STPMPostProcessor.__name__)


def describe(module: STPM) -> dict[str, Any]:
    """Plain data of all that decides a verdict, except the tensors."""
    network = module.model
    return {
        "format": FORMAT,
        "backbone": network.backbone,
        "layers": list(network.teacher.layers),
        **{name: getattr(network, name) for name in HEAD},
        "usual_places": None if network.usual_places is None else list(network.usual_places.mean.shape),
        "ignored": describe_mask(network.ignored),
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
    refuse_older_head(state)
    _refuse_another_architecture(module, state, stated)
    size = module.network_size
    _restore_pre_processor(module, state["pre_processor"], stated)
    if "score_area" not in state:
        state = {**state, "score_area": area_of(state, module.network_size)}
    taken = [] if module.network_size == size else [f"image_size={module.network_size}"]
    _restore_post_processor(module, state["post_processor"])
    taken += _restore_network(module, state, stated)
    taken += restore_mask(module, state.get("ignored"), stated)
    if taken:
        rank_zero_info(f"STPM: from the checkpoint: {', '.join(taken)}.")
    _restore_tiler(module, state["tiler"])
    module.teacher_ready, module.trained = state["teacher_ready"], state["trained"]
    module.data_record = DataRecord(**state["data"]) if state["data"] else None
    module.hparams.update(
        {name: state[name] for name in ARCHITECTURE} | {name: getattr(module.model, name) for name in HEAD}
    )
    module.hparams["image_size"] = module.network_size


def stated_arguments(module: STPM, components: Iterable[str]) -> dict[str, Any]:
    """The constructor's arguments that differ from its defaults, and the components that were given as objects."""
    classes = reversed(type(module).__mro__)  # a subclass's last
    signatures = [inspect.signature(one.__init__) for one in classes]  # type: ignore[misc]
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


def _restore_tiler(module: STPM, saved: Mapping[str, Any] | None) -> None:
    """Set the saved tiler, unless a callback has set the same one."""
    own = tiler_settings(module.model.tiler)
    if own is not None and own != saved:
        msg = (
            f"TilerConfigurationCallback sets the tiler {own}, and the checkpoint's model was trained with {saved}: "
            "leave the callback out, since the checkpoint brings its own."
        )
        raise STPMError(msg)
    if own is None and saved is not None:
        module.model.tiler = Tiler(**{**saved, "mode": ImageUpscaleMode(saved["mode"])})


def _config(component: Any) -> dict[str, Any] | None:
    """Settings of a pre- or post-processor, and its class's name; ``None`` for none."""
    if component is None:
        return None
    made = component.checkpoint_config() if hasattr(component, "checkpoint_config") else {}
    return {"class": type(component).__name__, "config": made}


def _refuse_another_architecture(module: STPM, state: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    for name in ARCHITECTURE:
        if name not in stated or _same(name, stated[name], state[name]):
            continue
        if name == "layers" and FeaturePyramid(state["backbone"], stated[name]).layers == list(state[name]):
            continue  # by their indices
        msg = f"{name}={stated[name]} contradicts the checkpoint, which has {name}={state[name]}: omit {name}."
        raise STPMError(msg)


def _restore_pre_processor(module: STPM, saved: Mapping[str, Any] | None, stated: Mapping[str, Any]) -> None:
    own = cast("Any", module.pre_processor)
    without = {"transform": None}
    wanted = saved["config"] if saved else without
    changed = (own.checkpoint_config() if own is not None else without) != wanted
    if changed and "pre_processor" in stated:
        msg = "pre_processor contradicts the checkpoint, whose model was trained with another: omit pre_processor."
        raise STPMError(msg)
    if changed and own is not None:
        own.load_checkpoint_config(wanted)
    size = tuple(stated["image_size"]) if stated.get("image_size") else None
    if "image_size" in stated and "pre_processor" not in stated and size != module.network_size:
        trained_on = "{} x {} pixels".format(*module.network_size) if module.network_size else "their own size"
        msg = (
            f"image_size={size} contradicts the checkpoint, whose model was trained on images of {trained_on}: "
            "omit image_size."
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
            f"the checkpoint's post-processor is a {saved['class']} and this model's is a {type(own).__name__}, which "
            f"would label images differently: set post_processor={saved['class']}."
        )
        raise STPMError(msg)
    own.load_checkpoint_config(saved["config"])
    if not isinstance(own, STPMPostProcessor):
        return
    for said in own.overruled(saved["config"]):
        rank_zero_info(f"STPM: {said}.")
        if said.startswith("normal_quantile") and not own.held_out_scores:
            rank_zero_warn(
                "STPM: this checkpoint contains no held-out scores to set thresholds from, so normal_quantile has no "
                "effect: train the model again."
            )


def _restore_network(module: STPM, state: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Rebuild the network if its architecture differs, set the head; returns what was taken from the state."""
    network, head = module.model, {}
    taken = []
    for name in HEAD:
        head[name] = state[name]
        if name in stated and stated[name] != state[name]:
            head[name] = stated[name]
            rank_zero_warn(
                f"STPM: {name}={stated[name]} as set here, instead of the checkpoint's {state[name]}: the thresholds "
                "belong to the latter, so labels mean little until `Engine.validate` or a training sets new ones."
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
    shape, own = state.get("usual_places"), module.model.usual_places
    if shape is None or own is None or list(own.mean.shape) != list(shape):
        module.model.usual_places = None if shape is None else UsualPlaces(tuple(shape)).to(module.device)
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
        msg = f"the checkpoint{where} holds a model other than STPM ({first}, ...): pass a checkpoint of STPM."
        raise STPMError(msg)


def refuse_older_head(state: Mapping[str, Any]) -> None:
    """Refuse a state whose anomaly map or image score this version no longer computes.

    Raises:
        STPMError: It is of version 0.1 or 0.2 and has a head other than the paper's, which has not changed since.
    """
    head = {name: state.get(name, plain) for name, plain in PAPERS_HEAD.items()}
    if state["format"] < 2 and head != PAPERS_HEAD:
        settings = ", ".join(f"{name} {value}" for name, value in head.items())
        msg = (
            f"the checkpoint is of stpm_plugin 0.1 or 0.2, and its scores ({settings}) are no longer computed, so its "
            "verdicts would change: train the model again, or use it with `pip install 'stpm_plugin<0.3'`. Models "
            "exported to OpenVINO still work."
        )
        raise STPMError(msg)


def area_of(state: Mapping[str, Any], size: tuple[int, int] | None) -> int:
    """The number of positions that an older state's `score_share` amounts to, for images of a size.

    Raises:
        STPMError: Its images are not resized to one size.
    """
    share = state["score_share"]
    if not share:
        return 0
    if size is None:
        msg = (
            f"the checkpoint's image score uses a share of the map ({share}), which is no longer computed for images "
            "of any size: train the model again."
        )
        raise STPMError(msg)
    stride = FeaturePyramid(state["backbone"], state["layers"]).strides[0]
    return max(1, math.prod(length // stride for length in size) * round(share * 1e6) // 10**6)


def upgraded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Make the extra state, which version 0.1.0 did not save, from what it did save."""
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
        **{name: settings[name] for name in PAPERS_HEAD},
        "tiler": None,
        **configs,
        "teacher_ready": True,
        "trained": kept is not None,
        "data": None,
    }
