"""The mask of the ignored part of a run's images: how it is read, saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torchvision.transforms.v2 import Resize

from ..decoding import read_ignored
from ..errors import STPMError
from ..model.ignored import Ignored
from .data import PIXEL_BY_PIXEL, parts_besides
from .data_record import identify, paths_of

if TYPE_CHECKING:
    from .lightning_model import STPM


def read_mask(module: STPM, source: Any) -> Ignored | None:
    """Read the mask that the model's ``ignore`` names.

    Args:
        module: The model; its ``ignore`` names the file.
        source: The run's datamodule, set up.

    Returns:
        The module that clears anomaly maps, on the model's device; ``None`` if nothing is ignored.

    Raises:
        STPMError: The file does not fit these images, or more than a resize prepares them for the network.
    """
    path = module.ignore
    if path is None:
        return None
    size = module.network_size
    if size is None:
        msg = (
            f"ignore={path} needs images that are resized to one size, and these are not: set image_size (and no "
            "crop_size), or pass the mask only to `stpm score --ignore`."
        )
        raise STPMError(msg)
    mask = torch.from_numpy(read_ignored(path))
    if not mask.any():
        msg = f"the mask {path} is black everywhere, so it ignores nothing: paint white what to ignore."
        raise STPMError(msg)
    dataset = source.train_dataloader().dataset
    for own, name in sizes(dataset):
        if own != tuple(mask.shape):
            msg = (
                f"training image {name} has {own[0]} x {own[1]} pixels and the mask {path} has {mask.shape[0]} x "
                f"{mask.shape[1]}: they must be equal."
            )
            raise STPMError(msg)
    collate = getattr(source, "external_collate_fn", None)
    odd = [*parts_besides(module.transform, (*PIXEL_BY_PIXEL, Resize)), *([] if collate is None else [collate])]
    if odd:
        msg = (
            f"ignore={path} is only resized, but the images also go through a {type(odd[0]).__name__}: leave out one "
            "of the two."
        )
        raise STPMError(msg)
    ignored = Ignored(size, digest_of(path))
    ignored.take(mask)
    if not ignored.counted.any():
        msg = f"the mask {path} leaves no pixel at {size[0]} x {size[1]}: ignore less, or set a larger image_size."
        raise STPMError(msg)
    return ignored.to(module.device)


def sizes(dataset: Any) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield height and width of a data set's images, as their files have them, and their names.

    Of a data set without files, only the first image's.

    Raises:
        STPMError: A file cannot be read.
    """
    paths = paths_of(dataset)
    if not paths:
        height, width = dataset[0].image.shape[-2:]
        yield (height, width), "number 0"
    for path in paths:
        try:
            with Image.open(path) as image:  # reads no more than the file's header
                yield (image.height, image.width), str(path)
        except OSError as error:
            msg = f"training image {path} cannot be read ({error}): repair it or take it out of the folder."
            raise STPMError(msg) from None


def describe_mask(ignored: Ignored | None) -> dict[str, Any] | None:
    """Plain data of a mask, except its pixels."""
    return None if ignored is None else {"size": list(ignored.size), "digest": ignored.digest}


def restore_mask(module: STPM, saved: Mapping[str, Any] | None, stated: Mapping[str, Any]) -> list[str]:
    """Make room for a saved mask's pixels, if needed; returns what was taken that was not stated.

    Args:
        module: It is changed.
        saved: As :func:`describe_mask` made it.
        stated: Arguments that the caller gave explicitly.

    Raises:
        STPMError: A mask was stated, and the saved model was trained without one or with another.
    """
    path, own = stated.get("ignore"), module.model.ignored
    if path is not None and saved is None:
        msg = (
            f"ignore={path} contradicts the checkpoint, whose model was trained without a mask: train it with the "
            "mask, or give the mask to `stpm score --ignore`."
        )
        raise STPMError(msg)
    if path is not None and saved is not None and Path(path).is_file() and digest_of(path) != saved["digest"]:
        msg = (
            f"ignore={path} contradicts the checkpoint, whose model was trained with another mask: omit ignore, or "
            "train the model again."
        )
        raise STPMError(msg)
    if describe_mask(own) == saved:
        return []
    module.model.ignored = None
    if saved is not None:
        module.model.ignored = Ignored(tuple(saved["size"]), saved["digest"]).to(module.device)
    return ["its mask"] if saved is not None and module.ignore is None else []


def digest_of(path: str | Path) -> str:
    """Hash of a mask's file."""
    return identify([Path(path)])[2][0]
