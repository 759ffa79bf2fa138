"""Export to OpenVINO at the end of a training, and what OpenVINO Model API must know of the exported model."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from ..errors import STPMError
from ..training.diagnostics import require_room, size_of
from .int8 import export_int8

if TYPE_CHECKING:
    from ..training.lightning_model import STPM

MODEL_INFO = {"model_type": "AnomalyDetection", "task": "segmentation"}  # what OpenVINO Model API reads


class OpenVINOExport(Callback):
    """Exports the selected weights to OpenVINO when a training ends, to ``weights/openvino`` in the run's folder.

    Args:
        compression_type: ``FP16``, ``INT8_PTQ`` or another of anomalib's; ``None`` for float32.
        input_size: Height and width of the images, pixels; ``None`` for any size.
        export_root: Folder to export to; ``None`` for the run's.
    """

    def __init__(
        self,
        compression_type: CompressionType | None = None,
        input_size: tuple[int, int] | None = None,
        export_root: str | None = None,
    ) -> None:
        self.compression_type, self.input_size, self.export_root = compression_type, input_size, export_root

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Export as `anomalib export` does."""
        if trainer.is_global_zero:
            root = self.export_root or trainer.default_root_dir
            options = {"input_size": self.input_size, "compression_type": self.compression_type}
            path = pl_module.to_openvino(root, **options, datamodule=trainer.datamodule)
            rank_zero_info(f"STPM: the OpenVINO model is {path}.")


def describe(path: Path) -> None:
    """Write ``MODEL_INFO`` into an exported ``.xml``, by which OpenVINO Model API knows an ``AnomalyDetection``."""
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights' file is overwritten
    model = core.read_model(path)
    for name, value in MODEL_INFO.items():
        model.set_rt_info(value, ["model_info", name])
    ov.save_model(model, path, compress_to_fp16=False)


def export(
    module: STPM,
    plain: Callable[..., Path],
    export_root: Path | str,
    compression_type: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
    max_drop: float = 0.01,
    **arguments: Any,
) -> Path:
    """Export as anomalib does, but for INT8, which is quantised for STPM.

    Args:
        module: A trained model.
        plain: anomalib's own export of it.
        export_root: Folder; the model lies below it, where anomalib puts it.
        compression_type: ``INT8_PTQ`` and ``INT8_ACQ`` are :mod:`stpm_plugin.deployment.int8`'s, the rest anomalib's.
        datamodule: For INT8: the data that trained the model. Images that trained it calibrate; its validation set or
            the held-out images set the thresholds.
        max_drop: For ``INT8_ACQ``: how far the correlation of the logarithms of rounded and float anomaly maps, on
            held-out normal images, may fall below 1.
        **arguments: As in anomalib; its ``metric``, which would read test labels, is not used.

    Returns:
        Path of the ``.xml`` file.

    Raises:
        STPMError: No room, INT8 without the data of the model, or ``INT8_ACQ`` without held-out images.
    """
    arguments.pop("metric", None)
    require_room(Path(export_root), size_of(module.model.state_dict()), "the model", "--export_root")
    if compression_type not in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ):
        target = plain(export_root, compression_type=compression_type, datamodule=datamodule, **arguments)
        describe(target)
        return target
    if datamodule is None:
        msg = "INT8 is calibrated on normal training images: name them with --data (datamodule=...)."
        raise STPMError(msg)
    drop = max_drop if compression_type == CompressionType.INT8_ACQ else None
    size = arguments.get("input_size")
    return _export_rounded(module, functools.partial(plain, **arguments), Path(export_root), size, datamodule, drop)


def _export_rounded(
    module: STPM,
    plain: Callable[..., Path],
    root: Path,
    size: tuple[int, int] | None,
    datamodule: AnomalibDataModule,
    drop: float | None,
) -> Path:
    """Export without the post-processor, round that, and append the post-processor with thresholds of its own."""
    post_processor, module.post_processor = module.post_processor, None
    try:
        with tempfile.TemporaryDirectory() as folder:
            raw = plain(folder)
            target = root / raw.relative_to(folder)
            size = size or module.network_size
            export_int8(raw, target, datamodule, module.data_record, size, post_processor, drop)
    finally:
        module.post_processor = post_processor
    describe(target)
    return target
