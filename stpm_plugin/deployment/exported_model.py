"""Read and write an exported model: its graph, its files, their hash, and the information stored with the graph."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import openvino as ov

from ..errors import STPMError
from ..model.windows import Reach
from ..training.data_record import DataRecord, packed, unpacked
from .verdict import RAW_MAP, RAW_SCORE, SECTION, Verdict

MODEL_INFO = {"model_type": "AnomalyDetection", "task": "segmentation"}  # what OpenVINO Model API reads
TRAINED, HELD_OUT, SET_BY = "trained", "held_out", "set_by"  # names of the images' digests, stored with the graph
REACHES = "reaches"  # how far each level sees, of a graph that takes images of any size
KEPT = ("size", TRAINED, HELD_OUT, SET_BY, REACHES)  # what another verdict does not change
COMPANIONS = (".bin", ".onnx.data", ".data")  # files next to a model that hold its weights


def files_of(model: Path) -> list[Path]:
    """A model's file and the files next to it that hold its weights."""
    beside = [model.with_suffix(suffix) for suffix in COMPANIONS] + [model.with_name(model.name + ".data")]
    return [model, *dict.fromkeys(file for file in beside if file.is_file() and file != model)]


def digest(files: Iterable[Path]) -> str:
    """Hash of files' contents, 16 hexadecimal digits.

    Raises:
        STPMError: A file is missing.
    """
    made = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    made.update(block)
        except OSError as error:
            msg = f"{file} cannot be read: {error.strerror}."
            raise STPMError(msg) from None
    return made.hexdigest()


def size_of(network: ov.Model) -> tuple[int, int] | None:
    """Height and width of a graph's images, or those to which it resizes images first; ``None`` for any."""
    shape = network.input(0).partial_shape
    if shape[2].is_static and shape[3].is_static:
        return shape[2].get_length(), shape[3].get_length()
    if network.has_rt_info([SECTION, "size"]):
        height, width = json.loads(network.get_rt_info([SECTION, "size"]).astype(str))
        return height, width
    return None


def resizes_again(network: ov.Model) -> bool:
    """Whether a graph of one size resizes its images to another one, so that others would be resized twice."""
    return network.has_rt_info([SECTION, "size"]) and list(size_of(network) or ()) != json.loads(
        network.get_rt_info([SECTION, "size"]).astype(str)
    )


def reaches_of(network: ov.Model) -> list[Reach] | None:
    """How far each level sees, of a graph that takes images of any size; ``None`` for other graphs."""
    if not network.has_rt_info([SECTION, REACHES]):
        return None
    return [Reach(*numbers) for numbers in json.loads(network.get_rt_info([SECTION, REACHES]).astype(str))]


def tensor_of(network: ov.Model, name: str) -> ov.Output:
    """Find a tensor by its name."""
    return next(output for node in network.get_ops() for output in node.outputs() if name in output.get_names())


def read_model(core: ov.Core, path: Path, batch: int | None = None) -> ov.Model:
    """Read an exported model, and check that it takes requests of ``batch`` images.

    Raises:
        STPMError: The file is missing, or no such model.
    """
    if not path.is_file():
        msg = f"the model {path} does not exist: pass the .xml file that `stpm export` or `anomalib export` wrote."
        raise STPMError(msg)
    if path.suffix not in (".xml", ".onnx"):
        msg = f"{path} is not an exported model: pass the .xml file that `stpm export` or `anomalib export` wrote."
        raise STPMError(msg)
    try:
        network = core.read_model(path)
        names = {name for output in network.outputs for name in output.get_names()}
        shape = network.input(0).partial_shape
    except RuntimeError as error:
        msg = f"the model {path} cannot be read ({last_line(error)}): export it again with `anomalib export`."
        raise STPMError(msg) from None
    if "pred_score" not in names or len(shape) != 4:
        msg = f"the model {path} has no output pred_score: pass one that `anomalib export` wrote."
        raise STPMError(msg)
    if batch is not None and shape[0].is_static and shape[0].get_length() != batch:
        msg = f"the model {path} takes batches of {shape[0].get_length()}: pass --batch {shape[0].get_length()}."
        raise STPMError(msg)
    return network


def last_line(error: Exception) -> str:
    """Return the last line of an OpenVINO error: the message, below the source locations."""
    return str(error).strip().splitlines()[-1].strip()


def describe(model: ov.Model, size: tuple[int, int] | None, record: DataRecord | None) -> None:
    """Store in a model what OpenVINO Model API, the scorer and the report need.

    Args:
        model: It is changed.
        size: Height and width to which its graph resizes images first; ``None`` if it does not.
        record: The images that trained it and that were held out, if they are known.
    """
    for name, value in MODEL_INFO.items():
        model.set_rt_info(value, ["model_info", name])
    if size is not None:
        model.set_rt_info(json.dumps(size), [SECTION, "size"])
    if record is not None and record.identified:
        model.set_rt_info(packed(record.trained_digests), [SECTION, TRAINED])
        model.set_rt_info(packed(record.held_out_digests), [SECTION, HELD_OUT])


def images_of(model: ov.Model, part: str) -> frozenset[str]:
    """Shortened digests of images that a model knows; empty if unknown.

    Args:
        model: An exported model.
        part: :data:`TRAINED`, :data:`HELD_OUT`, or :data:`SET_BY` for those that set the thresholds after the export.
    """
    if not model.has_rt_info([SECTION, part]):
        return frozenset()
    return unpacked(model.get_rt_info([SECTION, part]).astype(str))


def rejudged(model: ov.Model, verdict: Verdict, set_by: Collection[str] = ()) -> ov.Model:
    """The same networks with another verdict.

    Args:
        model: An exported model.
        verdict: The other verdict.
        set_by: Digests of the images that set its thresholds; by default those that the model holds.
    """
    said = {name: model.get_rt_info([SECTION, name]).astype(str) for name in KEPT if model.has_rt_info([SECTION, name])}
    if set_by:
        said[SET_BY] = packed(set_by)
    made = verdict.append_to(model, tensor_of(model, RAW_SCORE), tensor_of(model, RAW_MAP))
    describe(made, None, None)
    for name, text in said.items():
        made.set_rt_info(text, [SECTION, name])
    return made


def write(model: ov.Model, target: Path) -> None:
    """Write a model to temporary files, then move them, so that a full disk or Ctrl-C leaves the old model whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        ov.save_model(model, made, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            made.with_suffix(suffix).replace(target.with_suffix(suffix))
