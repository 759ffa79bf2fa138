import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataset, ImageBatch, InferenceBatch
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from conftest import MODEL, RESNET18, TEACHER, TINY, anomalib, command, fit
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torchvision.transforms import v2

from stpm_plugin import STPM, DemoData
from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.errors import STPMError
from stpm_plugin.model.features import FrozenPyramid
from stpm_plugin.training import selection
from stpm_plugin.training.data import augments, draw_indices, hold_out, share_out
from stpm_plugin.training.feature_cache import _storage
from stpm_plugin.training.schedule import passes_within
from stpm_plugin.training.selection import CHECKPOINT_KEY
from stpm_plugin.training.thresholds import STPMPostProcessor


def student(model: STPM) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in model.model.student.state_dict().values()])


def test_hold_out_is_seeded_and_complete():
    first, again, other = (hold_out(320, 0.2, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 64
    parts = share_out(320, first)
    assert sorted(parts.train + parts.holdout) == list(range(320))


def test_ranks_share_the_images_evenly():
    held = hold_out(21, 0.2, 0, 2)
    parts = [share_out(21, held, rank, 2) for rank in range(2)]
    assert sorted(parts[0].holdout + parts[1].holdout) == held
    assert len(parts[0].train) == len(parts[1].train) == 8
    assert not {*parts[0].train} & {*parts[1].train}
    assert len(hold_out(21, 0.01, 0, 2)) == 2


def test_too_few_images_is_said():
    with pytest.raises(STPMError, match="lower holdout"):
        share_out(2, [0])


def test_augmentation_is_noticed():
    class Data:
        augmentations = v2.Compose([v2.Resize((8, 8))])

    assert not augments(Data, v2.Compose([v2.Resize((8, 8)), v2.Normalize([0.5] * 3, [0.5] * 3)]))
    Data.augmentations = v2.Compose([v2.RandomHorizontalFlip(), v2.Resize((8, 8))])
    assert augments(Data, None)


@pytest.fixture(scope="module")
def reference(demo_root, tmp_path_factory) -> STPM:
    """What three epochs give."""
    return fit(DemoData(root=demo_root, **TINY), tmp_path_factory.mktemp("reference"), 3)[1]


def test_same_seed_same_weights(reference, demo, tmp_path):
    _, again = fit(demo, tmp_path, 3)
    assert torch.equal(student(again), student(reference))


def test_disk_cache_equals_memory_cache(reference, demo, tmp_path):
    folder = tmp_path / "Ort ü 検査"
    callbacks = [_NothingIn(folder)]
    _, other = fit(demo, tmp_path, 3, cache="disk", cache_dir=str(folder), trainer={"callbacks": callbacks})
    assert torch.equal(student(other), student(reference))


class _NothingIn(Callback):
    """A file without a name is gone with its process, however that ends."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_start(self, trainer, pl_module):
        assert pl_module.selection.images._cache is not None
        assert self.folder.is_dir()
        assert not list(self.folder.iterdir())


class _Work:
    """Counts the images that are read for training and the teacher's forward passes."""

    def __init__(self, monkeypatch):
        self.read, self.taught = [], 0
        get, forward = AnomalibDataset.__getitem__, FrozenPyramid.forward

        def getitem(dataset, index):
            if dataset.split == "train":
                self.read.append(index)
            return get(dataset, index)

        def teach(pyramid, images):
            self.taught += len(images)
            return forward(pyramid, images)

        monkeypatch.setattr(AnomalibDataset, "__getitem__", getitem)
        monkeypatch.setattr(FrozenPyramid, "forward", teach)


def test_no_image_is_read_twice_and_no_teacher_runs_twice(demo_root, tmp_path, monkeypatch):
    work = _Work(monkeypatch)
    fit(DemoData(root=demo_root, val_split_mode="none", **TINY), tmp_path, 4)
    assert sorted(work.read) == list(range(10))
    assert work.taught == 10


def test_augmented_training_is_made_anew_and_says_so_once(demo_root, tmp_path, monkeypatch, caplog):
    work = _Work(monkeypatch)
    flips = v2.RandomHorizontalFlip(0.5)
    datamodule = DemoData(root=demo_root, val_split_mode="none", train_augmentations=flips, **TINY)
    with caplog.at_level("INFO"):
        _, model = fit(datamodule, tmp_path, 3)
    assert caplog.text.count("the training images are augmented") == 1
    assert "keeping" not in caplog.text
    assert len(work.read) == work.taught == 3 * 10 + 2  # and the held-out ones once more, for the thresholds
    assert model.selection.chosen.score < 1


def test_data_larger_than_the_memory_share_go_to_disk(reference, demo, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    with caplog.at_level("INFO"):
        _, other = fit(demo, tmp_path, 3, cache_dir=str(tmp_path / "cache"))
    assert f"keeping 10 images and their teacher features in a file in {tmp_path / 'cache'}" in caplog.text
    assert re.search(
        r"at its peak the process will take about [1-9]\.\d\d GiB of memory, 0\.00 GiB of disk", caplog.text
    )
    assert torch.equal(student(other), student(reference))


def test_processes_divide_the_memory_share(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    storages = [_storage("auto", "folder", need, torch.device("cpu"), 2) for need in (250, 251)]
    assert storages == [torch.device("cpu"), Path("folder")]
    assert _storage("memory", "folder", 10**6, torch.device("cpu"), 2) == torch.device("cpu")


def test_features_stay_on_a_gpu_with_room(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert [_storage("auto", "folder", need, gpu, 1) for need in (500, 501, 5001)] == [gpu, cpu, Path("folder")]
    assert [_storage("memory", "folder", need, gpu, 1) for need in (500, 5001)] == [gpu, cpu]
    assert _storage("disk", "folder", 1, gpu, 1) == Path("folder")


@pytest.mark.parametrize(("kept", "weights", "metrics"), [("float32", 1e-3, 0.01), ("float16", 0.05, 0.1)])
def test_cached_equals_uncached(demo_root, tmp_path, monkeypatch, kept, weights, metrics):
    """Equal but for rounding; kept in half precision, the weights drift a little, and the metric of so short a training with them."""
    monkeypatch.setattr("stpm_plugin.training.feature_cache.KEPT_DTYPE", getattr(torch, kept))
    results = []
    for cache in ("memory", "off"):
        datamodule = DemoData(root=demo_root, **TINY)
        engine, model = fit(datamodule, tmp_path / cache, 3, cache=cache, precision="trainer", **RESNET18)
        results.append((student(model), engine.test(model, datamodule=datamodule)[0]["pixel_AUROC"]))
    (cached, cached_metric), (fresh, fresh_metric) = results
    assert (cached - fresh).norm() / fresh.norm() < weights
    assert cached_metric == pytest.approx(fresh_metric, abs=metrics)


def test_resumed_equals_uninterrupted(reference, demo, demo_root, tmp_path):
    engine, _ = fit(demo, tmp_path / "first", 2)
    checkpoint = engine.best_model_path
    _, resumed = fit(DemoData(root=demo_root, **TINY), tmp_path / "second", 3, checkpoint, seed=7)
    torch.testing.assert_close(student(resumed), student(reference), rtol=1e-4, atol=1e-5)
    assert resumed.selection.chosen.epoch == reference.selection.chosen.epoch
    assert resumed.selection.chosen.score == pytest.approx(reference.selection.chosen.score, rel=1e-4)


@pytest.mark.parametrize("before", ["constant", "one-cycle"])
def test_a_finished_run_goes_on_along_a_new_cycle(before, demo, demo_root, tmp_path):
    """Over the steps that are left, up to the new rate and down again, whatever the rate was before."""
    engine, _ = fit(demo, tmp_path / "first", 2, schedule=before, lr=0.3)
    rates = Rates()
    longer = {"schedule": "one-cycle", "lr": 0.2, "trainer": {"callbacks": [rates]}}
    again, _ = fit(DemoData(root=demo_root, **TINY), tmp_path / "second", 4, engine.best_model_path, **longer)
    assert again.trainer.current_epoch == 4
    optimizer = torch.optim.SGD([torch.zeros(1)], 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=len(rates.seen), cycle_momentum=False)
    for rate in rates.seen:
        assert rate == pytest.approx(cycle.get_last_lr()[0])
        optimizer.step()
        cycle.step()
    assert len(rates.seen) == again.trainer.global_step - engine.trainer.global_step == 4


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_chosen_weights_are_everywhere(demo, tmp_path):
    engine, model = fit(demo, tmp_path, 4, lr=1.0)  # a rate at which the score goes up and down
    checkpoint = torch.load(engine.best_model_path, weights_only=True)
    loaded = STPM.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(student(loaded), student(model))
    assert checkpoint[CHECKPOINT_KEY]["score"] == pytest.approx(model.selection.chosen.score)
    assert torch.equal(loaded.post_processor.image_max, model.post_processor.image_max)
    assert not torch.isnan(loaded.post_processor.image_threshold)
    before, after = engine.test(model, datamodule=demo)[0], engine.test(loaded, datamodule=demo)[0]
    assert before == after


def test_a_checkpoint_loads_whatever_was_measured(demo, tmp_path):
    metrics = [AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")]
    engine, model = fit(demo, tmp_path, 1, evaluator=Evaluator(test_metrics=metrics))
    loaded = STPM.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(student(loaded), student(model))


def scored(monkeypatch, values, seen=None):
    """Let the held-out score of each epoch be one of these values."""
    real, values = selection.score, iter(values)

    def score(module, batches):
        if seen is not None:
            seen.append(student(module).clone())
        return next(values), real(module, batches)[1]

    monkeypatch.setattr(selection, "score", score)
    return values


@pytest.mark.parametrize(
    ("values", "epoch"), [([0.5, 0.2, 0.4], 1), ([float("nan"), 0.5, 0.6], 1), ([0.2, float("nan"), 0.1], 2)]
)
def test_the_lowest_holdout_score_is_chosen(values, epoch, demo, tmp_path, monkeypatch):
    seen = []
    left = scored(monkeypatch, values, seen)
    _, model = fit(demo, tmp_path, 3)
    assert model.selection.chosen.epoch == epoch
    assert torch.equal(student(model), seen[epoch])
    assert list(left) == []


def test_no_finite_score_is_said(demo, tmp_path, monkeypatch):
    scored(monkeypatch, [float("nan")] * 2)
    with pytest.raises(STPMError, match=r"no epoch had a finite held-out score \(nan\): lower lr"):
        fit(demo, tmp_path, 2)


def test_thresholds_without_defects(demo_root, tmp_path):
    datamodule = DemoData(root=demo_root, val_split_mode="none", **TINY)
    _, model = fit(datamodule, tmp_path, 1, holdout=0.4, post_processor=STPMPostProcessor(normal_quantile=0.5))
    processor = model.post_processor
    scores = torch.tensor([0.0, 1.0, 9.0]) * processor.image_threshold
    made = processor(InferenceBatch(pred_score=scores, anomaly_map=torch.zeros(3, 1, 2, 2)))
    torch.testing.assert_close(made.pred_score, torch.tensor([0.0, 0.5, 0.9]))
    assert made.pred_label.tolist() == [False, False, True]
    loaded = STPM.load_from_checkpoint(next(tmp_path.rglob("model.ckpt")))
    assert loaded.post_processor.normal_quantile == 0.5
    assert torch.equal(loaded.post_processor.image_threshold, processor.image_threshold)


def test_quantile_by_hand():
    """0.75 of five images: rank ceil(0.75 x 6) = 5, so the highest; 0.6: rank ceil(3.6) = 4."""
    for quantile, image, pixel in ((0.75, 5.0, 10.0), (0.6, 4.0, 9.0)):
        processor = STPMPostProcessor(normal_quantile=quantile)
        processor.set_from_normal_images(torch.tensor([4.0, 1, 3, 2, 5]), torch.tensor([6.0, 7, 8, 9, 10]))
        assert (processor.image_threshold, processor.pixel_threshold) == (image, pixel)
    with pytest.raises(STPMError, match="between 0 and 1"):
        STPMPostProcessor(normal_quantile=1.0)


@pytest.mark.parametrize(("steps", "epochs"), [(None, 2), ((4, 9), 2), ((5, 9), 3), ((0, 3), 1), ((3, 3), 2)])
def test_own_epochs_bound_a_run_that_names_none(steps, epochs, demo, tmp_path):
    """Eight of ten images train, four in a step: two steps an epoch."""
    _, model = fit(demo, tmp_path, None, schedule="one-cycle", epochs=2, steps=steps)
    assert model.trainer.current_epoch == epochs
    assert model.trainer.global_step == 2 * epochs
    assert model.trainer.lr_scheduler_configs[0].scheduler.end == 2 * epochs
    assert model.trainer.progress_bar_metrics["minutes_left"] == 0


def test_of_too_many_images_a_part_is_drawn_and_the_others_are_not_read(demo_root, tmp_path, caplog):
    """Ten images less two held out are four steps of two; two steps take five images, one of them held out."""
    root = shutil.copytree(demo_root, tmp_path / "data")
    data = DemoData(root=root, **TINY)
    images = sorted(root.glob("*/train/good/*.png"))
    drawn = draw_indices(10, 5, seed=3)
    for index in set(range(10)) - set(drawn):
        images[index].write_bytes(b"no image")
    budget = {"steps": (0, 2), "batch_size": 2, "seed": 3}
    with caplog.at_level("INFO"):
        engine, model = fit(data, tmp_path / "first", None, **budget)
    assert engine.trainer.global_step == 2
    assert "one pass over 10 good images would take more steps than `steps` allows: 5 of them are drawn" in caplog.text
    assert model.data_record.names == [images[index].name for index in drawn]
    assert len(model.data_record.held_out) == 1
    _, again = fit(data, tmp_path / "second", None, **budget)
    assert again.data_record == model.data_record
    with pytest.raises(STPMError, match="nothing is left to train: 1 of 1 epochs are done"):
        fit(data, tmp_path / "second", None, Path(engine.best_model_path), **budget)
    with pytest.raises(STPMError, match="cannot be read"):  # a run that names its length takes all
        fit(data, tmp_path / "third", 1, **budget)


@pytest.mark.parametrize("steps", [(5, 3), (-1, 3), (0, 0), (1,)])
def test_a_budget_that_no_run_can_keep_to(steps):
    with pytest.raises(STPMError, match=r"must be the fewest and the most steps, such as \[600, 1400\]"):
        STPM(**MODEL, steps=steps)


def test_passes_within_a_budget():
    """320 images in 152 steps, 48 in 23, 400 in 190, 3000 in 1400: eight passes, or what comes to 600 to 1400 steps."""
    assert [passes_within(steps, 8, (600, 1400)) for steps in (152, 23, 190, 1400)] == [8, 27, 7, 1]
    assert passes_within(152, 8, (1800, 1800)) == 12
    assert passes_within(23, 8, None) == 8


def test_users_validation_changes_no_weights(reference, demo, tmp_path):
    _, model = fit(demo, tmp_path, 3, trainer={"check_val_every_n_epoch": 2})
    assert torch.equal(student(model), student(reference))


def test_holdout_of_zero_takes_the_last_epoch(demo, tmp_path):
    _, model = fit(demo, tmp_path, 2, holdout=0)
    assert model.selection.chosen.epoch == 1


def test_a_second_fit_chooses_anew(demo, tmp_path):
    engine, model = fit(demo, tmp_path, 1)
    first = model.selection.chosen
    engine.trainer.fit_loop.max_epochs = 2
    engine.fit(model, datamodule=demo)
    assert model.selection.chosen is not first
    assert model.selection.chosen.epoch == 1


def test_the_trainer_gets_its_datamodule_back(demo, tmp_path):
    before = dict(vars(demo))
    engine, _ = fit(demo, tmp_path, 1)
    assert type(engine.trainer.datamodule) is DemoData
    assert {name for name in vars(demo) if vars(demo)[name] is not before.get(name)} <= {
        "trainer", "train_data", "val_data", "test_data", "_is_setup", "_category", "_hparams"
    }  # fmt: skip


class _Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_one_cycle_rises_and_falls(demo, tmp_path):
    rates = _Rates()
    fit(demo, tmp_path, 5, schedule="one-cycle", trainer={"callbacks": [rates]})
    peak = rates.rates.index(max(rates.rates))
    assert max(rates.rates) == pytest.approx(MODEL["lr"], rel=0.05)
    assert rates.rates[: peak + 1] == sorted(rates.rates[: peak + 1])
    assert rates.rates[peak:] == sorted(rates.rates[peak:], reverse=True)
    assert rates.rates[-1] < 1e-3 * MODEL["lr"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"holdout": 1.5}, "holdout=1.5"),
        ({"layers": ["layer7"]}, "layer1 (1)"),
        ({"score_area": -1}, "score_area=-1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(STPMError) as error:
        STPM(**{**MODEL, **arguments})
    assert words in str(error.value)


def test_plain_loaders_are_refused(demo, tmp_path):
    demo.prepare_data()
    demo.setup()
    with pytest.raises(STPMError, match="datamodule instead of data loaders"):
        Engine(default_root_dir=tmp_path).fit(STPM(**MODEL), train_dataloaders=demo.train_dataloader())


def test_untrained_model_is_refused(demo, tmp_path):
    with pytest.raises(STPMError, match="ckpt_path"):
        Engine(default_root_dir=tmp_path, accelerator="cpu").test(STPM(**MODEL), datamodule=demo)


def test_unreadable_image_is_named(demo_root, tmp_path):
    root = shutil.copytree(demo_root, tmp_path / "data")
    broken = sorted(root.glob("*/train/good/*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(STPMError) as error:
        fit(DemoData(root=root, **TINY), tmp_path / "run", 1)
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_that_a_worker_cannot_read_is_named(demo_root, tmp_path):
    """In a process of its own: with Python 3.13, workers forked from a test's crash it when they fail."""
    good = Path(shutil.copytree(next(demo_root.glob("*/train/good")), tmp_path / "good"))
    broken = sorted(good.iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    options = ["--model.init_args.image_size=[64,64]", "--trainer.accelerator=cpu", "--data.init_args.num_workers=1"]
    said = command("stpm", "train", "good", "--teacher", str(TEACHER), *options, check=False, cwd=tmp_path)
    assert f"{broken} cannot be read" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_an_image_that_vanishes_is_named_and_the_last_checkpoint_stays(demo_root, tmp_path):
    """Augmented images are read again in each epoch."""
    root = shutil.copytree(demo_root, tmp_path / "data")
    datamodule = DemoData(root=root, train_augmentations=v2.RandomHorizontalFlip(0.5), **TINY)
    gone = sorted(root.glob("*/train/good/*.png"))[3]
    with pytest.raises(STPMError, match=rf"^training image {gone} cannot be read .*No such file"):
        fit(datamodule, tmp_path / "run", 3, trainer={"callbacks": [_Removes(gone)]})
    assert torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=True)["epoch"] == 0


class _Removes(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.path.unlink()


def test_deep_grey_is_refused_where_anomalib_reads(trained, demo_root, tmp_path):
    """Pillow's conversion, which anomalib takes, would make it white."""
    root = shutil.copytree(demo_root, tmp_path / "data")
    datamodule = DemoData(root=root, **TINY)
    deep = sorted(root.glob("*/train/good/*.png"))[3]
    Image.fromarray(np.full((64, 64), 20_000, np.uint16)).save(deep)
    with pytest.raises(STPMError, match=f"^training image {deep} has grey values of more than 8 bits"):
        fit(datamodule, tmp_path / "run", 1)
    with pytest.raises(STPMError, match=f"^{deep} has grey values of more than 8 bits"):
        predict(trained, deep)


def predict(checkpoint, image):
    engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False)
    return engine.predict(STPM(), data_path=image, ckpt_path=checkpoint)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_bad_checkpoints_are_refused(trained, exported, demo, demo_root, tmp_path, caplog, capsys):
    """One is cut off, the other runs code if it is unpickled: by every command that reads a checkpoint."""
    half, bomb = tmp_path / "half.ckpt", tmp_path / "bomb.ckpt"
    half.write_bytes(trained.read_bytes()[:100_000])
    torch.save({**torch.load(trained, weights_only=True), "bomb": Bomb()}, bomb)
    images = next(demo_root.glob("*/test/good"))
    for checkpoint, words in ((half, "is truncated or not a checkpoint"), (bomb, "contains more than tensors and")):
        said = f"the checkpoint {checkpoint} {words}"
        for read in (lambda path: predict(path, images), lambda path: fit(demo, tmp_path / "run", 5, path)):
            caplog.clear()
            with pytest.raises((RuntimeError, pickle.UnpicklingError)):
                read(checkpoint)
            assert f"STPM: {said}" in caplog.text
        with pytest.raises(STPMError, match=re.escape(said)):
            Engine(logger=False).export(STPM(**MODEL), "openvino", tmp_path / "out", ckpt_path=checkpoint)
        assert stpm(["verify", str(checkpoint), str(exported), str(images)]) == 1
        assert capsys.readouterr().err.strip().startswith(said)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(("labels", "threshold"), [([0, 0, 1, 1], 0.5), ([1, 1, 1, 1], 0.099), ([0, 0, 0, 0], 0.7)])
def test_threshold_lies_between_images(labels, threshold):
    """Best F1 from 0.6 up, so half-way between 0.4 and 0.6; if one kind is missing, below the lowest or the highest."""
    processor = STPMPostProcessor()
    scores = torch.tensor([0.1, 0.4, 0.6, 0.7])
    maps = scores.reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    batch = ImageBatch(
        image=maps.expand(4, 3, 2, 2), gt_label=torch.tensor(labels), pred_score=scores, anomaly_map=maps
    )
    processor.on_validation_batch_end(None, None, batch)
    processor.on_validation_epoch_end(None, None)
    assert processor.image_threshold == pytest.approx(threshold)


def test_anomalous_training_image_is_refused(demo, tmp_path):
    demo.prepare_data()
    demo.setup()
    demo._is_setup = True
    demo.train_data.samples.loc[2, "label_index"] = 1
    with pytest.raises(STPMError, match="1 of 10 training images are labelled anomalous"):
        fit(demo, tmp_path, 1)


def test_non_finite_loss_keeps_the_last_checkpoint(demo, tmp_path):
    with pytest.raises(STPMError, match=r"the loss is nan in epoch 1, batch \d+: lower lr"):
        fit(demo, tmp_path, 3, trainer={"callbacks": [_Poison()]})
    checkpoint = torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(torch.isfinite(tensor).all() for name, tensor in checkpoint["state_dict"].items() if "student" in name)


class _Poison(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            next(pl_module.model.student.parameters()).data.fill_(float("nan"))


def test_full_disk_goes_on_without_a_cache(demo, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.warns(UserWarning, match="Point cache_dir at a larger disk"):
        _, model = fit(demo, tmp_path, 1, cache="disk")
    assert model.selection.chosen is not None


def test_a_full_disk_is_said(demo, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.trainer.trainer.Trainer.save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        fit(demo, tmp_path, 1)
    assert f"STPM: the disk of {tmp_path}" in caplog.text


def test_a_full_disk_leaves_the_last_checkpoint_whole(demo, tmp_path, monkeypatch):
    engine, _ = fit(demo, tmp_path, 1, **RESNET18)
    before = Path(engine.best_model_path).read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(STPMError, match=r"a checkpoint may take 1\d MiB and the disk of .* has 1: make room"):
        engine.trainer.save_checkpoint(engine.best_model_path)
    assert Path(engine.best_model_path).read_bytes() == before


def test_trained_demo_beats_chance_through_the_command(tmp_path):
    """Five epochs on few small images: enough to tell defects from good parts far better than chance."""
    root = Path(__file__).parents[1]
    anomalib(
        "train", "-c", str(root / "configs/demo.yaml"), "--model.init_args.image_size", "[128,128]",
        "--trainer.max_epochs", "5", "--data.init_args.train_images", "40", "--data.init_args.test_images", "2", "--trainer.enable_progress_bar", "false",
        "--trainer.logger", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}",
        cwd=tmp_path,
    )  # fmt: skip
    metrics = next(tmp_path.glob("logs/**/metrics.csv")).read_text().splitlines()
    last = dict(zip(metrics[0].split(","), metrics[-1].split(","), strict=True))
    assert float(last["pixel_AUROC"]) > 0.8, json.dumps(last)
    assert list(tmp_path.glob("results/STPM/DemoData/*/latest/images/**/*.png"))
    assert list(tmp_path.glob("results/STPM/DemoData/*/latest/weights/openvino/model.xml"))
