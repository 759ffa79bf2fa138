"""What a run says in a sentence: settings that cannot work, the time left, and why it ended."""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ..errors import STPMError
from .schedule import end_of_run
from .thresholds import STPMPostProcessor

if TYPE_CHECKING:
    from .lightning_model import STPM

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
FULL_MEMORY = ("not enough memory", "allocate memory", "out of memory")  # Windows, Linux and CUDA
RESULTS_OPTION = "--default_root_dir (--results of stpm train)"
LOST_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def check_precision(trainer: Trainer) -> None:
    """Refuse a precision that would round the networks themselves.

    Raises:
        STPMError: It is one.
    """
    if str(trainer.precision) not in PRECISIONS:
        msg = (
            f"trainer.precision={trainer.precision} would change the teacher and the images: use one of "
            f"{', '.join(PRECISIONS)}."
        )
        raise STPMError(msg)


def check_run(module: STPM) -> None:
    """Refuse, before anything is read, a run that could only fail later.

    Raises:
        STPMError: A threshold needs images that are not held out, or the pre-processor could not be saved.
    """
    post_processor = module.post_processor
    if (
        isinstance(post_processor, STPMPostProcessor)
        and post_processor.normal_quantile is not None
        and not module.holdout
    ):
        msg = "normal_quantile sets thresholds from held-out good images and holdout=0 keeps none: set holdout above 0."
        raise STPMError(msg)
    if module.transform is not None and not _can_be_saved(module.pre_processor):
        msg = (
            f"anomalib cannot save the pre-processor's transform ({type(module.transform).__name__}), so a loaded "
            "checkpoint would prepare images differently: use torchvision's Resize, CenterCrop and Normalize, and give "
            "random transforms to the datamodule as train_augmentations."
        )
        raise STPMError(msg)


def _can_be_saved(pre_processor: Any) -> bool:
    return (
        hasattr(pre_processor, "checkpoint_config") and pre_processor.checkpoint_config().get("transform") is not None
    )


class TimeLeft(Callback):
    """Logs ``minutes_left`` to the progress bar after each epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._started, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time left, estimated from the epochs so far."""
        epochs = trainer.max_epochs or 0
        if epochs > 0:
            each = (time.monotonic() - self._started) / (trainer.current_epoch + 1 - self._first)
            left = each * (epochs - trainer.current_epoch - 1)
            pl_module.log("minutes_left", left / 60, prog_bar=True, logger=False)


class Line(Protocol):
    """A line of progress."""

    def step(self) -> None:
        """Count a step."""

    def end(self) -> None:
        """End the line."""


class TrainingProgress(Callback):
    """Shows the training's steps on a progress line of the caller.

    Args:
        line: Makes the line, for a number of steps.
    """

    def __init__(self, line: Callable[[int], Line]) -> None:
        self.begin = line
        self.line: Line | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the line."""
        del pl_module
        self.line = self.begin(end_of_run(trainer) - trainer.global_step)

    def on_train_batch_end(self, *args: Any) -> None:
        """Count a step."""
        del args
        if self.line:
            self.line.step()

    def on_train_end(self, *args: Any) -> None:
        """End the line."""
        del args
        if self.line:
            self.line.end()
            self.line = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line."""
        self.on_train_end(trainer, pl_module, exception)


class FailureReport(Callback):
    """Logs in a sentence why a run ended, where the error names neither what failed nor the remedy."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log one line about a full disk, full memory, a bad checkpoint, or another process that was killed."""
        del pl_module
        if said := explanation(trainer, exception):
            logging.getLogger(__name__).error("STPM: %s", said)


def explanation(trainer: Trainer, exception: BaseException) -> str | None:
    """Say what an exception that ended a run means; ``None`` where it says so itself."""
    if isinstance(exception, OSError) and exception.errno == errno.ENOSPC:
        return (
            f"the disk of {trainer.default_root_dir} is full in epoch {trainer.current_epoch}, and the checkpoint that "
            f"was being written may be truncated: make room, or choose another folder with {RESULTS_OPTION}."
        )
    full = any(words in str(exception) for words in FULL_MEMORY)
    if full or isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return f"out of memory in epoch {trainer.current_epoch}: lower batch_size or image_size, or set cache=disk."
    if said := bad_checkpoint(trainer.ckpt_path, exception):
        return said
    if trainer.world_size > 1 and isinstance(exception, RuntimeError) and _lost_peer(exception):
        return (
            f"process {trainer.global_rank} of {trainer.world_size} lost the others in epoch {trainer.current_epoch}: "
            "one was killed or failed, see its own message; if memory ran out, lower batch_size or set cache=disk. The "
            "last checkpoint is whole: resume from it with --ckpt_path."
        )
    return None


def _lost_peer(exception: RuntimeError) -> bool:
    return isinstance(exception, torch.distributed.DistError) or any(word in str(exception) for word in LOST_PEER)


def bad_checkpoint(path: str | Path | None, error: BaseException) -> str | None:
    """Say what is wrong with a checkpoint that torch has refused, if that is what the error means."""
    if not path or not Path(path).is_file() or not isinstance(error, RuntimeError | pickle.UnpicklingError):
        return None
    if not zipfile.is_zipfile(path):
        return f"the checkpoint {path} is truncated or not a checkpoint: pass another, or train again."
    if isinstance(error, pickle.UnpicklingError):
        return f"the checkpoint {path} contains more than tensors and settings, so it is not loaded: train again."
    return None


def size_of(state: dict[str, Tensor]) -> int:
    """Bytes of a state's tensors."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def require_room(folder: Path, need: int, what: str, option: str) -> None:
    """Make a folder, if its disk has room for ``need`` bytes: a full disk would truncate the existing file.

    Raises:
        STPMError: It has no room; names what needs it and the option that gives another folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        msg = (
            f"{what} may take {need / 2**20:.0f} MiB and the disk of {folder} has {free / 2**20:.0f}: make room, or "
            f"choose another folder with {option}."
        )
        raise STPMError(msg)
