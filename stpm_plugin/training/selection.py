"""The choice of the weights: those of the epoch with the lowest held-out score are tested, saved and exported.

As Lightning's `WeightAveraging` does with its average, the chosen weights stand in for those under training wherever
weights are used: in validation, in checkpoints, and once training has ended. A checkpoint's state is the chosen
student with its thresholds, ready to use; what is needed to continue training is saved next to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..errors import STPMError
from .crops import CroppedImages
from .diagnostics import check_precision
from .held_out import Matched, gathered, ordinary_score, predicted, score, share_statistics
from .mask import read_mask
from .normal_images import NormalImages, StandIn
from .schedule import is_last_pass
from .thresholds import STPMPostProcessor, calibrate, of_held_out
from .validation import scored_validation, validates_each_epoch

if TYPE_CHECKING:
    from .lightning_model import STPM

CHECKPOINT_KEY = "stpm"


@dataclass(frozen=True)
class Chosen:
    """The weights that are tested, saved and exported, and why.

    Args:
        epoch: The epoch that these weights come from.
        score: Mean anomaly map on the held-out images, in [0, 2]; NaN where none are held out.
        student: The student's tensors.
    """

    epoch: int
    score: float
    student: dict[str, Tensor]


class WeightSelection(Callback):
    """Draws a run's good images, scores each epoch's student on the held-out ones, and keeps the best.

    Attributes:
        images: The run's good images, during a fit.
        chosen: The weights chosen so far; ``None`` before the first epoch has ended.
        scores: Held-out score of each epoch of this data's run.
    """

    def __init__(self) -> None:
        self.images: NormalImages | None = None
        self._resized = True  # whether the run's images are
        self._reset()

    def _reset(self) -> None:
        self.chosen: Chosen | None = None
        self.scores: list[float] = []
        self._training: dict[str, Tensor] | None = None  # set while the chosen weights stand in for these
        self._considered = -1  # epoch
        self._calibrated: Chosen | None = None  # whose thresholds the validation set has set
        self._resumed: dict[str, Any] | None = None

    # Before a run, and after it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the precision; before a fit read the mask, and stand in for the datamodule's training batches."""
        check_precision(trainer)
        if stage != "fit":
            return
        module = cast("STPM", pl_module)
        self._give_back(trainer)
        self._reset()
        self._resized = module.network_size is not None
        source = getattr(trainer, "datamodule", None)
        if source is None:
            msg = (
                "STPM holds out and keeps training images itself: pass Engine.fit a datamodule instead of data loaders."
            )
            raise STPMError(msg)
        module.model.ignored = read_mask(module, source)
        self.images = NormalImages(module, source) if module.crop_size is None else CroppedImages(module, source)
        trainer.datamodule = StandIn(source, self.images, validates_each_epoch(trainer, module))  # type: ignore[attr-defined]
        module.plan(self.images)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the datamodule back, and leave the chosen weights in the model."""
        if stage == "fit":
            self._end(trainer, cast("STPM", pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after a fault: what was chosen so far can be used."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING:
            self._end(trainer, cast("STPM", pl_module))

    def _end(self, trainer: Trainer, module: STPM) -> None:
        self._use_chosen(module)
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if isinstance(datamodule := getattr(trainer, "datamodule", None), StandIn):
            trainer.datamodule = datamodule.__wrapped__  # type: ignore[attr-defined]
        self.images = None

    # The choice

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the weights change; a run that is refused before leaves a trained model trained."""
        if self.chosen is None:
            cast("STPM", pl_module).trained = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Consider the weights once the epoch's batches are done, before anything validates or saves them."""
        del outputs, batch
        ends_early = trainer.fit_loop.epoch_loop.done  # by max_steps or should_stop
        if ends_early or batch_idx + 1 == trainer.num_training_batches:
            self._consider(cast("STPM", pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consider them where the epoch was cut short, and complete the choice where it is due."""
        self._consider(cast("STPM", pl_module))
        self.complete(cast("STPM", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the chosen weights in the model, with thresholds of their own.

        Raises:
            STPMError: No epoch had a finite held-out score.
        """
        module = cast("STPM", pl_module)
        if self.chosen is None:
            if self.scores:
                msg = f"no epoch had a finite held-out score ({self.scores[-1]}): lower lr ({module.lr})."
                raise STPMError(msg)
            return
        self.complete(module)
        self._give_back(trainer)  # before other callbacks' on_fit_end: an export reads the datamodule's own images
        if module.holdout:
            rank_zero_info(f"STPM: chose epoch {self.chosen.epoch}, held-out score {self.chosen.score:.4g}.")
        self._use_chosen(module)
        if isinstance(module.post_processor, STPMPostProcessor):
            rank_zero_info(f"STPM: {module.post_processor.report()}")

    def _consider(self, module: STPM) -> None:
        """Score the student on the held-out images, and keep it if it is the best so far."""
        if self._considered == module.current_epoch:
            return
        self._considered = module.current_epoch
        self._resume(module)
        share_statistics(module)
        value = float("nan")
        if module.holdout:
            value, kept = score(module, self._run_images.for_choice())
            module.log("holdout_score", value, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)
        self.scores.append(value)
        worse = self.chosen is not None and math.isfinite(self.chosen.score) and not value < self.chosen.score
        if module.holdout and (worse or not math.isfinite(value)):
            return
        student = {name: tensor.clone() for name, tensor in module.model.student.state_dict().items()}
        self.chosen = Chosen(module.current_epoch, value, student)
        module.trained = True
        if not module.holdout:
            return
        self._set_ordinary(module, kept, self._run_images.held)
        if isinstance(module.post_processor, STPMPostProcessor):  # until the run is complete
            scored = of_held_out(module.model.score(*matched) for matched in kept)
            own = self._run_images.by_image(scored[0]), self._run_images.by_image(scored[1])
            module.post_processor.set_from_normal_images(*gathered(module, own, self._run_images.held))

    def complete(self, module: STPM) -> None:
        """In the last epoch, set the chosen weights' thresholds in full precision, and from the validation set.

        Without held-out images this happens in each epoch, or checkpoints before the last would have no thresholds.
        """
        chosen, images = self.chosen, self.images
        if chosen is None or images is None or self._calibrated is chosen:
            return
        if module.holdout and not is_last_pass(module.trainer):
            return
        self._use_chosen(module)
        if not module.holdout and module.model.usual_places is not None:
            self._set_ordinary(module, score(module, images.training())[1], images.trained)
        self._calibrated = chosen
        if module.post_processor is not None:
            held_out = gathered(module, of_held_out(predicted(module, images.held_out())), images.held)
            if isinstance(module.post_processor, STPMPostProcessor):
                module.post_processor.forget()
            calibrate(module.post_processor, held_out, scored_validation(module, images.source))
        self._use_training(module)

    @staticmethod
    def _set_ordinary(module: STPM, matched: list[Matched], count: int) -> None:
        if module.model.usual_places is not None:
            module.model.usual_places.ordinary.copy_(ordinary_score(module, matched, count))

    @property
    def _run_images(self) -> NormalImages:
        return cast("NormalImages", self.images)

    # Standing in

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the chosen weights, never the last epoch's."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._use_chosen(cast("STPM", pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue training with the last epoch's weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._use_training(cast("STPM", pl_module))

    def _use_chosen(self, module: STPM) -> None:
        if self.chosen is not None and self._training is None:
            state = module.model.student.state_dict()
            self._training = {name: tensor.clone() for name, tensor in state.items()}
            module.model.student.load_state_dict(self.chosen.student)

    def _use_training(self, module: STPM) -> None:
        if self._training is not None:
            module.model.student.load_state_dict(self._training)
            self._training = None

    # Checkpoints

    def put_into(self, checkpoint: dict[str, Any], module: STPM) -> None:
        """Make a checkpoint's state that of the chosen weights, and save those under training next to it."""
        if self.chosen is None or module.trainer.state.fn != TrainerFn.FITTING:
            return
        self.complete(module)
        under_training = self._training or module.model.student.state_dict()
        checkpoint[CHECKPOINT_KEY] = {
            "epoch": self.chosen.epoch,
            "score": self.chosen.score,
            "scores": list(self.scores),
            "student": {name: tensor.clone() for name, tensor in under_training.items()},
        }
        checkpoint["state_dict"] = module.state_dict() | {
            f"model.student.{name}": tensor for name, tensor in self.chosen.student.items()
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """If training continues, take the weights under training; the chosen ones were just loaded."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = cast("STPM", pl_module)
        if self._resized != (module.network_size is not None):  # the images were opened before
            msg = "the checkpoint's model trained on images at their own size: set image_size to null to resume it."
            raise STPMError(msg)
        self._reset()
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            return
        student = {name: tensor.clone() for name, tensor in module.model.student.state_dict().items()}
        self.chosen = Chosen(saved["epoch"], saved["score"], student)
        self.scores = list(saved["scores"])
        self._resumed = {"held_out": held_out_of(module)}
        module.model.student.load_state_dict(saved["student"])

    def _resume(self, module: STPM) -> None:
        """Once the run's images are known, forget a choice that was made on other held-out images."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and (resumed["held_out"] is None or resumed["held_out"] != held_out_of(module)):
            rank_zero_info("STPM: the held-out images differ from the checkpoint's, so epoch selection starts over.")
            self.chosen, self.scores, module.trained = None, [], False

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightSelection:
        """A copied model has no run of its own."""
        del memo
        return WeightSelection()


def held_out_of(module: STPM) -> frozenset[str] | None:
    """Contents of the held-out images; ``None`` where they are not known."""
    record = module.data_record
    return record.held_out_digests if record is not None and record.identified else None
