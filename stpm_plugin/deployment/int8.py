"""INT8 for OpenVINO, accurate enough for a student and a teacher that differ by hundredths.

Plain post-training quantisation also rounds the distance head, where a hundredth decides, and calibrates on
validation images, which for MVTec AD are the test images. Here only the two backbones are quantised, on normal
training images, and thresholds are recomputed from the scores of the quantised model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, Batch
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from torchvision.tv_tensors import Mask

from ..errors import STPMError
from ..training.data import check_normal, images_of, read
from ..training.data_record import DataRecord, identify, paths_of
from ..training.thresholds import HELD_OUT, VALIDATION, STPMPostProcessor, calibrate, of_held_out

CALIBRATION_IMAGES = 300  # NNCF's own default
CONVOLUTIONS = {"Convolution", "GroupConvolution"}
FLOAT_REDUCTION = 4  # input pixels per position, along a side, up to which nothing is rounded
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would compute in bfloat16


def round_model(
    source: Path,
    datamodule: AnomalibDataModule,
    record: DataRecord | None,
    size: tuple[int, int] | None,
    post_processor: PostProcessor | None,
    max_drop: float | None = None,
) -> tuple[ov.Model, PostProcessor | None]:
    """Quantise an exported model and set its thresholds again.

    Args:
        source: OpenVINO file of the model without its post-processor.
        datamodule: Holds the images that trained the model, and the validation set.
        record: Which images trained the model and which were held out; ``None`` where that is unknown.
        size: Height and width to which images are resized first, pixels; ``None`` leaves them as they are.
        post_processor: The float model's; ``None`` for raw scores.
        max_drop: As in :func:`quantize`.

    Returns:
        The rounded model of raw scores, and a copy of the post-processor with the rounded model's thresholds.

    Raises:
        STPMError: The data are not the model's, or an image is anomalous or cannot be read.
    """
    loader = normal_images(datamodule)
    trained, held_out = indices_of(loader.dataset, record)
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(record.seed if record else 0)).tolist()
    calibration = [trained[index] for index in order[:CALIBRATION_IMAGES]]
    parts = (calibration, [] if max_drop is None else held_out)
    images, held = (
        [images_of(b).numpy() for b in fitted(read(loader, chosen, 1, plain=True), size)] for chosen in parts
    )
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the caller removes the folder, and Windows keeps mapped files
    exact = core.read_model(source)
    model = quantize(exact, images, held, max_drop)
    if post_processor is not None:
        validation = datamodule.val_dataloader() if hasattr(datamodule, "val_data") else []
        batches = (fitted(read(loader, held_out, 1, plain=True), size), fitted(validation, size))
        post_processor = with_thresholds(post_processor, model, exact, *batches)
    return model, post_processor


def normal_images(datamodule: AnomalibDataModule) -> DataLoader:
    """The loader of a datamodule's training images.

    Raises:
        STPMError: One of them is labelled anomalous.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    check_normal(loader.dataset)
    return cast("DataLoader", loader)


def require_held_out(record: DataRecord | None) -> None:
    """Refuse to continue without held-out images.

    Raises:
        STPMError: There are none.
    """
    if record is None or not record.identified or not record.held_out:
        msg = (
            "INT8_ACQ and normal_quantile need images that were held out from training, but this model records none: "
            "train it with holdout above 0, or use INT8_PTQ with a validation set."
        )
        raise STPMError(msg)


def fitted(batches: Iterable[Batch], size: tuple[int, int] | None) -> Iterator[Batch]:
    """Resize the images of batches (B, 3, H, W) to a height and width, as training does; not at all for ``None``."""
    for batch in batches:
        yield batch.update(image=resize(batch.image, list(size), antialias=True) if size else batch.image)


def indices_of(dataset: Any, record: DataRecord | None) -> tuple[list[int], list[int]]:
    """Find the images that trained a model, and those that were held out, by their content.

    Args:
        dataset: Normal images of a datamodule.
        record: Of the model's training; ``None`` where it is unknown: all count as training images then.

    Returns:
        Indices of both in the data set. Images that the model has not seen are in neither.

    Raises:
        STPMError: None of the images trained the model, or none of those that were held out is here.
    """
    if record is None or not record.identified:
        rank_zero_warn(
            "STPM: this model does not record which images trained it: INT8 is calibrated on all images, and none "
            "counts as held out."
        )
        return list(range(len(dataset))), []
    _, _, digests = identify(paths_of(dataset))
    trained = [index for index, digest in enumerate(digests) if digest in record.trained_digests]
    held_out = [index for index, digest in enumerate(digests) if digest in record.held_out_digests]
    if not trained or (record.held_out and not held_out):
        msg = (
            f"this is not the model's training data: the {len(digests)} good images contain {len(trained)} of the "
            f"{len(record.trained_digests)} that trained it and {len(held_out)} of its {len(record.held_out)} held-out "
            "ones. Pass its training data (--good of `stpm export`, --data of `anomalib export`)."
        )
        raise STPMError(msg)
    missing = len(record.trained_digests) - len({digests[index] for index in trained})
    missing += len(record.held_out_digests) - len({digests[index] for index in held_out})
    if missing:
        rank_zero_warn(
            f"STPM: {missing} images of the model's training data are missing; INT8 is calibrated on the others."
        )
    return trained, held_out


def quantize(
    model: ov.Model, images: Sequence[np.ndarray], holdout: Sequence[np.ndarray] = (), max_drop: float | None = None
) -> ov.Model:
    """Quantise the two backbones of a model to INT8.

    Args:
        model: From images (B, 3, H, W) in [0, 1] to image scores and anomaly maps, without normalisation.
        images: Normal training images (1, 3, H, W), float32 in [0, 1].
        holdout: Other normal images, on which ``max_drop`` is checked.
        max_drop: Operations return to float, the most harmful first, until the logarithms of the quantised and the
            float model's anomaly maps correlate by at least 1 - ``max_drop``; ``None`` quantises all.

    Returns:
        A new model with the same inputs and outputs.
    """
    import nncf

    options = {
        "subset_size": len(images),
        "preset": nncf.QuantizationPreset.MIXED,  # activations before a ReLU have two signs
        "fast_bias_correction": False,  # layer by layer, on the outputs of the rounded layers before
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
    """Name the operations that stay in float: input, head, and features at a quarter of the image's size or finer.

    Rounding errors of the first operations run through the whole network, and the finest level's distances come
    straight from them; they are a third of a ResNet-18's work. A network whose convolutions reduce no further (Swin,
    which merges patches without any, or ``layer1`` alone) is quantised whole.
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


def with_thresholds(
    post_processor: PostProcessor,
    model: ov.Model,
    exact: ov.Model,
    held_out: Iterable[Batch],
    validation: Iterable[Batch],
) -> PostProcessor:
    """A copy of a post-processor with thresholds and normalisation for a rounded model.

    They stay on their basis. Held-out images set them again. An image threshold from the validation set becomes the
    one that repeats the float model's labels; if the data have no validation set with defects, the float model's
    thresholds stay, whose scores INT8's are near (`docs/int8.md`).

    Args:
        post_processor: The float model's.
        model: From images to raw scores and maps, rounded.
        exact: The float model.
        held_out: Batches of good images (B, 3, H, W) in [0, 1] that did not train the model.
        validation: Batches of the validation set, likewise, with labels, and masks where there are any.
    """
    made, basis = copy.deepcopy(post_processor), getattr(post_processor, "basis", VALIDATION)
    rounded, reference = (ov.compile_model(one, "CPU", FLOAT32) for one in (model, exact))
    scores, float_scores = [torch.empty(0)], [torch.empty(0)]

    def compared() -> Iterator[Batch]:
        for batch in validation:
            float_scores.append(torch.from_numpy(reference(images_of(batch).numpy())["pred_score"].copy()).reshape(-1))
            for judged in scored(rounded, [batch]):
                scores.append(cast("Tensor", judged.pred_score))
                yield judged

    calibrate(made, of_held_out(scored(rounded, held_out)), () if basis == HELD_OUT else compared())
    if not isinstance(made, STPMPostProcessor):
        return made
    if basis == VALIDATION and made.basis != VALIDATION:
        rank_zero_info("STPM: the data have no validation set with defects: INT8 keeps the float model's thresholds.")
        kept = copy.deepcopy(cast("STPMPostProcessor", post_processor))
        kept.held_out_scores, kept.held_out_maxima = made.held_out_scores, made.held_out_maxima
        return kept
    threshold = post_processor.image_threshold
    if made.basis == VALIDATION and len(scores) > 1 and not threshold.isnan():
        made.set_image_threshold(same_labels(torch.cat(float_scores), threshold, torch.cat(scores)))
    return made


def scored(model: ov.CompiledModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Add a model's raw image scores (B,) and maps (B, 1, H, W) to batches, whose masks are resized to the maps."""
    for batch in batches:
        made = model(images_of(batch).numpy())
        score, anomaly_map = (torch.from_numpy(made[name].copy()) for name in ("pred_score", "anomaly_map"))
        if batch.gt_mask is not None:
            size = list(anomaly_map.shape[-2:])
            batch.update(gt_mask=resize(Mask(batch.gt_mask), size, InterpolationMode.NEAREST))
        yield batch.update(pred_score=score.reshape(-1), anomaly_map=anomaly_map)


def same_labels(float_scores: Tensor, threshold: Tensor, scores: Tensor) -> Tensor:
    """Find the threshold of scores (N,) that repeats the most labels of float scores (N,) at their threshold.

    Of equally good ones, it is the nearest to the float threshold times the median ratio of the scores.
    """
    near = threshold * (scores / float_scores.clamp(min=torch.finfo(torch.float32).tiny)).median()
    ordered = scores.sort().values
    tried = torch.cat([near[None], (ordered[1:] + ordered[:-1]) / 2])
    wrong = ((scores > tried[:, None]) != (float_scores > threshold)).sum(1)
    best = tried[wrong == wrong.min()]
    return best[(best - near).abs().argmin()]
