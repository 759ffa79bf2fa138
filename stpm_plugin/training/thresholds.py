"""Thresholds: from held-out good images alone, or anomalib's own from a validation set with defects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ..errors import STPMError
from ..false_alarms import Limit, found, in_words, limit

DEFAULT_QUANTILE = 0.995  # where no other is asked for: one good image in 200
NO_BASIS, HELD_OUT, VALIDATION = "none", "held-out good images", "validation set"


class BetweenImages(F1AdaptiveThreshold):
    """anomalib's adaptive threshold, moved half-way down to the next lower score, or by 1 % where there is none.

    anomalib's is the lowest score that should count as anomalous, but only scores above a threshold do: the image with
    that score is on the edge, and a device's rounding decides its label.
    """

    def compute(self) -> Tensor:  # type: ignore[override]  # anomalib's own is not a curve either
        """Give the threshold, a scalar; NaN where no image is anomalous, so that good images alone choose it."""
        if not (dim_zero_cat(self.target) == 1).any():
            return torch.tensor(torch.nan)
        threshold = super().compute()
        scores = dim_zero_cat(self.preds)
        lower = scores[scores < threshold]
        self.value = (threshold + lower.max()) / 2 if len(lower) else 0.99 * threshold
        return self.value


class STPMPostProcessor(PostProcessor):
    """anomalib's post-processor, with thresholds that held-out good images set.

    There are two bases. With ``normal_quantile``, or where the validation set holds no defects, thresholds come from
    the held-out good images: the image threshold from their image scores, the pixel threshold from their maps'
    maxima, by the same rule (:func:`stpm_plugin.false_alarms.limit`). A good image's mask is then empty as often as
    its label is normal. Scores are normalised as s / (s + threshold): 0.5 is the threshold, 0.9 nine times the
    threshold, and no two scores become equal.

    Otherwise the image threshold is the one with the best F1 score on the validation set (:class:`BetweenImages`). The
    pixel threshold is anomalib's, from the masks, or without masks that of the held-out images. Scores are normalised
    as in anomalib.

    Args:
        normal_quantile: Share of good images that should pass, in (0, 1), such as 0.995; ``None`` for the best F1 score
            where the validation set has defects, and 0.995 where it has none.
        enable_normalization: As in anomalib.
        enable_thresholding: As in anomalib.
        enable_threshold_matching: As in anomalib.
        image_sensitivity: As in anomalib, in [0, 1]: images above ``1 - image_sensitivity`` are anomalous. ``None``
            for the checkpoint's, or 0.5.
        pixel_sensitivity: As in anomalib, in [0, 1]; ``None`` for the checkpoint's, or 0.5.

    Attributes:
        basis: What set the thresholds: ``none``, ``held-out good images`` or ``validation set``.
        held_out_scores: Image scores of the held-out good images, before normalisation, ascending.
        held_out_maxima: Maxima of their anomaly maps, before normalisation, ascending.

    Raises:
        STPMError: A number is out of its range.
    """

    image_limit: Tensor
    pixel_limit: Tensor

    def __init__(
        self,
        normal_quantile: float | None = None,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float | None = None,
        pixel_sensitivity: float | None = None,
    ) -> None:
        asked = {
            "normal_quantile": normal_quantile,
            "image_sensitivity": image_sensitivity,
            "pixel_sensitivity": pixel_sensitivity,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        check_shares(asked)
        switches = {
            "enable_normalization": enable_normalization,
            "enable_thresholding": enable_thresholding,
            "enable_threshold_matching": enable_threshold_matching,
        }
        super().__init__(
            **switches,
            image_sensitivity=0.5 if image_sensitivity is None else image_sensitivity,
            pixel_sensitivity=0.5 if pixel_sensitivity is None else pixel_sensitivity,
        )
        self.normal_quantile = normal_quantile
        self.stated = asked | {name: value for name, value in switches.items() if not value}
        self.basis = NO_BASIS
        self.held_out_scores: list[float] = []
        self.held_out_maxima: list[float] = []
        self.image_f1 = BetweenImages(fields=["pred_score", "gt_label"], strict=False)
        self.register_buffer("image_limit", torch.tensor(torch.nan))  # NaN leaves the threshold to anomalib
        self.register_buffer("pixel_limit", torch.tensor(torch.nan))
        self.register_load_state_dict_pre_hook(_without_limits)
        self.register_load_state_dict_post_hook(_with_stated_quantile)

    # What is saved

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:  # anomalib's hook for subclasses with more settings
        return (*super()._checkpoint_config_keys, "normal_quantile", "basis", "held_out_scores", "held_out_maxima")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` saved; explicit arguments of the constructor win."""
        super().load_checkpoint_config({**config, **self.stated})
        if "basis" not in config:  # of version 0.1.0, which normalised by the quantile alone
            self.basis = VALIDATION if config.get("normal_quantile") is None else HELD_OUT

    def overruled(self, config: dict[str, Any]) -> list[str]:
        """Say which settings of a checkpoint the stated ones overrule, one sentence each."""
        return [
            f"{name}={value} as set here, instead of the checkpoint's {config[name]}"
            for name, value in self.stated.items()
            if config.get(name, value) != value
        ]

    # How thresholds are set

    def forget(self) -> None:
        """Drop all thresholds and ranges, such as those of another student, and scores that are half collected."""
        self.basis, self.held_out_scores, self.held_out_maxima = NO_BASIS, [], []
        for buffer in self.buffers(recurse=False):
            buffer.fill_(torch.nan)
        self.on_validation_start()

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin with no scores: an earlier validation may have been interrupted."""
        for part in (part for part in self.children() if isinstance(part, Metric)):
            part.reset()

    def set_from_normal_images(self, scores: Tensor, maxima: Tensor) -> None:
        """Set both thresholds from held-out good images.

        Args:
            scores: Their image scores (N,).
            maxima: The maxima of their anomaly maps (N,).
        """
        self.basis = HELD_OUT
        self.held_out_scores = sorted(scores.double().tolist())
        self.held_out_maxima = sorted(maxima.double().tolist())
        self.image_limit.fill_(limit(scores.cpu().numpy(), self.quantile).value)
        self.pixel_limit.fill_(limit(maxima.cpu().numpy(), self.quantile).value)

    def set_image_threshold(self, threshold: Tensor) -> None:
        """Set the image threshold, a scalar on the scale of the scores before normalisation."""
        self.image_limit.copy_(threshold)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Collect scores and labels as anomalib does, unless good images alone set the thresholds."""
        if self.normal_quantile is not None:
            return
        super().on_validation_batch_end(*args, **kwargs)
        if self.enable_thresholding:
            self.image_f1.update(kwargs["outputs"] if "outputs" in kwargs else args[2])

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Set the thresholds from the validation set, if it holds defects."""
        collected = self.image_f1.update_called
        super().on_validation_epoch_end(*args, **kwargs)
        if not collected:
            return
        threshold = self.image_f1.compute()
        self.image_f1.reset()
        if threshold.isnan() and self.held_out_scores:
            return
        self.basis = VALIDATION
        self.image_limit.copy_(threshold)
        maskless = self._pixel_threshold.isnan() and self.held_out_maxima
        self.pixel_limit.fill_(
            limit(torch.tensor(self.held_out_maxima).numpy(), self.quantile).value if maskless else torch.nan
        )

    # What they do

    @property
    def quantile(self) -> float:
        """Share of good images that should pass."""
        return self.normal_quantile or DEFAULT_QUANTILE

    @property
    def image_threshold(self) -> Tensor:
        """Image threshold, a scalar on the scale of the scores before normalisation; NaN before training."""
        return torch.where(self.image_limit.isnan(), super().image_threshold, self.image_limit)

    @property
    def pixel_threshold(self) -> Tensor:
        """Pixel threshold, a scalar on the scale of the map before normalisation; NaN before training."""
        return torch.where(self.pixel_limit.isnan(), super().pixel_threshold, self.pixel_limit)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """Image scores above this, a scalar, are anomalous; raw ones where nothing is normalised."""
        if self.enable_normalization:
            return super().normalized_image_threshold
        return self._raw_limit("image")

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """Map values above this, a scalar, are anomalous; raw ones where nothing is normalised."""
        if self.enable_normalization:
            return super().normalized_pixel_threshold
        return self._raw_limit("pixel")

    def _raw_limit(self, kind: str) -> Tensor:
        """The raw value, a scalar, that normalisation would map to 1 - sensitivity; NaN without a threshold."""
        threshold, low, high, sensitivity = (
            getattr(self, f"{kind}_{name}") for name in ("threshold", "min", "max", "sensitivity")
        )
        if self.basis == HELD_OUT:
            return threshold * (1 - sensitivity) / max(float(sensitivity), 1e-12)
        threshold = torch.where(threshold.isnan(), (low + high) / 2, threshold)  # as anomalib normalises
        if sensitivity == 0.5:
            return threshold  # needs no range, which anomalib collects only to normalise
        if not torch.compiler.is_compiling() and (high - low).isnan() and not threshold.isnan():
            msg = (
                f"{kind}_sensitivity={sensitivity} cannot move the threshold: the model was trained with "
                "enable_normalization=False and holds no range of scores; leave it at 0.5, or train with normalisation."
            )
            raise STPMError(msg)
        return threshold + (0.5 - sensitivity) * (high - low)

    def normalize_batch(self, batch: Batch) -> None:
        """Normalise a batch's image scores (B,) and anomaly maps (B, 1, H, W) in place, by what set the thresholds."""
        if self.basis != HELD_OUT:
            super().normalize_batch(batch)
            return
        batch.anomaly_map = relative(batch.anomaly_map, self.pixel_threshold)
        batch.pred_score = relative(batch.pred_score, self.image_threshold)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores (B,) and maps (B, 1, H, W), and add labels and masks."""
        if self.basis != HELD_OUT or not self.enable_normalization:
            return super().forward(predictions)
        score = relative(predictions.pred_score, self.image_threshold)
        anomaly_map = relative(predictions.anomaly_map, self.pixel_threshold)
        label = mask = None
        if self.enable_thresholding:
            label = score > self.normalized_image_threshold
            mask = anomaly_map > self.normalized_pixel_threshold
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    # What is known of them

    def expected_alarms(self) -> Limit | None:
        """The image threshold and the share of false alarms to expect, at a sensitivity of 0.5; ``None`` if unknown."""
        if not self.held_out_scores:
            return None
        scores = torch.tensor(self.held_out_scores, dtype=torch.float64).numpy()
        if self.basis == HELD_OUT:
            return limit(scores, self.quantile)
        return found(scores, float(self.image_threshold))

    def report(self) -> str:
        """Say in a sentence what the image threshold is, what set it, and the false alarms to expect."""
        if self.basis == NO_BASIS:
            return "no threshold was set."
        said = f"image threshold {float(self.image_threshold):.4g} from the {self.basis}"
        alarms = self.expected_alarms()
        if alarms is None:
            return f"{said}; false alarms unknown, since no good image was held out."
        return f"{said}; {in_words(alarms, self.quantile)}"


HeldOut = tuple[Tensor, Tensor]  # image scores (N,) and maxima of the anomaly maps (N,), before normalisation


def of_held_out(predictions: Iterable[Any]) -> HeldOut:
    """Image scores (N,) and map maxima (N,) of good images.

    Args:
        predictions: Batches with ``pred_score`` (B,) and ``anomaly_map`` (B, 1, H, W), before normalisation.
    """
    scores, maxima = [torch.empty(0)], [torch.empty(0)]
    for made in predictions:
        scores.append(made.pred_score.flatten().cpu())
        maxima.append(made.anomaly_map.flatten(1).amax(1).cpu())
    return torch.cat(scores), torch.cat(maxima)


def calibrate(post_processor: PostProcessor, held_out: HeldOut, validation: Iterable[Batch] = ()) -> None:
    """Set a post-processor's thresholds and normalisation from scored images.

    Args:
        post_processor: It is changed. Only an :class:`STPMPostProcessor` uses the held-out images.
        held_out: Scores of held-out good images, as :func:`of_held_out` gives them; may be empty.
        validation: Batches of the validation set with raw scores and maps, labels, and masks where there are any; not
            read where ``normal_quantile`` is set.
    """
    unused: Any = None  # anomalib's hooks look at neither trainer nor model
    if isinstance(post_processor, STPMPostProcessor):
        if len(held_out[0]):
            post_processor.set_from_normal_images(*held_out)
        if post_processor.normal_quantile is not None:
            return
    for batch in validation:
        post_processor.on_validation_batch_end(unused, unused, batch)
    post_processor.on_validation_epoch_end(unused, unused)


def relative(values: Tensor | None, threshold: Tensor) -> Any:
    """Map values in [0, inf) to [0, 1), and the threshold, a scalar, to 0.5; values stay where it is NaN."""
    if values is None:
        return None
    return torch.where(threshold.isnan(), values, values / (values + threshold))


def check_shares(asked: dict[str, Any]) -> None:
    """Refuse a quantile outside (0, 1) or a sensitivity outside [0, 1].

    Raises:
        STPMError: One of them is out of range; names it.
    """
    for name, value in asked.items():
        inside = 0 < value < 1 if name == "normal_quantile" else 0 <= value <= 1
        if not inside:
            msg = f"{name}={value} must be between 0 and 1, such as {0.995 if 'quantile' in name else 0.5}."
            raise STPMError(msg)


def _with_stated_quantile(module: STPMPostProcessor, *args: Any) -> None:
    """Set loaded thresholds again from the saved held-out scores, if a quantile was stated."""
    del args
    if "normal_quantile" in module.stated and module.held_out_scores:
        module.set_from_normal_images(torch.tensor(module.held_out_scores), torch.tensor(module.held_out_maxima))


def _without_limits(module: STPMPostProcessor, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load what anomalib's post-processor or version 0.1.0 saved: thresholds are then anomalib's."""
    del module, args
    for name in ("image_limit", "pixel_limit"):
        state_dict.setdefault(prefix + name, torch.tensor(torch.nan))
