"""Verdicts on images from an exported model, by OpenVINO and NumPy alone: no torch, no anomalib."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import openvino as ov

from ..decoding import UNREADABLE, read_ignored
from ..errors import STPMError
from .exported_model import digest, files_of, last_line, reaches_of, read_model, resizes_again, size_of, tensor_of
from .images import read_images
from .large_images import LargeImages, as_input
from .refusals import Refused, finite, raising, require_masks_size, require_size
from .regions import Region, regions, shrunk
from .resize import resize
from .settings import Hint, Precision, check, for_device, in_words, require_precision
from .verdict import RAW_MAP, RAW_SCORE, Scale, changed, read_verdict

AS_EXPORTED = Scale(0.5)  # outputs of a model that describes no verdict: 0.5 is the threshold


class Scored(NamedTuple):
    """A model's verdict on an image.

    Attributes:
        path: The image's file or name.
        score: Image score, in [0, 1] if the model normalises; 0.5 is then the threshold.
        raw: Image score before normalisation; NaN if the model does not tell.
        label: ``normal`` or ``anomalous``; empty if the model sets no threshold.
        percentile: Percentage of the held-out good images with a lower score; ``None`` if the model has none.
        latency: The model's time for the whole batch, seconds.
        regions: Anomalous regions, the highest peak first, if maps were requested.
        image: The image (H, W, 3), BGR, uint8, if maps were requested.
        anomaly_map: Its normalised anomaly map (h, w), if maps were requested.
    """

    path: str
    score: float
    raw: float
    label: str
    percentile: float | None
    latency: float
    regions: tuple[Region, ...] = ()
    image: np.ndarray | None = None
    anomaly_map: np.ndarray | None = None


class Prepared(NamedTuple):
    """An image as the network takes it.

    Attributes:
        inputs: (3, h, w), RGB: resized, float32 in [0, 1], or of the image's own size, uint8.
        image: The image itself (H, W, 3), BGR, uint8, if it is to be returned.
    """

    inputs: np.ndarray
    image: np.ndarray | None


class Scorer:
    """A compiled model that scores several images at a time.

    Args:
        model: An ``.xml`` or ``.onnx`` file that anomalib exported.
        device: An OpenVINO device, such as ``CPU``, ``GPU`` or ``AUTO``.
        hint: ``latency`` or ``throughput``.
        batch: Images per request.
        precision: What the device computes in: ``f32`` keeps the verdicts of training; ``bf16`` and ``f16`` are faster
            where the hardware has them, and ``stpm verify`` says whether they are safe.
        threads: CPU threads to use; ``None`` for all.
        threshold: Raw image score above which an image is anomalous, instead of the model's.
        sensitivity: Instead of the model's, in (0, 1): above 0.5 finds more, below raises fewer false alarms.
        ignore: Mask, an image file of the images' size; its white parts are ignored.
        reduced_decode: Decode large JPEGs at a part of their size: faster, but scores move a little; without maps.

    Attributes:
        digest: Hash of the model's files.
        settings: The options that decide a verdict, in words.
        verdict: The thresholds in use; ``None`` if the model describes none.
        size: Height and width to which images are resized first, pixels; ``None`` if they are not.
        only: Height and width that images must have, if the graph takes no others.
        smallest: Fewest pixels that an image must have along each side.
        large: Scores images that are too large for one request, in windows; ``None`` for a graph that resizes them.

    Raises:
        STPMError: The file is missing or is not such a model, the device cannot run it, it is fixed to another batch,
            or it does not hold what an option needs.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "CPU",
        hint: Hint = "throughput",
        batch: int = 1,
        precision: Precision = "f32",
        threads: int | None = None,
        threshold: float | None = None,
        sensitivity: float | None = None,
        ignore: str | Path | None = None,
        reduced_decode: bool = False,
    ) -> None:
        check(hint, precision, batch, threads)
        core, path = ov.Core(), Path(model)
        require_precision(core, device, precision)
        network = read_model(core, path, batch)
        self.batch, self.digest = batch, digest(files_of(path))
        self.labels = any("pred_label" in output.get_names() for output in network.outputs)
        self.verdict = changed(read_verdict(network, path), path, threshold, sensitivity, ignore)
        self.ignore, self.ignored = ignore, None if ignore is None else read_ignored(ignore)
        mask = None if ignore is None else digest([Path(ignore)])
        self.settings = in_words(device, precision, threshold, sensitivity, mask, reduced_decode)
        seen = None if self.verdict is None else reaches_of(network)
        self.size = size_of(network) if seen is None else None  # else nothing is resized
        self.only = size_of(network) if seen is not None or resizes_again(network) else None
        self.smallest = 1 if seen is None else seen[-1].stride
        self.reduce_to = self.size if reduced_decode else None
        if reduced_decode and (self.size is None or ignore is not None):
            msg = "reduced_decode needs a model that resizes images, and no mask: omit reduced_decode."
            raise STPMError(msg)
        if self.ignored is not None and self.size is not None and shrunk(self.ignored, self.size).all():
            msg = f"the mask {ignore} leaves no pixel at {self.size[0]} x {self.size[1]}: ignore less."
            raise STPMError(msg)
        if self.verdict is not None:
            network = ov.Model([tensor_of(network, name) for name in (RAW_SCORE, RAW_MAP)], network.get_parameters())
        if self.size is not None:  # a graph of one size is compiled once, and takes images of all sizes in one batch
            network.reshape([1 if batch == 1 else -1, 3, *self.size])
        options = for_device(hint, precision, threads)
        one_window = options | {"PERFORMANCE_HINT": "LATENCY"}  # at a time, since each takes much memory
        compile_for = functools.partial(compiled, core, device=device, options=one_window)
        self.large = LargeImages(network, seen, compile_for) if seen and self.only is None else None
        self.compiled = compiled(core, network, device, options)
        self.requests = self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def score(
        self,
        files: Iterable[str | Path],
        maps: bool = False,
        unreadable: Callable[[str], None] | None = None,
        skip: Callable[[str], bool] | None = None,
        refused: Refused | None = None,
    ) -> Iterator[Scored]:
        """Score image files, several at a time, with the pixels that training sees.

        Args:
            files: Paths.
            maps: Whether to return regions, images and anomaly maps too.
            unreadable: Called with the path of each file that is not such an image; ``None`` raises.
            skip: Whether to leave out a video frame, by its name.
            refused: Called with the path of each image that cannot be scored, and a sentence that says why: its size
                is not the mask's or not one that the model takes, or its score is not finite; ``None`` raises.

        Yields:
            One verdict per image that is not left out, in order.

        Raises:
            ImageError: An image cannot be scored, and ``refused`` is ``None``.
            STPMError: A file cannot be read, and ``unreadable`` is ``None``; or maps are requested of images that are
                decoded to a part of their size.
        """
        if maps and self.reduce_to is not None:
            msg = "reduced_decode gives only scores and labels: omit maps, regions and heat maps."
            raise STPMError(msg)
        paths = (str(path) for path in files)
        prepare = functools.partial(self._prepare, keep=maps)
        refused = refused or raising
        images = read_images(paths, unreadable or _refuse, prepare, skip, self.reduce_to, refused)
        return self._infer(images, maps, refused)

    def score_arrays(
        self, images: Iterable[tuple[str, np.ndarray]], channels: str, maps: bool = False
    ) -> Iterator[Scored]:
        """Score images that are in memory, several at a time.

        Args:
            images: Names and images (H, W, 3), uint8, of any size. Unlike ``cv2.imread``, training ignores EXIF
                rotation.
            channels: Their order: ``BGR`` as OpenCV has it, or ``RGB`` as Pillow has it.
            maps: Whether to return regions, images and anomaly maps too.

        Yields:
            One verdict per image, in order.

        Raises:
            ImageError: An image cannot be scored, as for ``score``.
            STPMError: An image is ``None``, of another shape or type, or ``channels`` is another word.
        """
        if channels not in ("BGR", "RGB"):
            msg = f'channels="{channels}": say "BGR" for images from OpenCV or "RGB" for images from Pillow.'
            raise STPMError(msg)
        step = 1 if channels == "BGR" else -1
        prepared = ((name, self._prepare(checked(name, image)[:, :, ::step], name, maps)) for name, image in images)
        return self._infer(prepared, maps, raising)

    def _prepare(self, image: np.ndarray, name: str, keep: bool) -> Prepared:
        """The network's input (3, h, w), RGB, float32 in [0, 1], of an image (H, W, 3), BGR, uint8."""
        if self.ignored is not None and self.ignore is not None:
            require_masks_size(name, image.shape[:2], self.ignored.shape, self.ignore)
        require_size(name, image.shape[:2], self.only, self.smallest)
        pixels = image if self.size is None else resize(image, self.size)
        inputs = np.ascontiguousarray(pixels[:, :, ::-1].transpose(2, 0, 1))
        # A large image is dropped as soon as it can be, and one that is not resized waits as bytes.
        return Prepared(inputs if self.size is None else as_input(inputs), image if keep else None)

    def _infer(self, images: Iterable[tuple[str, Prepared]], maps: bool, refused: Refused) -> Iterator[Scored]:
        """Score prepared images, as many at a time as the device is best at."""
        idle = deque(self.compiled.create_infer_request() for _ in range(self.requests))
        busy: deque[tuple[ov.InferRequest, list[tuple[str, Prepared]]]] = deque()
        for batch in self._batches(images):
            if self.large is not None and self.large.is_large(batch[0][1].inputs):
                while busy:
                    oldest = busy.popleft()
                    yield from self._answers(*oldest, maps, refused)
                    idle.append(oldest[0])
                for one in batch:
                    yield from self._answer_in_windows(*one, maps, refused)
                continue
            if not idle:  # the oldest is done first, or nearly so
                oldest = busy.popleft()
                yield from self._answers(*oldest, maps, refused)
                idle.append(oldest[0])
            request = idle.popleft()
            inputs = np.stack([prepared.inputs for _, prepared in batch])
            request.start_async({0: as_input(inputs) if inputs.dtype == np.uint8 else inputs})
            busy.append((request, batch))
        for asked in busy:
            yield from self._answers(*asked, maps, refused)

    def _batches(self, images: Iterable[tuple[str, Prepared]]) -> Iterator[list[tuple[str, Prepared]]]:
        """Join neighbours of one size into batches."""
        batch: list[tuple[str, Prepared]] = []
        for name, prepared in images:
            if batch and (len(batch) == self.batch or batch[0][1].inputs.shape != prepared.inputs.shape):
                yield batch
                batch = []
            batch.append((name, prepared))
        if batch:
            yield batch

    def _answers(
        self, request: ov.InferRequest, batch: list[tuple[str, Prepared]], maps: bool, refused: Refused
    ) -> Iterator[Scored]:
        """Wait for a request and yield the verdict on each image of its batch that has a finite score."""
        request.wait()
        latency = request.latency / 1000
        scores = request.get_tensor(RAW_SCORE if self.verdict else "pred_score").data.reshape(-1).copy()
        anomaly_maps = None
        if maps or self.ignored is not None:
            anomaly_maps = request.get_tensor(RAW_MAP if self.verdict else "anomaly_map").data.copy()
        labels = request.get_tensor("pred_label").data.reshape(-1).copy() if self.labels and not self.verdict else None
        for index, (path, prepared) in enumerate(batch):
            if not finite(path, scores[index], refused):
                continue
            anomaly_map = None if anomaly_maps is None else anomaly_maps[index].reshape(anomaly_maps.shape[-2:])
            if self.verdict is None:
                label = "" if labels is None else "anomalous" if labels[index] else "normal"
                judged: tuple[float, float, str, float | None] = (float(scores[index]), math.nan, label, None)
            else:
                judged = self._judge(scores[index], anomaly_map)
            yield Scored(path, *judged, latency, *(self._shown(prepared.image, anomaly_map) if maps else ()))

    def _answer_in_windows(self, path: str, prepared: Prepared, maps: bool, refused: Refused) -> Iterator[Scored]:
        """Yield the verdict on an image that is too large for one request, if its score is finite."""
        assert self.large is not None and self.verdict is not None  # noqa: S101, PT018  # for the type checker
        raw = self.large.score(prepared.inputs, self.verdict)
        if not finite(path, raw.score, refused):
            return
        judged = self._judge(np.float32(raw.score), raw.anomaly_map)
        yield Scored(path, *judged, raw.seconds, *(self._shown(prepared.image, raw.anomaly_map) if maps else ()))

    def _judge(self, raw: np.float32, anomaly_map: np.ndarray | None) -> tuple[float, float, str, float | None]:
        """Score, raw score, label and percentile of a raw image score; a mask's part of the raw map is cleared."""
        verdict = self.verdict
        assert verdict is not None  # noqa: S101  # for the type checker
        if self.ignored is not None and anomaly_map is not None:
            ignored = shrunk(self.ignored, anomaly_map.shape)
            raw = np.float32(verdict.image_score(anomaly_map, ignored))
            anomaly_map[ignored] = 0
        limit = verdict.image.limit if verdict.normalize else np.float32(verdict.image.raw_limit)
        score = verdict.image.normalize(raw) if verdict.normalize else raw
        label = ("anomalous" if score > limit else "normal") if self.judges else ""
        return float(score), float(raw), label, verdict.percentile(float(raw))

    def _shown(self, image: Any, raw_map: Any) -> tuple[tuple[Region, ...], np.ndarray, np.ndarray]:
        """Regions, the image, and its map on the scale of the scores."""
        scale = AS_EXPORTED if self.verdict is None else self.verdict.pixel
        normalizes = self.verdict is not None and self.verdict.normalize
        anomaly_map = scale.normalize(raw_map) if normalizes else raw_map
        return tuple(regions(anomaly_map, self.pixel_limit, image.shape[:2])), image, anomaly_map

    @property
    def judges(self) -> bool:
        """Whether images get labels: not without a threshold."""
        if self.verdict is None:
            return self.labels
        return self.verdict.label and not math.isnan(self.verdict.image.threshold)

    @property
    def pixel_limit(self) -> float:
        """Values of ``anomaly_map`` above it are anomalous."""
        if self.verdict is None:
            return float(AS_EXPORTED.limit)
        return float(self.verdict.pixel.limit) if self.verdict.normalize else self.verdict.pixel.raw_limit


def compiled(core: ov.Core, network: ov.Model, device: str, options: dict[str, Any]) -> ov.CompiledModel:
    """Compile a model for a device.

    Raises:
        STPMError: The device cannot run it, or does not exist.
    """
    try:
        return core.compile_model(network, device, options)
    except RuntimeError as error:
        others = ", ".join(core.available_devices)
        msg = f"device {device} cannot run the model ({last_line(error)}): use one of {others}."
        raise STPMError(msg) from None


def checked(name: str, image: Any) -> np.ndarray:
    """Return an image that is (H, W, 3) of uint8.

    Raises:
        STPMError: It is something else, which would be misread.
    """
    if image is None:
        msg = f"{name} is None: the file was not read; give Scorer.score its path to learn why."
        raise STPMError(msg)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
        msg = f"{name} is {found}: give an array (height, width, 3) of uint8, as cameras and OpenCV do."
        raise STPMError(msg)
    if not image.size:
        msg = f"{name} has no pixels."
        raise STPMError(msg)
    return image


def _refuse(path: str) -> NoReturn:
    """Raise for a file that cannot be read."""
    msg = f"{path} {UNREADABLE}."
    raise STPMError(msg)
