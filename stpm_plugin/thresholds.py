"""Thresholds: anomalib's own, or one that needs no defects."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from .errors import STPMError


class BetweenImages(F1AdaptiveThreshold):
    """anomalib's adaptive threshold, moved half-way down to the next lower score, or by 1 % where there is none.

    anomalib's is the lowest score that should count as anomalous, while only scores above a threshold do: the image
    that has it lies on the edge, and a device's rounding decides on its label.
    """

    def compute(self) -> Tensor:  # type: ignore[override]  # anomalib's own is not a curve either
        """Give the threshold, a scalar; anomalib's own where no image is anomalous."""
        threshold = super().compute()
        scores = dim_zero_cat(self.preds)
        lower = scores[scores < threshold]
        if self._has_anomalous_samples():
            threshold = self.value = (threshold + lower.max()) / 2 if len(lower) else 0.99 * threshold
        return threshold


class STPMPostProcessor(PostProcessor):
    """anomalib's post-processor, with a threshold between two images, or from normal images alone.

    With ``normal_quantile`` the threshold of images and pixels is that quantile of the image scores of the held-out
    normal images, and no validation label is read. A pixel is anomalous if it alone would make its image anomalous.
    Scores are then normalised as s / (s + threshold): 0.5 is the threshold, 0.9 nine times the threshold, and no
    two scores become equal, however far from the normal ones they are.

    Args:
        normal_quantile: Share of normal images that should pass, in (0, 1), such as 0.995; ``None`` for the
            best F1 score, as in anomalib, which needs defects in the validation set: see :class:`BetweenImages`.
        enable_normalization: As in anomalib.
        enable_thresholding: As in anomalib.
        enable_threshold_matching: As in anomalib.
        image_sensitivity: As in anomalib, in [0, 1]: images above ``1 - image_sensitivity`` are anomalous.
        pixel_sensitivity: As in anomalib, in [0, 1].

    Raises:
        STPMError: ``normal_quantile`` is outside (0, 1).
    """

    def __init__(
        self,
        normal_quantile: float | None = None,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        if normal_quantile is not None and not 0 < normal_quantile < 1:
            msg = f"normal_quantile={normal_quantile} must lie between 0 and 1, such as 0.995."
            raise STPMError(msg)
        self.normal_quantile = normal_quantile
        self._image_threshold_metric = BetweenImages(fields=["pred_score", "gt_label"], strict=False)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "normal_quantile")

    def calibrate(self, scores: Tensor) -> None:
        """Set the thresholds from held-out normal images' scores (N,), if ``normal_quantile`` asks for it.

        Raises:
            STPMError: There are no held-out images.
        """
        if self.normal_quantile is None:
            return
        if not len(scores):
            msg = "normal_quantile needs held-out normal images: set holdout above 0."
            raise STPMError(msg)
        threshold = torch.quantile(scores.float(), self.normal_quantile)
        self._image_threshold.copy_(threshold)
        self._pixel_threshold.copy_(threshold)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Collect scores and labels as anomalib does, unless normal images set the threshold."""
        if self.normal_quantile is None:
            super().on_validation_batch_end(*args, **kwargs)

    def _normalize(  # type: ignore[override]  # anomalib's is static, and called on the instance
        self, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor
    ) -> Tensor | None:
        if preds is None or self.normal_quantile is None:
            return super()._normalize(preds, norm_min, norm_max, threshold)
        return torch.where(torch.isnan(threshold), preds, preds / (preds + threshold))


def from_normal_images(post_processor: object) -> TypeGuard[STPMPostProcessor]:
    """Whether a post-processor takes its thresholds from normal images alone."""
    return getattr(post_processor, "normal_quantile", None) is not None
