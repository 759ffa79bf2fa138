"""INT8 for OpenVINO that keeps the accuracy of a student and a teacher who differ by hundredths.

Plain post-training quantisation also rounds the distance head, where a hundredth decides, and calibrates on
validation images, which for MVTec AD are the test images. Here the two backbones alone are quantised, on normal
training images, and thresholds are set anew from the scores that the rounded networks give.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.post_processing import PostProcessor
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from torchvision.tv_tensors import Mask

from .thresholds import from_normal_images
from .training_data import check_normal, images_of, read, split

CALIBRATION_IMAGES = 300  # NNCF's own default
CONVOLUTIONS = {"Convolution", "GroupConvolution"}
FLOAT_REDUCTION = 4  # input pixels per position, along a side, up to which nothing is rounded
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would compute in bfloat16
MODEL_INFO = {"model_type": "AnomalyDetection", "task": "segmentation"}  # what OpenVINO Model API reads


class OpenVINOExport(Callback):
    """Ends a training with an OpenVINO model of the chosen weights, below the run's folder in ``weights/openvino``.

    Args:
        compression_type: ``FP16``, ``INT8_PTQ`` or another of anomalib's; nothing for float32.
        input_size: Height and width of the images, pixels; nothing for any.
        export_root: Another folder than the run's.
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


def export_int8(
    source: Path,
    target: Path,
    datamodule: AnomalibDataModule,
    holdout: float,
    seed: int,
    size: tuple[int, int] | None,
    post_processor: PostProcessor | None,
    max_drop: float | None = None,
) -> None:
    """Quantise an exported model and set its thresholds anew.

    Args:
        source: OpenVINO file of the model without its post-processor.
        target: Where the quantised model goes, post-processor included.
        datamodule: Where normal training images and the validation set come from.
        holdout: Share of the training images that training held out.
        seed: Seed of that hold-out.
        size: Height and width to which images are resized first, pixels; nothing leaves them as they are.
        post_processor: It stays as it is; nothing for raw scores.
        max_drop: As in :func:`quantize`.

    Raises:
        STPMError: A training image is anomalous or cannot be read.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = type(datamodule).train_dataloader(datamodule)  # the datamodule's own, also while STPM trains
    check_normal(loader.dataset)
    parts = split(len(loader.dataset), holdout, seed)

    def fitting(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch.update(image=resize(batch.image, list(size), antialias=True) if size else batch.image)

    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = [parts.train[place] for place in order[:CALIBRATION_IMAGES]]
    places = (calibration, [] if max_drop is None else parts.holdout)
    images, held = ([images_of(b).numpy() for b in fitting(read(loader, chosen, 1))] for chosen in places)
    exact = ov.Core().read_model(source)
    model = quantize(exact, images, held, max_drop)
    if post_processor is not None:
        post_processor = copy.deepcopy(post_processor)
        if from_normal_images(post_processor):
            set_thresholds(post_processor, model, exact, fitting(read(loader, parts.holdout, 1)))
        elif hasattr(datamodule, "val_data"):
            set_thresholds(post_processor, model, exact, fitting(datamodule.val_dataloader()))
        else:
            rank_zero_warn("STPM: without a validation set the INT8 model keeps the thresholds of the float one.")
        model = post_process(model, post_processor)
    target.parent.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, target, compress_to_fp16=False)


def describe(path: Path) -> None:
    """Write into an exported ``.xml`` what OpenVINO Model API reads to know an ``AnomalyDetection``."""
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights' file is written anew
    model = core.read_model(path)
    for name, value in MODEL_INFO.items():
        model.set_rt_info(value, ["model_info", name])
    ov.save_model(model, path, compress_to_fp16=False)


def quantize(
    model: ov.Model, images: Sequence[np.ndarray], holdout: Sequence[np.ndarray] = (), max_drop: float | None = None
) -> ov.Model:
    """Quantise the two backbones of a model to INT8.

    Args:
        model: From images (B, 3, H, W) in [0, 1] to image scores and anomaly maps, without normalisation.
        images: Normal training images (1, 3, H, W), float32 in [0, 1].
        holdout: Other normal images, with which ``max_drop`` is held.
        max_drop: Operations go back to float, those that harm most first, until the correlation of the logarithms of
            the rounded and the float model's anomaly maps is at least 1 - ``max_drop``; nothing rounds all.

    Returns:
        A new model with the same inputs and outputs.
    """
    import nncf

    options = {
        "subset_size": len(images),
        "preset": nncf.QuantizationPreset.MIXED,  # activations before a ReLU have two signs
        "fast_bias_correction": False,  # layer by layer, on what the rounded layers before it give
        "ignored_scope": nncf.IgnoredScope(names=outside_the_backbones(model)),
    }
    if max_drop is None:
        return nncf.quantize(model, nncf.Dataset(images), **options)
    float_maps = _log_maps(ov.compile_model(model, "CPU", FLOAT32), holdout)

    def agreement(compiled: ov.CompiledModel, batches: Iterable[np.ndarray]) -> tuple[float, None]:
        return float(np.corrcoef(float_maps, _log_maps(compiled, batches))[0, 1]), None

    data = nncf.Dataset(images), nncf.Dataset(holdout)
    return nncf.quantize_with_accuracy_control(model, *data, agreement, max_drop=max_drop, **options)


def _log_maps(compiled: ov.CompiledModel, images: Iterable[np.ndarray]) -> np.ndarray:
    """Logarithms of all images' anomaly maps, flat."""
    maps = [compiled(image)["anomaly_map"].ravel() for image in images]
    return np.log(np.concatenate(maps) + np.finfo(np.float32).tiny)


def outside_the_backbones(model: ov.Model) -> list[str]:
    """Name the operations that stay in float: input, head, and what is not finer than a quarter of the image.

    What those first operations round runs through the whole network, and the finest level's distances come right from
    them; they are a third of a ResNet-18's work. A network whose convolutions reduce no further (Swin, which merges
    patches without any, or ``layer1`` alone) is rounded whole.
    """
    operations = model.get_ordered_ops()
    reduction: dict[str, int] = {}  # input pixels per position, of what comes from a convolution
    for node in operations:
        sources = [reduction.get(value.get_node().get_friendly_name(), 0) for value in node.input_values()]
        strides = node.get_attributes().get("strides", [1])
        reduction[node.get_friendly_name()] = max([*sources, int(node.get_type_name() in CONVOLUTIONS)]) * strides[0]
    feeding: set[str] = set()
    for node in reversed(operations):
        targets = [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
        if any(t.get_type_name() in CONVOLUTIONS or t.get_friendly_name() in feeding for t in targets):
            feeding.add(node.get_friendly_name())
    convolutions = {node.get_friendly_name() for node in operations if node.get_type_name() in CONVOLUTIONS}
    finest = FLOAT_REDUCTION if max(reduction.values()) > FLOAT_REDUCTION else 0
    return [name for name in reduction if reduction[name] <= finest or name not in feeding | convolutions]


class Scores(nn.Module):
    """A post-processor as a network from raw scores (B,) and maps (B, 1, H, W) to what is given out."""

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, pred_score: Tensor, anomaly_map: Tensor) -> dict[str, Tensor]:
        """Normalise and threshold."""
        made = self.post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map))
        return {name: value for name, value in made._asdict().items() if value is not None}


def post_process(model: ov.Model, post_processor: PostProcessor) -> ov.Model:
    """Append normalisation and thresholds to a model of raw scores and maps."""
    example = (torch.rand(2), torch.rand(2, 1, 8, 8))
    names = [*Scores(post_processor)(*example)]
    dynamic = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder:  # by ONNX, which computes thresholds' conditions once and for all
        path = Path(folder, "scores.onnx")
        shapes = ({0: dynamic}, {0: dynamic, 2: dynamic, 3: dynamic})
        torch.onnx.export(
            Scores(post_processor).eval(), example, path, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        tail = ov.convert_model(path)
    for parameter, name in zip(tail.get_parameters(), ("pred_score", "anomaly_map"), strict=True):
        raw = model.output(name).get_node().input_value(0)
        raw.set_names({f"raw_{name}"})  # a name is that of one tensor
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(raw)
    whole = ov.Model(tail.get_results(), model.get_parameters(), model.get_friendly_name())
    for output, name in zip(whole.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    return whole


def set_thresholds(post_processor: PostProcessor, model: ov.Model, exact: ov.Model, batches: Iterable[Batch]) -> None:
    """Set a post-processor's thresholds and normalisation anew, from what a rounded model gives.

    An image threshold that labels have set becomes the one that repeats the float model's labels; one from normal
    images is their quantile, as it was.

    Args:
        post_processor: The float model's; it is changed.
        model: From images to raw scores and maps, rounded.
        exact: The float model.
        batches: Held-out normal images, if the post-processor has a ``normal_quantile``; else the validation set:
            images (B, 3, H, W) in [0, 1], labels, and masks where there are any.
    """
    nobody: Any = None  # neither trainer nor model is looked at
    threshold = post_processor.image_threshold.clone()
    adaptive = not from_normal_images(post_processor)
    rounded, reference = (ov.compile_model(one, "CPU", FLOAT32) for one in (model, exact))
    scores, float_scores = [], []
    for batch in batches:
        images = images_of(batch).numpy()
        made = rounded(images)
        score, anomaly_map = (torch.from_numpy(made[name].copy()) for name in ("pred_score", "anomaly_map"))
        scores.append(score.reshape(-1))
        if adaptive:
            float_scores.append(torch.from_numpy(reference(images)["pred_score"].copy()).reshape(-1))
        if batch.gt_mask is not None:
            size = list(anomaly_map.shape[-2:])
            batch.update(gt_mask=resize(Mask(batch.gt_mask), size, InterpolationMode.NEAREST))
        batch.update(pred_score=scores[-1], anomaly_map=anomaly_map)
        post_processor.on_validation_batch_end(nobody, nobody, batch)
    post_processor.on_validation_epoch_end(nobody, nobody)
    if from_normal_images(post_processor):
        post_processor.calibrate(torch.cat(scores))
    elif not threshold.isnan():
        post_processor._image_threshold.copy_(same_labels(torch.cat(float_scores), threshold, torch.cat(scores)))


def same_labels(float_scores: Tensor, threshold: Tensor, scores: Tensor) -> Tensor:
    """Find the threshold of scores (N,) that repeats most of the labels that float scores (N,) have at theirs.

    Of several that do, it is the one nearest to the float threshold times the median ratio of the scores.
    """
    near = threshold * (scores / float_scores.clamp(min=torch.finfo(torch.float32).tiny)).median()
    ordered = scores.sort().values
    tried = torch.cat([near[None], (ordered[1:] + ordered[:-1]) / 2])
    wrong = ((scores > tried[:, None]) != (float_scores > threshold)).sum(1)
    best = tried[wrong == wrong.min()]
    return best[(best - near).abs().argmin()]
