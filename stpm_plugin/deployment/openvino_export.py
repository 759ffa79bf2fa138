"""Export to OpenVINO at the end of a training, and what OpenVINO Model API must know of the exported model."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import openvino as ov
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.post_processing import PostProcessor
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ..errors import STPMError
from ..model.network import STPMModel
from ..model.pre_processing import AntialiasedResize
from ..training.diagnostics import require_room, size_of
from ..training.thresholds import HELD_OUT, VALIDATION, STPMPostProcessor
from .exported_model import REACHES, describe, write
from .int8 import require_held_out, round_model
from .verdict import RAW_LEVEL, SECTION, Scale, Verdict

if TYPE_CHECKING:
    from ..training.lightning_model import STPM


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


def export(
    module: STPM,
    plain: Callable[..., Path],
    export_root: Path | str,
    model_file_name: str = "model",
    input_size: tuple[int, int] | None = None,
    compression_type: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
    max_drop: float = 0.01,
    **arguments: Any,
) -> Path:
    """Export the networks as anomalib does and append the verdict; INT8 is quantised for STPM.

    Args:
        module: A trained model.
        plain: anomalib's own export of it.
        export_root: Folder; the model goes below it, where anomalib puts it.
        model_file_name: Name of the file; a compression is added to it.
        input_size: Height and width of the images, pixels; ``None`` for any size, or the size they are resized to.
        compression_type: ``INT8_PTQ`` and ``INT8_ACQ`` are :mod:`stpm_plugin.deployment.int8`'s, the rest anomalib's.
        datamodule: For INT8: the data that trained the model. Its training images calibrate; its validation set or
            the held-out images set the thresholds.
        max_drop: For ``INT8_ACQ``: how far the correlation of the logarithms of rounded and float anomaly maps, on
            held-out normal images, may fall below 1.
        **arguments: As in anomalib; its ``metric``, which would read test labels, is not used.

    Returns:
        Path of the ``.xml`` file: ``model.xml``, or for a compressed model for example ``model_int8_ptq.xml``.

    Raises:
        STPMError: No room, INT8 without the data of the model, or ``INT8_ACQ`` without held-out images.
    """
    arguments.pop("metric", None)
    require_room(Path(export_root), size_of(module.model.state_dict()), "the model", "--export_root")
    rounds = compression_type in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
    appended = appendable(module.post_processor)
    if rounds and datamodule is None:
        msg = "INT8 is calibrated on normal training images: pass them with --data (datamodule=...)."
        raise STPMError(msg)
    if rounds and not appended:
        name = type(module.post_processor).__name__
        msg = f"INT8 needs new thresholds, which {name} cannot set: use STPMPostProcessor, or export in FP16."
        raise STPMError(msg)
    drop = max_drop if compression_type == CompressionType.INT8_ACQ else None
    if drop is not None or (rounds and getattr(module.post_processor, "normal_quantile", None) is not None):
        require_held_out(module.data_record)
    with tempfile.TemporaryDirectory() as folder, without_post_processor(module, appended) as post_processor:
        options = {} if rounds else {"compression_type": compression_type, "datamodule": datamodule}
        source = plain(folder, input_size=input_size, **options, **arguments)
        if rounds:
            size = input_size or module.network_size
            data = cast("AnomalibDataModule", datamodule)
            model, post_processor = round_model(source, data, module.data_record, size, post_processor, drop)
        else:
            core = ov.Core()
            core.set_property({"ENABLE_MMAP": False})  # the folder is removed
            model = core.read_model(source)
        if isinstance(post_processor, PostProcessor):
            raw = (model.output(name).get_node().input_value(0) for name in ("pred_score", "anomaly_map"))
            model = verdict_of(post_processor, module.model).append_to(model, *raw)
            if module.network_size is None:
                name_levels(model, module.model)
        suffix = f"_{CompressionType(compression_type).value}" if compression_type else ""
        target = Path(export_root) / source.relative_to(folder).parent / f"{model_file_name}{suffix}.xml"
        describe(model, resized_to(module.pre_processor), module.data_record)
        write(model, target)
    return target


@contextlib.contextmanager
def without_post_processor(module: STPM, detach: bool) -> Iterator[PostProcessor | None]:
    """Take a module's post-processor off for a while, if ``detach``; yields what was taken."""
    if not detach:
        yield None
        return
    taken, module.post_processor = module.post_processor, None
    try:
        yield taken
    finally:
        module.post_processor = taken


def appendable(post_processor: PostProcessor | None) -> bool:
    """Whether a :class:`Verdict` says what a post-processor does; else anomalib exports it with the networks."""
    normalizes = type(post_processor) is PostProcessor and post_processor.enable_normalization
    return post_processor is None or normalizes or isinstance(post_processor, STPMPostProcessor)


def verdict_of(post_processor: PostProcessor, model: STPMModel) -> Verdict:
    """What a post-processor does, as numbers."""
    quantile = None
    if isinstance(post_processor, STPMPostProcessor) and post_processor.basis == HELD_OUT:
        quantile = post_processor.quantile

    def scale(kind: str) -> Scale:
        threshold, low, high = (
            float(getattr(post_processor, f"{kind}_{name}")) for name in ("threshold", "min", "max")
        )
        sensitivity = float(getattr(post_processor, f"{kind}_sensitivity"))
        if quantile is not None:  # scores are relative to the threshold
            return Scale(threshold, sensitivity=sensitivity)
        return Scale((low + high) / 2 if math.isnan(threshold) else threshold, low, high, sensitivity)

    return Verdict(
        basis=getattr(post_processor, "basis", VALIDATION),
        image=scale("image"),
        pixel=scale("pixel"),
        normalize=post_processor.enable_normalization,
        label=post_processor.enable_thresholding,
        held_out_scores=tuple(getattr(post_processor, "held_out_scores", ())),
        held_out_maxima=tuple(getattr(post_processor, "held_out_maxima", ())),
        score_area=model.score_area,
        stride=model.teacher.strides[0],
        stands_out=True,
        counted=1.0 if model.ignored is None else float(model.ignored.share),
        quantile=quantile,
    )


def name_levels(model: ov.Model, network: STPMModel) -> None:
    """Name the levels' distances in a graph that takes images of any size, so that large ones are scored in windows.

    Args:
        model: It is changed, unless the network cannot take an image in windows.
        network: The network that was exported.
    """
    seen = network.reaches
    if seen is None or network.usual_places is not None:
        return
    model.set_rt_info(json.dumps(seen), [SECTION, REACHES])
    if model.input(0).partial_shape[2].is_static:
        return  # images of one size are never cut
    resizes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Interpolate"]
    side = 8 * seen[-1].stride
    fixed = model.clone()
    fixed.reshape([1, 3, side, side])
    heights = [
        node.input(0).get_partial_shape()[2].get_length()
        for node in fixed.get_ordered_ops()
        if node.get_type_name() == "Interpolate"
    ]
    for node, height in zip(resizes, heights, strict=True):
        index = [reach.stride for reach in seen].index(side // height)
        node.input_value(0).set_names({f"{RAW_LEVEL}{index}"})


def resized_to(pre_processor: nn.Module | None) -> tuple[int, int] | None:
    """Height and width to which an exported graph resizes images before anything else; ``None`` if it does not."""
    first = getattr(pre_processor, "export_transform", None)
    while isinstance(first, nn.Sequential):
        first = first[0]
    return first.size if isinstance(first, AntialiasedResize) else None
