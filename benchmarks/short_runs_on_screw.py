"""What the teacher's training and the antialiased resize are worth: short STPM runs on MVTec AD screw.

    python -m benchmarks.short_runs_on_screw --root DIR --imagenet FILE.safetensors

The recipe is the same for all: 20 passes, batch 4, one cycle, one seed; shorter than the paper's, so that four runs
take a quarter of an hour on two cores. Rows are written as they come; a run that has one is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from safetensors.torch import save_file
from torchvision.transforms.v2 import Compose, Normalize, Resize

from stpm_plugin import STPM, STPMPreProcessor
from stpm_plugin.features import FeaturePyramid
from stpm_plugin.pre_processing import IMAGENET_MEAN, IMAGENET_STD

RESULT = Path(__file__).parent / "results" / "short_runs_on_screw.json"
RECIPE = {
    "epochs": 20,
    "batch_size": 4,
    "lr": 0.4,
    "schedule": "one-cycle",
    "hard_share": 1.0,
    "score_share": 0.0,
    "level_power": 0.0,
    "holdout": 0.2,
    "seed": 0,
}
LAYERS = ["layer1", "layer2", "layer3"]


def main() -> None:
    """Train and test with each teacher and keep one JSON row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="MVTec AD's folder")
    parser.add_argument("--imagenet", required=True, help="weights of torchvision's ResNet-18")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        random_weights = Path(folder) / "random.safetensors"
        save_file(FeaturePyramid("resnet18", LAYERS).net.state_dict(), random_weights)
        runs = {
            "imagenet": (args.imagenet, True),
            "builtin": ("builtin", True),
            "random": (str(random_weights), True),
            "imagenet, resize without antialiasing": (args.imagenet, False),
        }
        rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        for name, (weights, antialias) in runs.items():
            if name not in rows:
                rows[name] = train(weights, antialias, args.root, Path(folder) / name)
                RESULT.write_text(json.dumps(rows, indent=2) + "\n")
                print(name, rows[name])


def train(weights: str, antialias: bool, root: str, folder: Path) -> dict[str, object]:
    """Fit and test once; returns the row."""
    metrics = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    resize = Resize((256, 256), antialias=antialias)
    model = STPM(
        "resnet18",
        teacher_weights=weights,
        pre_processor=STPMPreProcessor(Compose([resize, Normalize(IMAGENET_MEAN, IMAGENET_STD)])),
        evaluator=Evaluator(test_metrics=metrics),
        visualizer=False,
        **RECIPE,
    )
    datamodule = MVTecAD(root=root, category="screw", num_workers=2)
    engine = Engine(default_root_dir=folder, accelerator="cpu")
    started = time.time()
    engine.fit(model, datamodule=datamodule)
    seconds = time.time() - started
    results = engine.test(model, datamodule=datamodule)[0]
    return {
        "recipe": RECIPE,
        **{key: round(value, 4) for key, value in results.items()},
        "fit_seconds": round(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.short_runs_on_screw",
        "versions": {name: version(name) for name in ("anomalib", "torch", "timm", "lightning")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    main()
