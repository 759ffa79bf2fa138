"""Recipes tried for `configs/stpm.yaml`, compared by the held-out normal images alone.

    python -m benchmarks.recipes --root DIR --teacher FILE.safetensors --category screw

Every recipe gets the same passes over the same images from the same seed. What none of the package's arguments
offers is a subclass here (Nesterov, a short warm-up), so that what loses never enters the package. Rows are written as
they come; a run that has one is not repeated. Test images are not touched. The kept rows with a moving average of the
weights are of version 0.1.0, whose model it was part of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.environment import environment
from stpm_plugin import STPM

RESULT = Path(__file__).parent / "results" / "recipes.json"
RECIPES: dict[str, dict[str, Any]] = {
    "batch 4, one-cycle": {},
    "batch 8, one-cycle": {"batch_size": 8},
    "batch 16, one-cycle": {"batch_size": 16},
    "batch 2, one-cycle": {"batch_size": 2},
    "batch 4, one-cycle, lr 0.2": {"lr": 0.2},
    "batch 4, one-cycle, lr 0.8": {"lr": 0.8},
    "batch 4, cosine after 5 % warm-up": {"warm_up": 0.05},
    "batch 4, one-cycle, Nesterov": {"nesterov": True},
    "batch 4, constant": {"schedule": "constant"},
    # what the rows above suggest: more steps, a higher rate
    "batch 2, one-cycle, lr 0.8": {"batch_size": 2, "lr": 0.8},
    "batch 4, one-cycle, lr 1.6": {"lr": 1.6},
    "batch 2, one-cycle, lr 1.6": {"batch_size": 2, "lr": 1.6},
    "batch 2, one-cycle, lr 3.2": {"batch_size": 2, "lr": 3.2},
    "batch 1, one-cycle, lr 1.6": {"batch_size": 1, "lr": 1.6},
}


class Trial(STPM):
    """STPM with what was tried beyond its arguments.

    Args:
        nesterov: Nesterov's momentum.
        warm_up: Share of the steps in which one-cycle's rate rises.
        compiled: Run the student through `torch.compile`.
    """

    def __init__(
        self,
        nesterov: bool = False,
        warm_up: float = 0.3,
        compiled: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.nesterov, self.warm_up = nesterov, warm_up
        self.history: list[float] = []
        if compiled:
            self.model.student.compile()

    def configure_optimizers(self) -> Any:
        """As STPM's, with Nesterov's momentum and another warm-up."""
        made = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        optimizer.param_groups[0]["nesterov"] = self.nesterov
        if isinstance(made, dict):
            steps = int(self.trainer.estimated_stepping_batches)
            made["lr_scheduler"]["scheduler"] = OneCycleLR(
                optimizer, self.lr, total_steps=steps, pct_start=self.warm_up, cycle_momentum=False
            )
        return made

    def on_train_epoch_end(self) -> None:
        """Note the held-out score."""
        self.history.append(round(self.selection.scores[-1], 5))


def main() -> None:
    """Fit each recipe and keep one JSON row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="MVTec AD's folder")
    parser.add_argument("--teacher", required=True, help="weights of torchvision's ResNet-18")
    parser.add_argument("--category", default="screw")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    parser.add_argument("--only", nargs="*", help="names of the recipes to run; all by default")
    args = parser.parse_args()
    for name, arguments in RECIPES.items():
        rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        key = f"{args.category}, {args.epochs} passes, {name}"
        if key in rows or (args.only and name not in args.only):
            continue
        rows[key] = fit(arguments, args)
        RESULT.write_text(json.dumps(rows, indent=2) + "\n")
        print(key, rows[key]["holdout_score"], rows[key]["fit_seconds"], flush=True)
    RESULT.with_suffix(".md").write_text(table(json.loads(RESULT.read_text())))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Set the rows as a Markdown table, the best of each data set first."""
    lines = ["| data, passes | recipe | held-out score | fit, s |", "|---|---|---|---|"]
    for key in sorted(rows, key=lambda key: (key.split(", ")[0], rows[key]["holdout_score"])):
        category, passes, recipe = key.split(", ", 2)
        row = rows[key]
        lines.append(f"| {category}, {passes} | {recipe} | {row['holdout_score']:.4f} | {row['fit_seconds']} |")
    return "\n".join(lines) + "\n"


def fit(arguments: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Fit once on the training images; returns the row."""
    recipe = {"batch_size": 4, "lr": 0.4, "schedule": "one-cycle", "epochs": args.epochs, "seed": 0, **arguments}
    recipe |= {"holdout": 0.2, "level_power": 0.0}  # what were the defaults then
    recipe["hard_share"] = 1.0  # with a smaller one held-out scores are higher and maps better
    model = Trial(teacher_weights=args.teacher, **recipe)
    datamodule = MVTecAD(root=args.root, category=args.category, num_workers=2, val_split_mode="none")
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, max_epochs=args.epochs, logger=False
        )
        started = time.time()
        engine.fit(model, datamodule=datamodule)
        seconds = time.time() - started
    return {
        "recipe": recipe,
        "holdout_score": round(model.selection.chosen.score, 5),
        "chosen_epoch": model.selection.chosen.epoch,
        "holdout_scores": model.history,
        "fit_seconds": round(seconds),
        **environment("python -m benchmarks.recipes"),
    }


if __name__ == "__main__":
    main()
