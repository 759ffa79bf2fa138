"""Equal weights give equal verdicts, in whatever order a model is fitted, resumed, interrupted, saved, loaded and exported."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch
from anomalib.engine import Engine
from conftest import TEACHER, TINY
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from lightning.pytorch.callbacks import Callback

from stpm_plugin import STPM, DemoData, STPMPostProcessor

SMALL = {
    "backbone": "resnet18",
    "teacher_weights": str(TEACHER),
    "layers": ["layer1", "layer2"],
    "image_size": (32, 32),
}
HEADS = st.fixed_dictionaries({"score_area": st.sampled_from([0, 3])})
RULES = st.sampled_from([None, 0.6])


class FaultError(Exception):
    """What interrupts a fit."""


class Interrupt(Callback):
    """Raises in a batch of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise FaultError


class AnyOrder(RuleBasedStateMachine):
    """Each checkpoint is kept with the verdict that the model gave when it was saved."""

    saved = Bundle("saved")
    root: Path

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.images = torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(0))
        self.datamodule = DemoData(root=self.root, **TINY)
        self.model: STPM | None = None
        self.engine: Engine | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def verdict(self, model: STPM) -> list[torch.Tensor]:
        """Scores, labels, maps and masks, and the thresholds, of the same images."""
        model.eval()
        with torch.inference_mode():
            made = model(self.images)
        processor = model.post_processor
        thresholds = (processor.image_threshold, processor.pixel_threshold)
        return [
            one.clone() for one in (made.pred_score, made.pred_label, made.anomaly_map, made.pred_mask, *thresholds)
        ]

    def agree(self, one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)

    def run(self, model: STPM, epochs: int, checkpoint: Path | None = None, interrupt: Interrupt | None = None) -> bool:
        """Fit; returns whether it came to its end."""
        callbacks = [interrupt] if interrupt else []
        folder = tempfile.mkdtemp(dir=self.folder)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "callbacks": callbacks}
        self.engine = Engine(default_root_dir=folder, max_epochs=epochs, enable_model_summary=False, **options)
        self.model = model
        with contextlib.suppress(FaultError):
            self.engine.fit(model, datamodule=self.datamodule, ckpt_path=checkpoint)
        assert type(self.engine.trainer.datamodule) is DemoData
        assert "train_dataloader" not in vars(self.datamodule)
        return self.engine.trainer.state.status == "finished"

    def best(self) -> Path | None:
        path = self.engine.best_model_path if self.engine else ""
        return Path(path) if path else None

    @rule(target=saved, head=HEADS, quantile=RULES, holdout=st.sampled_from([0.2, 0.4]))
    def fit(self, head, quantile, holdout):
        model = STPM(
            **SMALL, **head, holdout=holdout, seed=0, visualizer=False, post_processor=STPMPostProcessor(quantile)
        )
        assert self.run(model, 1)
        verdict = self.verdict(model)
        self.agree(verdict, self.verdict(STPM.load_from_checkpoint(self.best())))
        return self.best(), verdict

    @rule(target=saved, source=saved, batch=st.sampled_from([None, 0, 2]))
    def resume(self, source, batch):
        """With a bare model: architecture, head and rule are the checkpoint's; a fault leaves what was chosen."""
        path, before = source
        passes = torch.load(path, weights_only=True)["epoch"] + 1
        model = STPM(visualizer=False, holdout=0.2)
        ended = self.run(model, passes + 1, path, None if batch is None else Interrupt(passes, batch))
        assert ended == (batch is None)
        if not ended:
            return path, before
        verdict = self.verdict(model)
        self.agree(verdict, self.verdict(STPM.load_from_checkpoint(self.best())))
        return self.best(), verdict

    @precondition(lambda self: self.model is not None and self.model.trained)
    @rule(target=saved)
    def save(self):
        path = self.folder / f"{len(list(self.folder.iterdir()))}.ckpt"
        self.engine.trainer.save_checkpoint(path)
        return path, self.verdict(self.model)

    @rule(source=saved, route=st.sampled_from(["load_from_checkpoint", "load_state_dict", "Engine"]))
    def load(self, source, route):
        path, verdict = source
        model = STPM.load_from_checkpoint(path) if route == "load_from_checkpoint" else STPM(visualizer=False)
        if route == "load_state_dict":
            model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        if route == "Engine":
            engine = Engine(
                default_root_dir=self.folder / "test", accelerator="cpu", logger=False, enable_progress_bar=False
            )
            engine.test(model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
            self.engine = engine
        self.model = model if route == "Engine" else None
        self.agree(self.verdict(model), verdict)

    @rule(source=saved)
    def export(self, source):
        path, verdict = source
        model = STPM.load_from_checkpoint(path)
        file = model.to_torch(self.folder / "exported")
        exported = torch.load(file, weights_only=False)["model"].eval()
        with torch.inference_mode():
            made = exported(self.images)
        self.agree([made.pred_score, made.pred_label, made.anomaly_map, made.pred_mask], verdict[:4])


def test_equal_weights_give_equal_verdicts_in_any_order(demo_root):
    AnyOrder.root = demo_root
    calm = settings(
        max_examples=3,
        stateful_step_count=6,
        phases=[Phase.generate],  # a failing order is short enough to read
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(AnyOrder, settings=calm)
