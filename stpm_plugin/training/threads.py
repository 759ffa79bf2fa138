"""As many threads as there are processors free for them.

Threads that share a processor wait for each other in every convolution, and oneDNN's and libgomp's spin while they
wait: on two cores, next to one busy process, a fit takes 2.6 times as long, and in bfloat16 still longer. With one
thread for each free processor it takes 1.3 to 1.8 times as long (`docs/speed.md`).
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

PROBE = 0.2  # seconds: some time slices of the system's scheduler, and of a container's quota (0.1 s)
EVERY = 20.0  # seconds from probe to probe: they take 1 % of the time
VALUES = 2**17  # of each thread in the probe: a sine of them takes it a part of a millisecond
SLACK = 1.02  # threads wait, without spinning, up to a fiftieth of the probe's time
NOISE = 0.1  # of a processor: beside a busy process, a thread that spins while it waits misses a third to a half of one


class FreeProcessors(Callback):
    """Trains on as many threads as other work leaves processors for, and restores their number at the end.

    It measures before the images are read and every 20 seconds of training. It does nothing on a GPU, or if
    ``OMP_NUM_THREADS`` is set.
    """

    def __init__(self) -> None:
        self.most = 0  # threads before training; 0 while nothing is to be done
        self.next_probe = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure before the images and the teacher's features are read."""
        del pl_module
        if stage == "fit":
            fixed = trainer.strategy.root_device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
            self.most, self.next_probe = 0 if fixed else torch.get_num_threads(), 0.0
            self.on_train_batch_start()

    def on_train_batch_start(self, *args: Any) -> None:
        """Measure, if it is time to."""
        del args
        if self.most > 1 and time.monotonic() >= self.next_probe:
            before = torch.get_num_threads()
            torch.set_num_threads(self.most)
            free = free_processors(*probe(), self.most)
            torch.set_num_threads(free)
            self.next_probe = time.monotonic() + EVERY
            if free != before:
                rank_zero_info(
                    f"STPM: training on {free} of {self.most} threads, because other processes use the CPU."
                    if free < self.most
                    else f"STPM: training on all {free} threads again."
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the threads back."""
        del trainer, pl_module, stage
        self._give_back()

    def on_exception(self, *args: Any) -> None:
        """Give the threads back."""
        del args
        self._give_back()

    def _give_back(self) -> None:
        if self.most:
            torch.set_num_threads(self.most)
            self.most = 0


def probe() -> tuple[float, float]:
    """Keep all threads busy for a moment; returns the processor's and the clock's seconds."""
    values = torch.ones(torch.get_num_threads(), VALUES).sin_()  # wakes the threads
    start, used = time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < PROBE:
        values.sin_()  # torch's own loop, which has a part for each thread
    return time.process_time() - used, passed


def free_processors(used: float, passed: float, threads: int) -> int:
    """Say how many threads had a processor of their own.

    Args:
        used: The processors' seconds, of all threads that were busy.
        passed: The clock's seconds.
        threads: How many were busy.

    Returns:
        Threads, from 1 to ``threads``.
    """
    return max(1, min(threads, math.floor(SLACK * used / passed + NOISE)))
