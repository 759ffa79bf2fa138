"""STPM as anomalib's Engine and command line run it: training, the choice of the weights, thresholds, checkpoints."""

from __future__ import annotations

import errno
import functools
import logging
import pickle
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from .errors import STPMError
from .feature_cache import CacheMode, FeatureCache, open_cache
from .matching import anomaly_map, level_means, matching_loss
from .pre_processing import STPMPreProcessor
from .register import publish
from .teacher_weights import load_teacher
from .thresholds import STPMPostProcessor, from_normal_images
from .torch_model import STPMModel
from .training_data import (
    Split,
    TrainingBatch,
    TrainingBatches,
    augments,
    check_depth,
    check_normal,
    images_of,
    read,
    split,
)

LIGHTNING_DEFAULT_EPOCHS = 1000  # what Trainer(max_epochs=None) turns into
CHECKPOINT_KEY = "stpm"


class Chosen(NamedTuple):
    """The weights that are tested, saved and exported, and why."""

    epoch: int
    score: float
    student: dict[str, Tensor]


class LastWord(Callback):
    """Says in a sentence why a run ended, where the error names neither the place nor the remedy."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log one line: of a full disk, a bad checkpoint, or another process that was killed."""
        del pl_module
        logger = logging.getLogger(__name__)
        if isinstance(exception, OSError) and exception.errno == errno.ENOSPC:
            logger.error(
                "STPM: the disk of %s is full in epoch %d, and the checkpoint that was being written may be cut off: "
                "make room, or give another folder with --default_root_dir.",
                trainer.default_root_dir,
                trainer.current_epoch,
            )
        elif said := bad_checkpoint(trainer.ckpt_path, exception):
            logger.error("STPM: %s", said)
        elif trainer.world_size > 1 and isinstance(exception, RuntimeError):
            logger.error(
                "STPM: process %d of %d lost the others in epoch %d: one was killed or failed, see its own message; "
                "for want of memory, lower batch_size or say cache=disk. The last checkpoint is whole: resume from it "
                "with --ckpt_path.",
                trainer.global_rank,
                trainer.world_size,
                trainer.current_epoch,
            )


class STPM(AnomalibModule):
    """Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021, arXiv 2103.04257).

    The defaults go past the paper's recipe, which ``configs/paper.yaml`` holds. A share of the normal training images
    is held out, and the weights of the epoch with the lowest mean anomaly map on them are the ones that are tested,
    saved and exported. Test images and anomalib's validation set choose nothing.

    Args:
        backbone: timm model of teacher and student; any that offers ``features_only``. A tag names its weights.
        layers: Names (``layer1``) or indices of the matched layers, from shallow to deep.
        teacher_weights: Path of a ``.safetensors`` or ``.pth`` file; ``builtin`` for the package's small teacher,
            trained on CIFAR-10; nothing for timm's pretrained weights, which are downloaded.
        image_size: Height and width to which images are resized, pixels.
        score_share: Share of the anomaly map, its highest values, whose mean is the image score; 0 for its maximum, as
            in the paper.
        level_power: Power of the mean over the levels' distances, each over its mean on held-out normal images, in
            [-4, 0]: below 0 the levels that see less count more; 0 for the paper's product.
        finest_weight: Weight of the shallowest level in that mean, above 0; the others have 1, and so has it in the
            paper.
        hard_share: Share of the positions in a batch, those of the largest distances, that train; 1 for all, as in
            the paper.
        lr: Learning rate of SGD, the highest of the schedule; 0.4 is the authors', for a batch of 32.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD.
        schedule: ``constant`` rate, or ``one-cycle``: up to ``lr`` in the first 30 % of the steps, then down to zero.
        epochs: Passes over the training images where the trainer's ``max_epochs`` is not set.
        min_steps: Steps that those passes come to at least: with few images there are more passes; 0 for ``epochs``
            alone.
        batch_size: Training images in a step; nothing for the datamodule's ``train_batch_size``.
        holdout: Share of the normal training images to hold out, in [0, 1); 0 takes the last epoch's weights.
        cache: Where images and teacher features are kept between epochs: ``memory`` (the GPU's while they take at most
            half of what is free there), ``disk``, ``off``, or ``auto``: memory while they take at most half of what is
            free, then disk.
        cache_dir: Directory of the cache's file; nothing for the system's temporary directory.
        precision: ``auto`` computes the networks in bfloat16 while training where the hardware has it natively;
            ``trainer`` leaves it to ``trainer.precision``, which also wins when it is not 32 bits.
        seed: Seed of the student's first weights, of the hold-out and of the batches; nothing to draw them from torch's
            global seed. (anomalib 2.7's command line accepts ``--seed_everything`` and does not use it.)
        pre_processor: As in anomalib.
        post_processor: As in anomalib; :class:`stpm_plugin.STPMPostProcessor` can set thresholds without defects.
        evaluator: As in anomalib.
        visualizer: As in anomalib.

    Raises:
        STPMError: An argument is out of range, or the backbone or a layer does not exist.
    """

    model: STPMModel
    post_processor: PostProcessor | None
    _loader: DataLoader  # this and the split are there once a fit has drawn its batches
    _split: Split

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str | int] = ("layer1", "layer2", "layer3"),
        teacher_weights: str | None = None,
        image_size: tuple[int, int] = (256, 256),
        score_share: float = 0.003,
        level_power: float = -1.0,
        finest_weight: float = 0.5,
        hard_share: float = 0.2,
        lr: float = 1.6,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Literal["constant", "one-cycle"] = "one-cycle",
        epochs: int = 8,
        min_steps: int = 600,
        batch_size: int | None = 2,
        holdout: float = 0.05,
        cache: CacheMode = "auto",
        cache_dir: str | None = None,
        precision: Literal["auto", "trainer"] = "auto",
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if not 0 <= holdout < 1:
            msg = f"holdout={holdout} must be a share of the training images, at least 0 and below 1."
            raise STPMError(msg)
        if not 0 < hard_share <= 1:
            msg = f"hard_share={hard_share} must be a share of the positions, above 0 and at most 1 (all train)."
            raise STPMError(msg)
        super().__init__(
            pre_processor=self._default_pre_processor(backbone, image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model = STPMModel(backbone, layers, score_share, level_power, finest_weight)
        self.backbone, self.teacher_weights = backbone, teacher_weights
        self.lr, self.momentum, self.weight_decay, self.hard_share = lr, momentum, weight_decay, hard_share
        self.schedule, self.epochs, self.min_steps = schedule, epochs, min_steps
        self.batch_size, self.holdout = batch_size, holdout
        self.cache, self.cache_dir, self.precision, self.seed = cache, cache_dir, precision, seed

        self._teacher_ready = False  # weights are read when fit starts, so that a checkpoint never needs their source
        self._data_seed: int | None = None
        self._kept: FeatureCache | None = None
        self._chosen: Chosen | None = None
        self._scores: list[float] = []  # held-out, of each epoch
        self._resumed: dict[str, Any] = {}  # the checkpoint from which training goes on
        self._training_student: dict[str, Tensor] | None = None  # set while the chosen weights stand in for it
        self._limit_val_batches: int | float | None = None
        self._bf16 = False

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
        """Anomalib's thresholds and normalisation."""
        return STPMPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback]:
        """anomalib's, and a last word where a process of several is lost."""
        return [*cast("Sequence[Callback]", super().configure_callbacks()), LastWord()]

    def configure_optimizers(self) -> Any:
        """SGD on the student, at a constant rate or along one cycle over the whole run, or over what is left of it."""
        optimizer = torch.optim.SGD(
            self.model.student.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        resumed, self._resumed = self._resumed, {}
        begun, goes_on = resumed.get("global_step", 0), False
        configured: Any = optimizer
        if self.schedule != "constant":
            steps = int(self.trainer.estimated_stepping_batches)
            goes_on = [cycle["total_steps"] for cycle in resumed.get("lr_schedulers", [])] == [steps]
            left = steps if goes_on else max(1, steps - begun)
            if begun and not goes_on:
                rank_zero_info(f"STPM: the checkpoint's run was of another length; a new cycle of {left} steps begins.")
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=left, cycle_momentum=False)
            configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        if resumed and not goes_on:  # Lightning reads rates and the place in the cycle from the checkpoint
            resumed["lr_schedulers"] = []
            for state in resumed.get("optimizer_states", []):
                for group, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
                    group.update({**new, "params": group["params"]})
        return configured

    # Training

    def setup(self, stage: str) -> None:
        """Before a fit: take over the drawing of batches, and put validation off to the end.

        Raises:
            STPMError: The fit was started with plain data loaders.
        """
        if stage != "fit":
            return
        self._chosen, self._scores = None, []  # of this fit; a checkpoint to resume from is read later
        self._data_seed = self.seed
        trainer, datamodule = self.trainer, self._datamodule
        if datamodule is None:
            msg = (
                "STPM holds out and keeps training images itself: pass Engine.fit a datamodule instead of data loaders."
            )
            raise STPMError(msg)
        datamodule.train_dataloader = self._train_dataloader  # on this instance, until teardown
        if trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0:
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def teardown(self, stage: str) -> None:
        """Give the datamodule its own loader back and let go of what was kept."""
        if stage == "fit":
            self._use_chosen()
            vars(self._datamodule).pop("train_dataloader", None)
            vars(self).pop("_loader", None)
            self._kept = self._training_student = None

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> STEP_OUTPUT:
        """Match the teacher's unit vectors on a batch of normal images (B, 3, H, W).

        Raises:
            STPMError: The loss is not finite.
        """
        images = images_of(batch)
        teacher = batch.teacher or self.model.teach(images)
        with self._autocast():
            student = self.model.student(images)
        loss = matching_loss(teacher, student, self.hard_share)
        if not torch.isfinite(loss):
            msg = (
                f"the loss is {loss.item()} in epoch {self.current_epoch}, batch {batch_idx}: lower lr ({self.lr}). "
                "The last checkpoint holds the weights chosen so far."
            )
            raise STPMError(msg)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_start(self) -> None:
        """Start the clock of the time left."""
        self._started = (time.monotonic(), self.current_epoch)

    def on_train_epoch_end(self) -> None:
        """Score the held-out images and choose the weights anew."""
        self._share_statistics()
        score = float("nan")
        if self.holdout:
            score, level_scales = self._score(self._split.holdout, len(self._split.train))
            self.log("holdout_score", score, prog_bar=True)
        self._scores.append(score)
        if not self.holdout or self._chosen is None or score < self._chosen.score:
            student = {name: tensor.clone() for name, tensor in self.model.student.state_dict().items()}
            self._chosen = Chosen(self.current_epoch, score, student)
            if self.holdout:
                self.model.level_scales.copy_(level_scales)  # always the chosen weights'
        epochs = self.trainer.max_epochs or 0
        if epochs > 0:
            started, first = self._started
            each = (time.monotonic() - started) / (self.current_epoch + 1 - first)
            left = each * (epochs - self.current_epoch - 1)
            self.log("minutes_left", left / 60, prog_bar=True, logger=False)

    def on_validation_start(self) -> None:
        """Validate the chosen weights, never the last epoch's."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._use_chosen()

    def on_validation_end(self) -> None:
        """Go on training the last epoch's weights."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._use_training()

    def on_train_end(self) -> None:
        """Leave the chosen weights in the model, with thresholds of their own, and in the checkpoints on disk."""
        if self._chosen is None:
            return
        self._use_chosen()
        if self.holdout:
            rank_zero_info(f"STPM: chose epoch {self._chosen.epoch}, held-out score {self._chosen.score:.4g}.")
        else:
            self.model.level_scales.copy_(self._score(self._split.train, 0)[1])
        if from_normal_images(self.post_processor):
            self.post_processor.calibrate(self._holdout_image_scores())
        self._validate()
        self._use_chosen()
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                for path in {callback.best_model_path, callback.last_model_path} - {""}:
                    self.trainer.save_checkpoint(path, callback.save_weights_only)

    # Prediction

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images (B, 3, H, W)."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse images that anomalib has misread, here and in tests and predictions.

        Raises:
            STPMError: An image has more bits than anomalib reads.
        """
        del batch_idx, dataloader_idx
        for path in batch.image_path or ():
            check_depth(path)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_test_start(self) -> None:
        """Refuse to test an untrained model."""
        self._require_teacher()

    def on_predict_start(self) -> None:
        """Refuse to predict with an untrained model."""
        self._require_teacher()

    def to_openvino(  # type: ignore[override]  # what is not named here goes on to anomalib by keyword
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Any = None,
        max_drop: float = 0.01,
        **arguments: Any,
    ) -> Path:
        """Export as anomalib does, but for INT8, which is quantised for STPM.

        Args:
            export_root: Folder; the model lies below it, where anomalib puts it.
            model_file_name: Its name, without ``.xml``.
            input_size: Height and width of the images, pixels; nothing for any.
            compression_type: ``INT8_PTQ`` and ``INT8_ACQ`` are :func:`stpm_plugin.openvino_export.quantize`'s, the
                rest anomalib's.
            datamodule: For INT8: its normal training images calibrate; its validation set, or the held-out images
                where the post-processor has a ``normal_quantile``, sets the thresholds.
            metric: Not used: anomalib's would read test labels.
            max_drop: For ``INT8_ACQ``: how far the correlation of the logarithms of rounded and float anomaly maps, on
                held-out normal images, may fall below 1.
            **arguments: As in anomalib.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            STPMError: No room, INT8 without a datamodule, or ``INT8_ACQ`` without held-out images.
        """
        from .openvino_export import describe, export_int8  # OpenVINO takes seconds to import

        del metric
        plain = functools.partial(super().to_openvino, model_file_name=model_file_name, input_size=input_size)
        require_room(Path(export_root), size_of(self.model.state_dict()), "the model", "--export_root")
        if compression_type not in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ):
            target = plain(export_root, compression_type=compression_type, datamodule=datamodule, **arguments)
            describe(target)
            return target
        if datamodule is None:
            msg = "INT8 is calibrated on normal training images: name them with --data (datamodule=...)."
            raise STPMError(msg)
        drop = max_drop if compression_type == CompressionType.INT8_ACQ else None
        if drop is not None and not self.holdout:
            msg = "INT8_ACQ is controlled on held-out images and holdout=0 keeps none: use INT8_PTQ."
            raise STPMError(msg)
        post_processor, self.post_processor = self.post_processor, None
        try:
            with tempfile.TemporaryDirectory() as folder:
                raw = plain(folder, **arguments)
                target = Path(export_root) / raw.relative_to(folder)
                fixed = input_size or self._network_size
                seed = cast("int", self._data_seed)  # a trained model has one
                export_int8(raw, target, datamodule, self.holdout, seed, fixed, post_processor, drop)
        finally:
            self.post_processor = post_processor
        describe(target)
        return target

    @property
    def _network_size(self) -> tuple[int, int] | None:
        """Height and width to which the pre-processor resizes, if it does."""
        parts = getattr(self._transform, "transforms", [self._transform])
        sizes = [tuple(part.size) for part in parts if isinstance(part, Resize) and len(part.size or ()) == 2]
        return sizes[-1] if sizes else None

    # Checkpoints hold the chosen weights, ready to use, and beside them what is needed to go on training

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the chosen weights in the checkpoint's state, and those under training beside them.

        Raises:
            STPMError: There is no room: Lightning would cut off the checkpoint that it writes over.
        """
        super().on_save_checkpoint(checkpoint)
        need = 2 * size_of(checkpoint["state_dict"])  # the student under training and its momentum take less than that
        require_room(Path(self.trainer.default_root_dir), need, "a checkpoint", "--default_root_dir")
        if self._chosen is None:
            return
        checkpoint[CHECKPOINT_KEY] = {
            "data_seed": self._data_seed,
            "epoch": self._chosen.epoch,
            "score": self._chosen.score,
            "scores": self._scores,
            "student": dict(self._training_student or self.model.student.state_dict()),
        }
        checkpoint["state_dict"].update(_prefixed(self._chosen.student))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # the other arguments are passed on
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> STPM:
        """Load as anomalib does.

        Raises:
            STPMError: The file is cut off, or holds code.
        """
        try:
            return cast("STPM", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))
        except (pickle.UnpicklingError, RuntimeError) as error:
            if said := bad_checkpoint(checkpoint_path, error):
                raise STPMError(said) from None
            raise

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the teacher from the checkpoint and, where training goes on, the weights under training."""
        super().on_load_checkpoint(checkpoint)
        self._teacher_ready = True
        metrics = {name: tensor for name, tensor in self.state_dict().items() if name.startswith("evaluator.")}
        trained = {n: tensor for n, tensor in checkpoint["state_dict"].items() if not n.startswith("evaluator.")}
        checkpoint["state_dict"] = trained | metrics  # metrics learn nothing, and this model may have others
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:
            return
        self._data_seed = state["data_seed"]
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        names = state["student"].keys()
        chosen = {name: checkpoint["state_dict"][f"model.student.{name}"].clone() for name in names}
        self._chosen, self._scores = Chosen(state["epoch"], state["score"], chosen), list(state.get("scores", []))
        checkpoint["state_dict"].update(_prefixed(state["student"]))
        self._resumed = checkpoint

    # Helpers

    @staticmethod
    def _default_pre_processor(backbone: str, image_size: tuple[int, int]) -> PreProcessor:
        config = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
        statistics: dict[str, Any] = {"mean": config.mean, "std": config.std} if config else {}
        return STPMPreProcessor(image_size=image_size, **statistics)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def _ready_teacher(self) -> None:
        """Read the teacher's weights, unless a checkpoint brought them, and choose the precision."""
        if not self._teacher_ready:
            load_teacher(self.model.teacher, self.backbone, self.teacher_weights)
            self._teacher_ready = True
        plain = self.precision == "auto" and self.trainer.precision == "32-true"
        self._bf16 = plain and native_bf16(self.device)
        name = "bfloat16, distances in float32" if self._bf16 else self.trainer.precision
        rank_zero_info(f"STPM: training on {self.device.type} in {name}.")

    def _train_dataloader(self) -> TrainingBatches:
        """Split the datamodule's training images, keep them and the teacher's features, and draw batches from there."""
        self._ready_teacher()
        trainer, datamodule = self.trainer, self._datamodule
        self._loader = loader = type(datamodule).train_dataloader(datamodule)
        check_normal(loader.dataset)
        if self._data_seed is None:
            self._data_seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self._split = parts = split(
            len(loader.dataset), self.holdout, self._data_seed, trainer.global_rank, trainer.world_size
        )
        mode = self.cache
        if mode != "off" and augments(loader.dataset, self._transform):
            rank_zero_info("STPM: training images are augmented, so they and the teacher's features are made anew.")
            mode = "off"
        self._kept = self._keep(mode, [*parts.train, *parts.holdout], self._batch_size) if mode != "off" else None
        batches = TrainingBatches(loader, parts.train, self._batch_size, self._data_seed, self._kept)
        self._bound(len(batches))
        return batches

    def _bound(self, steps: int) -> None:
        """Bound a run that names no end, to ``epochs`` of so many steps, or more of few."""
        trainer = self.trainer
        if trainer.max_steps == -1 and trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS:
            trainer.fit_loop.max_epochs = epochs = max(self.epochs, -(-self.min_steps // steps))
            why = "`epochs`" if epochs == self.epochs else f"`min_steps`, {self.min_steps}"
            rank_zero_info(f"STPM: trainer.max_epochs is not set; training {epochs} epochs (the model's {why}).")

    @property
    def _datamodule(self) -> Any:
        """The trainer's datamodule, an attribute that Lightning does not declare."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def _batch_size(self) -> int:
        """Images in a step."""
        return self.batch_size or cast("int", self._loader.batch_size)

    @property
    def _transform(self) -> Any:
        """The pre-processor's transform, which anomalib applies to each batch."""
        return getattr(self.pre_processor, "transform", None)

    def _prepare(self, images: Tensor) -> Tensor:
        """Move images (B, 3, H, W) to the model's device and pre-process them."""
        images = images.to(self.device)
        return self._transform(images) if self._transform else images

    @torch.no_grad()
    def _keep(self, mode: CacheMode, places: Sequence[int], batch_size: int) -> FeatureCache | None:
        """Read each image and run the teacher on it once."""
        cache, start = None, 0
        batches = read(self._loader, places, batch_size)
        total = -(-len(places) // batch_size)
        progress = track(batches, "reading images and teacher features", total, disable=not self.trainer.is_global_zero)
        for batch in progress:
            images = images_of(batch)
            teacher = self.model.teach(self._prepare(images))
            if cache is None:
                step = batch_size * self._activations(images[:1])
                example = images[0], [level[0] for level in teacher]
                cache = open_cache(mode, self.cache_dir, len(places), *example, step, self.trainer.num_devices)
            if cache is None:
                return None
            cache.put(start, images, teacher)
            start += len(images)
        return cache

    def _activations(self, images: Tensor) -> int:
        """Return the bytes that a forward pass of the student on images (B, 3, H, W) keeps for its backward pass."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        self.model.student.eval()  # so that no statistic moves
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with self._autocast():
                student = self.model.student(self._prepare(images))
            loss = matching_loss(student, student)
        self.model.student.train()
        del loss
        return sum(kept.values())

    def _normal_images(self, places: Sequence[int], start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield pre-processed images (B, 3, H, W) and the teacher's unit vectors, for each level.

        Args:
            places: Places in the training data.
            start: Of the first of them in the cache, where the training images lie before the held-out ones.
        """
        if self._kept is None:
            for batch in read(self._loader, places, self._batch_size):
                images = self._prepare(images_of(batch))
                yield images, self.model.teach(images)
        else:
            for kept in torch.arange(start, start + len(places)).split(self._batch_size):
                images, teacher = self._kept.get(kept)
                yield self._prepare(images), [level.to(self.device) for level in teacher]

    @torch.no_grad()
    def _pyramids(
        self, places: Sequence[int], start: int
    ) -> Iterator[tuple[list[Tensor], list[Tensor], tuple[int, int]]]:
        """Yield both pyramids, (B, C_l, H_l, W_l) for each level, of normal images of this process, and their size."""
        self.model.eval()
        for images, teacher in self._normal_images(places, start):
            with self._autocast():
                student = self.model.student(images)
            height, width = images.shape[-2:]
            yield teacher, student, (height, width)
        self.model.train()

    def _score(self, places: Sequence[int], start: int) -> tuple[float, Tensor]:
        """Score normal images of all processes with the student as it is; arguments as :meth:`_normal_images` has them.

        Returns:
            The mean over images and positions of the levels' product, as the authors take it, brought back to the
            scale of one distance, in [0, 2]; and each level's mean distance (L,).
        """
        levels = len(self.model.teacher.layers)
        sums = torch.zeros(levels + 2, device=self.device)
        for teacher, student, size in self._pyramids(places, start):
            product = anomaly_map(teacher, student, size).pow(levels).mean().unsqueeze(0)
            sums += len(teacher[0]) * torch.cat([product.new_ones(1), product, level_means(teacher, student)])
        count, product, *means = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return float((product / count).pow(1 / levels)), (torch.stack(means) / count).clamp(min=torch.finfo().tiny)

    def _holdout_image_scores(self) -> Tensor:
        """Return the image scores (N,) of the held-out normal images of all processes."""
        pyramids = self._pyramids(self._split.holdout, len(self._split.train))
        scores = [cast("Tensor", self.model.score(*each).pred_score) for each in pyramids]
        own = torch.cat(scores) if scores else torch.empty(0, device=self.device)
        most = -(-self._split.held // self.trainer.world_size)  # processes hold out one image more or less
        padded = F.pad(own, (0, most - len(own)), value=torch.nan)
        gathered = cast("Tensor", self.all_gather(padded)).flatten()
        return gathered[~gathered.isnan()]

    def _share_statistics(self) -> None:
        """Give all processes the mean of their BatchNorm statistics, so that there is one student."""
        if self.trainer.world_size > 1:
            for statistic in self.model.student.buffers():
                if statistic.is_floating_point():
                    statistic.copy_(self.trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))

    def _validate(self) -> None:
        """Run anomalib's validation epoch, which sets thresholds and normalisation."""
        if self._limit_val_batches is not None:
            self.trainer.limit_val_batches = self._limit_val_batches
        if not self.trainer.enable_validation or not hasattr(self._datamodule, "val_data"):
            return  # val_split_mode=none
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.run()
        self.trainer.training = True

    def _use_chosen(self) -> None:
        """Let the chosen weights stand in for those under training."""
        if self._chosen is not None and self._training_student is None:
            state = self.model.student.state_dict()
            self._training_student = {name: tensor.clone() for name, tensor in state.items()}
            self.model.student.load_state_dict(self._chosen.student)

    def _use_training(self) -> None:
        """Put the weights under training back."""
        if self._training_student is not None:
            self.model.student.load_state_dict(self._training_student)
            self._training_student = None

    def _require_teacher(self) -> None:
        if not self._teacher_ready:
            msg = "this STPM is untrained: give the checkpoint of a trained one with --ckpt_path (ckpt_path=...)."
            raise STPMError(msg)


def size_of(state: dict[str, Tensor]) -> int:
    """Bytes of a state's tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def require_room(folder: Path, need: int, what: str, option: str) -> None:
    """Make a folder, if its disk has room for ``need`` bytes: on a full one, half a file takes a whole one's place.

    Raises:
        STPMError: It has not; names what needs it and the option that gives another folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        msg = (
            f"{what} may take {need / 2**20:.0f} MiB and the disk of {folder} has {free / 2**20:.0f}: make room, or "
            f"give another folder with {option}."
        )
        raise STPMError(msg)


def bad_checkpoint(path: str | Path | None, error: BaseException) -> str | None:
    """Say what is wrong with a checkpoint that torch has refused, if that is what the error means."""
    if not path or not Path(path).is_file() or not isinstance(error, RuntimeError | pickle.UnpicklingError):
        return None
    if not zipfile.is_zipfile(path):
        return f"the checkpoint {path} is cut off or no checkpoint: give another, or train again."
    if isinstance(error, pickle.UnpicklingError):
        return f"the checkpoint {path} holds more than tensors and settings, and is not loaded: train it anew."
    return None


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware: AVX512-BF16, AMX, or CUDA from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def _prefixed(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the student's tensors as the Lightning module's state does."""
    return {f"model.student.{name}": tensor for name, tensor in student.items()}


publish(STPM, "anomalib.models")
