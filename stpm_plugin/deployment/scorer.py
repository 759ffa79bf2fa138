"""Image scores and anomaly maps from an exported model, by OpenVINO and NumPy alone: no torch, no anomalib."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

from ..errors import STPMError


class Scored(NamedTuple):
    """A model's verdict on an image.

    Attributes:
        path: The image's file.
        score: Image score, in [0, 1] if the model normalises; 0.5 is then the threshold.
        label: ``normal`` or ``anomalous``; empty if the model sets no threshold.
        latency: The model's time for the whole batch, seconds.
        image: The image (H, W, 3), BGR, uint8, if maps were requested.
        anomaly_map: Its anomaly map (h, w), if maps were requested.
    """

    path: str
    score: float
    label: str
    latency: float
    image: np.ndarray | None = None
    anomaly_map: np.ndarray | None = None


class Scorer:
    """A compiled model that scores several images at a time.

    Args:
        model: An ``.xml`` or ``.onnx`` file that anomalib exported.
        device: An OpenVINO device, such as ``CPU``, ``GPU`` or ``AUTO``.
        hint: ``latency`` or ``throughput``.
        batch: Images per request; neighbours of one size share a request.
        precision: What the device computes in, such as ``f32``; ``None`` leaves it to the device.

    Raises:
        STPMError: The file is missing or no such model, the device cannot run it, or it is fixed to another batch.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "CPU",
        hint: str = "throughput",
        batch: int = 1,
        precision: str | None = None,
    ) -> None:
        core, path = ov.Core(), Path(model)
        options = {"PERFORMANCE_HINT": hint.upper()} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        network = _read_model(core, path, batch)
        shape = network.input(0).partial_shape
        self.batch = batch
        self.labels = any("pred_label" in output.get_names() for output in network.outputs)
        pixels = PrePostProcessor(network)
        pixels.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        pixels.input().tensor().set_color_format(ColorFormat.BGR)
        pixels.input().model().set_layout(ov.Layout("NCHW"))
        steps = (
            pixels.input().preprocess().convert_element_type(ov.Type.f32).convert_color(ColorFormat.RGB).scale(255.0)
        )
        if shape[2].is_static and shape[3].is_static:  # resized as in training: the scores of an any-size model
            pixels.input().tensor().set_spatial_dynamic_shape()
            steps.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
        try:
            self.compiled = core.compile_model(pixels.build(), device, options)
        except RuntimeError as error:
            others = ", ".join(core.available_devices)
            msg = f"device {device} cannot run {path} ({_last_line(error)}); there are: {others}."
            raise STPMError(msg) from None
        self.requests = self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def score(self, images: Iterable[tuple[str, np.ndarray]], maps: bool = False) -> Iterator[Scored]:
        """Score images as they come, several at a time.

        Args:
            images: Paths and images (H, W, 3), BGR, uint8, of any size.
            maps: Whether to return images and anomaly maps too.

        Yields:
            One verdict per image, in the order of the images.
        """
        idle = deque(self.compiled.create_infer_request() for _ in range(self.requests))
        busy: deque[tuple[ov.InferRequest, list[str], np.ndarray]] = deque()
        for paths, batch in self._batches(images):
            if not idle:  # the oldest is done first, or nearly so
                oldest = busy.popleft()
                yield from self._answers(*oldest, maps)
                idle.append(oldest[0])
            request = idle.popleft()
            request.start_async({0: batch})
            busy.append((request, paths, batch))
        for asked in busy:
            yield from self._answers(*asked, maps)

    def _answers(self, request: ov.InferRequest, paths: list[str], batch: np.ndarray, maps: bool) -> Iterator[Scored]:
        """Wait for a request and yield the verdict on each image of its batch (B, H, W, 3)."""
        request.wait()
        scores = request.get_tensor("pred_score").data.reshape(-1)
        labels = request.get_tensor("pred_label").data.reshape(-1) if self.labels else None
        anomaly_maps = request.get_tensor("anomaly_map").data.copy() if maps else None
        for place, path in enumerate(paths):
            label = "" if labels is None else "anomalous" if labels[place] else "normal"
            shown = (batch[place], anomaly_maps[place, 0]) if anomaly_maps is not None else ()
            yield Scored(path, float(scores[place]), label, request.latency / 1000, *shown)

    def _batches(self, images: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Join neighbours of one size into batches (B, H, W, 3)."""
        paths: list[str] = []
        waiting: list[np.ndarray] = []
        for path, image in images:
            if waiting and (len(waiting) == self.batch or waiting[0].shape != image.shape):
                yield paths, np.stack(waiting)
                paths, waiting = [], []
            paths.append(path)
            waiting.append(image)
        if waiting:
            yield paths, np.stack(waiting)


def _read_model(core: ov.Core, path: Path, batch: int) -> ov.Model:
    """Read an exported model that takes requests of ``batch`` images.

    Raises:
        STPMError: The file is missing, or no such model.
    """
    if not path.is_file():
        msg = f"the model {path} does not exist: give the .xml file that `anomalib export` wrote."
        raise STPMError(msg)
    try:
        network = core.read_model(path)
        names = {name for output in network.outputs for name in output.get_names()}
        shape = network.input(0).partial_shape
    except RuntimeError as error:
        msg = f"the model {path} cannot be read ({_last_line(error)}): export it again with `anomalib export`."
        raise STPMError(msg) from None
    if "pred_score" not in names or len(shape) != 4:
        msg = f"the model {path} has no output pred_score: give one that `anomalib export` wrote."
        raise STPMError(msg)
    if shape[0].is_static and shape[0].get_length() != batch:
        msg = f"the model {path} takes batches of {shape[0].get_length()}: give --batch {shape[0].get_length()}."
        raise STPMError(msg)
    return network


def _last_line(error: Exception) -> str:
    """Return the last line of an OpenVINO error: the message, below the source locations."""
    return str(error).strip().splitlines()[-1].strip()
