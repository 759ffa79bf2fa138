import pytest
import torch
from anomalib.pre_processing import PreProcessor
from conftest import MODEL
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2.functional import resize

from stpm_plugin import STPM
from stpm_plugin.errors import STPMError
from stpm_plugin.model.pre_processing import AntialiasedResize, STPMPreProcessor, resize_weights


def test_weights_by_hand():
    # Halving 4 pixels to 2: a triangle of half-width 2 centred at 1 and at 3, pixels at 0.5, 1.5, 2.5, 3.5.
    got = resize_weights(4, 2, torch.zeros(()))
    row = torch.tensor([0.75, 0.75, 0.25, 0.0]) / 1.75
    torch.testing.assert_close(got, torch.stack([row, row.flip(0)]))


@pytest.mark.parametrize("size", [(900, 700), (513, 257), (256, 256), (101, 333), (64, 1000)])
def test_equals_torchvisions_antialiased_resize(size):
    images = torch.rand(2, 3, *size)
    got = AntialiasedResize((256, 256))(images)
    torch.testing.assert_close(got, resize(images, [256, 256], antialias=True), rtol=1e-4, atol=1e-5)


def test_exported_form_equals_the_lightning_form():
    processor = STPMPreProcessor(image_size=(96, 64))
    images = torch.rand(1, 3, 203, 151)
    torch.testing.assert_close(processor(images), processor.transform(images), rtol=1e-4, atol=1e-4)
    restored = STPMPreProcessor()
    restored.load_checkpoint_config(processor.checkpoint_config())
    torch.testing.assert_close(restored(images), processor(images))


def test_a_resize_that_does_not_antialias_stays_as_it_is():
    transform = Compose([Resize((32, 32), antialias=False), Normalize([0.5] * 3, [0.5] * 3)])
    images = torch.rand(1, 3, 100, 90)
    torch.testing.assert_close(STPMPreProcessor(transform)(images), transform(images))


@pytest.mark.parametrize(
    "made",
    [
        PreProcessor(Compose([Resize((64, 64), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])),
        STPMPreProcessor(Resize((64, 64), InterpolationMode.BICUBIC, antialias=True)),
        STPMPreProcessor(Compose([Resize(72, antialias=True), CenterCrop((64, 64))])),
    ],
)
def test_an_export_that_would_not_antialias_is_refused(made, tmp_path):
    model = STPM(**{**MODEL, "pre_processor": made})
    model.trained = True
    for export in (model.to_torch, model.to_onnx, model.to_openvino):
        with pytest.raises(STPMError, match="its exported form would not, so scores would differ"):
            export(tmp_path)
