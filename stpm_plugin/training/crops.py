"""Training at the images' own size: each step draws windows, and counts the positions that equal the whole image's.

The teacher sees the same window as the student, rather than the whole image once: a run of 300 steps looks at a few
hundred windows, and a hundred images of four megapixels have 6,000.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import ImageBatch
from torch import Tensor

from ..errors import STPMError
from ..model.network import BYTES_A_PIXEL, STPMModel
from ..model.windows import LARGEST, Reach, Span, Window, drawn
from .data import PIXEL_BY_PIXEL, TrainingBatch, TrainingBatches, images_of, parts_besides, read, sizes_differ
from .feature_cache import ImageCache, open_image_cache
from .normal_images import Good, NormalImages, activation_bytes, reading
from .worst_windows import worst_windows

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from .lightning_model import STPM

CHOSEN_BY = 8  # fewest windows of held-out images that judge an epoch
PRIME = 1_000_003  # makes a seed from the numbers that identify a window


class CroppedImages(NormalImages):
    """The good images of a run that trains on windows of them."""

    _kept: ImageCache | None = None

    def for_choice(self) -> Iterator[Good]:
        """Yield the same windows of this process's held-out images in each epoch."""
        indices = self._split.holdout
        each = -(-CHOSEN_BY // max(1, len(indices)))
        for index, image in zip(indices, self._whole(indices, len(self._split.train), plain=True), strict=True):
            for number in range(each):
                window = draw_window(image.shape[-2:], self.module, self._record.seed, index, number)
                yield Good(self._prepared(window.of(image)[None].float() / 255), None, window)

    def by_image(self, values: Tensor) -> Tensor:
        """The highest value of each image's windows."""
        return values.reshape(len(self._split.holdout), -1).amax(1)

    def at(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """Yield this process's training images (3, H, W), uint8, by their numbers among them."""
        if self._kept is not None:
            return (self._kept.get(number) for number in numbers)
        return self._whole([self._split.train[number] for number in numbers], 0)

    def prepared(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """Yield this process's training images (1, 3, H, W), pre-processed, by their numbers among them."""
        return (self._prepared(image[None].float() / 255) for image in self.at(numbers))

    def _make_batches(self, indices: Sequence[int], seed: int) -> TrainingBatches:
        self._check()
        self._kept = self._keep_bytes([*self._split.train, *self._split.holdout]) if self._may_keep() else None
        return CropBatches(self, self._loader, indices, self._batch_size, seed)

    def _read(self, indices: Sequence[int], start: int, plain: bool = False) -> Iterator[Good]:
        """Yield whole images at indices in the data set, kept from ``start`` on."""
        for image in self._whole(indices, start, plain):
            yield Good(self._prepared(image[None].float() / 255))

    def _whole(self, indices: Sequence[int], start: int, plain: bool = False) -> Iterator[Tensor]:
        """Yield images (3, H, W), uint8, at indices in the data set, kept from ``start`` on."""
        if self._kept is not None:
            yield from (self._kept.get(index) for index in range(start, start + len(indices)))
        else:
            yield from (self._bytes(batch) for batch in read(self._loader, indices, 1, plain))

    def _bytes(self, batch: ImageBatch) -> Tensor:
        """An image (3, H, W) as it was read, uint8, of a batch of one in [0, 1].

        Raises:
            STPMError: The image is smaller than the network can take.
        """
        image, smallest = images_of(batch)[0], self.module.model.teacher.strides[-1]
        if min(image.shape[1:]) < smallest:
            msg = (
                f"training image {(batch.image_path or ['?'])[0]} has {image.shape[1]} x {image.shape[2]} pixels, and "
                f"{self.module.model.backbone} needs {smallest} along each side: take it out of the folder."
            )
            raise STPMError(msg)
        return torch.mul(image, 255).add_(0.5).to(torch.uint8)

    def _check(self) -> None:
        """Refuse what cannot be trained in windows.

        Raises:
            STPMError: The network sees the whole image, or the pre-processor more than one pixel.
        """
        module, transform = self.module, self.module.transform
        if module.model.reaches is None:
            msg = (
                f"crop_size={module.crop_size}: each position of {module.model.backbone} sees the whole image, or it "
                "takes images of one size, so a crop cannot stand for the image: set image_size instead of "
                "crop_size, or choose another backbone."
            )
            raise STPMError(msg)
        odd = parts_besides(transform, PIXEL_BY_PIXEL)
        if odd:
            msg = (
                f"crop_size={module.crop_size} trains on crops of images at their own size, but the pre-processor has "
                f"a {type(odd[0]).__name__}: set image_size instead, or remove the {type(odd[0]).__name__}."
            )
            raise STPMError(msg)

    def _keep_bytes(self, indices: Sequence[int]) -> ImageCache | None:
        """Read each image once."""
        module, cache = self.module, None
        for batch in reading(read(self._loader, indices, 1), len(indices), "reading images", module):
            image, pixels = images_of(batch)[0], self._bytes(batch)
            if cache is None:
                window = draw_window(image.shape[-2:], module, self._record.seed, 0).of(image)
                step = self._batch_size * activation_bytes(module, self._prepared(window[None]))
                scoring = BYTES_A_PIXEL * min(image[0].numel(), LARGEST**2)
                cache = open_image_cache(
                    module.cache,
                    module.cache_dir,
                    len(indices),
                    image,
                    module.device,
                    max(step, scoring),
                    module.trainer.num_devices,
                )
            if cache is None or not cache.put(pixels):
                return None
        return cache


class CropBatches(TrainingBatches):
    """The loader that Lightning iterates: shuffled batches of windows, as many in an epoch as there are images.

    In the first epoch each image gives one window, drawn at random. In later ones every second window is instead one in
    which the student does worst, of a few images that it is tried on before the epoch.

    Args:
        images: Give the images themselves.
        loader: As in :class:`TrainingBatches`.
        indices: Indices of the training images in its data set.
        batch_size: Windows in a batch.
        seed: Seed of the order, and of the windows.
    """

    def __init__(
        self, images: CroppedImages, loader: DataLoader, indices: Sequence[int], batch_size: int, seed: int
    ) -> None:
        super().__init__(loader, indices, batch_size, seed, None)
        self.images = images
        self.worst: list[tuple[int, Window]] = []  # of this epoch: an image's number, and a window of it

    def state_dict(self) -> dict[str, Any]:
        """The position in the order, and the epoch's worst windows."""
        return super().state_dict() | {"worst": [(number, *map(list, window)) for number, window in self.worst]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position, with the windows of that epoch."""
        super().load_state_dict(state)
        found = state.get("worst", ())
        self.worst = [(number, Window(Span(*rows), Span(*columns))) for number, rows, columns in found]

    def _batches(self, order: Tensor) -> Iterator[TrainingBatch]:
        if not self.drawn:  # else the epoch is resumed, with its windows
            self.worst = self._find_worst()
        numbered = enumerate(order.tolist(), self.drawn * self.batch_size)
        worst = dict(zip(itertools.count(1, 2), self.worst))
        wanted = [worst.get(position, (number, None)) for position, number in numbered]
        whole = self.images.at([number for number, _ in wanted])
        for start in range(0, len(wanted), self.batch_size):
            chosen = wanted[start : start + self.batch_size]
            crops, windows = [], []
            for (number, found), image in zip(chosen, itertools.islice(whole, len(chosen)), strict=True):
                window = found or draw_window(image.shape[-2:], self.images.module, self.seed, self.epoch, number)
                crops.append(window.of(image).float() / 255)
                windows.append(window)
                if crops[-1].shape != crops[0].shape:
                    raise STPMError(sizes_differ("of a batch", image.shape, crops[0].shape))
            yield TrainingBatch(image=torch.stack(crops), windows=windows)

    def _find_worst(self) -> list[tuple[int, Window]]:
        """Try the student on images that give no window of their own in this epoch."""
        spared = self._order()[1::2].tolist()
        if not self.epoch or not spared:
            return []
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        images = zip(spared, self.images.prepared(spared), strict=True)
        return worst_windows(self.images.module, images, len(spared), generator)


def draw_window(size: Sequence[int], module: STPM, *numbers: int) -> Window:
    """Draw a window of an image of so many rows and columns; equal numbers draw equal windows."""
    generator = torch.Generator().manual_seed(functools.reduce(lambda made, one: (made * PRIME + one) % 2**63, numbers))

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    rows, columns = (drawn(length, module.crop_size or 0, module.model.reaches or [], draw) for length in size)
    return Window(rows, columns)


def unspoilt(levels: Sequence[Tensor], windows: Sequence[Window], model: STPMModel) -> list[Tensor]:
    """Keep those distances of windows that equal the whole images'.

    Args:
        levels: Distances (B, h_l, w_l) for each level.
        windows: One for each of B.
        model: Whose levels they are.

    Returns:
        Distances (N_l,) for each level.
    """
    made = []
    for level, reach in zip(levels, model.reaches or [], strict=True):
        kept = (window.kept(one, reach).flatten() for one, window in zip(level, windows, strict=True))
        made.append(torch.cat(list(kept)))
    return made


def common(levels: Sequence[Tensor], window: Window, model: STPMModel) -> tuple[list[Tensor], tuple[int, int]]:
    """Keep the part of a window's distances (1, h_l, w_l) that is unspoilt at each level; and its size, pixels."""
    seen = model.reaches or []
    deepest, kept = seen[-1], []
    for level, reach in zip(levels, seen, strict=True):
        times = deepest.stride // reach.stride
        kept.append(window.kept(level, Reach(reach.stride, times * deepest.before, times * deepest.after)))
    height, width = kept[0].shape[-2:]
    return kept, (height * seen[0].stride, width * seen[0].stride)
