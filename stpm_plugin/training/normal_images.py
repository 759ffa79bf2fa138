"""The good images of one run: which are held out, what is kept of them, and the batches that Lightning draws."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import wrapt
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import STPMError
from ..model.matching import matching_loss
from ..model.usual_places import UsualPlaces
from ..model.windows import Window
from .data import (
    Split,
    TrainingBatches,
    augments,
    check_normal,
    draw_indices,
    hold_out,
    images_of,
    read,
    share_out,
    sizes_differ,
)
from .data_record import UNKNOWN, DataRecord, identify, paths_of
from .feature_cache import FeatureCache, open_cache
from .placement import learn

if TYPE_CHECKING:
    from .lightning_model import STPM


class StandIn(wrapt.ObjectProxy):
    """The user's datamodule as Lightning sees it during a fit: only the batches that train are replaced.

    Args:
        source: The user's datamodule, which is not changed.
        images: The images that train.
        validates: Whether its validation set is read in each epoch; else thresholds are set once, at the end.
    """

    def __init__(self, source: Any, images: NormalImages, validates: bool) -> None:
        super().__init__(source)
        self._self_images, self._self_validates = images, validates  # wrapt keeps names of this form to itself

    def train_dataloader(self) -> TrainingBatches:
        """The batches that train."""
        return self._self_images.batches

    def val_dataloader(self) -> Any:
        """The user's validation set, or none."""
        if self._self_validates:
            return self.__wrapped__.val_dataloader()
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # on purpose
        return []


class Good(NamedTuple):
    """A batch of a run's good images.

    Attributes:
        images: Pre-processed (B, 3, H, W).
        teacher: The teacher's unit vectors (B, C_l, H_l, W_l) for each level, where they are known.
        window: The window of a larger image that they were cut from, if any.
    """

    images: Tensor
    teacher: list[Tensor] | None = None
    window: Window | None = None


class NormalImages:
    """The good images of a run, read through the user's datamodule when they are first needed.

    Args:
        module: The model that is trained.
        source: The user's datamodule, set up.
    """

    def __init__(self, module: STPM, source: Any) -> None:
        self.module, self.source = module, source
        self._share = 1.0  # share of the images that is drawn
        self._batches: TrainingBatches | None = None
        self._loader: DataLoader  # this, the split and the record are there once the batches are
        self._split: Split
        self._record: DataRecord
        self._cache: FeatureCache | None = None

    def draw(self, share: float) -> None:
        """Take a random share of the images, in (0, 1], and leave the others unread."""
        self._share = share
        rank_zero_info(
            f"STPM: one pass over {self.available} good images would take more steps than `steps` allows: "
            f"{self.count} of them are drawn, and the others are not read."
        )

    @property
    def available(self) -> int:
        """Good images in the datamodule."""
        return len(self.source.train_dataloader().dataset)

    @property
    def count(self) -> int:
        """Good images of this run: those that are drawn."""
        return math.ceil(self.available * self._share)

    @property
    def batches_in_a_pass(self) -> int:
        """Batches that this process draws in an epoch, known before any image is read."""
        count, world = self.count, self.module.trainer.world_size
        held = hold_out(count, self.module.holdout, 0, world)
        return -(-len(share_out(count, held, 0, world).train) // self._batch_size)

    @property
    def batches(self) -> TrainingBatches:
        """The training batches; the first call splits, identifies and keeps the images."""
        self.module.ready_teacher()  # each time: a learning-rate finder restores the model between two calls
        if self._batches is None:
            self._require_work()
            self._batches = self._open()
        self._use_places()  # likewise
        self._batches.batch_size = self._batch_size  # a batch-size finder changes it between two calls
        self.module.data_record = self._record
        return self._batches

    @property
    def held(self) -> int:
        """Held-out images of all processes."""
        return len(self._record.held_out)

    @property
    def trained(self) -> int:
        """Training images of all processes."""
        return len(self._split.train) * self.module.trainer.world_size

    def held_out(self) -> Iterator[Good]:
        """Yield this process's held-out images, without training augmentations."""
        return self._read(self._split.holdout, len(self._split.train), plain=True)

    def for_choice(self) -> Iterator[Good]:
        """Yield the held-out images that judge each epoch."""
        return self.held_out()

    def by_image(self, values: Tensor) -> Tensor:
        """The values of each held-out image of this process, of those (N,) that :meth:`for_choice` led to."""
        return values

    def training(self) -> Iterator[Good]:
        """Yield this process's training images, in order."""
        return self._read(self._split.train, 0)

    @property
    def _batch_size(self) -> int:
        return self.module.batch_size or cast("int", self.source.train_dataloader().batch_size)

    def _require_work(self) -> None:
        """Refuse a run that would train nothing, before anything of the model changes."""
        loop = self.module.trainer.fit_loop
        if loop.done:
            done, most = loop.trainer.current_epoch, loop.max_epochs
            msg = (
                f"nothing is left to train: {done} of {most} epochs are done. Set max_epochs higher, make a new "
                "Engine, or use the checkpoint as it is."
            )
            raise STPMError(msg)

    def _open(self) -> TrainingBatches:
        module, trainer = self.module, self.module.trainer
        self._loader = loader = self.source.train_dataloader()
        check_normal(loader.dataset)
        seed = self._seed(module.data_record)
        drawn = draw_indices(self.available, self.count, seed)
        self._record = record = self._hold_out(drawn, seed, module.data_record)
        parts = share_out(len(drawn), record.held_out, trainer.global_rank, trainer.world_size)
        self._split = Split(*([drawn[index] for index in part] for part in parts))
        return self._make_batches(self._split.train, record.seed)

    def _make_batches(self, indices: Sequence[int], seed: int) -> TrainingBatches:
        """Keep the images, if they are to be kept, and make the batches of those at ``indices``."""
        self._cache = self._keep([*self._split.train, *self._split.holdout]) if self._may_keep() else None
        return TrainingBatches(self._loader, indices, self._batch_size, seed, self._cache)

    @functools.cached_property
    def _places(self) -> UsualPlaces | None:
        """What is usual at each position of the training images."""
        return learn(self.module, self)

    def _use_places(self) -> None:
        """Give them to the model; a resumed run keeps the ordinary score that its chosen weights were scored with."""
        before, self.module.model.usual_places = self.module.model.usual_places, self._places
        if before is not None and self._places is not None:
            self._places.ordinary.copy_(before.ordinary)

    def _seed(self, before: DataRecord | None) -> int:
        """Seed of the draw, the hold-out and the batches: the model's own, or the checkpoint's, or torch's."""
        given = before.seed if before else torch.initial_seed() % 2**31
        own = self.module.seed
        return own if own is not None else int(self.module.trainer.strategy.broadcast(given))

    def _hold_out(self, drawn: Sequence[int], seed: int, before: DataRecord | None) -> DataRecord:
        """Identify the images and hold some out: those of the checkpoint's run, and a share of the images it lacked.

        No content both trains and is held out, neither in this run nor in the checkpoint's.

        Raises:
            STPMError: All images trained the checkpoint's student.
        """
        module, trainer = self.module, self.module.trainer
        paths = paths_of(self._loader.dataset)
        found = identify([paths[index] for index in drawn] if paths else []) if trainer.is_global_zero else None
        names, sizes, digests = cast("tuple[list[str], list[int], list[str]]", trainer.strategy.broadcast(found))
        held = hold_out(len(drawn), module.holdout, seed, trainer.world_size)
        if module.holdout and before and before.identified and digests:
            again = [index for index, digest in enumerate(digests) if digest in before.held_out_digests]
            held = sorted({*again, *(index for index in held if digests[index] not in before.trained_digests)})
            if len(held) < trainer.world_size:
                msg = (
                    "all good images trained the checkpoint's student, so none can be held out: set holdout=0, add "
                    "good images, or train without the checkpoint."
                )
                raise STPMError(msg)
        if digests and UNKNOWN not in digests:
            contents = {digests[index] for index in held}
            held = [index for index, digest in enumerate(digests) if digest in contents]
        return DataRecord(names, sizes, digests, held, module.holdout, seed)

    def _may_keep(self) -> bool:
        """Whether an image and its features are the same in each epoch, and are to be kept."""
        if self.module.cache == "off":
            return False
        if getattr(self.source, "external_collate_fn", None) is not None:
            why = "the datamodule's own collation may change images"
        elif augments(self._loader.dataset, self.module.transform):
            why = "the training images are augmented"
        else:
            return True
        rank_zero_info(f"STPM: {why}, so images and teacher features are computed again in each epoch.")
        return False

    @torch.no_grad()
    def _keep(self, indices: Sequence[int]) -> FeatureCache | None:
        """Read each image and run the teacher on it once."""
        module, size = self.module, self._batch_size
        cache, start = None, 0
        total = -(-len(indices) // size)
        batches = read(self._loader, indices, size)
        for batch in reading(batches, total, "reading images and teacher features", module):
            images = images_of(batch)
            teacher = module.model.teach(self._prepared(images))
            if cache is None:
                step = size * activation_bytes(module, self._prepared(images[:1]))
                example = images[0], [level[0] for level in teacher]
                cache = open_cache(
                    module.cache, module.cache_dir, len(indices), *example, step, module.trainer.num_devices
                )
            if cache is None:
                return None
            if images.shape[1:] != cache.images.shape[1:]:
                raise STPMError(sizes_differ(batch.image_path, images.shape, cache.images.shape))
            cache.put(start, images, teacher)
            start += len(images)
        return cache

    def _prepared(self, images: Tensor) -> Tensor:
        """Move images (B, 3, H, W) to the model's device and pre-process them."""
        images = images.to(self.module.device)
        return self.module.transform(images) if self.module.transform else images

    def _read(self, indices: Sequence[int], start: int, plain: bool = False) -> Iterator[Good]:
        """Yield images and unit vectors at indices in the data set, kept in the cache from ``start`` on."""
        if self._cache is None:
            for batch in read(self._loader, indices, self._batch_size, plain):
                images = self._prepared(images_of(batch))
                yield Good(images, self.module.model.teach(images))
        else:
            for kept in torch.arange(start, start + len(indices)).split(self._batch_size):
                images, teacher = self._cache.get(kept)
                yield Good(self._prepared(images), [level.to(self.module.device) for level in teacher])


def reading(batches: Iterable[Any], total: int, words: str, module: STPM) -> Iterable[Any]:
    """Show a progress bar while ``total`` batches are read, in the first process."""
    return track(batches, words, total, disable=not module.trainer.is_global_zero)


def activation_bytes(module: STPM, images: Tensor) -> int:
    """Bytes that a forward pass of the student on pre-processed images (B, 3, H, W) keeps for its backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    module.model.student.eval()  # so that no statistic moves
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with module.autocast():
            student = module.model.study(images)
        loss = matching_loss(student, student)
    module.model.student.train()
    del loss
    return sum(kept.values())
