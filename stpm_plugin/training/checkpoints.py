"""How STPM is saved and loaded, by Lightning's and torch's own hooks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.models.components import AnomalibModule
from lightning.pytorch import Trainer

from ..errors import STPMError
from . import saved_state
from .diagnostics import RESULTS_OPTION, bad_checkpoint, require_room, size_of

if TYPE_CHECKING:
    from .lightning_model import STPM
    from .selection import WeightSelection

    Base = AnomalibModule
else:
    Base = object  # anomalib lists the direct subclasses of its module as models, and this is not one


class Checkpointed(Base):
    """The part of STPM that carries all that decides a verdict into each checkpoint and state dict, and back."""

    stated: dict[str, Any]
    selection: WeightSelection
    transform: Any

    def get_extra_state(self) -> dict[str, Any]:
        """All that decides a verdict, except the tensors: see :mod:`stpm_plugin.training.saved_state`."""
        return saved_state.describe(_stpm(self))

    def set_extra_state(self, state: Any) -> None:
        """Become the model that a saved state describes, before its tensors are loaded."""
        saved_state.restore(_stpm(self), state, self.stated)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors and settings, as torch does.

        Raises:
            STPMError: The state dict does not say what model it is of.
        """
        if saved_state.KEY not in state_dict:
            msg = (
                "this state dict lacks the model's settings (_extra_state): use load_from_checkpoint on its checkpoint."
            )
            raise STPMError(msg)
        known = {name: tensor for name, tensor in state_dict.items() if name not in saved_state.GONE}
        return super().load_state_dict(known, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the chosen weights together with those under training.

        Raises:
            STPMError: The disk has no room: Lightning would truncate the checkpoint that it overwrites.
        """
        self.selection.put_into(checkpoint, _stpm(self))  # sets thresholds, whose settings anomalib saves next
        super().on_save_checkpoint(checkpoint)
        need = 2 * size_of(checkpoint["state_dict"])  # the student under training and its momentum take less than that
        folders = {Path(getattr(one, "dirpath", None) or ".") for one in self.trainer.checkpoint_callbacks}
        for folder in folders or {Path(self.trainer.default_root_dir)}:
            require_room(folder, need, "a checkpoint", RESULTS_OPTION)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # the other arguments are passed on
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> STPM:
        """Load as anomalib does; arguments of the constructor that are given here count as stated.

        Raises:
            STPMError: The file is truncated, holds code or another model, or an argument contradicts it.
        """
        try:
            module = cast("STPM", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))
        except (pickle.UnpicklingError, RuntimeError) as error:
            if said := bad_checkpoint(checkpoint_path, error):
                raise STPMError(said) from None
            raise
        module.stated = {
            name: value for name, value in kwargs.items() if name in module.hparams or name == "pre_processor"
        }
        saved_state.restore(module, saved_state.describe(module), module.stated)
        return module

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that a checkpoint describes; of version 0.1 or 0.2, if it has the paper's head."""
        trainer = attached_trainer(_stpm(self))
        saved_state.refuse_foreign(checkpoint, trainer and trainer.ckpt_path)
        tensors = checkpoint["state_dict"]
        state = tensors[saved_state.KEY] if saved_state.KEY in tensors else saved_state.upgraded(checkpoint)
        before = self.transform
        sizes = (settings.get("image_size", ()) for settings in (self.stated, checkpoint["hyper_parameters"]))
        if len({size and tuple(size) for size in sizes}) == 1:
            self.stated.pop("image_size", None)  # as in training, where a pre-processor may have set another size
        if trainer is None and self.stated.get("ignore") == checkpoint["hyper_parameters"].get("ignore"):
            self.stated.pop("ignore", None)  # load_from_checkpoint repeats it, and the file may have changed since
        saved_state.restore(_stpm(self), state, self.stated)
        super().on_load_checkpoint(checkpoint)
        own = self.state_dict()  # of metrics and a visualizer, which learn nothing and may be others
        parts = ("model.",) if _stpm(self).post_processor is None else ("model.", "post_processor.")
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
        kept = {name: tensor for name, tensor in kept.items() if name not in saved_state.GONE}
        taken = (saved_state.KEY, "evaluator.")  # what was restored is settled, and said once
        checkpoint["state_dict"] = {name: one for name, one in own.items() if name.startswith(taken)} | kept
        datamodule = getattr(trainer, "datamodule", None)
        if trainer is not None and datamodule is not None and self.transform is not before:
            datamodule.setup(trainer.state.fn)  # anomalib resizes by the transform that the model had until now


def attached_trainer(module: STPM) -> Trainer | None:
    """The trainer that runs a module, if any does."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def _stpm(module: Checkpointed) -> STPM:
    return cast("STPM", module)
