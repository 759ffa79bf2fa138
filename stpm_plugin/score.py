"""Score folders of images with an exported model: OpenVINO, OpenCV and NumPy, no torch and no anomalib.

    python -m stpm_plugin.score model.xml FOLDER --csv scores.csv --heatmaps maps

One CSV row an image, in the order of the paths: path, score in [0, 1] (0.5 is the threshold), label, latency in
milliseconds. A CSV that is half done is gone on with. Images that cannot be read are named and skipped, and the exit
code is then 2.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import openvino as ov
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

from .errors import STPMError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
COLUMNS = ("path", "score", "label", "latency_ms")
Row = tuple[str, float, str, float]
DECODERS = min(4, os.cpu_count() or 1)  # threads: decoding a megapixel takes as long as scoring it
AHEAD = 4 * DECODERS  # decoded images that may wait
UNREADABLE = "cannot be read as an image, or not as training reads it: convert it to a plain PNG of 8 bits a channel"
TIFF = (b"II*\0", b"MM\0*")  # first bytes
AS_STORED = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


class Scored(NamedTuple):
    """What a model says of an image.

    Attributes:
        path: The image's file.
        score: Image score, in [0, 1] if the model normalises; 0.5 is then the threshold.
        label: ``normal`` or ``anomalous``; empty if the model sets no threshold.
        latency: The model's time for the whole batch, seconds.
        image: The image (H, W, 3), BGR, uint8, where maps are wanted.
        anomaly_map: Its anomaly map (h, w), where maps are wanted.
    """

    path: str
    score: float
    label: str
    latency: float
    image: np.ndarray | None = None
    anomaly_map: np.ndarray | None = None


class Scorer:
    """A compiled model that works on several images at a time.

    Args:
        model: An ``.xml`` or ``.onnx`` file that anomalib exported.
        device: OpenVINO's name of a device, such as ``CPU``, ``GPU`` or ``AUTO``.
        hint: ``latency`` or ``throughput``.
        batch: Images in a request, if they are of one size.
        precision: What the device computes in, such as ``f32``; nothing for its own choice.

    Raises:
        STPMError: The file is no such model, the device does not exist, or the model's batch is fixed.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "CPU",
        hint: str = "throughput",
        batch: int = 1,
        precision: str | None = None,
    ) -> None:
        core, path = ov.Core(), Path(model)
        if not path.is_file():
            msg = f"the model {path} does not exist: give the .xml file that `anomalib export` wrote."
            raise STPMError(msg)
        options = {"PERFORMANCE_HINT": hint.upper()} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        try:
            network = core.read_model(path)
            names = {name: output for output in network.outputs for name in output.get_names()}
            shape = network.input(0).partial_shape
        except RuntimeError as error:
            msg = f"the model {path} cannot be read ({_last_line(error)}): export it again with `anomalib export`."
            raise STPMError(msg) from None
        if "pred_score" not in names or len(shape) != 4:
            msg = f"the model {path} has no output pred_score: give one that `anomalib export` wrote."
            raise STPMError(msg)
        if shape[0].is_static and shape[0].get_length() != batch:
            msg = f"the model {path} takes batches of {shape[0].get_length()}: give --batch {shape[0].get_length()}."
            raise STPMError(msg)
        self.batch = batch
        self.labels = "pred_label" in names
        pixels = PrePostProcessor(network)
        pixels.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        pixels.input().tensor().set_color_format(ColorFormat.BGR)
        pixels.input().model().set_layout(ov.Layout("NCHW"))
        steps = (
            pixels.input().preprocess().convert_element_type(ov.Type.f32).convert_color(ColorFormat.RGB).scale(255.0)
        )
        if (
            shape[2].is_static and shape[3].is_static
        ):  # as training resizes, so that scores are those of any-size models
            pixels.input().tensor().set_spatial_dynamic_shape()
            steps.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
        try:
            self.compiled = core.compile_model(pixels.build(), device, options)
        except RuntimeError as error:
            others = ", ".join(core.available_devices)
            msg = f"device {device} cannot run {path} ({_last_line(error)}); there are: {others}."
            raise STPMError(msg) from None
        self.requests = self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def score(self, images: Iterable[tuple[str, np.ndarray]], maps: bool = False) -> Iterator[Scored]:
        """Score images as they come, several at a time.

        Args:
            images: Paths and images (H, W, 3), BGR, uint8, of any size.
            maps: Whether images and anomaly maps are wanted too.

        Yields:
            What the model says, in the order of the images.
        """
        idle = deque(self.compiled.create_infer_request() for _ in range(self.requests))
        busy: deque[tuple[ov.InferRequest, list[str], np.ndarray]] = deque()
        for paths, batch in self._batches(images):
            if not idle:  # the oldest is done first, or nearly so
                oldest = busy.popleft()
                yield from self._answers(*oldest, maps)
                idle.append(oldest[0])
            request = idle.popleft()
            request.start_async({0: batch})
            busy.append((request, paths, batch))
        for asked in busy:
            yield from self._answers(*asked, maps)

    def _answers(self, request: ov.InferRequest, paths: list[str], batch: np.ndarray, maps: bool) -> Iterator[Scored]:
        """Wait for a request and yield what it says of each image of its batch (B, H, W, 3)."""
        request.wait()
        scores = request.get_tensor("pred_score").data.reshape(-1)
        labels = request.get_tensor("pred_label").data.reshape(-1) if self.labels else None
        anomaly_maps = request.get_tensor("anomaly_map").data.copy() if maps else None
        for place, path in enumerate(paths):
            label = "" if labels is None else "anomalous" if labels[place] else "normal"
            shown = (batch[place], anomaly_maps[place, 0]) if anomaly_maps is not None else ()
            yield Scored(path, float(scores[place]), label, request.latency / 1000, *shown)

    def _batches(self, images: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Join neighbours of one size into batches (B, H, W, 3)."""
        paths: list[str] = []
        waiting: list[np.ndarray] = []
        for path, image in images:
            if waiting and (len(waiting) == self.batch or waiting[0].shape != image.shape):
                yield paths, np.stack(waiting)
                paths, waiting = [], []
            paths.append(path)
            waiting.append(image)
        if waiting:
            yield paths, np.stack(waiting)


def find_images(sources: Sequence[str]) -> list[str]:
    """List image files: those given, those below folders given, and those that patterns match.

    Frames are in the order of their numbers: 2 before 10.

    Raises:
        STPMError: A source leads to no image.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files: Iterable[Path] = path.rglob("*")
        elif path.is_file():
            files = [path]
        else:
            files = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
        chosen = [str(file) for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not chosen:
            msg = f"{source} leads to no image ({', '.join(sorted(SUFFIXES))}): give a folder, a file or a pattern."
            raise STPMError(msg)
        found += sorted(chosen, key=_by_number)
    return list(dict.fromkeys(found))


def _by_number(name: str) -> list[str | int]:
    """Order names by the numbers in them."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _last_line(error: Exception) -> str:
    """Return what an error of OpenVINO says in the end, after the places in its source."""
    return str(error).strip().splitlines()[-1].strip()


def read_images(paths: Iterable[str], unreadable: Callable[[str], None]) -> Iterator[tuple[str, np.ndarray]]:
    """Decode images in several threads, a few ahead.

    Args:
        paths: Image files.
        unreadable: Called with the path of a file that is no image.

    Yields:
        Paths and images (H, W, 3), BGR, uint8, as stored: a camera's rotation mark is not applied, as in training.
    """
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[str, Future[np.ndarray | None]] | None] = deque()
        for path in [*paths, *[None] * AHEAD]:
            waiting.append(None if path is None else (path, pool.submit(_decode, path)))
            if len(waiting) > AHEAD and (oldest := waiting.popleft()):
                name, image = oldest
                if (pixels := image.result()) is not None:
                    yield name, pixels
                else:
                    unreadable(name)


def _decode(path: str) -> np.ndarray | None:
    """Read an image (H, W, 3), BGR, uint8, as training does; nothing if the file is none or one that training refuses.

    Of 16-bit colours the upper eight bits count; grey of more than 8 bits is refused, and so is what OpenCV and Pillow
    take for different pictures: a TIFF with transparency, and an animated PNG whose still image is none of its frames.
    """
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, AS_STORED)
    except (OSError, cv2.error):
        return None
    if image is None or (image.dtype, image.ndim) not in [(np.uint8, 2), (np.uint8, 3), (np.uint16, 3)]:
        return None
    whole = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data[:4].tobytes() in TIFF else None
    if whole is not None and whole.shape[2:] == (4,):
        return None
    head = data.tobytes().partition(b"IDAT")[0]
    if b"acTL" in head and b"fcTL" not in head:
        return None
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image if image.dtype == np.uint8 else np.right_shift(image, 8, dtype=np.uint16).astype(np.uint8)


def overlay(image: np.ndarray, anomaly_map: np.ndarray) -> np.ndarray:
    """Lay an anomaly map (h, w) in [0, 1] over its image (H, W, 3), BGR, uint8, as colours from black to yellow."""
    values = cv2.resize(np.clip(anomaly_map, 0, 1) * 255, image.shape[1::-1]).astype(np.uint8)
    return cv2.addWeighted(image, 0.4, cv2.applyColorMap(values, cv2.COLORMAP_INFERNO), 0.6, 0)


def open_csv(path: Path) -> tuple[IO[str], set[str]]:
    """Open a CSV to append to; returns it and the paths that it already has.

    A last row that a crash cut off is taken away.

    Raises:
        STPMError: The file is another CSV.
    """
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as raw:
            content = raw.read()
            raw.truncate(content.rfind(b"\n") + 1)
        with path.open(newline="") as text:
            kept = list(csv.reader(text))
        if kept and tuple(kept[0]) != COLUMNS:
            msg = f"{path} is not a CSV of scores (its first row is not {','.join(COLUMNS)}): give --csv another file."
            raise STPMError(msg)
        if kept:
            return path.open("a", newline=""), {row[0] for row in kept[1:]}
    file = path.open("w", newline="")
    csv.writer(file).writerow(COLUMNS)
    return file, set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after an error, or 2 after unreadable images."""
    parser = argparse.ArgumentParser("python -m stpm_plugin.score", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help=".xml or .onnx file that `anomalib export` wrote")
    parser.add_argument("images", nargs="+", help="folders, files, or quoted patterns such as 'parts/**/*.png'")
    parser.add_argument("--csv", type=Path, default=Path("scores.csv"), help="rows are appended (default %(default)s)")
    parser.add_argument("--heatmaps", type=Path, help="folder for the images with their anomaly maps laid over")
    parser.add_argument("--device", default="CPU", help="CPU, GPU, AUTO ... (default %(default)s)")
    parser.add_argument("--hint", choices=["latency", "throughput"], default="throughput", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images of one size in a request (default %(default)s)")
    parser.add_argument(
        "--precision", choices=["f32", "bf16", "f16"], help="to compute in; by default the device's own"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="score over a Ray cluster: its address, `auto` or `local`")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with {options.csv}.", file=sys.stderr)
        return 130
    except STPMError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:  # one that names no file is of the file that is open
        place = error.filename or options.csv
        print(f"\n{place}: {error.strerror or error}; once that is mended, the same command goes on.", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """Score what is not yet in the CSV."""
    paths = find_images(options.images)
    root = Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))
    settings = (options.model, options.device, options.hint, options.batch, options.precision)
    if options.ray:
        from .cluster import Cluster  # Ray takes a second to import, and few have it

        worker: Cluster | Worker = Cluster(options.ray, settings, options.heatmaps, root)
    else:
        worker = Worker(Scorer(*settings), options.heatmaps, root)
    file, have = open_csv(options.csv)
    broken: list[str] = []
    left = [path for path in paths if path not in have]
    with file:
        rows, progress = csv.writer(file), Progress(len(left))
        for row in worker.rows(left, broken.append):
            rows.writerow([row[0], f"{row[1]:.6g}", row[2], f"{row[3]:.2f}"])
            file.flush()
            progress.step()
    progress.end()
    for path in broken:
        print(f"{path} {UNREADABLE}; it has no row until then.", file=sys.stderr)
    return 2 if broken else 0


class Worker:
    """What one process does: read images, score them, draw their heat maps.

    Args:
        scorer: The model.
        heatmaps: Folder of the overlays; nothing for none.
        root: Folder above all images: an overlay lies below ``heatmaps`` as its image does below this.
    """

    def __init__(self, scorer: Scorer, heatmaps: Path | None, root: Path) -> None:
        cv2.setNumThreads(1)  # the cores are the model's and the decoders'
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV moved it
        set_log_level(0)  # silent: broken files are named in the end
        self.scorer, self.heatmaps, self.root = scorer, heatmaps, root

    def rows(self, paths: Iterable[str], unreadable: Callable[[str], None]) -> Iterator[Row]:
        """Yield a row for each image, in order.

        Args:
            paths: Image files.
            unreadable: Called with the path of a file that is no image.
        """
        for scored in self.scorer.score(read_images(paths, unreadable), self.heatmaps is not None):
            if self.heatmaps and scored.image is not None and scored.anomaly_map is not None:
                target = self.heatmaps / Path(scored.path).absolute().relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                laid = overlay(scored.image, scored.anomaly_map)
                if not cv2.imwrite(str(target.with_name(target.name + ".jpg")), laid):
                    msg = f"{target}.jpg cannot be written: make room, or give --heatmaps another folder."
                    raise STPMError(msg)
            yield scored.path, scored.score, scored.label, 1000 * scored.latency


class Progress:
    """One line on the terminal: images done, images a second, time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started, self.shown = total, 0, time.monotonic(), 0.0

    def step(self) -> None:
        """Count an image."""
        self.done += 1
        if time.monotonic() - self.shown > 0.5:
            self.show()

    def show(self, end: str = "") -> None:
        """Write the line anew."""
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.started, 1e-9)
        left = (self.total - self.done) / rate if self.done else 0.0
        print(f"\r{self.done}/{self.total} images, {rate:.1f} a second, {left:.0f} s left ", end=end, file=sys.stderr)

    def end(self) -> None:
        """Leave the line."""
        self.show("\n")


if __name__ == "__main__":
    sys.exit(main())
