"""Time of scoring files: `stpm score` beside anomalib's OpenVINOInferencer in a loop, in turns.

    python -m benchmarks.scoring_speed files    --model MODEL.xml --images DIR/screw   # PNG and JPEG, 1 to 12 MP
    python -m benchmarks.scoring_speed start-up --model MODEL.xml --images DIR/screw   # to the first score
    python -m benchmarks.scoring_speed table                                           # from what is kept

Rows are kept in `results/scoring.json`, beside those of other measurements of scores, whose tables are
`results/scoring.md`. Images are test images of a folder in MVTec AD's layout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov

from benchmarks.environment import environment, keep, markdown, rows, spread
from stpm_plugin.decoding import decode
from stpm_plugin.deployment.images import images_below

HERE = Path(__file__).parent
RESULT = HERE / "results" / "scoring.json"
SIDES = {"1 MP": (1024, 24), "4 MP": (2048, 16), "12 MP": (3464, 10)}  # pixels along a side, images
ROUNDS = 3
SCORE = """
import pathlib, sys, tempfile, time
from stpm_plugin.commands.entry import main
model, folder, *options = sys.argv[1:]
files = sorted(str(file) for file in pathlib.Path(folder).iterdir())
def seconds(images):
    with tempfile.TemporaryDirectory() as place:
        wall, cpu = time.perf_counter(), time.process_time()
        if main(["score", model, *images, "--csv", f"{place}/scores.csv", *options]):
            raise SystemExit(1)
        return time.perf_counter() - wall, time.process_time() - cpu
seconds(files[:1])
for several, one in zip(seconds(files), seconds(files[:1])):
    print((several - one) / (len(files) - 1))
"""
INFER = "import sys; from anomalib.deploy import OpenVINOInferencer as I; I(sys.argv[1]).predict(sys.argv[2])"


def main() -> None:
    """Run one part, then tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["files", "start-up", "table"])
    parser.add_argument("--model", type=Path, help="exported model")
    parser.add_argument("--images", type=Path, help="folder in MVTec AD's layout")
    parser.add_argument("--results", type=Path, default=RESULT, help="file of what is kept")
    args = parser.parse_args()
    if args.part != "table":
        model, originals = args.model.resolve(), images_below(args.images.resolve() / "test")
        measured = files(model, originals) if args.part == "files" else {"start-up": start_up(model, originals[0])}
        where = environment(f"python -m benchmarks.scoring_speed {args.part}")
        for key, row in measured.items():
            keep(args.results, key, row | {"openvino": ov.__version__, "opencv": cv2.__version__} | where)
    print(table(rows(args.results)))


def photograph(path: str, side: int) -> np.ndarray:
    """A test image at another size, with a camera's noise of two grey levels, without which it is too smooth."""
    rng = np.random.default_rng(side)
    image = cv2.resize(decode(path), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).round().astype(np.uint8)


def python(arguments: list[str], folder: str) -> str:
    """Run Python in a folder, with this version of the package; returns what it prints."""
    where = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=True).stdout


def files(model: Path, originals: list[str]) -> dict[str, Any]:
    """Milliseconds per image from files to scores, start-up left out, in turns; and of all cores' time."""
    from anomalib.deploy import OpenVINOInferencer

    inferencer = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": "f32"})
    found: dict[str, Any] = {}

    def score(folder: str, *options: str) -> list[float]:
        return [float(seconds) for seconds in python(["-c", SCORE, str(model), folder, *options], folder).split()]

    def loop(folder: str) -> list[float]:
        first, *others = sorted(Path(folder).iterdir())
        inferencer.predict(first)
        wall, cpu = time.perf_counter(), time.process_time()
        for file in others:
            inferencer.predict(file)
        return [spent / len(others) for spent in (time.perf_counter() - wall, time.process_time() - cpu)]

    for name, (side, count) in SIDES.items():
        for kind in ("png", "jpg"):
            with tempfile.TemporaryDirectory() as folder:
                taken = originals[:: max(1, len(originals) // (count + 1))][: count + 1]
                for number, path in enumerate(taken):
                    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == "jpg" else []
                    cv2.imwrite(f"{folder}/{number}.{kind}", photograph(path, side), quality)
                ways = {"score": lambda: score(folder), "OpenVINOInferencer in a loop": lambda: loop(folder)}
                if kind == "jpg":
                    ways["score, reduced decode"] = lambda: score(folder, "--reduced-decode")
                spent: dict[str, list[list[float]]] = defaultdict(list)  # of each round, by the clock and of the cores
                for _ in range(ROUNDS):
                    for way, timed in ways.items():
                        spent[way].append([round(1000 * seconds, 1) for seconds in timed()])
            found[f"files, {name}, {kind}"] = {"milliseconds": spent, "images": len(taken) - 1}
            print(name, kind, json.dumps(spent), flush=True)
    return found


def start_up(model: Path, image: str) -> dict[str, Any]:
    """Seconds from a fresh process to the first score; the first of each only fills the disk's cache."""
    ways = {"score": ["-m", "stpm_plugin.commands", "score"], "OpenVINOInferencer": ["-c", INFER]}
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(ROUNDS + 1):
        for way, arguments in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                python([*arguments, str(model), image], folder)
                if turn:
                    seconds[way].append(round(time.perf_counter() - begin, 2))
    return {"seconds": seconds}


def table(kept: dict[str, Any]) -> str:
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
