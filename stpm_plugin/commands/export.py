"""`stpm export`: from a checkpoint to an OpenVINO model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..deployment.images import images_below
from ..errors import STPMError
from .running import logged
from .terminal import Quiet, with_warnings

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule

# In a run's folder, where anomalib puts them.
CHECKPOINT, EXPORTED, CONFIG = (
    Path(name) for name in ("weights/lightning/model.ckpt", "weights/openvino/model.xml", "config.yaml")
)
Compression = Literal["none", "fp16", "int8", "int8_acq"]


@dataclass
class Export:
    """Export a trained model to OpenVINO.

    Args:
        source: Folder of a run, or its .ckpt file.
        compression: int8 quantises the networks with the good images that trained them; int8_acq returns to float where
            the maps of held-out images change too much; fp16 only halves the file.
        int8: The same as --compression int8.
        good: Folder of the good images that trained the model, for int8; by default the folder that the run names.
        input_size: Height and width of the images, as "[256,256]", for a graph of that size only; by default any size.
        max_drop: For int8_acq: how far the maps may change (docs/int8.md); by default 0.01.
        out: Folder to write to; by default the run's.
    """

    source: Path
    compression: Compression = "none"
    int8: bool = False
    good: Path | None = None
    input_size: tuple[int, int] | None = None
    max_drop: float | None = None
    out: Path | None = None

    def run(self) -> int:
        """Export; returns 0."""
        if self.int8 and self.compression not in ("none", "int8"):
            msg = f"--int8 and --compression {self.compression} contradict each other: pass only one."
            raise STPMError(msg)
        compression = "int8" if self.int8 else self.compression
        if self.good is not None and not compression.startswith("int8"):
            msg = "--good is only for --compression int8 or int8_acq (--int8): add one of them, or omit --good."
            raise STPMError(msg)
        if self.max_drop is not None and compression != "int8_acq":
            msg = "--max-drop is only for --compression int8_acq: add it, or omit --max-drop."
            raise STPMError(msg)
        checkpoint = checkpoint_of(self.source)
        run = checkpoint.parents[2] if checkpoint.parts[-3:] == CHECKPOINT.parts else None
        root = self.out or run or checkpoint.parent
        images = self.images(run) if compression.startswith("int8") else None

        def work(terminal: Quiet) -> Path:
            from anomalib.deploy import CompressionType
            from anomalib.loggers import configure_logger

            from .verify import load

            configure_logger()
            types = {"fp16": "FP16", "int8": "INT8_PTQ", "int8_acq": "INT8_ACQ"}
            options: dict[str, Any] = {} if self.max_drop is None else {"max_drop": self.max_drop}
            if compression in types:
                options["compression_type"] = CompressionType[types[compression]]
            if images is not None:
                terminal.say("quantising with the good images that trained the model, for a minute or more ...")
                options["datamodule"] = datamodule_of(images)
            with with_warnings(terminal):
                return load(str(checkpoint)).to_openvino(root, input_size=self.input_size, **options)

        made = logged(root / "export.log", "the export", work)
        print(f"exported: {made} ({(made.stat().st_size + made.with_suffix('.bin').stat().st_size) / 2**20:.1f} MiB)")
        return 0

    def images(self, run: Path | None) -> Path | dict[str, Any]:
        """The good images for INT8: a folder of them, or the data's settings in the run's folder.

        Raises:
            STPMError: There is neither.
        """
        if self.good is not None:
            if not images_below(self.good):
                msg = f"--good {self.good} contains no images: pass the folder of good images that trained the model."
                raise STPMError(msg)
            return self.good
        saved = run / CONFIG if run is not None else None
        if saved is None or not saved.is_file():
            msg = f"{self.source} does not record which good images trained it: pass their folder with --good."
            raise STPMError(msg)
        return yaml.safe_load(saved.read_text(encoding="utf-8"))["data"]


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that was meant by a run's folder or a file.

    Raises:
        STPMError: There is none.
    """
    if source.is_dir():
        found = source / CHECKPOINT
        if not found.is_file():
            msg = f"{source} contains no {CHECKPOINT}: pass the folder of a run, such as results/STPM/NAME/latest."
            raise STPMError(msg)
        return found
    if not source.is_file():
        msg = f"{source} does not exist: pass the folder of a run or its .ckpt file."
        raise STPMError(msg)
    if source.suffix != ".ckpt":
        msg = f"{source} is not a checkpoint: pass the .ckpt file of a trained STPM or the folder of its run."
        raise STPMError(msg)
    return source


def datamodule_of(images: Path | dict[str, Any]) -> AnomalibDataModule:
    """A datamodule of a folder of good images, or of settings that a run saved."""
    from anomalib.data import AnomalibDataModule, Folder
    from jsonargparse import ArgumentParser

    if isinstance(images, Path):
        good = images.absolute()
        return Folder(
            good.name,
            root=good.parent,
            normal_dir=good.name,
            test_split_mode="none",
            val_split_mode="none",
            num_workers=0,
        )
    parser = ArgumentParser(exit_on_error=False)  # anomalib's get_datamodule makes no lists of the settings' lists
    parser.add_argument("--data", type=AnomalibDataModule)
    return parser.instantiate_classes(parser.parse_object({"data": images})).data
