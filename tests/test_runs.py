"""Runs that are resumed, interrupted, bounded, monitored or changed by other callbacks."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataset, Folder, ImageBatch
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from conftest import MODEL, TINY, command, fit
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import RandomErasing

from stpm_plugin import STPM, DemoData
from stpm_plugin.errors import STPMError
from stpm_plugin.model.teacher_weights import load_teacher
from stpm_plugin.training import selection
from stpm_plugin.training.data_record import identify
from stpm_plugin.training.diagnostics import explanation
from stpm_plugin.training.schedule import one_cycle
from stpm_plugin.training.selection import CHECKPOINT_KEY
from stpm_plugin.training.thresholds import STPMPostProcessor
from stpm_plugin.training.validation import validates_each_epoch


class Seen(Callback):
    """What each step of a run had: its epoch, rate and images."""

    def __init__(self):
        self.epochs, self.rates, self.images = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs.append(trainer.current_epoch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None)
        self.images.append(batch.image.sum().item())


class Fails(Callback):
    """Raises once, before a batch of an epoch."""

    def __init__(self, epoch, batch=0, error=RuntimeError):
        self.when, self.error, self.trainer = (epoch, batch), error, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.trainer is None and (trainer.current_epoch, batch_idx) == self.when:
            self.trainer = trainer
            raise self.error("killed")


class StopsAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class StopsAfterStep(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.steps


def killed(datamodule, folder, max_epochs, when, ckpt_path=None, trainer=None, **arguments):
    """Fit until a callback raises; returns the checkpoints, oldest first."""
    callbacks = [*(trainer or {}).pop("callbacks", []), Fails(*when)]
    with pytest.raises(RuntimeError, match="killed"):
        fit(datamodule, folder, max_epochs, ckpt_path, trainer={**(trainer or {}), "callbacks": callbacks}, **arguments)
    return sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def scored(monkeypatch, values):
    """Let the held-out scores be these values."""
    real, values = selection.score, iter(values)

    def score(module, batches):
        return next(values), real(module, batches)[1]

    monkeypatch.setattr(selection, "score", score)


def drawn(root, sizes=((64, 64),), count=10):
    """Images of noise, of these heights and widths in turn."""
    (root / "good").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "good" / f"{number}.png")
    whole = {"val_split_mode": "none", "test_split_mode": "none"}
    return Folder(name="noise", root=root, normal_dir="good", train_batch_size=4, num_workers=0, **whole)


def student(model):
    return torch.cat([tensor.flatten().float() for tensor in model.model.student.state_dict().values()])


def torchs_cycle(peak, total):
    """Rates of torch's OneCycleLR at each of its steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, cycle_momentum=False)
    rates = [cycle.get_last_lr()[0]]
    for _ in range(total - 1):
        optimizer.step()
        cycle.step()
        rates.append(cycle.get_last_lr()[0])
    return rates


def assert_one_sentence(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def assert_same_verdict(loaded, model):
    """Weights, level scales, thresholds and settings are equal, and there are thresholds."""
    one, other = loaded.state_dict(), model.state_dict()
    assert one.pop("_extra_state") == other.pop("_extra_state")
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(model.post_processor.image_threshold)
    assert torch.isfinite(model.post_processor.pixel_threshold)


# A choice does not outlive its data


def test_other_images_begin_the_choice_anew(demo, tmp_path, monkeypatch, caplog):
    scored(monkeypatch, [0.1, 0.1, 0.6, 0.5])
    engine, _ = fit(demo, tmp_path / "first", 2)
    with caplog.at_level("INFO"):
        _, model = fit(drawn(tmp_path / "noise"), tmp_path / "second", 4, engine.best_model_path)
    assert "the held-out images differ from the checkpoint's, so epoch selection starts over" in caplog.text
    assert model.selection.chosen.epoch == 3
    assert model.selection.scores == [0.6, 0.5]


@pytest.mark.parametrize(("holdout", "epoch", "count"), [(0.2, 0, 4), (0.4, 0, 4)])
def test_an_earlier_choice_competes_on_its_own_images_alone(holdout, epoch, count, demo, tmp_path, monkeypatch):
    scored(monkeypatch, [0.1, 0.2, 0.5, 0.6])
    engine, first = fit(demo, tmp_path / "first", 2)
    _, model = fit(demo, tmp_path / "second", 4, engine.best_model_path, holdout=holdout)
    assert model.data_record.held_out == first.data_record.held_out  # no other image can be: they all trained
    assert model.selection.chosen.epoch == epoch
    assert len(model.selection.scores) == count
    assert torch.equal(student(model), student(first)) == (epoch == 0)


def test_added_images_are_held_out_too(tmp_path):
    """Those that were held out stay so, and no image that trained the checkpoint joins them."""
    few, many = drawn(tmp_path / "few"), drawn(tmp_path / "many", count=30)
    engine, first = fit(few, tmp_path / "first", 1)
    _, model = fit(many, tmp_path / "second", 2, engine.best_model_path)
    before, after = first.data_record, model.data_record
    assert before.held_out_digests < after.held_out_digests
    assert before.trained_digests < after.trained_digests
    assert len(model.selection.scores) == 1


def test_a_run_without_hold_out_goes_on_with_one_on_images_that_did_not_train(demo, tmp_path):
    engine, _ = fit(demo, tmp_path / "first", 1, holdout=0)
    with pytest.raises(STPMError, match="all good images trained the checkpoint's student, so none can be held out"):
        fit(demo, tmp_path / "second", 3, engine.best_model_path)
    _, model = fit(drawn(tmp_path / "others"), tmp_path / "third", 3, engine.best_model_path)
    assert model.selection.chosen.epoch >= 1
    assert 0 < model.selection.chosen.score == min(model.selection.scores) < 2
    assert len(model.selection.scores) == 2


def test_copies_of_a_held_out_image_are_held_out(tmp_path):
    root = tmp_path / "images"
    data = drawn(root)
    _, model = fit(data, tmp_path / "first", 1)
    held = [model.data_record.names[index] for index in model.data_record.held_out]
    good = next(path for path in root.rglob("*.png") if path.name == Path(held[0]).name and "test" not in path.parts)
    shutil.copy(good, good.with_name(f"copy of {good.name}"))
    _, model = fit(drawn(root), tmp_path / "second", 1)
    record = model.data_record
    assert not set(record.held_out_digests) & set(record.trained_digests)
    assert {record.digests[index] for index in record.held_out} == set(record.held_out_digests)


def test_a_run_that_is_done_is_refused_and_stays_trained(demo, tmp_path):
    engine, model = fit(demo, tmp_path / "first", 2)
    threshold = float(model.post_processor.image_threshold)
    with pytest.raises(STPMError, match="nothing is left to train: 2 of 2 epochs are done"):
        engine.fit(model, datamodule=demo)
    assert model.trained
    assert float(model.post_processor.image_threshold) == threshold
    with pytest.raises(STPMError, match="nothing is left to train: 2 of 2 epochs are done"):
        fit(demo, tmp_path / "second", 2, engine.best_model_path)


def test_a_new_fit_forgets_the_thresholds_of_another_student(demo, tmp_path):
    engine, first = fit(demo, tmp_path / "first", 1)
    assert torch.isfinite(first.post_processor.image_threshold)
    trainer = {"limit_val_batches": 0}
    _, model = fit(
        drawn(tmp_path / "noise"), tmp_path / "second", 2, engine.best_model_path, holdout=0, trainer=trainer
    )
    assert not torch.isfinite(model.post_processor.image_limit)
    assert (model.post_processor.basis, model.post_processor.held_out_scores) == ("none", [])


def test_held_out_images_are_read_without_augmentations(demo, tmp_path):
    """Their scores in training are those of the same images in a test of the chosen student."""
    augmented = DemoData(root=demo.root, **TINY, train_augmentations=RandomErasing(p=1.0, scale=(0.3, 0.3)))
    _, model = fit(augmented, tmp_path, 2, post_processor=STPMPostProcessor(normal_quantile=0.8))
    record = model.data_record
    paths = [str(path) for path in map(Path, augmented.train_data.samples.image_path)]
    held = [path for path in paths if identify([Path(path)])[2][0] in record.held_out_digests]
    model.eval()
    found = [model.model(model.transform(read_image(path, as_tensor=True)[None])).pred_score for path in held]
    assert model.post_processor.held_out_scores == pytest.approx(sorted(map(float, found)), rel=1e-4)


def test_verdicts_are_of_full_precision_whatever_the_trainers(demo, tmp_path):
    _, model = fit(demo, tmp_path, 1)
    model.eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = model.model(image).pred_score
    for step in (model.validation_step, model.test_step, model.predict_step):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(step(ImageBatch(image=image), 0).pred_score, plain)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", precision="bf16-true", logger=False)
    with pytest.raises(STPMError, match="bf16-true would change the teacher"):
        engine.predict(model, datamodule=demo)
    assert next(model.parameters()).dtype == torch.float32


# A failed fit leaves nothing behind


@pytest.mark.parametrize(("error", "seen_as"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_a_failed_fit_leaves_the_datamodule_as_it_was(error, seen_as, demo, tmp_path):
    fails = Fails(1, 0, error)
    engine = Engine(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", enable_progress_bar=False, callbacks=[fails]
    )
    model = STPM(**MODEL)
    with pytest.raises(seen_as):
        engine.fit(model, datamodule=demo)
    assert not {name for name in vars(demo) if name.endswith("_dataloader")}
    assert type(engine.trainer.datamodule) is DemoData
    assert engine.trainer.datamodule is demo
    assert engine.trainer.limit_val_batches == 1.0
    assert not engine.trainer.validating
    assert model.selection.images is None
    assert model.selection.chosen.epoch == 0
    other = STPM(**MODEL)
    engine.fit(other, datamodule=demo)
    assert torch.isfinite(other.post_processor.image_threshold)
    assert trained_by_padim(demo, tmp_path) == [ImageBatch] * 10


def trained_by_padim(datamodule, folder):
    """The type of the batch in which Padim got each of its images."""
    got = []

    class Types(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            got.extend([type(batch)] * len(batch.image))

    size = Padim.configure_pre_processor(image_size=(64, 64))
    padim = Padim("resnet18", ["layer1"], pre_trained=False, n_features=5, pre_processor=size, visualizer=False)
    Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, callbacks=[Types()]).fit(
        padim, datamodule=datamodule
    )
    return got


SENDS = """
import os, signal
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from stpm_plugin import STPM, DemoData

class Sends(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            os.kill(os.getpid(), signal.{sent})

engine = Engine(max_epochs=9, accelerator="cpu", enable_progress_bar=False, callbacks=[Sends()])
engine.fit(STPM(**{model}), datamodule=DemoData(root={root!r}, **{data}))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
def test_a_stopped_process_loses_the_epoch_under_way(sent, demo, demo_root, tmp_path):
    (tmp_path / "sends.py").write_text(SENDS.format(sent=sent, model=MODEL, root=str(demo_root), data=TINY))
    said = command("python", "-m", "sends", check=False, cwd=tmp_path)
    assert "Traceback" not in said
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model.ckpt"]
    seen = Seen()
    fit(demo, tmp_path / "rest", 3, checkpoint, trainer={"callbacks": [seen]})
    assert seen.epochs == [2, 2]


# The rate


@pytest.mark.parametrize("total", range(1, 51))
def test_one_cycle_is_torchs(total):
    assert [one_cycle(step, total) for step in range(total)] == pytest.approx(torchs_cycle(1.0, total), rel=1e-9)


def test_another_batch_size_begins_a_new_cycle(demo, tmp_path):
    engine, _ = fit(demo, tmp_path / "first", 2, schedule="one-cycle", batch_size=2)
    seen = Seen()
    longer = {"schedule": "one-cycle", "batch_size": 4, "trainer": {"callbacks": [seen]}}
    again, _ = fit(demo, tmp_path / "second", 4, engine.best_model_path, **longer)
    assert again.trainer.current_epoch == 4
    assert len(seen.rates) == 4
    assert seen.rates == pytest.approx(torchs_cycle(MODEL["lr"], 4))


def test_a_second_interruption_keeps_the_cycle(demo, tmp_path):
    """Two epochs, resumed to eight, killed in the sixth and resumed again: the rates are the uninterrupted run's."""
    engine, _ = fit(demo, tmp_path / "first", 2, schedule="one-cycle")
    whole, rest, other = Seen(), Seen(), Seen()
    cycle = {"schedule": "one-cycle"}
    fit(demo, tmp_path / "whole", 8, engine.best_model_path, **cycle, trainer={"callbacks": [whole]})
    checkpoint = killed(demo, tmp_path / "killed", 8, (5, 1), engine.best_model_path, **cycle)[-1]
    fit(demo, tmp_path / "rest", 8, checkpoint, **cycle, trainer={"callbacks": [rest]})
    assert rest.epochs == [5, 5, 6, 6, 7, 7]
    assert rest.rates == pytest.approx(whole.rates[6:])
    changed = {"lr": MODEL["lr"] / 2, "momentum": 0.5, "weight_decay": 0.01}
    last, _ = fit(demo, tmp_path / "other", 8, checkpoint, **cycle, **changed, trainer={"callbacks": [other]})
    assert other.rates == pytest.approx([rate / 2 for rate in rest.rates])
    group = last.trainer.optimizers[0].param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)


# The length of a run


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_own_epochs_bound_a_run_that_names_a_time(schedule, demo, tmp_path):
    engine, model = fit(
        demo, tmp_path, None, schedule=schedule, epochs=2, steps=None, trainer={"max_time": {"minutes": 10}}
    )
    assert engine.trainer.current_epoch == 2
    assert len(model.selection.scores) == 2


@pytest.mark.parametrize("ends", [{"callbacks": [StopsAfter(2)]}, {"max_time": {"seconds": 1}}])
def test_an_endless_run_is_ended(ends, demo, tmp_path):
    engine, model = fit(demo, tmp_path, -1, epochs=10_000, trainer=ends)
    assert engine.trainer.current_epoch < 1000
    assert_same_verdict(STPM.load_from_checkpoint(engine.best_model_path), model)


def test_an_endless_cycle_is_refused(demo, tmp_path):
    with pytest.raises(STPMError, match=r"schedule=one-cycle needs an end and trainer.max_epochs is -1") as error:
        fit(demo, tmp_path, -1, schedule="one-cycle")
    assert_one_sentence(error)


@pytest.mark.parametrize("limits", [{"accumulate_grad_batches": 4}, {"limit_train_batches": 1}])
def test_fewest_steps_are_steps_of_the_optimizer(limits, demo, tmp_path):
    engine, _ = fit(demo, tmp_path, None, epochs=1, steps=(3, 9), batch_size=2, trainer=limits)
    assert engine.trainer.global_step == engine.trainer.current_epoch == 3


# Other callbacks see the chosen weights


def measured():
    fields = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
    return Evaluator(val_metrics=[AUROC(**fields)], test_metrics=[AUROC(**fields)])


class Validated(Callback):
    """The epoch of the choice that each validation saw, where the weights are those."""

    def __init__(self):
        self.epochs = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        chosen = pl_module.selection.chosen
        right = all(
            torch.equal(tensor, chosen.student[n]) for n, tensor in pl_module.model.student.state_dict().items()
        )
        self.epochs.append(chosen.epoch if right else None)


def test_a_monitored_metric_is_of_the_chosen_weights(demo, tmp_path, monkeypatch):
    scored(monkeypatch, [0.5, 0.4, 0.6])
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="image_AUROC", mode="max", filename="{epoch}")
    validated = Validated()
    callbacks = [best, EarlyStopping("image_AUROC", mode="max", patience=5), validated]
    engine, _ = fit(demo, tmp_path, 3, evaluator=measured(), trainer={"callbacks": callbacks})
    assert validated.epochs == [0, 1, 1]
    assert Path(best.best_model_path).is_file()
    assert 0 <= best.best_model_score <= 1
    assert torch.isfinite(STPM.load_from_checkpoint(best.best_model_path).post_processor.image_threshold)
    assert engine.trainer.current_epoch == 3


@pytest.mark.parametrize("monitor", [ModelCheckpoint, EarlyStopping])
def test_a_metric_that_nothing_measures_is_refused(monitor, demo, tmp_path):
    seen = Seen()
    words = f"{monitor.__name__} monitors image_AUROC, which is not measured while training"
    with pytest.raises(STPMError, match=words) as error:
        fit(demo, tmp_path, 1, trainer={"callbacks": [monitor(monitor="image_AUROC", mode="max"), seen]})
    assert_one_sentence(error)
    assert seen.epochs == []


def test_early_stopping_saves_what_is_in_memory(demo, tmp_path, monkeypatch):
    scored(monkeypatch, [0.1, 0.5, 0.6])
    engine, model = fit(demo, tmp_path, 9, trainer={"callbacks": [EarlyStopping("holdout_score", patience=1)]})
    assert engine.trainer.current_epoch == 2
    assert model.selection.chosen.epoch == 0
    assert_same_verdict(STPM.load_from_checkpoint(engine.best_model_path), model)


@pytest.mark.parametrize(("holdout", "epochs"), [(0.2, [0, 1, 1]), (0, [0, 1, 2])])
def test_each_checkpoint_is_complete(holdout, epochs, demo, tmp_path, monkeypatch):
    """Weights and thresholds are those of the choice in its epoch."""
    scored(monkeypatch, [0.5, 0.2, 0.4])
    every = ModelCheckpoint(dirpath=tmp_path / "all", save_top_k=-1, filename="{epoch}")
    _, model = fit(demo, tmp_path, 3, holdout=holdout, trainer={"callbacks": [every]})
    files = sorted((tmp_path / "all").glob("*.ckpt"))
    loaded = [STPM.load_from_checkpoint(path) for path in files]
    assert [torch.load(path, weights_only=True)[CHECKPOINT_KEY]["epoch"] for path in files] == epochs
    for one in loaded:
        assert torch.isfinite(one.post_processor.image_threshold)
        assert one.eval()(torch.rand(1, 3, 64, 64)).pred_label.dtype == torch.bool
    assert not torch.equal(student(loaded[0]), student(loaded[1]))
    assert torch.equal(student(loaded[1]), student(loaded[2])) == (epochs[1] == epochs[2])
    assert_same_verdict(loaded[2], model)


# The middle of an epoch


@pytest.mark.parametrize("when", [(0, 2), (1, 0), (1, 3)])
def test_resumed_from_the_middle_of_an_epoch(when, demo, tmp_path):
    """Four steps an epoch, a checkpoint after each; what is drawn afterwards is what the whole run draws."""
    whole, rest = Seen(), Seen()
    settings = {"batch_size": 2, "schedule": "one-cycle"}
    _, expected = fit(demo, tmp_path / "whole", 2, trainer={"callbacks": [whole]}, **settings)
    steps = ModelCheckpoint(dirpath=tmp_path / "killed", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    checkpoint = killed(demo, tmp_path / "killed", 2, when, trainer={"callbacks": [steps]}, **settings)[-1]
    _, model = fit(demo, tmp_path / "rest", 2, checkpoint, seed=7, trainer={"callbacks": [rest]}, **settings)
    done = 4 * when[0] + when[1]
    assert checkpoint.stem == f"step={done}"
    assert rest.images == whole.images[done:]
    assert rest.rates == pytest.approx(whole.rates[done:])
    assert len(model.selection.scores) == 2
    torch.testing.assert_close(student(model), student(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ends", [{"max_steps": 3}, {"callbacks": [StopsAfterStep(3)]}])
def test_a_run_that_ends_in_the_middle_of_an_epoch(ends, demo, tmp_path, monkeypatch):
    """The weights of the last step are considered before a checkpoint of that step is saved."""
    scored(monkeypatch, [0.5, 0.4])
    steps = ModelCheckpoint(dirpath=tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [*ends.get("callbacks", []), steps]
    engine, model = fit(demo, tmp_path, None, epochs=9, trainer={**ends, "callbacks": callbacks})
    assert engine.trainer.global_step == 3
    assert model.selection.chosen.epoch == 1
    assert_same_verdict(STPM.load_from_checkpoint(tmp_path / "all" / "step=3.ckpt"), model)


# Callbacks of Lightning that take a run into their hands


def test_weight_averaging_keeps_the_models_epochs(demo, tmp_path):
    """One more pass updates the average's BatchNorm."""
    averaging = StochasticWeightAveraging(swa_lrs=0.05)
    seen = Seen()
    _, model = fit(demo, tmp_path, None, epochs=3, steps=None, trainer={"callbacks": [averaging, seen]})
    assert seen.epochs == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(model.selection.scores) == 4


def test_a_rate_finder_leaves_choice_and_teacher(demo, tmp_path):
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    _, model = fit(demo, tmp_path, 2, trainer={"callbacks": [finder]})
    assert len(model.selection.scores) == 2
    assert model.selection.chosen.score == min(model.selection.scores)
    teacher = STPM(**MODEL).model.teacher
    load_teacher(teacher, MODEL["backbone"], MODEL["teacher_weights"])
    torch.testing.assert_close(model.model.teacher.state_dict(), teacher.state_dict(), rtol=0, atol=0)


def test_a_batch_size_finder_is_heard(demo, tmp_path):
    """It ends at 4: two steps an epoch instead of four."""
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    engine, model = fit(demo, tmp_path, 2, batch_size=2, trainer={"callbacks": [finder]})
    assert model.batch_size == 4
    assert engine.trainer.global_step == 4
    assert len(model.selection.scores) == 2


def test_a_collation_of_its_own_is_run_in_each_epoch(demo_root, tmp_path, monkeypatch, caplog):
    datamodule = DemoData(root=demo_root, val_split_mode="none", **TINY)
    calls = []

    def collate(items):
        calls.append(len(items))
        return datamodule.train_data.collate_fn(items)

    datamodule.external_collate_fn = collate
    with caplog.at_level("INFO"):
        fit(datamodule, tmp_path, 2)
    assert "the datamodule's own collation may change images" in caplog.text
    assert sum(calls) == 2 * 10 + 2  # and the held-out ones once more, for the thresholds


# What is refused before an image is read, and what is said afterwards


def read_images(monkeypatch):
    """Places of the images that are read from now on."""
    read, get = [], AnomalibDataset.__getitem__
    monkeypatch.setattr(AnomalibDataset, "__getitem__", lambda data, place: read.append(place) or get(data, place))
    return read


def test_a_quantile_needs_held_out_images(demo, tmp_path, monkeypatch):
    read = read_images(monkeypatch)
    with pytest.raises(STPMError, match="normal_quantile sets thresholds from held-out good images") as error:
        fit(demo, tmp_path, 1, holdout=0, post_processor=STPMPostProcessor(normal_quantile=0.9))
    assert_one_sentence(error)
    assert read == []


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_changes_images_is_refused(precision, demo, tmp_path, monkeypatch):
    read = read_images(monkeypatch)
    with pytest.raises(STPMError, match=f"trainer.precision={precision} would change") as error:
        fit(demo, tmp_path, 1, trainer={"precision": precision})
    assert_one_sentence(error)
    assert read == []


def test_images_of_several_sizes(tmp_path):
    datamodule = drawn(tmp_path / "noise", sizes=((64, 64), (64, 96)))
    normalize = v2.Normalize([0.5] * 3, [0.5] * 3)
    for transform, size in ((normalize, 4), (normalize, 1), (v2.Compose([v2.CenterCrop(64), normalize]), 1)):
        with pytest.raises(STPMError, match=r"training image .*good.*png has 64 x \d+ pixels and others") as error:
            fit(datamodule, tmp_path, 1, pre_processor=PreProcessor(transform), batch_size=size)
        assert_one_sentence(error)
    _, model = fit(datamodule, tmp_path, 1, pre_processor=PreProcessor(transform), batch_size=1, cache="off")
    assert torch.isfinite(model.post_processor.image_threshold)


def test_full_memory_is_no_lost_process():
    trainer = SimpleNamespace(world_size=2, global_rank=1, current_epoch=3, ckpt_path=None, default_root_dir="results")
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**55)
    for error in (full.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert explanation(trainer, error).startswith("out of memory in epoch 3: lower batch_size")
    lost = explanation(trainer, RuntimeError("[gloo] Connection closed by peer"))
    assert lost.startswith("process 1 of 2 lost the others in epoch 3")


def test_a_time_between_validations_validates():
    """Lightning then sets no `val_check_interval` at all."""
    module = SimpleNamespace(evaluator=None)
    assert validates_each_epoch(SimpleNamespace(callbacks=[], check_val_every_n_epoch=1), module)
    whole = SimpleNamespace(callbacks=[], check_val_every_n_epoch=1, val_check_interval=1.0)
    assert not validates_each_epoch(whole, module)


def test_scores_of_an_interrupted_validation_are_forgotten():
    judge = STPMPostProcessor()
    for begun in (False, True):
        if begun:
            judge.on_validation_start(None, None)
        else:
            judge.on_validation_batch_end(None, None, labelled([7.0, 9.0], [0, 1]))  # and then it ends
    judge.on_validation_batch_end(None, None, labelled([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]))
    judge.on_validation_epoch_end(None, None)
    assert 0.2 < float(judge.image_limit) < 0.8
    assert float(judge.image_max) == pytest.approx(0.9)


def labelled(scores, labels):
    """A batch as a model scores it."""
    size = len(scores)
    found = {"pred_score": torch.tensor(scores), "anomaly_map": torch.zeros(size, 1, 4, 4)}
    return ImageBatch(image=torch.zeros(size, 3, 4, 4), gt_label=torch.tensor(labels), **found)


def test_a_checkpoint_loads_without_its_post_processor(demo, tmp_path):
    engine, model = fit(demo, tmp_path, 1)
    raw = STPM.load_from_checkpoint(engine.best_model_path, post_processor=False)
    assert raw.post_processor is None
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(raw.eval().model(image).pred_score, model.eval().model(image).pred_score)
