"""Where training images and features are kept: a file gives what memory does, and goes when the cache goes."""

import errno
import mmap
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stpm_plugin.training.feature_cache import FeatureCache

IMAGE, LEVELS = torch.rand(3, 8, 8), [torch.rand(4, 2, 2), torch.rand(6, 1, 1)]


def test_a_file_keeps_what_memory_keeps(tmp_path):
    caches = [FeatureCache(5, IMAGE, LEVELS, where) for where in (torch.device("cpu"), tmp_path / "new")]
    images, teacher = torch.rand(5, 3, 8, 8), [torch.rand(5, 4, 2, 2), torch.rand(5, 6, 1, 1)]
    for cache in caches:
        cache.put(0, images[:3], [level[:3] for level in teacher])
        cache.put(3, images[3:], [level[3:] for level in teacher])
    (kept, levels), (other, others) = (cache.get(torch.tensor([4, 0])) for cache in caches)
    assert torch.equal(kept, images[[4, 0]].half().float())
    assert torch.equal(kept, other)
    assert all(torch.equal(*pair) for pair in zip(levels, others, strict=True))


def test_the_file_has_no_name_and_goes_with_the_cache(tmp_path, monkeypatch):
    """Windows refuses to delete a mapped file by its name, and does so itself once nothing holds it open."""
    mappings = []

    class Mapping(mmap.mmap):
        def __init__(self, *arguments):
            mappings.append(weakref.ref(self))

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "The file is mapped")

    monkeypatch.setattr("stpm_plugin.training.feature_cache.mmap", SimpleNamespace(mmap=Mapping))
    monkeypatch.setattr(Path, "unlink", refuse)
    cache = FeatureCache(5, IMAGE, LEVELS, tmp_path)
    assert os.name == "nt" or not list(tmp_path.iterdir())
    cache.put(0, IMAGE[None], [level[None] for level in LEVELS])
    assert mappings[0]() is not None
    del cache
    assert mappings[0]() is None
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_where_no_room_can_be_reserved(tmp_path, monkeypatch):
    """macOS would truncate to a file with holes, and the process would end in a bus error as they fill."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert FeatureCache(5, IMAGE, LEVELS, tmp_path).images.shape == (5, 3, 8, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="No space left on device") as raised:
        FeatureCache(5, IMAGE, LEVELS, tmp_path)
    assert raised.value.errno == errno.ENOSPC
