"""Which images trained a model and which were held out, by content, so that no later run has to guess."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

READERS = 4  # threads: hashing releases the interpreter, and a disk answers several at once
SHORT = 12  # hexadecimal digits that tell images apart in an exported model: 20,000 images take 160 kB
UNKNOWN = ""  # digest of an image that could not be read, or of a data set that names no files


@dataclass(frozen=True)
class DataRecord:
    """The good images of a run.

    Args:
        names: Path of each image with forward slashes, relative to the folder above all of them; absolute where they
            are on several drives.
        sizes: Bytes of each.
        digests: BLAKE2 hash of each file's bytes, 128 bits, hexadecimal.
        held_out: Indices of the images that chose the weights and set thresholds; the student did not train on them.
        holdout: Share that was asked for.
        seed: Seed of the hold-out and of the order of the batches.
    """

    names: list[str]
    sizes: list[int]
    digests: list[str]
    held_out: list[int]
    holdout: float
    seed: int

    def to_state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @property
    def identified(self) -> bool:
        """Whether each image is known by its content."""
        return bool(self.digests) and UNKNOWN not in self.digests

    @property
    def held_out_digests(self) -> frozenset[str]:
        """Contents that were held out and that no training image shares."""
        return frozenset(self.digests[index] for index in self.held_out) - self.trained_digests

    @property
    def trained_digests(self) -> frozenset[str]:
        """Contents that trained the model."""
        held = set(self.held_out)
        return frozenset(digest for index, digest in enumerate(self.digests) if index not in held)


def packed(digests: Iterable[str]) -> str:
    """Shortened digests as text, for an exported model."""
    return base64.b64encode(b"".join(sorted(bytes.fromhex(digest[:SHORT]) for digest in digests))).decode()


def unpacked(text: str) -> frozenset[str]:
    """The shortened digests that :func:`packed` wrote."""
    content, step = base64.b64decode(text), SHORT // 2
    return frozenset(content[at : at + step].hex() for at in range(0, len(content), step))


def among(paths: Sequence[Path], digests: Iterable[str]) -> set[Path]:
    """Which of the image files have contents among ``digests``, whole or shortened."""
    known = {digest[:SHORT] for digest in digests}
    _, _, found = identify(paths) if known else ([], [], [])
    return {path for path, digest in zip(paths, found, strict=False) if digest[:SHORT] in known}


def paths_of(dataset: Any) -> list[Path]:
    """Image files of an anomalib data set, in its order; empty for one that names no files."""
    samples = getattr(dataset, "samples", None)
    return [] if samples is None else [Path(path) for path in samples.image_path]


def identify(paths: Sequence[Path]) -> tuple[list[str], list[int], list[str]]:
    """Names, sizes and digests of image files, as :class:`DataRecord` has them."""
    if not paths:
        return [], [], []
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(_digest, paths))
    return names_of([path.absolute() for path in paths]), [size for size, _ in found], [digest for _, digest in found]


def _digest(path: Path) -> tuple[int, str]:
    try:
        content = path.read_bytes()
    except OSError:  # reported where the file is decoded
        return 0, UNKNOWN
    return len(content), hashlib.blake2b(content, digest_size=16).hexdigest()


def names_of(paths: Sequence[PurePath]) -> list[str]:
    """Names of absolute paths, as :class:`DataRecord` has them."""
    above = (folder for folder in paths[0].parents if all(path.is_relative_to(folder) for path in paths))
    root = next(above, None)
    return [(path if root is None else path.relative_to(root)).as_posix() for path in paths]
