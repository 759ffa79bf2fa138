"""What is usual at each place: what raising maps there gains and costs, on the students that `students.py` keeps.

    python -m benchmarks.places run KEPT DIR/screw DIR/bottle --teacher FILE   # folders in MVTec AD's layout
    python -m benchmarks.places run KEPT DIR/screw --recipe lite0 --teacher lite0
    python -m benchmarks.places run KEPT DIR/screw --recipe "default 10 %" --teacher FILE    # of a tenth of the images
    python -m benchmarks.places table                                          # from what is kept

Each student's test images are scored without it and with it, by the package's map and score and anomalib's metrics.
The plugin decides by the alignment: above a half, with. `accuracy.py students` takes its rows from here. Rows "on a
GPU" are of images that were resized before, rounded to 8 bits, and their students trained in bfloat16 on an H100;
those of the recipes that share the teacher's stem held the student's first layers at the teacher's weights.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.heads import Found, blurred, computed, gains
from benchmarks.students import RECIPES, SIZE, data_of, subset
from stpm_plugin import STPM
from stpm_plugin.model.matching import anomaly_map, image_score
from stpm_plugin.model.teacher_weights import load_teacher
from stpm_plugin.training.data import hold_out
from stpm_plugin.training.placement import ALIGNED, alignment, left_out, usual

RESULTS = Path(__file__).parent / "results" / "places.json"
WAYS = ("without", "with")
SMOOTHED = tuple(f"{way}, smoothed" for way in WAYS)  # as `heads.py` smooths: the one other map that its rule allowed
VERDICT = (
    "By the two metrics of the map the rule lets smoothing through. It is not taken: the score is read from the same "
    "map, and with image AUROC among the metrics nothing is left without transistor; PRO falls on bottle, grid and "
    "toothbrush."
)
NOTHING_CHOSEN = (
    "Nothing is chosen on fewer than three seeds, and none of these would be: without one category each loses in the "
    "mean of the three metrics. More passes help screw, as fewer help KolektorSDD. A student that takes over the "
    "teacher's stem agrees with it on defects too, and its PRO falls everywhere but on transistor."
)
GPU = " on a GPU"
SIX = ("screw", "bottle", "kolektor_sdd", "grid", "transistor", "toothbrush")
SHOWN = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def main() -> None:
    """Measure what is missing, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("kept", nargs="?", type=Path, help="folder of what `students.py` kept")
    parser.add_argument("categories", nargs="*", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--teacher", help="weights of the recipe's backbone: a file, or lite0")
    parser.add_argument(
        "--recipe", default="default", help="of `students.py`; `default mixed` for one of all categories"
    )
    args = parser.parse_args()
    kept = rows()
    of_images = re.fullmatch(r"(.+) (\d+) %", args.recipe)
    recipe, share = (of_images[1], int(of_images[2])) if of_images else (args.recipe.removesuffix(" mixed"), 100)
    for category in args.categories:
        for file in sorted(args.kept.glob(f"{args.recipe}, {category.name}, *.pt")):
            wanted = {*WAYS, *(SMOOTHED if args.recipe == "default" else ())}
            if not kept.get(file.stem, {"metrics": {}})["metrics"].keys() >= wanted:
                model = STPM(**RECIPES[recipe])
                student = torch.load(file, weights_only=True)
                with tempfile.TemporaryDirectory() as folder:
                    root = subset(category.resolve(), share, student["seed"], Path(folder))
                    features = deepest(root / category.name, args.teacher, model)
                kept[file.stem] = measure(student, *features, model.model.score_area, smooth=args.recipe == "default")
                RESULTS.write_text(json.dumps(kept, indent=1))
                print(file.stem, flush=True)
    RESULTS.with_suffix(".md").write_text(text := table(kept))
    print(text)


def rows() -> dict[str, dict[str, Any]]:
    """Return what is kept."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@torch.inference_mode()
def deepest(category: Path, teacher: str, model: STPM) -> list[Tensor]:
    """The teacher's unit vectors of the deepest level, of the training and of the test images (N, C, h, w)."""
    data = data_of(category)
    load_teacher(model.model.teacher, model.model.backbone, teacher)
    parts = (data.train_data, data.test_data)
    return [torch.cat([model.model.teach(model.transform(item.image[None]))[-1] for item in part]) for part in parts]


def measure(student: dict[str, Any], training: Tensor, test: Tensor, area: int, smooth: bool = True) -> dict[str, Any]:
    """The five metrics, each way; ``smooth`` also of smoothed maps."""
    stride = student["strides"][0]
    mean, variance, maps, raised = maps_of(student, training, test, area)
    found = {}
    ways = dict(zip(WAYS, (maps, raised), strict=True))
    if smooth:
        ways |= {f"{way}, smoothed": blurred(one) for way, one in ways.items()}
    for way, one in ways.items():
        images = SimpleNamespace(pred_score=image_score(one, area, stride), gt_label=student["labels"])
        pixels = SimpleNamespace(anomaly_map=one[:, 0] / one.max(), gt_mask=student["masks"])
        found[way] = {
            "image_AUROC": computed(AUROC(fields=["pred_score", "gt_label"]), images),
            "pixel_AUROC": computed(AUROC(fields=["anomaly_map", "gt_mask"]), pixels),
            "pixel_AUPRO": computed(AUPRO(fields=["anomaly_map", "gt_mask"]), pixels),
            "image_F1Score": computed(F1Max(fields=["pred_score", "gt_label"]), images),
            "pixel_AUPR": computed(AUPR(fields=["anomaly_map", "gt_mask"]), pixels),
        }
    row = {"alignment": round(alignment(mean, variance), 4), "metrics": found}
    return row | {"run": student["run"]} | environment("python -m benchmarks.places run")


def maps_of(
    student: dict[str, Any], training: Tensor, test: Tensor, area: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance at each position (C, h, w), and the test images' maps (N, 1, H, W), without and with them."""
    held = hold_out(len(training), student["holdout"], int(student["seed"]))
    trained = training[sorted(set(range(len(training))) - set(held))]
    mean, variance = trained.mean(0), trained.var(0)
    maxima = left_out(trained, len(trained), mean, variance).flatten(1).amax(1)
    places = usual(mean, variance, maxima)
    stride = student["strides"][0]
    good, maps = (anomaly_map(student[part], SIZE) for part in ("good", "test"))
    places.ordinary.copy_(image_score(good, area, stride).median())
    return mean, variance, maps, places(maps, image_score(maps, area, stride), test)


def table(kept: dict[str, dict[str, Any]]) -> str:
    """All tables."""
    return f"{with_and_without(kept)}\n{smoothing(kept)}\n{recipes(kept)}"


def recipes(kept: dict[str, dict[str, Any]]) -> str:
    """Each recipe on a GPU, as the plugin scores it, and what it gains over the default, in the words of the rule."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for key, row in kept.items():
        recipe, category, seed = key.split(", ")
        if seed.endswith(GPU):
            aligned = row["run"]["aligned"]
            found.setdefault(recipe, {})[category, seed] = [row["metrics"][WAYS[aligned]][name] for name in SHOWN]
    said = [
        "Recipes beside the default, trained on one H100 in bfloat16; what is not named is the default's. Means over "
        "the six of image AUROC / pixel AUROC / PRO, what they gain over the default of the same seeds (over lite0 for "
        "the recipes of lite0), and the least gain of their mean with a category left out:",
        "",
        f"| recipe | seeds | {' | '.join(SIX)} | mean | gain | least gain of the mean |",
        f"|---|---|{'---|' * len(SIX)}---|---|---|",
    ]
    for recipe, rows in found.items():
        seeds = [seed for seed in sorted({seed for _, seed in rows}) if all((c, seed) in rows for c in SIX)]
        base = found["lite0" if recipe.startswith("lite0") else "default"]
        shared = {key: rows[key] for key in rows if key in base and key[1] in seeds}
        if not shared:
            continue
        by_category = [averaged([rows[c, seed] for seed in seeds]) for c in SIX]
        gain = averaged([[n - o for n, o in zip(rows[key], base[key], strict=True)] for key in shared])
        least = gains(shared, {key: base[key] for key in shared})[2]
        cells = [set_out(values) for values in [*by_category, averaged(by_category)]]
        gained = "" if base is rows else " / ".join(f"{value:+.4f}" for value in gain)
        said.append(
            f"| {recipe} | {', '.join(seed.removesuffix(GPU) for seed in seeds)} | {' | '.join(cells)} | {gained} | "
            f"{'' if base is rows else f'{least:+.4f}'} |"
        )
    return "\n".join([*said, "", NOTHING_CHOSEN, ""])


def averaged(rows: list[list[float]]) -> list[float]:
    """Means of the columns."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def set_out(values: list[float]) -> str:
    """Three metrics."""
    return " / ".join(f"{value:.4f}" for value in values)


def smoothing(kept: dict[str, dict[str, Any]]) -> str:
    """What smoothing gains over the map as the plugin makes it, in the words of the rule of `heads.py`."""
    said = [
        "What smoothing the map by a Gaussian of 4 pixels, as PaDiM and PatchCore do, gains over the map as the plugin "
        "makes it, scores included:",
        "",
        "| mean of | gain | least gain, with a category left out |",
        "|---|---|---|",
    ]
    for names in (SHOWN[1:], SHOWN):
        plain: Found = {}
        smooth: Found = {}
        for key, row in kept.items():
            recipe, category, seed = key.split(", ")
            if recipe == "default":
                way = WAYS[row["alignment"] > ALIGNED]
                for found, name in ((plain, way), (smooth, f"{way}, smoothed")):
                    found[category, seed] = [row["metrics"][name][metric] for metric in names]
        gain, error, least = gains(smooth, plain)
        said.append(f"| {', '.join(names)} | {gain:+.4f} ± {error:.4f} | {least:+.4f} |")
    return "\n".join([*said, "", VERDICT, ""])


def with_and_without(kept: dict[str, dict[str, Any]]) -> str:
    """Set the categories in Markdown, the most aligned first."""
    lines = ["| recipe | category | alignment | n | without | with |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in kept.items():
        recipe, category, _ = key.split(", ")
        groups.setdefault((recipe, category), []).append(row)
    for (recipe, category), found in sorted(groups.items(), key=lambda one: (one[0][0], -one[1][0]["alignment"])):
        share = statistics.mean(row["alignment"] for row in found)
        cells = [
            " / ".join(f"{statistics.mean(row['metrics'][way][name] for row in found):.4f}" for name in SHOWN)
            for way in WAYS
        ]
        chosen = [
            f"**{cell}**" if (way == "with") == (share > ALIGNED) else cell
            for way, cell in zip(WAYS, cells, strict=True)
        ]
        lines.append(f"| {recipe} | {category} | {share:.3f} | {len(found)} | {' | '.join(chosen)} |")
    return (
        "Image AUROC / pixel AUROC / PRO, means over n students; bold: what the plugin does. Alignment: share "
        "of the variance of the teacher's deepest features that goes with the position.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
