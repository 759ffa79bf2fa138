"""Time of scoring files: `stpm score` beside anomalib's OpenVINOInferencer in a loop, in turns.

    python -m benchmarks.scoring_speed files    --model MODEL.xml --images DIR/screw   # PNG and JPEG, 1 to 12 MP
    python -m benchmarks.scoring_speed start-up --model MODEL.xml --images DIR/screw   # to the first score
    python -m benchmarks.scoring_speed table                                           # from what is kept

Rows are kept in `results/scoring.json`, beside those of other measurements of scores, whose tables are
`results/scoring.md`. Images are test images of a folder in MVTec AD's layout. Each way runs in a process of its own;
one image is scored first, and its time, which has the start in it, is taken off that of all. Models for images at
their own size (`stpm train --recipe native`) are timed in the same way; `--results` keeps their rows apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import openvino as ov

from benchmarks.environment import Row, environment, keep, markdown, parser, rows, spread
from stpm_plugin.deployment.images import decode, images_below

SIDES = {"1 MP": (1024, 24), "4 MP": (2048, 16), "12 MP": (3464, 10)}  # pixels along a side, images
ROUNDS = 3
TIMED = """
import pathlib, resource, sys, tempfile, time
from stpm_plugin.commands.entry import main
model, folder, *options = sys.argv[1:]
files = sorted(str(file) for file in pathlib.Path(folder).iterdir())
def score(images):
    with tempfile.TemporaryDirectory() as place:
        if main(["score", model, *images, "--csv", f"{place}/scores.csv", *options]):
            raise SystemExit(1)
def loop(images):
    for image in images:
        inferencer.predict(image)
if options == ["loop"]:
    from anomalib.deploy import OpenVINOInferencer
    inferencer, score = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": "f32"}), loop
def seconds(images):
    wall, cpu = time.perf_counter(), time.process_time()
    score(images)
    return time.perf_counter() - wall, time.process_time() - cpu
seconds(files[:1])
for several, one in zip(seconds(files), seconds(files[:1])):
    print(1000 * (several - one) / (len(files) - 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
INFER = "import sys; from anomalib.deploy import OpenVINOInferencer as I; I(sys.argv[1]).predict(sys.argv[2])"


def main() -> None:
    """Run one part, then tabulate."""
    options = parser(__doc__, ["files", "start-up", "table"])
    options.add_argument("--model", type=Path, help="exported model")
    options.add_argument("--images", type=Path, help="folder in MVTec AD's layout")
    args = options.parse_args()
    file = args.results / "scoring.json"
    if args.part != "table":
        originals = images_below(args.images.resolve() / "test")
        measured = (files if args.part == "files" else start_up)(str(args.model.resolve()), originals)
        where = environment(f"python -m benchmarks.scoring_speed {args.part}")
        for key, row in measured.items():
            keep(file, key, row | {"openvino": ov.__version__, "opencv": cv2.__version__} | where)
    print(table(rows(file)))


def python(*arguments: str) -> str:
    """Run Python in a folder of its own, with this version of the package; returns what it prints."""
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=True).stdout


def photograph(path: str, side: int) -> np.ndarray:
    """A test image at another size, with a camera's noise of two grey levels, without which it is too smooth."""
    rng = np.random.default_rng(side)
    image = cv2.resize(decode(path), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).round().astype(np.uint8)


def files(model: str, originals: list[str]) -> dict[str, Row]:
    """Milliseconds per image from files to scores, start-up left out, in turns; and of all cores' time."""
    found: dict[str, Row] = {}
    for name, (side, count) in SIDES.items():
        for kind, quality in (("png", []), ("jpg", [cv2.IMWRITE_JPEG_QUALITY, 95])):
            ways = {"score": [], "OpenVINOInferencer in a loop": ["loop"]}
            if kind == "jpg":
                ways["score, reduced decode"] = ["--reduced-decode"]
            with tempfile.TemporaryDirectory() as folder:
                taken = originals[:: max(1, len(originals) // (count + 1))][: count + 1]
                for number, path in enumerate(taken):
                    cv2.imwrite(f"{folder}/{number}.{kind}", photograph(path, side), quality)
                spent: dict[str, list[list[float]]] = defaultdict(list)  # of each round, by the clock and of the cores
                peaks: dict[str, float] = {}
                for _ in range(ROUNDS):
                    for way, options in ways.items():
                        said = python("-c", TIMED, model, folder, *options).split()[-3:]
                        *milliseconds, peaks[way] = (round(float(figure), 1) for figure in said)
                        spent[way].append(milliseconds)
            found[f"files, {name}, {kind}"] = {"milliseconds": spent, "images": len(taken) - 1, "peak_mib": peaks}
    return found


def start_up(model: str, originals: list[str]) -> dict[str, Row]:
    """Seconds from a fresh process to the first score; the first of each only fills the disk's cache."""
    ways = {"score": ["-m", "stpm_plugin.commands", "score"], "OpenVINOInferencer": ["-c", INFER]}
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(ROUNDS + 1):
        for way, arguments in ways.items():
            begin = time.perf_counter()
            python(*arguments, model, originals[0])
            if turn:
                seconds[way].append(round(time.perf_counter() - begin, 2))
    return {"start-up": {"seconds": seconds}}


def table(kept: dict[str, Row]) -> str:
    """Mean and deviation of the rounds, by the clock; of all cores' time."""
    timed = {key.removeprefix("files, "): row["milliseconds"] for key, row in kept.items() if key.startswith("files")}
    ways = sorted({way for row in timed.values() for way in row})
    lines = [["ms an image", *ways]]
    for key, row in timed.items():
        cells = ["; ".join(spread(part, 0) for part in zip(*row.get(way, []), strict=True)) for way in ways]
        lines.append([key, *cells])
    start = kept.get("start-up", {}).get("seconds", {})
    return markdown(lines) + "".join(f"\nFirst score, {way}: {spread(found)} s" for way, found in start.items())


if __name__ == "__main__":
    main()
