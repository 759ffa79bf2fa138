"""Whether scoring can be trusted: every size and setting beside torch, changes of light, thresholds set anew.

    python -m benchmarks.scoring grid      --checkpoint CKPT                          # sizes up to 100 MP, all settings
    python -m benchmarks.scoring drift     --checkpoint CKPT --images DIR/bottle      # a change of light is noticed
    python -m benchmarks.scoring threshold --checkpoint CKPT --images DIR/screw      # anew, on INT8
    python -m benchmarks.scoring bfloat16  --checkpoint CKPT --images DIR/bottle      # what the resize loses in it
    python -m benchmarks.scoring files     --model MODEL.xml --images DIR/screw       # PNG and JPEG, 1 to 12 MP
    python -m benchmarks.scoring reduced   --model MODEL.xml --images DIR/screw       # scores of JPEGs decoded smaller
    python -m benchmarks.scoring table                                                # from what is kept

Rows are kept in `results/scoring.json`. `drift` also counts false warnings on the raw scores that
`benchmarks.false_alarms` keeps, without a model. `files` times `stpm score` beside that of an `--older` checkout and
anomalib's inferencer in a loop, in turns. Images are official test images; no threshold or window was chosen on them.
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
from statistics import mean, stdev
from typing import Any

import cv2
import numpy as np
import openvino as ov
import torch

from benchmarks.environment import environment
from stpm_plugin import STPM
from stpm_plugin.deployment import drift
from stpm_plugin.deployment.images import decode, images_below
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.false_alarms import limit
from stpm_plugin.model.pre_processing import resize_weights

RESULT = Path(__file__).parent / "results" / "scoring.json"
SIZES = [(64, 64), (256, 256), (480, 640), (1080, 1920), (3400, 3400), (2160, 3840), (10_000, 10_000)]
SIZES += [(20, 12_000), (12_000, 20), (31, 1_000_000)]  # flat and tall
SETTINGS = [(hint, batch, threads) for hint in ("latency", "throughput") for batch in (1, 3) for threads in (1, 2)]
LIGHT = {"as it is": (1.0, 0), "0.95 as bright": (0.95, 0), "0.9 as bright": (0.9, 0), "0.8 as bright": (0.8, 0)}
LIGHT |= {"1.1 times as bright": (1.1, 0), "1.2 times as bright": (1.2, 0), "20 levels brighter": (1.0, 20)}
ASKED = (0.2, 0.1, 0.05)
DRAWS = 2000
SIDES = {"1 MP": (1024, 24), "4 MP": (2048, 16), "12 MP": (3464, 10)}  # pixels along a side, images
ROUNDS = 3
MOVED = 4  # every fourth test image
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


def main() -> None:
    """Run one part, then tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["grid", "drift", "threshold", "bfloat16", "files", "reduced", "table"])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--images", type=Path, help="folder in MVTec AD's layout: the checkpoint's category")
    parser.add_argument("--model", type=Path, help="exported model, for files and reduced")
    parser.add_argument("--older", type=Path, help="checkout of another version, for files")
    args = parser.parse_args()
    parts = {"grid": grid, "drift": light, "threshold": anew, "bfloat16": rounded_sums}
    parts |= {"files": from_files, "reduced": reduced}
    if args.part != "table":
        rows = parts[args.part](args)
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        for key, row in rows.items():
            kept[key] = row | environment(f"python -m benchmarks.scoring {args.part}")
        RESULT.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}\n")
    text = table(json.loads(RESULT.read_text()))
    RESULT.with_suffix(".md").write_text(text)
    print(text)


def load(checkpoint: Path) -> STPM:
    """A trained model on the CPU."""
    return STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()


def textured(height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) with something at every scale."""
    rng = np.random.default_rng(height + width)
    coarse = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return (coarse // 2 + rng.integers(0, 128, coarse.shape, np.uint8)).astype(np.uint8)


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """Largest difference of an image score from torch's, for each size, over all settings at each precision."""
    model, core = load(args.checkpoint), ov.Core()
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = ["f32", *(name for name, flag in (("bf16", "BF16"), ("f16", "FP16")) if flag in offered)]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"any size": model.to_openvino(Path(folder, "any"))}
        files["fixed"] = model.to_openvino(Path(folder, "fixed"), input_size=model.network_size)
        for size in SIZES:
            image = textured(*size)
            with torch.inference_mode():
                exact = float(model(torch.from_numpy(image).permute(2, 0, 1)[None] / 255).pred_score)
            differences: dict[str, float] = {}
            slowest = 0.0
            for precision in precisions:
                for file in files.values():
                    for hint, batch, threads in SETTINGS:
                        scorer = Scorer(file, hint=hint, batch=batch, threads=threads, precision=precision)
                        begin = time.perf_counter()
                        found = list(scorer.score_arrays([("", image)] * batch, "RGB"))
                        slowest = max(slowest, (time.perf_counter() - begin) / batch)
                        worst = max(abs(one.score - exact) for one in found)
                        differences[precision] = max(differences.get(precision, 0.0), worst)
            key = f"grid, {size[0]} x {size[1]}"
            rows[key] = {"score": exact, "differences": differences, "slowest_seconds": round(slowest, 2)}
            print(key, rows[key], flush=True)
    return rows


def false_warnings() -> dict[str, Any]:
    """Share of windows of good test images that are called a change, from raw scores that are kept."""
    kept = json.loads(RESULT.with_name("false_alarms.json").read_text())
    rng, found = np.random.default_rng(0), {}
    for row in kept.values():
        held_out = np.sort(row["held_out_scores"])
        windows = [rng.choice(row["test_scores"], drift.WINDOW) for _ in range(DRAWS)]
        found[row["category"]] = float(np.mean([drift.describe(held_out, window) is not None for window in windows]))
    return found


def light(args: argparse.Namespace) -> dict[str, Any]:
    """Score good test images under changed light; how soon each change is noticed, and how often nothing is."""
    model = load(args.checkpoint)
    held_out = np.array(model.post_processor.held_out_scores)
    files = images_below(args.images / "test/good")
    rng, rows = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(model.to_openvino(folder))
        for name, (gain, offset) in LIGHT.items():
            images = ((file, np.clip(decode(file) * gain + offset, 0, 255).astype(np.uint8)) for file in files)
            raw = np.array([one.raw for one in scorer.score_arrays(images, "BGR")])
            windows = [rng.choice(raw, drift.WINDOW) for _ in range(DRAWS)]
            noticed = float(np.mean([drift.describe(held_out, window) is not None for window in windows]))
            label = float(np.mean(raw > float(model.post_processor.image_threshold)))
            row = {"noticed": noticed, "anomalous": label, "median_ratio": float(np.median(raw) / np.median(held_out))}
            rows[f"drift, {args.images.name}, {name}"] = row | {"held_out": len(held_out), "images": len(files)}
    return rows | {"drift, false warnings": {"windows": false_warnings(), "draws": DRAWS, "window": drift.WINDOW}}


def anew(args: argparse.Namespace) -> dict[str, Any]:
    """Set the threshold of an INT8 export on half of the good test images, count false alarms on the other half."""
    from anomalib.data import MVTecAD

    model = load(args.checkpoint)
    data = MVTecAD(root=args.images.parent, category=args.images.name, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(model.to_openvino(folder, compression_type="int8_ptq", datamodule=data))
        raw = np.array([one.raw for one in scorer.score(images_below(args.images / "test/good"))])
    rng, rows = np.random.default_rng(0), {}
    for asked in ASKED:
        found, promised = [], []
        for _ in range(DRAWS):
            order = rng.permutation(len(raw))
            first, second = raw[order[: len(raw) // 2]], raw[order[len(raw) // 2 :]]
            alarms = limit(first, 1 - asked)
            found.append(float(np.mean(second > alarms.value)))
            promised.append(alarms.expected)
        row = {"asked": asked, "expected": float(np.mean(promised)), "found": float(np.mean(found))}
        rows[f"threshold, {args.images.name}, {asked:g}"] = row | {"good_images": len(raw), "draws": DRAWS}
    return rows


def rounded_sums(args: argparse.Namespace) -> dict[str, Any]:
    """How far a score moves if the graph's resize adds its weights up in bfloat16, emulated on any processor."""
    model, rows = load(args.checkpoint), {}
    normalize = model.pre_processor.export_transform[1:]

    def score(images: torch.Tensor) -> float:
        return float(model.post_processor(model.model(normalize(images))).pred_score)

    def weights(length: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        exact = resize_weights(length, wanted, torch.zeros(1))
        rounded = (exact * length).bfloat16()
        total = torch.zeros(wanted, 1, dtype=torch.bfloat16)
        for column in rounded.unbind(1):
            total = total + column[:, None]
        return exact, (rounded / total).float()

    files = images_below(args.images / "test/good")[:3]
    for height, width in [(900, 900), (1080, 1920), (2160, 3840)]:
        (down, rounded_down), (across, rounded_across) = (
            weights(*one) for one in zip((height, width), model.network_size, strict=True)
        )
        moved = []
        for file in files:
            image = cv2.resize(decode(file), (width, height))[:, :, ::-1].copy()
            x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
            with torch.inference_mode():
                moved.append(score(rounded_down @ x @ rounded_across.T) - score(down @ x @ across.T))
        rows[f"bfloat16, emulated, {height} x {width}"] = {"score_moves": float(np.abs(moved).max())}
    return rows


def photograph(path: Path, side: int) -> np.ndarray:
    """A test image at another size, with a camera's noise of two grey levels, without which it is too smooth."""
    rng = np.random.default_rng(side)
    image = cv2.resize(decode(str(path)), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).round().astype(np.uint8)


def from_files(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per image from files to scores, start-up left out, in turns; and of all cores' time."""
    from anomalib.deploy import OpenVINOInferencer

    here = Path(__file__).parents[1]
    model, originals, rows = args.model.resolve(), images_below(args.images.resolve() / "test"), {}
    inferencer = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": "f32"})

    def score(checkout: Path, folder: str, *options: str) -> list[float]:
        command = [sys.executable, "-W", "ignore", "-c", SCORE, str(model), folder, *options]
        where = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        done = subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=True)
        return [float(seconds) for seconds in done.stdout.split()]

    def loop(folder: str) -> list[float]:
        files = sorted(Path(folder).iterdir())
        inferencer.predict(files[0])
        wall, cpu = time.perf_counter(), time.process_time()
        for file in files[1:]:
            inferencer.predict(file)
        return [spent / (len(files) - 1) for spent in (time.perf_counter() - wall, time.process_time() - cpu)]

    for name, (side, count) in SIDES.items():
        for kind in ("png", "jpg"):
            with tempfile.TemporaryDirectory() as folder:
                for number, path in enumerate(originals[:: len(originals) // (count + 1)][: count + 1]):
                    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == "jpg" else []
                    cv2.imwrite(f"{folder}/{number}.{kind}", photograph(Path(path), side), quality)
                ways = {"score": lambda: score(here, folder), "OpenVINOInferencer in a loop": lambda: loop(folder)}
                if args.older:
                    ways["score before"] = lambda: score(args.older, folder)
                if kind == "jpg":
                    ways["score, reduced decode"] = lambda: score(here, folder, "--reduced-decode")
                spent: dict[str, list[list[float]]] = defaultdict(list)  # of each round, by the clock and of the cores
                for _ in range(ROUNDS):
                    for way, timed in ways.items():
                        spent[way].append([round(1000 * seconds, 1) for seconds in timed()])
            rows[f"files, {name}, {kind}"] = {
                "milliseconds": spent,
                "images": count,
                "openvino": ov.__version__,
                "opencv": cv2.__version__,
            }
            print(name, kind, json.dumps(spent), flush=True)
    return rows


def reduced(args: argparse.Namespace) -> dict[str, Any]:
    """How far scores and labels of JPEGs move where they are decoded to a part of their size."""
    plain, faster = (Scorer(args.model, reduced_decode=chosen) for chosen in (False, True))
    originals, rows = images_below(args.images / "test")[::MOVED], {}
    for name, (side, _) in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/{number}.jpg" for number in range(len(originals))]
            for path, file in zip(originals, files, strict=True):
                cv2.imwrite(file, photograph(Path(path), side), [cv2.IMWRITE_JPEG_QUALITY, 95])
            before, after = (list(scorer.score(files)) for scorer in (plain, faster))
        moved = [abs(a.score - b.score) for a, b in zip(after, before, strict=True)]
        labels = sum(a.label != b.label for a, b in zip(after, before, strict=True))
        row = {"mean": mean(moved), "most": max(moved), "other_labels": labels, "images": len(moved)}
        rows[f"reduced decode, {args.images.name}, {name}"] = row
        print(name, row, flush=True)
    return rows


def table(kept: dict[str, Any]) -> str:
    """Tables of what is kept."""
    grids = {key[6:]: row for key, row in kept.items() if key.startswith("grid")}
    names = sorted({name for row in grids.values() for name in row["differences"]})
    lines = [f"| image | {' | '.join(names)} | seconds at most |", "|---|" + "---|" * (len(names) + 1)]
    for size, row in grids.items():
        cells = [f"{row['differences'][name]:.1e}" if name in row["differences"] else "" for name in names]
        lines.append(f"| {size} | {' | '.join(cells)} | {row['slowest_seconds']} |")
    moved = [f"{key.split(', ')[2]}: {row['score_moves']:.3f}" for key, row in kept.items() if "score_moves" in row]
    text = "Largest difference of a normalised image score from torch's, over hints, batches, threads and exports:\n\n"
    text += "\n".join(lines) + "\n\nShare of windows in which a change of light is noticed:\n\n"
    text += "| category | light | noticed | median over held-out | called anomalous |\n|---|---|---|---|---|\n"
    for key, row in kept.items():
        if key.startswith("drift") and "noticed" in row:
            category, name = key.split(", ")[1:]
            text += (
                f"| {category} | {name} | {row['noticed']:.1%} | {row['median_ratio']:.2f} | {row['anomalous']:.0%} |\n"
            )
    for category, share in kept.get("drift, false warnings", {}).get("windows", {}).items():
        text += f"| {category} | false warnings, kept scores | {share:.2%} | | |\n"
    text += f"\nScores move, if a graph's resize adds its weights up in bfloat16 (emulated): {'; '.join(moved)}.\n"
    text += "\nFalse alarms of an INT8 export whose threshold was set anew on half of the good test images:\n\n"
    text += "| category | good images | asked | expected | found |\n|---|---|---|---|---|\n"
    for key, row in kept.items():
        if key.startswith("threshold"):
            cells = [f"{row[name]:.1%}" for name in ("asked", "expected", "found")]
            text += f"| {key.split(', ')[1]} | {row['good_images']} | {' | '.join(cells)} |\n"
    text += (
        "\nMilliseconds per image from files to scores, start-up left out: by the clock; of all cores' time. Mean and "
    )
    text += "deviation of the rounds:\n\n"
    timed = {key: row for key, row in kept.items() if key.startswith("files")}
    ways = sorted({way for row in timed.values() for way in row["milliseconds"]})
    text += f"| images | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}\n"
    for key, row in timed.items():
        found = [row["milliseconds"].get(way) for way in ways]
        cells = [
            "" if one is None else "; ".join(f"{mean(part):.0f} ± {stdev(part):.0f}" for part in zip(*one, strict=True))
            for one in found
        ]
        text += f"| {key.removeprefix('files, ')} | {' | '.join(cells)} |\n"
    text += "\nScores of JPEGs move by `--reduced-decode`, mean and most; other labels:\n\n"
    text += "| category, image | mean | most | other labels |\n|---|---|---|---|\n"
    for key, row in kept.items():
        if key.startswith("reduced"):
            cells = [f"{row['mean']:.4f}", f"{row['most']:.4f}", f"{row['other_labels']} of {row['images']}"]
            text += f"| {key.removeprefix('reduced decode, ')} | {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
