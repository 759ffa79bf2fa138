"""Test metrics, given only where they mean something."""

from __future__ import annotations

from typing import Any, cast

from anomalib.metrics import Evaluator
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric


class BothKinds(Evaluator):
    """anomalib's evaluator, which gives no metrics where only good or only defective images were tested.

    They would be 0.0, whatever the model does. A process counts only its own images: where several processes share a
    test, the metrics are always given.
    """

    def on_test_start(self, trainer: Trainer, *args: Any) -> None:
        """Forget the last test."""
        del trainer, args
        self.seen: set[int] = set()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the metrics with a batch, and note what it holds."""
        super().on_test_batch_end(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[3]
        if batch.gt_label is not None:
            self.seen |= {int(label) for label in batch.gt_label}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the metrics, or say why there are none."""
        if len(self.seen) == 1 and trainer.world_size == 1:
            kind = "defective" if self.seen == {1} else "good"
            rank_zero_info(f"STPM: all tested images are {kind}: AUROC and F1 need both kinds, so they are left out.")
            for metric in self.test_metrics:
                cast("Metric", metric).reset()
            return
        super().on_test_epoch_end(trainer, pl_module)
