"""STPM as anomalib's Engine and command line run it.

The module holds what is trained and says what a step is. A run's other jobs have owners of their own: its images
(`normal_images`), the choice of the weights (`selection`), its length and rate (`schedule`), thresholds (`thresholds`),
what is saved (`saved_state`, `checkpoints`), and what is said when something is wrong (`diagnostics`, `guards`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import timm
import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Resize

from ..errors import STPMError
from ..model.matching import distances, loss_of
from ..model.network import STPMModel
from ..model.pre_processing import STPMPreProcessor
from ..model.teacher_weights import load_teacher
from ..register import publish
from . import saved_state
from .checkpoints import Checkpointed
from .crops import unspoilt
from .data import TrainingBatch, images_of
from .data_record import DataRecord
from .diagnostics import FailureReport, TimeLeft, check_run
from .evaluator import BothKinds
from .feature_cache import CacheMode
from .guards import TrainedOnly
from .normal_images import NormalImages
from .schedule import Kind, RateSchedule, bound_epochs, end_of_run, names_no_length, steps_in_a_pass
from .selection import WeightSelection
from .threads import FreeProcessors
from .thresholds import STPMPostProcessor
from .verdict_pictures import VerdictPictures

Precision = Literal["auto", "trainer"]

CROP_SIZE = 256  # pixels along a side: as many as a resized image has


class STPM(Checkpointed, TrainedOnly, AnomalibModule):
    """Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021, arXiv 2103.04257).

    The defaults go beyond the paper's recipe, which is ``configs/paper.yaml``. A share of the normal training images is
    held out. The weights of the epoch with the lowest mean anomaly map on them are tested, saved and exported; test
    images and anomalib's validation set do not choose them.

    Args:
        backbone: timm model of teacher and student; any that offers ``features_only``. A tag names its weights.
        layers: Names or indices of the matched layers, from shallow to deep; ``None`` for strides 4, 8 and 16.
        teacher_weights: Path of a ``.safetensors`` or ``.pth`` file; ``lite0`` for ImageNet weights of
            ``tf_efficientnet_lite0``, which are installed with this package; ``None`` for timm's pretrained weights,
            which are downloaded.
        image_size: Height and width to which images are resized, pixels; ``None`` keeps each image's own size.
        crop_size: Side of the crops to train on if images keep their own size, pixels, without the margin that the
            network sees; ``None`` means 256 if ``image_size`` is ``None``, else whole images.
        score_area: Number of most anomalous positions of the finest level that make the image score: how far they
            stand out from the image's own map; 0 for the map's maximum, as in the paper.
        aligned: Whether parts have the same position in all images, so that a missing or misplaced part is anomalous;
            ``None`` to decide from the training images; ``False`` as in the paper.
        ignore: Mask, an image file of the training images' size: its white parts neither train nor score. ``None``
            for no mask.
        hard_share: Share of a batch's positions that train, those of the largest distances; 1 for all, as in the paper.
        lr: Highest learning rate of SGD's schedule; the authors' is 0.4, for a batch of 32.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD.
        schedule: ``constant`` rate, or ``one-cycle``: up to ``lr`` in the first 30 % of the steps, then down to zero.
        epochs: Passes over the training images if the trainer's ``max_epochs`` is not set.
        steps: Fewest and most optimiser steps of such a run: few images take more passes and many take fewer. If one
            pass is too long, some images are drawn and the rest is not read. ``None`` to go by ``epochs`` only.
        batch_size: Training images in a step; ``None`` for the datamodule's ``train_batch_size``.
        holdout: Share of the normal training images to hold out, in [0, 1); 0 takes the last epoch's weights.
        cache: Where images and teacher features are kept between epochs: ``memory`` (the GPU's if they take at most
            half of what is free there), ``disk``, ``off``, or ``auto``: memory if they take at most half of what is
            free, else disk.
        cache_dir: Directory of the cache's file; ``None`` for the system's temporary directory.
        precision: ``auto`` trains in bfloat16 where the hardware supports it natively; ``trainer`` leaves the precision
            to ``trainer.precision``, which also wins if it is not 32 bits.
        seed: Seed of the student's first weights, of the hold-out and of the batches; ``None`` to draw them from
            torch's global seed. (anomalib 2.7's command line accepts ``--seed_everything`` and does not use it.)
        pre_processor: As in anomalib.
        post_processor: As in anomalib; :class:`stpm_plugin.STPMPostProcessor` can set thresholds without defects.
        evaluator: As in anomalib.
        visualizer: As in anomalib.

    Attributes:
        trained: Whether there are weights to test, predict with and export.
        teacher_ready: Whether the teacher holds trained weights.
        data_record: Which images trained the model and which were held out; ``None`` before training.

    Raises:
        STPMError: An argument is out of range, or the backbone or a layer does not exist.
    """

    model: STPMModel
    post_processor: PostProcessor | None

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str | int] | None = None,
        teacher_weights: str | None = None,
        image_size: tuple[int, int] | None = (256, 256),
        crop_size: int | None = None,
        score_area: int = 12,
        aligned: bool | None = None,
        ignore: str | None = None,
        hard_share: float = 0.2,
        lr: float = 1.6,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Kind = "one-cycle",
        epochs: int = 8,
        steps: tuple[int, int] | None = (600, 1400),
        batch_size: int | None = 2,
        holdout: float = 0.05,
        cache: CacheMode = "auto",
        cache_dir: str | None = None,
        precision: Precision = "auto",
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_shares(holdout, hard_share)
        check_steps(steps)
        self_sized = image_size is None and pre_processor is True
        made = default_pre_processor(backbone, image_size) if pre_processor is True else pre_processor
        super().__init__(made, post_processor, evaluator, visualizer)
        self.model = seeded_model(seed, backbone, layers, score_area)
        self.teacher_weights, self.precision, self.seed = teacher_weights, precision, seed
        self.lr, self.momentum, self.weight_decay, self.hard_share = lr, momentum, weight_decay, hard_share
        self.schedule, self.epochs, self.steps, self.batch_size = schedule, epochs, steps, batch_size
        self.holdout, self.cache, self.cache_dir, self.ignore = holdout, cache, cache_dir, ignore
        self.aligned, self.crop_size = aligned, CROP_SIZE if self_sized and crop_size is None else crop_size
        check_crops(self)
        self.trained = self.teacher_ready = False
        self.data_record: DataRecord | None = None
        self.stated = saved_state.stated_arguments(self, () if pre_processor is True else ("pre_processor",))
        self.selection = WeightSelection()

    # What anomalib asks of a model

    @property
    def learning_type(self) -> LearningType:
        """Normal images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Skip Lightning's trial validation: an untrained student says nothing."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width; 256 x 256 by default) and normalise with ImageNet's statistics."""
        return STPMPreProcessor(image_size=image_size or (256, 256))

    def configure_post_processor(self) -> PostProcessor:
        """The package's thresholds and normalisation."""
        return STPMPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's metrics, given if a test holds both kinds of images."""
        return BothKinds(test_metrics=[*super(STPM, STPM).configure_evaluator().test_metrics])

    @classmethod
    def configure_visualizer(cls) -> Any:
        """Pictures with the verdict on them."""
        return VerdictPictures()

    def configure_callbacks(self) -> Sequence[Callback]:
        """anomalib's, the choice of the weights, the threads, and a run's messages."""
        anomalibs = cast("Sequence[Callback]", super().configure_callbacks())
        return [*anomalibs, self.selection, FreeProcessors(), TimeLeft(), FailureReport()]

    # Training

    def plan(self, images: NormalImages) -> None:
        """Check a run before it starts, and bound it and its images if it names no length."""
        check_run(self)
        steps = steps_in_a_pass(self.trainer, images.batches_in_a_pass)
        if self.steps is not None and steps > self.steps[1] and names_no_length(self.trainer):
            images.draw(self.steps[1] / steps)
            steps = self.steps[1]
        bound_epochs(self.trainer, steps, self.epochs, self.steps, self.schedule)

    def ready_teacher(self) -> None:
        """Read the teacher's weights, unless a checkpoint brought them."""
        if not self.teacher_ready:
            load_teacher(self.model.teacher, self.model.backbone, self.teacher_weights)
            self.teacher_ready = True
            name = "bfloat16, distances in float32" if self._bfloat16 else self.trainer.precision
            rank_zero_info(f"STPM: training on {self.device.type} in {name}.")

    def configure_optimizers(self) -> Any:
        """SGD on the student, and the rate's schedule over the run."""
        optimizer = torch.optim.SGD(
            self.model.student.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = RateSchedule(optimizer, self.lr, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Lay the schedule over the steps that are left, with the caller's settings instead of a checkpoint's."""
        for group in cast("Any", self.optimizers()).param_groups:
            group.update(momentum=self.momentum, weight_decay=self.weight_decay)
        if isinstance(schedule := self.lr_schedulers(), RateSchedule):
            schedule.plan(self.trainer.global_step, end_of_run(self.trainer), self.lr)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> STEP_OUTPUT:
        """Match the teacher's unit vectors on a batch of normal images (B, 3, H, W).

        Raises:
            STPMError: The loss is not finite.
        """
        images = images_of(batch)
        teacher = batch.teacher or self.model.teach(images)
        with self.autocast():
            student = self.model.study(images)
        levels = distances(teacher, student)
        if batch.windows is not None:
            levels = unspoilt(levels, batch.windows, self.model)
        if self.model.ignored is not None:
            levels = [self.model.ignored.kept(level) for level in levels]
        loss = loss_of(levels, self.hard_share)
        if not torch.isfinite(loss):
            msg = (
                f"the loss is {loss.item()} in epoch {self.current_epoch}, batch {batch_idx}: lower lr ({self.lr}). "
                "The last checkpoint holds the weights chosen so far."
            )
            raise STPMError(msg)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def autocast(self) -> AbstractContextManager:
        """Compute a network in bfloat16 while training, where the hardware does so natively."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    @property
    def _bfloat16(self) -> bool:
        return self.precision == "auto" and self.trainer.precision == "32-true" and native_bf16(self.device)

    # Prediction

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images (B, 3, H, W)."""
        with torch.autocast(self.device.type, enabled=False):  # of the trainer's precision: as every export computes
            return batch.update(**self.model(batch.image)._asdict())

    test_step = predict_step = validation_step

    @property
    def transform(self) -> Any:
        """The pre-processor's transform, which anomalib applies to each batch; ``None`` for none."""
        return getattr(self.pre_processor, "transform", None)

    @property
    def network_size(self) -> tuple[int, int] | None:
        """Height and width to which the pre-processor resizes, pixels, if it does."""
        parts = getattr(self.transform, "transforms", [self.transform])
        sizes = [tuple(part.size) for part in parts if isinstance(part, Resize) and len(part.size or ()) == 2]
        return sizes[-1] if sizes else None


def check_shares(holdout: float, hard_share: float) -> None:
    """Refuse shares that are out of range.

    Raises:
        STPMError: One of them is out of range; names it and its range.
    """
    if not 0 <= holdout < 1:
        msg = f"holdout={holdout} must be a share of the training images, at least 0 and below 1."
        raise STPMError(msg)
    if not 0 < hard_share <= 1:
        msg = f"hard_share={hard_share} must be a share of the positions, above 0 and at most 1 (all train)."
        raise STPMError(msg)


def check_crops(module: STPM) -> None:
    """Refuse crops of images that are resized.

    Raises:
        STPMError: ``crop_size`` is stated, and the pre-processor resizes, or it is no number of pixels.
    """
    if module.crop_size is None:
        return
    if module.crop_size < 1:
        msg = f"crop_size={module.crop_size} must be the side of a crop, pixels, such as 256."
        raise STPMError(msg)
    if module.network_size is not None:
        msg = (
            f"crop_size={module.crop_size} trains on crops of images at their own size, but these are resized to "
            f"{module.network_size[0]} x {module.network_size[1]}: set image_size to null, or omit crop_size."
        )
        raise STPMError(msg)


def check_steps(steps: tuple[int, int] | None) -> None:
    """Refuse a budget that no run can keep to.

    Raises:
        STPMError: ``steps`` is not the fewest and the most steps.
    """
    if steps is not None and not (len(steps) == 2 and 0 <= steps[0] <= steps[1] and steps[1] > 0):
        msg = f"steps={steps} must be the fewest and the most steps, such as [600, 1400], or null to use only epochs."
        raise STPMError(msg)


def seeded_model(seed: int | None, *arguments: Any) -> STPMModel:
    """An untrained :class:`STPMModel` whose student's first weights depend only on ``seed``, if there is one."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return STPMModel(*arguments)


def default_pre_processor(backbone: str, image_size: tuple[int, int] | None) -> PreProcessor:
    """Resize to ``image_size``, if there is one, and normalise as the backbone's weights of timm were trained."""
    config: Any = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    return STPMPreProcessor(image_size=image_size, **({"mean": config.mean, "std": config.std} if config else {}))


@functools.cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware: AVX512-BF16, AMX, or CUDA from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("avx512_bf16") or features.get("amx_bf16"))


publish(STPM, "anomalib.models")
