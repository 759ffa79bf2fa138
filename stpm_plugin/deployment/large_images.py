"""Raw scores of images that are too large for one request, in windows, equal to those of the whole image."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import openvino as ov

from ..model.windows import LARGEST, Reach, over
from .exported_model import tensor_of
from .verdict import RAW_LEVEL, Verdict


class Raw(NamedTuple):
    """What a model finds in an image.

    Attributes:
        score: Raw image score.
        anomaly_map: Raw anomaly map (H, W).
        seconds: Time that it took.
    """

    score: float
    anomaly_map: np.ndarray
    seconds: float


class LargeImages:
    """A model that is run on windows of an image, while the results of the window before are collected.

    Args:
        network: An exported graph that takes images of any size, and names its levels' distances.
        seen: How far its levels see.
        compile_for: Compiles a graph for the device, best for one request at a time.
    """

    def __init__(
        self, network: ov.Model, seen: Sequence[Reach], compile_for: Callable[[ov.Model], ov.CompiledModel]
    ) -> None:
        levels = [tensor_of(network, f"{RAW_LEVEL}{index}") for index in range(len(seen))]
        self.seen = seen
        self._network, self._compile = ov.Model(levels, network.get_parameters()), compile_for

    @staticmethod
    def is_large(pixels: np.ndarray) -> bool:
        """Whether an image (3, H, W) is scored in windows."""
        return max(pixels.shape[1:]) > LARGEST

    @functools.cached_property
    def _requests(self) -> list[ov.InferRequest]:
        compiled = self._compile(self._network)
        return [compiled.create_infer_request() for _ in range(2)]

    def score(self, pixels: np.ndarray, verdict: Verdict) -> Raw:
        """Score an image (3, H, W), RGB, uint8; its score is made as ``verdict`` says."""
        begin = time.perf_counter()
        height, width = pixels.shape[1:]
        anomaly_map = combined(self._levels(pixels), (height, width))
        return Raw(verdict.image_score(anomaly_map), anomaly_map, time.perf_counter() - begin)

    def _levels(self, pixels: np.ndarray) -> list[np.ndarray]:
        """The levels' distances (H_l, W_l) of the whole image."""
        height, width = pixels.shape[1:]
        whole = [np.empty((-(-height // reach.stride), -(-width // reach.stride)), np.float32) for reach in self.seen]
        idle = deque(self._requests)
        busy: deque = deque()

        def collect() -> None:
            request, window = busy.popleft()
            request.wait()
            for index, reach in enumerate(self.seen):
                level = request.get_output_tensor(index).data
                whole[index][window.within(reach)] = window.kept(level, reach)[0, 0]
            idle.append(request)

        for window in over(height, width, LARGEST, self.seen):
            if not idle:
                collect()
            request = idle.popleft()
            request.start_async({0: as_input(window.of(pixels))[None]})
            busy.append((request, window))
        while busy:
            collect()
        return whole


def as_input(pixels: np.ndarray) -> np.ndarray:
    """Pixels (3, H, W), uint8, as a network takes them: float32 in [0, 1]."""
    return pixels / np.float32(255)


def combined(levels: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """:func:`stpm_plugin.model.matching.anomaly_map` in NumPy: levels (H_l, W_l) to a map of a height and width."""
    made = np.ones(size, np.float32)
    for level in levels:
        np.multiply(made, cv2.resize(level, size[::-1], interpolation=cv2.INTER_LINEAR), out=made)
    return np.power(made, np.float32(1 / len(levels)), out=made)
