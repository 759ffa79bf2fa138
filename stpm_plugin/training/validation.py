"""When a run's validation set is read, and how it is scored where Lightning's own loop does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import Batch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import STPMError
from .data import check_depth

if TYPE_CHECKING:
    from .lightning_model import STPM

MEASURED_BY_ANOMALIB = ("image_", "pixel_")  # prefixes of the names that its metrics have


def validates_each_epoch(trainer: Trainer, module: STPM) -> bool:
    """Whether the validation set is used while training; otherwise it is read once, at the end.

    It is used if the evaluator has validation metrics, or the trainer was told when to validate.

    Raises:
        STPMError: A callback monitors a metric that nothing measures.
    """
    measured = [metric.name for metric in getattr(module.evaluator, "val_metrics", ())]
    for callback in getattr(trainer, "callbacks", []):
        monitor = getattr(callback, "monitor", None)
        if monitor and monitor.startswith(MEASURED_BY_ANOMALIB) and monitor not in measured:
            there = ", ".join(["holdout_score", "train_loss", *measured])
            msg = (
                f"{type(callback).__name__} monitors {monitor}, which is not measured while training: add that metric "
                f"to val_metrics of anomalib.metrics.Evaluator (--model.evaluator), or monitor one of {there}."
            )
            raise STPMError(msg)
    interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none if it is a time
    return bool(measured) or trainer.check_val_every_n_epoch != 1 or interval != 1.0


@torch.no_grad()
def scored_validation(module: STPM, source: Any) -> Iterator[Batch]:
    """Yield the batches of a datamodule's validation set with raw scores and maps, each process its share.

    Args:
        module: The model, with the weights to score.
        source: The datamodule; nothing is yielded if it has no validation set or the trainer reads none.
    """
    if not hasattr(source, "val_data") or not module.trainer.limit_val_batches:
        return
    loader = source.val_dataloader()
    if module.trainer.world_size > 1:
        loader = _shared(loader, module.trainer)
    share = module.trainer.limit_val_batches
    count = share if isinstance(share, int) else int(len(loader) * share)
    module.model.eval()
    for index, batch in enumerate(itertools.islice(loader, count)):
        for path in batch.image_path or ():
            check_depth(path)
        moved = module.transfer_batch_to_device(batch, module.device, 0)
        if module.pre_processor is not None:
            cast("Any", module.pre_processor).on_validation_batch_start(module.trainer, module, moved, index)
        yield moved.update(**module.model(moved.image)._asdict())
    module.model.train()


def _shared(loader: DataLoader, trainer: Trainer) -> DataLoader:
    """The same loader for one process of several; as in Lightning, the last images may come twice."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, trainer.world_size, trainer.global_rank, shuffle=False
    )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
