"""Keep the training images and the teacher's features, in memory or in a file, so that neither is made twice."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

CacheMode = Literal["auto", "memory", "disk", "off"]
MEMORY_SHARE = 0.5  # of the free memory: the other half is for activations, the page cache and other programs
BLOCK = 2**28  # bytes of a file of images: a file each would use up the descriptors that a process may have
KEPT_DTYPE = torch.float16  # 11 bits: an image needs 8, and a unit vector's distance moves by less than 1e-6


class FeatureCache:
    """Images (N, 3, H, W) in [0, 1] and one map of unit vectors (N, C_l, H_l, W_l) for each level, in half precision.

    Args:
        count: Number of images N.
        image: One image (3, H, W).
        teacher: Its unit vectors (C_l, H_l, W_l), for each level.
        storage: Device that keeps them, or directory of the file that does.

    Raises:
        OSError: The directory has no room or cannot be written.
    """

    def __init__(self, count: int, image: Tensor, teacher: Sequence[Tensor], storage: torch.device | Path) -> None:
        shapes = [(count, *tensor.shape) for tensor in (image, *teacher)]
        if isinstance(storage, Path):
            flat = _mapped(storage, sum(math.prod(shape) for shape in shapes))
            parts = flat.split([math.prod(shape) for shape in shapes])
            store = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        else:
            store = [torch.empty(shape, dtype=KEPT_DTYPE, device=storage) for shape in shapes]
        self.images, *self.teacher = store

    def put(self, start: int, images: Tensor, teacher: Sequence[Tensor]) -> None:
        """Keep images (B, 3, H, W) and their unit vectors (B, C_l, H_l, W_l) from index ``start`` on."""
        for kept, given in zip((self.images, *self.teacher), (images, *teacher), strict=True):
            kept[start : start + len(given)] = given.to(KEPT_DTYPE)

    def get(self, indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the images (B, 3, H, W), float32, and unit vectors (B, C_l, H_l, W_l) at ``indices`` (B,)."""
        indices = indices.to(self.images.device)
        return self.images[indices].float(), [level[indices] for level in self.teacher]


class ImageCache:
    """Images (3, H, W) of any sizes, uint8, in the order in which they are put.

    Args:
        count: Number of images that will be put.
        directory: Of files of many images each; ``None`` for main memory.
    """

    def __init__(self, count: int, directory: Path | None) -> None:
        self.count, self.directory = count, directory
        self.images: list[Tensor] = []
        self._room = torch.empty(0, dtype=torch.uint8)  # of the last file

    def put(self, image: Tensor) -> bool:
        """Keep an image; returns whether there was room, and warns if there was none."""
        if self.directory is not None:
            if image.numel() > len(self._room):
                size = image.numel() * max(1, min(self.count - len(self.images), BLOCK // image.numel()))
                try:
                    self._room = _mapped(self.directory, size, torch.uint8)
                except OSError as error:
                    _no_room(sum(one.numel() for one in self.images) + size, self.directory, error)
                    return False
            room, self._room = self._room[: image.numel()], self._room[image.numel() :]
            image = room.view(image.shape).copy_(image)
        self.images.append(image)
        return True

    def get(self, index: int) -> Tensor:
        """Return an image (3, H, W)."""
        return self.images[index]


def open_image_cache(
    mode: CacheMode, directory: str | None, count: int, image: Tensor, device: torch.device, step: int, processes: int
) -> ImageCache | None:
    """Choose where to keep ``count`` images of about one size as bytes, and say so.

    Args:
        mode: As in :func:`open_cache`, but never a GPU's memory, which is left to the networks.
        directory: As in :func:`open_cache`.
        count: Number of images.
        image: One image (3, H, W).
        device: The device that trains.
        step: As in :func:`open_cache`.
        processes: As in :func:`open_cache`.

    Returns:
        The empty cache, or ``None`` where nothing is kept.
    """
    need = count * image.numel()
    storage = _storage(mode, directory, need, torch.device("cpu"), processes)
    if storage is None:
        return None
    _announce(f"{count} images", storage, need, device, step)
    return ImageCache(count, storage if isinstance(storage, Path) else None)


def open_cache(
    mode: CacheMode,
    directory: str | None,
    count: int,
    image: Tensor,
    teacher: Sequence[Tensor],
    step: int = 0,
    processes: int = 1,
) -> FeatureCache | None:
    """Choose where to keep ``count`` images, say so, and make the room.

    Args:
        mode: ``memory``: the teacher's GPU if the cache takes at most half of what is free there, else main memory;
            ``disk``; ``off``; or ``auto``: as ``memory`` if it takes at most half of what is free, else disk.
        directory: Where the file goes; ``None`` for the system's temporary directory.
        count: Number of images.
        image: One image (3, H, W).
        teacher: Its unit vectors (C_l, H_l, W_l), for each level, on the device that trains.
        step: Memory that a training step takes, bytes; logged with the rest.
        processes: Processes of this run that share this machine's memory.

    Returns:
        The empty cache, or ``None`` where nothing is kept: ``off``, or a disk without room, which is a warning.
    """
    need = count * sum(tensor.numel() for tensor in (image, *teacher)) * KEPT_DTYPE.itemsize
    device = teacher[0].device
    storage = _storage(mode, directory, need, device, processes)
    if storage is None:
        return None
    _announce(f"{count} images and their teacher features", storage, need, device, step)
    try:
        return FeatureCache(count, image, teacher, storage)
    except OSError as error:
        _no_room(need, storage, error)
        return None


def _no_room(need: int, storage: torch.device | Path, error: OSError) -> None:
    """Warn that ``need`` bytes cannot be kept."""
    free = shutil.disk_usage(storage).free / 2**30 if isinstance(storage, Path) and storage.is_dir() else 0.0
    rank_zero_warn(
        f"STPM: the cache of {need / 2**30:.2f} GiB does not fit in {storage} ({free:.2f} GiB free, "
        f"{error.strerror}): training continues without it, more slowly. Point cache_dir at a larger disk."
    )


def _announce(what: str, storage: torch.device | Path, need: int, device: torch.device, step: int) -> None:
    """Log where the cache goes, and the peak memory, from the bytes of the cache and of a training step."""
    peak = Counter(memory=psutil.Process().memory_info().rss)
    peak[_kind(device)] += step
    peak[_kind(storage)] += need
    peaks = ", ".join(f"{size / 2**30:.2f} GiB of {kind}" for kind, size in peak.items())
    where = f"a file in {storage}" if isinstance(storage, Path) else _kind(storage)
    rank_zero_info(
        f"STPM: keeping {what} in {where}, {need / 2**30:.2f} GiB; at its peak the process will take about {peaks}."
    )


def _storage(
    mode: CacheMode, directory: str | None, need: int, device: torch.device, processes: int
) -> torch.device | Path | None:
    """Choose a device or a directory for ``need`` bytes."""
    if mode == "off":
        return None
    if mode != "disk":
        if device.type == "cuda" and need <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            return device
        if mode == "memory" or need <= MEMORY_SHARE * psutil.virtual_memory().available / processes:
            return torch.device("cpu")
    return Path(directory or tempfile.gettempdir())


def _kind(storage: torch.device | Path) -> str:
    """Name what a storage is made of."""
    return "disk" if isinstance(storage, Path) else "memory" if storage.type == "cpu" else f"{storage.type} memory"


def _mapped(directory: Path, count: int, dtype: torch.dtype = KEPT_DTYPE) -> Tensor:
    """Map a new file of ``count`` values that has no name, so that no crash leaves it behind.

    Windows has no nameless files, and refuses to delete a mapped one: there the file goes with the mapping, which holds
    its last handle.
    """
    directory.mkdir(parents=True, exist_ok=True)
    size = count * dtype.itemsize
    with tempfile.TemporaryFile(prefix="stpm-cache-", dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a bus error later
        elif size > shutil.disk_usage(directory).free:  # macOS and Windows; truncating reserves nothing on macOS
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            file.truncate(size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)
