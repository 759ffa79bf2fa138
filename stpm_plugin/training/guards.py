"""An untrained model gives no verdict, and no image is scored that anomalib has misread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.export import Dim
from torchvision.transforms.v2 import Resize

from ..errors import STPMError
from ..model.tracing import traceable
from .data import check_depth

if TYPE_CHECKING:
    from ..model.network import STPMModel
    from .lightning_model import STPM

    Base = AnomalibModule
else:
    Base = object  # anomalib lists the direct subclasses of its module as models, and this is not one


class TrainedOnly(Base):
    """The part of STPM that checks before validation, test, prediction and export."""

    model: STPMModel
    trained: bool

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse images that anomalib has misread, here and in tests and predictions.

        Raises:
            STPMError: An image has more bits than anomalib reads.
        """
        del batch_idx, dataloader_idx
        for path in batch.image_path or ():
            check_depth(path)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_start(self) -> None:
        """Refuse to validate an untrained model, except in a run's own validation."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.require_trained()

    def on_test_start(self) -> None:
        """Refuse to test an untrained model."""
        self.require_trained()

    def on_predict_start(self) -> None:
        """Refuse to predict with an untrained model."""
        self.require_trained()

    def require_trained(self) -> None:
        """Refuse to use an untrained model.

        Raises:
            STPMError: It is untrained.
        """
        if not self.trained:
            msg = "this STPM is untrained: pass the checkpoint of a trained one with --ckpt_path (ckpt_path=...)."
            raise STPMError(msg)

    # Export

    def require_exportable(self) -> None:
        """Refuse to export an untrained model, or one that would resize in another way than it was trained.

        Raises:
            STPMError: It is untrained, or its pre-processor antialiases and the exported form of it would not.
        """
        self.require_trained()
        trained, exported = (
            resizes(getattr(self.pre_processor, name, None)) for name in ("transform", "export_transform")
        )
        if any(part.antialias for part in trained) and not all(part.antialias for part in exported):
            msg = (
                "the pre-processor's Resize antialiases, and its exported form would not, so scores would differ: use "
                "stpm_plugin.STPMPreProcessor, and a Resize to a height and a width, bilinear."
            )
            raise STPMError(msg)

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export a trained model as anomalib does."""
        self.require_exportable()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # anomalib's differs from Lightning's
        """Export a trained model that is not tiled, as anomalib does."""
        self.require_exportable()
        if self.model.tiler is not None:
            msg = "a tiled model cannot be exported to ONNX or OpenVINO: train it on whole images, or use to_torch."
            raise STPMError(msg)
        input_size = kwargs.get("input_size", args[2] if len(args) > 2 else None)
        if cast("STPM", self).network_size is None and input_size is None:
            kwargs = {"dynamic_shapes": any_size(self.model.teacher.strides[-1]), **kwargs}
        # anomalib asks for operator set 14, which torch cannot write: it would try, log a traceback and write 18
        with traceable(self.model):
            return super().to_onnx(*args, **{"opset_version": 18, "verbose": False, **kwargs})

    def to_openvino(self, export_root: Path | str, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, except for INT8: see :func:`stpm_plugin.deployment.openvino_export.export`."""
        from ..deployment.openvino_export import export  # the one import upward; OpenVINO takes seconds to import

        self.require_exportable()
        return export(cast("STPM", self), super().to_openvino, export_root, *args, **kwargs)


def resizes(transform: Any) -> list[Resize]:
    """Torchvision's resizes among the parts of a transform."""
    parts = getattr(transform, "transforms", transform if isinstance(transform, nn.Sequential) else [transform])
    return [part for part in parts if isinstance(part, Resize)]


def any_size(stride: int) -> tuple[dict[int, Any]]:
    """Dynamic shapes of images of any size: anomalib's own example has 2 pixels, to which a graph would be bound."""
    return ({0: Dim("batch_size"), 2: Dim("height", min=4 * stride), 3: Dim("width", min=4 * stride)},)
