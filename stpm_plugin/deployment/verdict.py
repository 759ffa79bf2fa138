"""What turns raw scores into a verdict: thresholds, normalisation, and the held-out scores behind them.

It takes three forms: NumPy, by which the scorer judges; operations appended to an exported graph, by which every other
host judges; and text in the model's ``.xml``, from which the first form is read again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ..errors import STPMError

SECTION = "stpm"  # of the model's runtime information
RAW_SCORE, RAW_MAP = "raw_pred_score", "raw_anomaly_map"  # tensors of the graph, before normalisation
RAW_LEVEL = "raw_distances_"  # and its distances at each level, from 0, where images may have any size
# 1: of versions 0.1 and 0.2, without `stands_out`; 2: with a share of the map in place of an area;
# 3: without `counted`; 4: without `quantile`
FORMAT = 5
MIN_MEAN = 1e-6  # of a map: `stpm_plugin.model.matching`'s, which this side cannot import, since it needs torch


@dataclasses.dataclass(frozen=True)
class Scale:
    """How one kind of value is normalised.

    Attributes:
        threshold: Raw value that becomes 0.5; NaN where none was set.
        low: Lowest raw value of the validation set, for anomalib's min-max normalisation; ``None`` for
            value / (value + threshold).
        high: Highest raw value, likewise.
        sensitivity: In [0, 1]; normalised values above 1 - sensitivity are anomalous.
    """

    threshold: float
    low: float | None = None
    high: float | None = None
    sensitivity: float = 0.5

    def normalize(self, values: Any) -> np.ndarray:
        """Map raw values to [0, 1], float32, the threshold to 0.5; unchanged if no threshold or range is known."""
        values, threshold = np.asarray(values, np.float32), np.float32(self.threshold)
        if self.low is None or self.high is None:
            return values if math.isnan(threshold) else values / (values + threshold)
        if math.isnan(self.low):
            return values
        if self.low == self.high:
            return np.where(values > threshold, 1, np.where(values < threshold, 0, 0.5)).astype(np.float32)
        return np.clip((values - threshold) / np.float32(self.high - self.low) + np.float32(0.5), 0, 1)

    @property
    def limit(self) -> np.float32:
        """Normalised values above this are anomalous."""
        return np.float32(1) - np.float32(self.sensitivity)

    @property
    def raw_limit(self) -> float:
        """Raw values above this are anomalous; at a sensitivity of 0.5, the threshold.

        Raises:
            STPMError: Another sensitivity needs a range of raw values, and none is known.
        """
        if self.low is None or self.high is None:
            return self.threshold * float(self.limit) / max(1 - float(self.limit), 1e-12)
        shift, value_range = float(self.limit) - 0.5, self.high - self.low
        if shift == 0:
            return self.threshold
        if math.isnan(value_range) and not math.isnan(self.threshold):
            msg = (
                f"sensitivity={self.sensitivity} cannot move the threshold: the model was trained with "
                "enable_normalization=False and holds no range of scores; use 0.5, or train with normalisation."
            )
            raise STPMError(msg)
        return self.threshold + shift * value_range

    def append(self, raw: ov.Output, normalize: bool) -> tuple[ov.Output, ov.Output]:
        """Append normalisation and comparison to a graph's raw values; returns values and labels."""
        if not normalize:
            return raw, ops.greater(raw, np.float32(self.raw_limit)).output(0)
        value, threshold = raw, np.float32(self.threshold)
        if self.low is None or self.high is None:
            if not math.isnan(threshold):
                value = ops.divide(raw, ops.add(raw, threshold)).output(0)
        elif self.low == self.high:
            above, below = ops.greater(raw, threshold), ops.less(raw, threshold)
            one, zero, half = (np.float32(number) for number in (1, 0, 0.5))
            value = ops.select(above, one, ops.select(below, zero, half)).output(0)
        elif not math.isnan(self.low):
            scaled = ops.divide(ops.subtract(raw, threshold), np.float32(self.high - self.low))
            value = ops.clamp(ops.add(scaled, np.float32(0.5)), 0.0, 1.0).output(0)
        return value, ops.greater(value, self.limit).output(0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Thresholds and normalisation of image scores and anomaly maps.

    Attributes:
        basis: What set the thresholds: ``held-out good images``, ``validation set``, ``new good images``, or ``none``.
        image: Of the image scores.
        pixel: Of the anomaly maps.
        normalize: Whether scores and maps are normalised.
        label: Whether labels and masks are given.
        held_out_scores: Raw image scores of good images that did not train the model, ascending.
        held_out_maxima: Raw maxima of their anomaly maps, ascending.
        score_area: Blocks of the map that the image score is made of, as in :class:`stpm_plugin.STPMModel`.
        score_share: The same as a share of the map, in older exports; ``None`` in others.
        stride: Pixels of the map that the shallowest level tells apart, along a side.
        stands_out: Whether the score says how far that part stands out of its map; else it is the part's mean, as
            versions 0.1 and 0.2 had it.
        counted: Share of the maps that counts; the model clears the rest, which it was trained to ignore.
        quantile: Share of good images that should stay below the image threshold, if the held-out scores set it by
            that; ``None`` if something else did.
    """

    basis: str
    image: Scale
    pixel: Scale
    normalize: bool = True
    label: bool = True
    held_out_scores: tuple[float, ...] = ()
    held_out_maxima: tuple[float, ...] = ()
    score_area: int = 0
    score_share: float | None = None
    stride: int = 4
    stands_out: bool = False
    counted: float = 1.0
    quantile: float | None = None

    def with_threshold(self, threshold: float) -> Verdict:
        """The verdict with another raw image threshold; the pixel threshold moves by the same factor.

        It replaces the model's sensitivity. A pixel sensitivity that differs from the image's still counts.

        Raises:
            STPMError: It is not above 0, or the model has no threshold to move.
        """
        if not self.image.threshold > 0:  # NaN where none was set; 0 cannot be scaled
            msg = "the model has no threshold to move: set one with `stpm threshold MODEL.xml --good IMAGES`."
            raise STPMError(msg)
        if not 0 < threshold < math.inf:
            msg = f"threshold={threshold} must be above 0, on the scale of raw scores (the column `raw`)."
            raise STPMError(msg)
        factor = threshold / self.image.threshold  # not raw_limit, which a high sensitivity can make 0 or negative
        own = self.pixel.sensitivity != self.image.sensitivity
        moved = (self.pixel.raw_limit if own else self.pixel.threshold) * factor
        image = dataclasses.replace(self.image, threshold=threshold, sensitivity=0.5)
        pixel = dataclasses.replace(self.pixel, threshold=moved, sensitivity=0.5)
        return dataclasses.replace(self, image=image, pixel=pixel, quantile=None)

    def with_sensitivity(self, sensitivity: float) -> Verdict:
        """The verdict with another sensitivity, of labels and masks alike.

        Raises:
            STPMError: It is outside (0, 1), or not 0.5 and the model holds no range to move its thresholds by.
        """
        if not 0 < sensitivity < 1:
            msg = f"sensitivity={sensitivity} must be between 0 and 1: above 0.5 finds more, below raises fewer alarms."
            raise STPMError(msg)
        image, pixel = (dataclasses.replace(scale, sensitivity=sensitivity) for scale in (self.image, self.pixel))
        for scale in (image, pixel):
            _ = scale.raw_limit  # raises now, not at the first image
        return dataclasses.replace(self, image=image, pixel=pixel)

    def percentile(self, raw: float) -> float | None:
        """Percentage of the held-out good images with a score below a raw score; ``None`` if there are none."""
        if not self.held_out_scores or math.isnan(raw):
            return None
        return 100 * float(np.searchsorted(self.held_out_scores, raw)) / len(self.held_out_scores)

    def image_score(self, anomaly_map: np.ndarray, ignored: np.ndarray | None = None) -> float:
        """Raw image score of a raw anomaly map (h, w): :func:`stpm_plugin.model.matching.image_score` in NumPy.

        Where ``ignored`` (h, w) is true the map counts as 0, except in the mean that the most anomalous part is
        compared with, so that a mask raises no score.
        """
        cleared = anomaly_map if ignored is None else np.where(ignored, 0, anomaly_map)
        if not (self.score_share or self.score_area):
            return float(cleared.max())
        blocks = self._blocks(cleared)
        count = min(self.score_area, len(blocks))
        if self.score_share is not None:
            count = max(1, len(blocks) * round(self.score_share * 1e6) // 10**6)
        part = np.sort(blocks)[-count:].mean()
        mean = self._blocks(anomaly_map).mean() / self.counted
        return float(part / np.sqrt(max(mean, MIN_MEAN)) if self.stands_out else part)

    def _blocks(self, anomaly_map: np.ndarray) -> np.ndarray:
        """A map's means over squares of ``stride`` pixels, flat."""
        side = min(self.stride, *anomaly_map.shape)
        rows, columns = (length // side for length in anomaly_map.shape)
        return anomaly_map[: rows * side, : columns * side].reshape(rows, side, columns, side).mean((1, 3)).ravel()

    def append_to(self, model: ov.Model, score: ov.Output, anomaly_map: ov.Output) -> ov.Model:
        """Append itself to a graph, and describe itself there.

        Args:
            model: The graph.
            score: Its raw image scores (B,).
            anomaly_map: Its raw anomaly maps (B, 1, H, W).

        Returns:
            A model with the outputs of anomalib's exports: pred_score, pred_label, anomaly_map, pred_mask.
        """
        score.set_names({RAW_SCORE})
        anomaly_map.set_names({RAW_MAP})
        pred_score, pred_label = self.image.append(score, self.normalize)
        pred_map, pred_mask = self.pixel.append(anomaly_map, self.normalize)
        outputs = {"pred_score": pred_score, "pred_label": pred_label, "anomaly_map": pred_map, "pred_mask": pred_mask}
        if not self.label:
            del outputs["pred_label"], outputs["pred_mask"]
        results = []
        for name, value in outputs.items():
            # A name belongs to one tensor: where nothing was appended, the raw values keep theirs.
            value = ops.convert(value, value.get_element_type()).output(0) if value in (score, anomaly_map) else value
            value.set_names({name})
            results.append(ops.result(value))
        whole = ov.Model(results, model.get_parameters(), model.get_friendly_name())
        for name, text in {"verdict": json.dumps(dataclasses.asdict(self)), "format": str(FORMAT)}.items():
            whole.set_rt_info(text, [SECTION, name])
        return whole


def read_verdict(model: ov.Model, path: Any) -> Verdict | None:
    """Read the verdict of an exported model; ``None`` where it has none: another model's, or of version 0.1.0.

    Raises:
        STPMError: A newer version of this package wrote it.
    """
    if not model.has_rt_info([SECTION, "verdict"]):
        return None
    found = int(model.get_rt_info([SECTION, "format"]).astype(int))
    if found > FORMAT:
        msg = f"{path} was exported by a newer stpm_plugin (format {found}, this one reads {FORMAT}): upgrade it here."
        raise STPMError(msg)
    fields = json.loads(model.get_rt_info([SECTION, "verdict"]).astype(str))
    for name in ("image", "pixel"):
        fields[name] = Scale(**fields[name])
    for name in ("held_out_scores", "held_out_maxima"):
        fields[name] = tuple(fields[name])
    return Verdict(**fields)


def changed(
    verdict: Verdict | None,
    model: Path,
    threshold: float | None,
    sensitivity: float | None,
    ignore: str | Path | None,
) -> Verdict | None:
    """A model's verdict with what was asked for instead.

    Raises:
        STPMError: The model describes no verdict, an option is out of range, or two contradict each other.
    """
    if threshold is not None and sensitivity is not None:
        msg = "threshold and sensitivity both move the threshold: pass only one."
        raise STPMError(msg)
    if threshold is None and sensitivity is None and ignore is None:
        return verdict
    if verdict is None:
        msg = f"{model} describes no thresholds that could be changed: export its checkpoint again to OpenVINO."
        raise STPMError(msg)
    if threshold is not None:
        return verdict.with_threshold(threshold)
    return verdict if sensitivity is None else verdict.with_sensitivity(sensitivity)
