"""What is usual at each place: what raising maps there gains and costs, on the students that `students.py` keeps.

    python -m benchmarks.places run KEPT DIR/screw DIR/bottle --teacher FILE   # folders in MVTec AD's layout
    python -m benchmarks.places table                                          # from what is kept

Each student's test images are scored without it and with it. The plugin decides by the alignment: above a half, with.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.heads import detected, localised
from benchmarks.students import SIZE
from stpm_plugin import STPM
from stpm_plugin.model.matching import anomaly_map, image_score
from stpm_plugin.model.teacher_weights import load_teacher
from stpm_plugin.training.data import hold_out
from stpm_plugin.training.placement import ALIGNED, alignment, left_out, usual

RESULTS = Path(__file__).parent / "results" / "places.json"
WAYS = ("without", "with")


def main() -> None:
    """Measure what is missing, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("kept", nargs="?", type=Path, help="folder of what `students.py` kept")
    parser.add_argument("categories", nargs="*", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--share", type=float, default=0.003, help="of the map, that the image score is made of")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for category in args.categories:
        features: list[Tensor] = []
        for file in sorted(args.kept.glob(f"default, {category.name}, *.pt")):
            features = features or deepest(category.resolve(), args.teacher)
            if (key := f"{file.stem}, share {args.share:g}") not in kept:
                kept[key] = measure(torch.load(file, weights_only=True), *features, args.share)
                RESULTS.write_text(json.dumps(kept, indent=1))
    RESULTS.with_suffix(".md").write_text(text := table(kept))
    print(text)


@torch.inference_mode()
def deepest(category: Path, teacher: Path) -> list[Tensor]:
    """The teacher's unit vectors of the deepest level, of the training and of the test images (N, C, h, w)."""
    data = MVTecAD(root=category.parent, category=category.name, num_workers=0, val_split_mode="none")
    data.prepare_data()
    data.setup()
    model = STPM()
    load_teacher(model.model.teacher, model.model.backbone, str(teacher))
    parts = (data.train_data, data.test_data)
    return [torch.cat([model.model.teach(model.transform(item.image[None]))[-1] for item in part]) for part in parts]


def measure(student: dict[str, Any], training: Tensor, test: Tensor, share: float) -> dict[str, Any]:
    """Image AUROC, pixel AUROC and PRO, each way."""
    held = hold_out(len(training), student["holdout"], int(student["seed"]))
    trained = training[sorted(set(range(len(training))) - set(held))]
    mean, variance = trained.mean(0), trained.var(0)
    maxima = left_out(trained, len(trained), mean, variance).flatten(1).amax(1)
    places = usual(mean, variance, maxima)
    stride = student["strides"][0]
    good, maps = (anomaly_map(student[part], SIZE) for part in ("good", "test"))
    places.ordinary.copy_(image_score(good, share, stride).median())
    raised = places(maps, image_score(maps, share, stride), test)
    found = {
        way: [detected(image_score(one, share, stride), student["labels"]), *localised(one, student["masks"])]
        for way, one in zip(WAYS, (maps, raised), strict=True)
    }
    row = {"alignment": round(alignment(mean, variance), 4), "metrics": found}
    return row | environment("python -m benchmarks.places run")


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Set the categories in Markdown, the most aligned first."""
    lines = ["| category | alignment | n | without | with |", "|---|---|---|---|---|"]
    names = {key: key.split(", ")[1] for key in kept}
    categories = {name: [row for key, row in kept.items() if names[key] == name] for name in names.values()}
    for name, rows in sorted(categories.items(), key=lambda one: -one[1][0]["alignment"]):
        share = statistics.mean(row["alignment"] for row in rows)
        cells = [
            " / ".join(f"{statistics.mean(values):.4f}" for values in zip(*found, strict=True))
            for found in ([row["metrics"][way] for row in rows] for way in WAYS)
        ]
        chosen = [
            f"**{cell}**" if (way == "with") == (share > ALIGNED) else cell
            for way, cell in zip(WAYS, cells, strict=True)
        ]
        lines.append(f"| {name} | {share:.3f} | {len(rows)} | {' | '.join(chosen)} |")
    return (
        "Image AUROC / pixel AUROC / PRO, means over n students; bold: what the plugin does. Alignment: share "
        "of the variance of the teacher's deepest features that goes with the position.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
