"""Where the teacher's weights come from: timm's hub, a file, or the package that brings EfficientNet-Lite0's."""

from __future__ import annotations

import contextlib
import pickle
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import STPMError
from . import packaged_weights
from .features import FrozenPyramid

HUB_FILE = "model.safetensors"  # timm's name of weights in the hub
PATIENCE = 5.0  # seconds to wait for the hub's host


def load_teacher(teacher: FrozenPyramid, backbone: str, source: str | None) -> None:
    """Fill a teacher with trained weights.

    Args:
        teacher: The pyramid to fill, in place.
        backbone: Its timm name, with the tag of the weights to fetch when ``source`` is ``None``.
        source: ``None`` for timm's pretrained weights from the hub, ``"lite0"`` for EfficientNet-Lite0's from a
            package (:mod:`.packaged_weights`), or the path of a ``.safetensors`` or ``.pth`` file of the full network
            or a part of it, under timm's or torchvision's tensor names.

    Raises:
        STPMError: The hub cannot be reached, the package or file is missing or unreadable, it holds code, or it lacks
            a tensor that a used layer needs. Tensors of later layers and of the classifier are optional.
    """
    if source is None:
        weights = _fetch(backbone, teacher)
        source = f"timm's weights of {backbone}"
    elif source == packaged_weights.NAME:
        weights = packaged_weights.read_lite0(backbone)
    else:
        weights = _read(Path(source))
    _fill(teacher, weights, source)


def _fetch(backbone: str, teacher: FrozenPyramid) -> Mapping[str, Tensor]:
    """Take timm's weights from the hub client's cache, or download them.

    The cache is tried first, then the hub's host for a few seconds: the client itself would try for a minute.
    """
    rank_zero_info(f"STPM: fetching the teacher's weights ({backbone}) from timm's hub, or from its cache.")
    kept = cached(backbone)
    try:
        if kept is None and in_hub(backbone) and not hub_reachable():
            raise ConnectionError
        overlay = {"file": kept} if kept else None
        net = timm.create_model(
            backbone, pretrained=True, features_only=True, out_indices=teacher.indices, pretrained_cfg_overlay=overlay
        )
    except Exception as error:
        msg = (
            f"the weights of {backbone} could not be fetched from timm's hub ({type(error).__name__}). Offline, set "
            "teacher_weights to a .safetensors or .pth file, or use the light teacher, whose weights are installed: "
            "`stpm train --teacher lite0`, or teacher_weights=lite0 and backbone=tf_efficientnet_lite0."
        )
        raise STPMError(msg) from None
    return net.state_dict()


def cached(backbone: str) -> str | None:
    """The file of a backbone's weights in the hub client's cache; ``None`` if it is not there."""
    name = in_hub(backbone)
    if name is None:
        return None
    repository, _, revision = name.partition("@")
    found = try_to_load_from_cache(repository, HUB_FILE, revision=revision or None)
    return found if isinstance(found, str) else None


def in_hub(backbone: str) -> str | None:
    """The hub's name of a backbone's weights; ``None`` if it has none."""
    config = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    return (config.hf_hub_id or None) if config is not None else None


def hub_reachable() -> bool:
    """Whether the hub's host answers, within :data:`PATIENCE`."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):  # an answer all the same
                urllib.request.urlopen(constants.ENDPOINT, timeout=PATIENCE).close()  # noqa: S310 - the client's own
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a DNS look-up has no time limit of its own
    asking.start()
    asking.join(PATIENCE)  # ends at once where the host refuses
    return answered.is_set()


def _read(path: Path) -> Mapping[str, Tensor]:
    """Read a file of tensors; nothing in it is ever executed."""
    if not path.is_file():
        msg = f"teacher_weights={str(path)!r} is not a file: pass a .safetensors or .pth file, or lite0."
        raise STPMError(msg)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        msg = (
            f"teacher_weights={str(path)!r} contains more than tensors or is corrupt, so it is not loaded: save "
            "only the network's state_dict(), preferably as .safetensors."
        )
        raise STPMError(msg) from None
    except OSError as error:
        msg = f"teacher_weights={str(path)!r} cannot be read ({error.strerror or error}): check its permissions."
        raise STPMError(msg) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"teacher_weights={str(path)!r} is corrupt or not a weights file ({reason}): fetch it again."
        raise STPMError(msg) from None
    weights = weights.get("state_dict", weights) if isinstance(weights, Mapping) else {}
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}


def _fill(teacher: FrozenPyramid, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors that the teacher has, by name; its ``stages_0`` is the full network's ``stages.0``."""
    given = {name.replace(".", "_"): tensor for name, tensor in weights.items()}
    state = teacher.net.state_dict()
    missing, misshapen = [], []
    for name, own in state.items():
        tensor = given.get(name.replace(".", "_"))
        if tensor is not None and tensor.shape != own.shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(own.shape)}")
        elif tensor is not None:
            state[name] = tensor
        elif not name.endswith("num_batches_tracked"):  # counters: unused in eval mode
            missing.append(name)
    if missing or misshapen:
        parts = [f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                 for kind, names in (("missing", missing), ("misshapen", misshapen)) if names]  # fmt: skip
        msg = (
            f"teacher_weights={source!r} does not fit the backbone's layers {', '.join(teacher.layers)}: "
            f"{' and '.join(parts)} tensors. Set backbone to the network that the weights belong to."
        )
        raise STPMError(msg)
    teacher.net.load_state_dict(state)
