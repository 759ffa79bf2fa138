"""The normal images of a run: which are held out, how they are read, and the batches that training draws.

The datamodule's own loader says what the images are (data set, collation, workers). The batches are drawn here,
because the same images and teacher features are needed in every epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import Batch, ImageBatch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..errors import STPMError
from ..model.windows import Window
from .feature_cache import FeatureCache

# Transforms that give the same image every time. Anything else counts as augmentation.
DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Normalize, v2.ToDtype, v2.Grayscale, v2.Pad, v2.Identity)
PIXEL_BY_PIXEL = (v2.Compose, v2.Normalize, v2.ToDtype, v2.Grayscale, v2.Identity)


@dataclass
class TrainingBatch(ImageBatch):
    """A batch of normal images (B, 3, H, W), with more where it is known.

    Attributes:
        teacher: The teacher's unit vectors (B, C_l, H_l, W_l) for each level.
        windows: For each image, the window of the larger image that it was cut from.
    """

    teacher: list[Tensor] | None = None
    windows: list[Window] | None = None


def images_of(batch: Batch) -> Tensor:
    """Images (B, 3, H, W) of a batch; anomalib's types call every field optional."""
    return cast("Tensor", batch.image)


class Split(NamedTuple):
    """Indices of the images in the data set, in the order in which this process reads them."""

    train: list[int]
    holdout: list[int]


def draw_indices(available: int, count: int, seed: int) -> list[int]:
    """Choose ``count`` of so many images, in ascending order; the same seed gives the same choice."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:count].tolist())


def hold_out(count: int, share: float, seed: int, least: int = 1) -> list[int]:
    """Choose which images to hold out, in ascending order.

    Args:
        count: Number of images.
        share: Share to hold out, in [0, 1); above 0, at least ``least`` images are.
        seed: The same seed gives the same choice among as many images.
        least: Fewest images, one for each process.
    """
    held = max(least, round(count * share)) if share else 0
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()[:held])


def share_out(count: int, held: Sequence[int], rank: int = 0, world: int = 1) -> Split:
    """Give each process its own share of both parts; the training parts are of equal length.

    Args:
        count: Number of images.
        held: Indices of the held-out images.
        rank: This process among ``world``.
        world: Number of processes.

    Raises:
        STPMError: Fewer than two images are left to train on, in any process.
    """
    train = sorted(set(range(count)) - set(held))
    if len(train) < 2 * world:
        msg = (
            f"{count} normal training images less {len(held)} held out leave {len(train)}, and each of {world} "
            "process(es) needs 2: add images, or lower holdout."
        )
        raise STPMError(msg)
    even = len(train) - len(train) % world
    return Split(train[rank:even:world], sorted(held)[rank::world])


def augments(dataset: Any, transform: v2.Transform | None) -> bool:
    """Whether a data set's or a pre-processor's transforms may change an image from one epoch to the next."""
    pending = [getattr(dataset, "augmentations", None), transform]
    while pending:
        part = pending.pop()
        if isinstance(part, v2.Compose | torch.nn.Sequential):
            pending.extend(part.transforms if isinstance(part, v2.Compose) else part)
        elif part is not None and not isinstance(part, DETERMINISTIC):
            return True
    return False


def steady(transform: Any) -> Any:
    """A data set's transform without the parts that may change an image from one epoch to the next."""
    if isinstance(transform, v2.Compose | torch.nn.Sequential):
        parts = transform.transforms if isinstance(transform, v2.Compose) else list(transform)
        kept = [part for part in map(steady, parts) if part is not None]
        return v2.Compose(kept) if kept else None
    return transform if isinstance(transform, DETERMINISTIC) else None


def parts_besides(transform: v2.Transform | None, kinds: tuple[type, ...]) -> list[v2.Transform]:
    """The parts of a pre-processor's transform that are of none of these kinds."""
    parts = [part for part in (transform, *getattr(transform, "transforms", ())) if part is not None]
    return [part for part in parts if not isinstance(part, kinds)]


def check_normal(dataset: Any) -> None:
    """Refuse a training set with anomalous images.

    Raises:
        STPMError: An image of the data set carries the label anomalous; names the first.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None or "label_index" not in samples:
        return
    wrong = samples[samples.label_index == 1]
    if len(wrong):
        msg = (
            f"{len(wrong)} of {len(samples)} training images are labelled anomalous, the first "
            f"{wrong.image_path.iloc[0]}: STPM learns from normal images only. Move them to the test set."
        )
        raise STPMError(msg)


def check_depth(path: str) -> None:
    """Refuse a grey image of more than 8 bits: anomalib reads it by Pillow, which clips it to white.

    Raises:
        STPMError: The image is one.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
    except OSError:  # reported where the file is read
        return
    if mode[0] in "IF":  # I;16, I and F
        msg = f"{path} has grey values of more than 8 bits, which anomalib would clip to white: convert it to 8 bits."
        raise STPMError(msg)


class _Refused(NamedTuple):
    """Stands for an image that cannot be trained on, until the main process can raise the error."""

    reason: str


class _Readable(Dataset):
    """A data set whose broken files become values: worker processes lose the exception's message."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        samples = getattr(self.dataset, "samples", None)
        path = f"number {index}" if samples is None else samples.image_path.iloc[index]
        try:
            item = self.dataset[index]
            check_depth(path)
        except STPMError as error:
            return _Refused(f"training image {error}")
        except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return _Refused(f"training image {path} cannot be read ({reason}): repair it or take it out of the folder.")
        return item


class _Collate:
    """The datamodule's collation, which passes on a refusal, and names an image of another size."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        for item in items:
            if isinstance(item, _Refused):
                return item
        odd = [item for item in items if item.image.shape != items[0].image.shape]
        if odd:
            return _Refused(sizes_differ(odd[0].image_path, odd[0].image.shape, items[0].image.shape))
        return self.collate(items)


def sizes_differ(path: Any, shape: Sequence[int], others: Sequence[int]) -> str:
    """Say that a training image, or one of a batch, has another height and width than others."""
    first = path[0] if isinstance(path, list) else path
    return (
        f"training image {first} has {shape[-2]} x {shape[-1]} pixels and others {others[-2]} x {others[-1]}, but the "
        "pre-processor does not resize to a fixed size: add a Resize to it, or set batch_size=1 and cache=off."
    )


def read(loader: DataLoader, indices: Sequence[int], batch_size: int, plain: bool = False) -> Iterator[ImageBatch]:
    """Read the images at ``indices``, in that order, as a datamodule's loader would.

    Args:
        loader: The datamodule's loader: its data set, collation and workers are used.
        indices: Indices in the data set.
        batch_size: Images in a batch.
        plain: Leave out training augmentations, as for images that set a threshold.

    Yields:
        Batches of images (B, 3, H, W) in [0, 1].

    Raises:
        STPMError: A file cannot be read, holds what anomalib misreads, or has another size than its neighbours.
    """
    dataset: Any = loader.dataset
    if plain and getattr(dataset, "augmentations", None) is not None:
        dataset = copy.copy(dataset)
        dataset.augmentations = steady(dataset.augmentations)
    batches = DataLoader(
        _Readable(dataset),
        batch_size=batch_size,
        sampler=list(indices),
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),
    )
    for batch in batches:
        if isinstance(batch, _Refused):
            raise STPMError(batch.reason)
        yield batch


class TrainingBatches:
    """The loader that Lightning iterates: shuffled batches, from the cache or read again.

    The order depends only on the seed and the epoch, and the position in it is saved with a checkpoint: a resumed run
    draws what an uninterrupted one draws, even from the middle of an epoch.

    Args:
        loader: The datamodule's training loader.
        indices: Indices of the training images in its data set.
        batch_size: Images in a batch; the last batch of an epoch may be smaller.
        seed: Seed of the order.
        cache: The kept images and features, in the order of ``indices``, or ``None``.
    """

    def __init__(
        self, loader: DataLoader, indices: Sequence[int], batch_size: int, seed: int, cache: FeatureCache | None
    ) -> None:
        self.loader, self.indices, self.batch_size, self.seed, self.cache = loader, indices, batch_size, seed, cache
        self.epoch = 0
        self.drawn = 0  # batches of this epoch
        self._resumed = (-1, 0)  # epoch and batches drawn in it, of a checkpoint

    @property
    def sampler(self) -> TrainingBatches:
        """Itself: Lightning tells a loader's sampler the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in the order, as Lightning saves it."""
        return {"epoch": self.epoch, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position, if its epoch is drawn next."""
        self._resumed = state["epoch"], state["drawn"]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yield the epoch's batches, or what is left of them."""
        (epoch, drawn), self._resumed = self._resumed, (-1, 0)
        self.drawn = drawn if epoch == self.epoch and drawn < len(self) else 0
        for batch in self._batches(self._order()[self.drawn * self.batch_size :]):
            self.drawn += 1
            yield batch

    def _order(self) -> Tensor:
        """Numbers of all images, in this epoch's order."""
        return torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(self.seed + self.epoch))

    def _batches(self, order: Tensor) -> Iterator[TrainingBatch]:
        if self.cache is None:
            indices = [self.indices[index] for index in order.tolist()]
            for batch in read(self.loader, indices, self.batch_size):
                yield TrainingBatch(image=batch.image)
        else:
            for chosen in order.split(self.batch_size):
                images, teacher = self.cache.get(chosen)
                yield TrainingBatch(image=images, teacher=teacher)
