"""What a checkpoint carries, what the caller may state against it, and checkpoints of other versions and models."""

import inspect
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from conftest import MODEL, TINY, anomalib, checkpoint_in, fit
from test_routes import CPU, HEAD, engine, same, scored

from stpm_plugin import STPM, DemoData, STPMPostProcessor, STPMPreProcessor
from stpm_plugin.deployment.int8 import indices_of
from stpm_plugin.errors import STPMError
from stpm_plugin.false_alarms import limit
from stpm_plugin.training.data_record import identify, paths_of
from stpm_plugin.training.lightning_model import default_pre_processor

SETTINGS = {**HEAD, "layers": ["layer1", "layer2"], "image_size": (48, 80), "holdout": 0.3, "visualizer": False}
SAVED = {"normal_quantile": 0.8, "image_sensitivity": 0.4}


@pytest.fixture(scope="session")
def data(demo_root):
    return lambda: DemoData(root=demo_root, **TINY)


@pytest.fixture(scope="session")
def of_quantile(once, data) -> Path:
    """A checkpoint whose thresholds come from held-out good images."""
    settings = {"post_processor": STPMPostProcessor(**SAVED), **SETTINGS}
    return checkpoint_in(once("of_quantile", lambda out: fit(data(), out, 3, **settings)))


@pytest.fixture(scope="session")
def of_f1(once, data) -> Path:
    """A checkpoint whose thresholds come from the validation set."""
    return checkpoint_in(once("of_f1", lambda out: fit(data(), out, 3, **SETTINGS)))


# What the caller states


AGAINST = {
    "backbone": "resnet34",
    "layers": ["layer1"],
    "image_size": (64, 64),
    "pre_processor": STPMPreProcessor(image_size=(48, 80), mean=(0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("name", AGAINST)
def test_another_architecture_or_size_is_refused(name, of_quantile, data):
    stated = {name: AGAINST[name]}
    with pytest.raises(STPMError, match=rf"^(?s:.)*{name}.* contradicts the checkpoint.*: omit {name}\.$") as said:
        engine().test(STPM(**stated), datamodule=data(), ckpt_path=of_quantile)
    assert len(str(said.value).splitlines()) == 1
    with pytest.raises(STPMError, match=f"omit {name}"):
        STPM.load_from_checkpoint(of_quantile, **stated)


@pytest.mark.parametrize(
    "default",
    [
        {"layers": ("layer1", "layer2", "layer3")},
        {"image_size": (256, 256)},
        {"layers": [1, 2, 3]},
        {"pre_processor": False},
    ],
)
def test_a_default_that_is_given_in_python_is_stated_too(default, of_quantile):
    with pytest.raises(STPMError, match=f"omit {next(iter(default))}"):
        STPM.load_from_checkpoint(of_quantile, **default)


def test_what_the_checkpoint_says_may_be_stated(of_quantile, data):
    stated = {"backbone": MODEL["backbone"], "layers": [1, 2], "image_size": (48, 80), "visualizer": False}
    bare = scored(STPM(visualizer=False), data(), of_quantile)
    assert same(bare, scored(STPM(**stated), data(), of_quantile))
    assert same(bare, scored(STPM.load_from_checkpoint(of_quantile, **stated), data()))
    own = default_pre_processor(MODEL["backbone"], (48, 80))
    assert same(bare, scored(STPM(pre_processor=own, image_size=(32, 32), visualizer=False), data(), of_quantile))


def test_an_image_size_beside_a_pre_processor_means_nothing(data, tmp_path):
    given = {**SETTINGS, "image_size": (32, 32), "pre_processor": STPMPreProcessor(image_size=(48, 80))}
    trained_by, model = fit(data(), tmp_path, 1, **given)
    checkpoint = trained_by.best_model_path
    assert STPM.load_from_checkpoint(checkpoint).network_size == (48, 80)
    assert same(scored(model, data()), scored(STPM(image_size=(32, 32), visualizer=False), data(), checkpoint))


@pytest.mark.parametrize("route", ["Engine", "load_from_checkpoint"])
def test_a_stated_head_is_honoured_with_a_warning(route, of_quantile, data):
    name, default = "score_area", inspect.signature(STPM).parameters["score_area"].default
    value = 2 * default if route == "Engine" else default  # in Python a default is a statement
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if route == "Engine":
            model = STPM(**{name: value}, visualizer=False)
            scored(model, data(), of_quantile)
        else:
            model = STPM.load_from_checkpoint(of_quantile, **{name: value})
    assert getattr(model.model, name) == value == model.get_extra_state()[name]
    said = [str(one.message) for one in caught if "as set here" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith(f"STPM: {name}={value} as set here, instead of the checkpoint's {HEAD[name]}:")


LINE = "STPM: image_sensitivity=0.9 as set here, instead of the checkpoint's 0.4."


def test_a_stated_sensitivity_is_honoured(of_quantile, data, caplog):
    caplog.set_level(logging.INFO)
    by_engine = STPM(post_processor=STPMPostProcessor(image_sensitivity=0.9), visualizer=False)
    found = scored(by_engine, data(), of_quantile)
    assert [one.label for one in found.values()] == [one.score > 1 - 0.9 for one in found.values()]
    assert caplog.text.count(LINE) == 1
    loaded = STPM.load_from_checkpoint(of_quantile, post_processor=STPMPostProcessor(image_sensitivity=0.9))
    assert caplog.text.count(LINE) == 2
    for model in (by_engine, loaded):
        assert (model.post_processor.image_sensitivity, model.post_processor.normal_quantile) == (0.9, 0.8)
    assert STPM.load_from_checkpoint(of_quantile).post_processor.image_sensitivity == 0.4
    assert caplog.text.count(LINE) == 2


def test_a_stated_quantile_sets_thresholds_from_the_saved_scores(of_quantile, of_f1, data):
    for checkpoint in (of_quantile, of_f1):
        saved = STPM.load_from_checkpoint(checkpoint).post_processor
        asked = STPMPostProcessor(normal_quantile=0.6)
        by_engine = STPM(post_processor=STPMPostProcessor(normal_quantile=0.6), visualizer=False)
        scored(by_engine, data(), checkpoint)
        for post_processor in (
            STPM.load_from_checkpoint(checkpoint, post_processor=asked).post_processor,
            by_engine.post_processor,
        ):
            scores, maxima = (torch.tensor(v).numpy() for v in (saved.held_out_scores, saved.held_out_maxima))
            assert float(post_processor.image_threshold) == pytest.approx(limit(scores, 0.6).value)
            assert float(post_processor.pixel_threshold) == pytest.approx(limit(maxima, 0.6).value)
            assert post_processor.basis == "held-out good images"
            assert float(post_processor.image_threshold) != pytest.approx(float(saved.image_threshold))


def test_the_command_line_honours_and_refuses(of_quantile, demo_root, tmp_path):
    line = [
        "test", "--model", "STPM", "--ckpt_path", str(of_quantile), "--trainer.accelerator", "cpu",
        "--data", "stpm_plugin.DemoData", f"--data.root={demo_root}", *(f"--data.{k}={v}" for k, v in TINY.items()),
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    sensitive = ["--model.post_processor", "stpm_plugin.STPMPostProcessor"]
    sensitive += ["--model.post_processor.image_sensitivity", "0.9"]
    output = anomalib(*line, *sensitive, cwd=tmp_path)
    assert output.count(LINE) == 1
    assert "image_AUROC" in output
    output = anomalib(*line, "--model.layers", "[layer1]", check=False, cwd=tmp_path)
    assert output.strip().endswith(
        "STPMError: layers=['layer1'] contradicts the checkpoint, which has layers=['layer1', 'layer2']: omit layers."
    )
    assert "running_var" not in output  # no list of the tensors that do not fit


# Untrained, and saved again


def test_an_untrained_model_is_refused_everywhere(data, demo_root, tmp_path):
    model, images = STPM(**MODEL), next(demo_root.glob("*/test/good"))
    for use in (
        lambda: engine().validate(model, datamodule=data()),
        lambda: engine().test(model, datamodule=data()),
        lambda: engine().predict(model, data_path=images),
        lambda: model.to_torch(tmp_path),
        lambda: model.to_onnx(tmp_path),
        lambda: model.to_openvino(tmp_path),
        lambda: model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=data()),
    ):
        with pytest.raises(STPMError, match="this STPM is untrained"):
            use()
    assert not list(tmp_path.rglob("model.*"))


def test_a_checkpoint_saved_again_keeps_all(of_quantile, data, tmp_path):
    own = engine()
    own.test(STPM(visualizer=False), datamodule=data(), ckpt_path=of_quantile, verbose=False)
    own.trainer.save_checkpoint(tmp_path / "again.ckpt")
    first, again = STPM.load_from_checkpoint(of_quantile), STPM.load_from_checkpoint(tmp_path / "again.ckpt")
    assert again.get_extra_state() == first.get_extra_state()
    assert all(torch.equal(tensor, first.model.state_dict()[name]) for name, tensor in again.model.state_dict().items())
    assert same(scored(first, data()), scored(again, data()))


# Other versions and other models


def as_version_0_1_0(source: Path, target: Path) -> Path:
    """Rewrite a checkpoint as version 0.1.0 saved it."""
    checkpoint = torch.load(source, weights_only=True)
    tensors = checkpoint["state_dict"]
    del tensors["_extra_state"]
    for kind in ("image", "pixel"):
        limit = tensors.pop(f"post_processor.{kind}_limit")
        if not limit.isnan():
            tensors[f"post_processor._{kind}_threshold"] = limit
    for name in ("basis", "held_out_scores", "held_out_maxima"):
        del checkpoint["anomalib_post_processor_config"][name]
    checkpoint["stpm"]["data_seed"] = 0
    share = 0.02 if checkpoint["hyper_parameters"].pop("score_area") else 0.0
    checkpoint["hyper_parameters"] |= {"score_share": share, "level_power": 0.0, "finest_weight": 1.0}
    tensors["model.level_scales"] = torch.ones(2)
    torch.save(checkpoint, target)
    return target


def test_a_checkpoint_of_an_older_head_is_refused(of_quantile, data, tmp_path):
    """Of version 0.1, and of 0.2: by each route, before anything is computed with it."""
    old = as_version_0_1_0(of_quantile, tmp_path / "old.ckpt")
    checkpoint = torch.load(of_quantile, weights_only=True)
    checkpoint["state_dict"]["_extra_state"] |= {
        "format": 1,
        "score_share": 0.02,
        "level_power": -1.0,
        "finest_weight": 0.5,
    }
    torch.save(checkpoint, newer := tmp_path / "newer.ckpt")
    words = (
        r"^the checkpoint is of stpm_plugin 0.1 or 0.2, and its .*\(score_share 0.02, level_power {}.*train .* again"
    )
    for path, power in ((old, 0), (newer, -1)):
        with pytest.raises(STPMError, match=words.format(power)):
            STPM.load_from_checkpoint(path)
        with pytest.raises(STPMError, match=words.format(power)):
            scored(STPM(visualizer=False), data(), path)
    with pytest.raises(STPMError, match=words.format(-1)):
        STPM(visualizer=False).load_state_dict(checkpoint["state_dict"])


@pytest.mark.parametrize("post_processor", [STPMPostProcessor(**SAVED), True])
def test_a_checkpoint_of_version_0_1_0_with_the_papers_head_gives_the_same_verdicts(post_processor, data, tmp_path):
    settings = SETTINGS | {"score_area": 0, "post_processor": post_processor}
    new = Path(fit(data(), tmp_path, 1, **settings)[0].best_model_path)
    old = as_version_0_1_0(new, tmp_path / "old.ckpt")
    expected = scored(STPM(visualizer=False), data(), new)
    assert same(expected, scored(STPM(visualizer=False), data(), old))
    loaded = STPM.load_from_checkpoint(old)
    assert same(expected, scored(loaded, data()))
    assert "false alarms unknown" in loaded.post_processor.report()
    assert loaded.data_record is None
    with pytest.warns(UserWarning, match="contains no held-out scores .* normal_quantile has no effect"):
        stated = STPM.load_from_checkpoint(old, post_processor=STPMPostProcessor(normal_quantile=0.6))
    assert same(expected, scored(stated, data()))


@pytest.fixture(scope="session")
def of_padim(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("padim")
    own = Engine(default_root_dir=folder, **CPU)
    own.fit(
        Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8, visualizer=False),
        datamodule=data(),
    )
    return Path(own.best_model_path)


def test_another_models_checkpoint_is_refused(of_padim, data):
    said = r"^the checkpoint .*ckpt holds a model other than STPM \(.*\): pass a checkpoint of STPM\.$"
    with pytest.raises(STPMError, match=said):
        engine().test(STPM(), datamodule=data(), ckpt_path=of_padim)
    with pytest.raises(STPMError, match="holds a model other than STPM"):
        STPM.load_from_checkpoint(of_padim)


def test_anomalibs_post_processor_is_followed(data, tmp_path):
    trained_by, model = fit(data(), tmp_path, 1, post_processor=PostProcessor(), **SETTINGS)
    expected = scored(model, data())
    assert same(expected, scored(STPM(visualizer=False), data(), trained_by.best_model_path))
    assert same(expected, scored(STPM.load_from_checkpoint(trained_by.best_model_path), data()))


# Tiles


def test_a_tiler_is_part_of_the_model(data, tmp_path, monkeypatch):
    tiles = TilerConfigurationCallback(enable=True, tile_size=32, stride=32)
    trainer = {"callbacks": [tiles]}
    trained_by, model = fit(data(), tmp_path, 2, trainer=trainer, **{**SETTINGS, "image_size": (64, 64)})
    expected = scored(model, data())
    bare = STPM(visualizer=False)
    assert same(expected, scored(bare, data(), trained_by.best_model_path))
    assert (bare.model.tiler.tile_size_h, bare.model.tiler.stride_w) == (32, 32)
    loaded = STPM.load_from_checkpoint(trained_by.best_model_path)
    assert same(expected, scored(loaded, data()))
    bare.model.tiler = None
    assert not same(expected, scored(bare, data()))
    for export in (loaded.to_onnx, loaded.to_openvino):
        with pytest.raises(STPMError, match="a tiled model cannot be exported to ONNX or OpenVINO"):
            export(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    exported = torch.load(loaded.to_torch(tmp_path), weights_only=False)["model"].eval()
    item = data_item(data())
    with torch.no_grad():
        score = exported(item.image[None]).pred_score
    assert float(score) == pytest.approx(expected[item.image_path].score, abs=1e-5)


def data_item(datamodule):
    datamodule.setup("test")
    return datamodule.test_data[0]


def test_tiles_that_do_not_fit_are_refused(data, tmp_path):
    tiles = TilerConfigurationCallback(enable=True, tile_size=40, stride=40)
    with pytest.raises(STPMError, match="40 x 40 pixels every 40 x 40 do not cover 64 x 64 evenly"):
        fit(data(), tmp_path, 1, trainer={"callbacks": [tiles]}, **{**SETTINGS, "image_size": (64, 64)})


# Thresholds, and the images of INT8


def test_pixel_threshold_comes_from_the_held_out_maps(of_quantile, data):
    model = STPM.load_from_checkpoint(of_quantile).eval()
    post_processor, held = model.post_processor, model.data_record.held_out
    datamodule = data()
    datamodule.setup("fit")
    with torch.no_grad():
        maps = [model.model(model.transform(datamodule.train_data[i].image[None])).anomaly_map.max() for i in held]
    maxima = torch.stack(maps).sort().values
    torch.testing.assert_close(torch.tensor(post_processor.held_out_maxima), maxima, rtol=1e-4, atol=1e-6)
    assert len(held) == 3
    threshold = limit(maxima.numpy(), 0.8).value
    assert float(post_processor.pixel_threshold) == pytest.approx(threshold, rel=1e-4)
    report = post_processor.report()
    assert "from the held-out good images; expected false alarms 20.00%" in report
    assert "3 held-out good images are too few for a quantile of 0.8, which needs 4" in report


def test_int8_finds_its_images_by_content(of_quantile, data, demo_root, tmp_path):
    record = STPM.load_from_checkpoint(of_quantile).data_record
    changed = tmp_path / "data"
    shutil.copytree(demo_root, changed)
    good = next(changed.glob("*/train/good"))
    for index, path in enumerate(sorted(good.iterdir(), reverse=True)):
        path.rename(good / f"renamed {index}.png")
    shutil.copy(next(changed.glob("*/test/good/*")), good / "a new one.png")
    datamodule = DemoData(root=changed, **TINY)
    datamodule.setup("fit")
    trained, held_out = indices_of(datamodule.train_data, record)
    _, _, digests = identify(paths_of(datamodule.train_data))
    assert len(digests) == 11
    assert (len(trained), len(held_out)) == (7, 3)
    assert {digests[place] for place in held_out} == {record.digests[place] for place in record.held_out}
    assert not {digests[place] for place in held_out} & record.trained_digests
    assert "a new one.png" not in {paths_of(datamodule.train_data)[place].name for place in trained + held_out}


def test_int8_refuses_other_data_and_says_what_it_does_not_know(of_quantile, data, demo_root, tmp_path):
    record = STPM.load_from_checkpoint(of_quantile).data_record
    other = DemoData(root=tmp_path, **{**TINY, "seed": 1, "train_images": 2})
    other.setup("fit")
    with pytest.raises(
        STPMError, match=r"2 good images contain 0 of the 7 that trained it and 0 of its 3 held-out ones"
    ):
        indices_of(other.train_data, record)
    datamodule = data()
    datamodule.setup("fit")
    with pytest.warns(UserWarning, match="does not record which images trained it"):
        assert indices_of(datamodule.train_data, None) == (list(range(10)), [])
