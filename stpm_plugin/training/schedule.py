"""How long a run is, and the learning rate at each of its steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import STPMError

LIGHTNING_DEFAULT_EPOCHS = 1000  # what Trainer(max_epochs=None) turns into
RISE = 0.3  # share of the steps in which the rate rises
FIRST = 1 / 25  # of the highest rate; this and the two others are torch's OneCycleLR's
LAST = FIRST / 1e4

Kind = Literal["constant", "one-cycle"]


def one_cycle(step: int, total: int) -> float:
    """Share of the highest rate at a step of one cycle: up along a cosine for 30 % of the steps, then down to zero.

    Args:
        step: From 0; after the last one the rate stays at its end.
        total: Steps of the cycle.
    """
    top, end = RISE * total - 1, total - 1
    step = min(step, end)
    if step <= top:
        return _cosine(FIRST, 1.0, step / top)
    return _cosine(1.0, LAST, (step - top) / (end - top) if end > top else 1.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


class RateSchedule(LRScheduler):
    """A rate that depends only on the step, and that resumes from any step.

    A run that is resumed with the same length continues its cycle. A run of another length, another kind, or of
    version 0.1.0 begins a new cycle over the steps that are left. The highest rate is always the caller's.

    Args:
        optimizer: Whose rate is set.
        peak: The highest rate.
        kind: ``constant`` or ``one-cycle``.
    """

    def __init__(self, optimizer: Optimizer, peak: float, kind: Kind) -> None:
        self.peak, self.kind = peak, kind
        self.start, self.end = 0, 1  # steps at which the cycle begins and ends, once the run is planned
        self._planned: tuple[int, int, str] | None = None  # start, end and kind of a checkpoint
        super().__init__(optimizer)

    def plan(self, step: int, end: int, peak: float) -> None:
        """Lay the cycle over the run, once its length is known.

        Args:
            step: Optimiser steps taken.
            end: Steps at the run's end.
            peak: The highest rate.
        """
        begun, self._planned = self._planned, None
        goes_on = begun is not None and begun[1:] == (end, self.kind)
        self.start = begun[0] if begun is not None and goes_on else step
        self.last_epoch, self.end, self.peak = step, end, peak
        if step and not goes_on and self.kind != "constant":
            rank_zero_info(f"STPM: the checkpoint's run had another length; a new cycle of {end - step} steps begins.")
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate at the present step, for each parameter group."""
        share = 1.0 if self.kind == "constant" else one_cycle(self.last_epoch - self.start, self.end - self.start)
        return [self.peak * share for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The position in the cycle."""
        return {"last_epoch": self.last_epoch, "start": self.start, "end": self.end, "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a position in a cycle; :meth:`plan` decides whether it still holds."""
        if "kind" in state:  # else of version 0.1.0
            self._planned = state["start"], state["end"], state["kind"]


def steps_in_a_pass(trainer: Trainer, batches: int) -> int:
    """Optimiser steps in a pass over so many batches, after the trainer's limits and accumulation."""
    share = trainer.limit_train_batches
    drawn = min(batches, share) if isinstance(share, int) else max(1, int(batches * share))
    return max(1, -(-drawn // trainer.accumulate_grad_batches))


def names_no_length(trainer: Trainer) -> bool:
    """Whether the trainer leaves the length of a run to the model."""
    timed = any(isinstance(callback, Timer) for callback in _callbacks(trainer))
    unnamed = trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS or (trainer.max_epochs == -1 and timed)
    return trainer.max_steps == -1 and unnamed


def passes_within(steps: int, epochs: int, budget: tuple[int, int] | None) -> int:
    """Passes of a run that names no length: ``epochs``, or more or fewer to keep to the budget; at least one.

    Args:
        steps: Optimiser steps in a pass.
        epochs: Passes.
        budget: Fewest and most steps; the fewest win. ``None`` to use only ``epochs``.
    """
    if budget is None:
        return epochs
    fewest, most = budget
    return max(min(epochs, most // steps), -(-fewest // steps), 1)


def bound_epochs(trainer: Trainer, steps: int, epochs: int, budget: tuple[int, int] | None, schedule: Kind) -> None:
    """Bound a run that names no length.

    Args:
        trainer: Its fit loop is bounded.
        steps: Optimiser steps in a pass.
        epochs: Passes.
        budget: Fewest and most steps (:func:`passes_within`).
        schedule: One cycle needs an end.

    Raises:
        STPMError: The run has no end and the schedule needs one.
    """
    if names_no_length(trainer):
        passes = passes_within(steps, epochs, budget)
        trainer.fit_loop.max_epochs = passes
        why = "`epochs`" if passes == epochs or budget is None else f"`steps`, {budget[0]} to {budget[1]}"
        rank_zero_info(f"STPM: trainer.max_epochs is not set; training {passes} epochs (the model's {why}).")
    elif trainer.max_steps == -1 and trainer.max_epochs == -1 and schedule != "constant":
        msg = f"schedule={schedule} needs an end and trainer.max_epochs is -1: set a number, or schedule=constant."
        raise STPMError(msg)


def end_of_run(trainer: Trainer) -> int:
    """Optimiser steps at the end of a run that is about to start or to resume."""
    batches, accumulated = int(trainer.num_training_batches), trainer.accumulate_grad_batches
    drawn = trainer.fit_loop.epoch_loop.batch_progress.current.ready % batches  # of a pass that a resumed run is in
    steps = -(-batches // accumulated)
    ends = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        passes = trainer.max_epochs - trainer.current_epoch
        ends.append(trainer.global_step + passes * steps - drawn // accumulated)
    return max(min(ends, default=0), trainer.global_step + 1)


def is_last_pass(trainer: Trainer) -> bool:
    """Whether the run ends with the current pass, as far as is known now."""
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return bool(trainer.should_stop or by_epochs or trainer.global_step >= trainer.max_steps != -1)


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks", []))
