"""Train a small teacher: the classification run behind ``tests/cifar10_teacher.safetensors``.

    python -m benchmarks.pretrain_teacher --data folder --root cifar10 --out teacher.safetensors
    python -m benchmarks.pretrain_teacher --data mnist --root data --out teachers/mnist.safetensors   # for questions.py

Data: a folder in torchvision's layout (``train/CLASS/*`` and ``test/CLASS/*``), or CIFAR-10, CIFAR-100, SVHN or
MNIST by torchvision's loaders, which download. A ResNet-18 cut after its last used layer, average pooling and one
linear layer learn the classes; the network without the linear layer is saved in half precision, under
torchvision's tensor names.

The images are trained on enlarged (``--size``): the stem of an ImageNet network divides the size by four before
the first layer, which leaves too little of 32 x 32 pixels. ``--shuffle-labels`` gives each training image a label
by lot, to see what a teacher carries that has seen the images and learnt no classes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torchvision
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from stpm_plugin.model.features import FeaturePyramid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # STPM's images come normalised so


class Classifier(nn.Module):
    """A feature pyramid with average pooling and a linear layer on its last level."""

    def __init__(self, backbone: str, layers: list[str], classes: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(backbone, layers)
        self.head = nn.Linear(self.pyramid.channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to class logits (B, classes)."""
        return self.head(self.pyramid(images)[-1].mean((2, 3)))


def read(data: str, root: str, train: bool, size: int) -> tuple[Tensor, Tensor, int]:
    """Read one split as uint8 images (N, 3, size, size), labels (N,) and the number of classes."""
    to_image = v2.Compose([v2.Grayscale(3) if data == "mnist" else v2.RGB(), v2.Resize((size, size)), v2.PILToTensor()])
    split = "train" if train else "test"
    if data == "folder":
        dataset = torchvision.datasets.ImageFolder(Path(root) / split, to_image)
    elif data == "svhn":
        dataset = torchvision.datasets.SVHN(root, split, to_image, download=True)
    else:
        loaders = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}
        dataset = getattr(torchvision.datasets, loaders[data])(root, train, to_image, download=True)
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.long)
    for index in track(range(len(dataset)), description=f"reading {split}"):
        images[index], labels[index] = dataset[index]
    return images, labels, int(labels.max()) + 1


def prepare(images: Tensor, size: int, augment: bool) -> Tensor:
    """Turn uint8 images into normalised ones (B, 3, size, size), with pad-and-crop and flips when training."""
    if augment:
        pad = images.shape[-1] // 8
        padded = F.pad(images.float(), (pad,) * 4, mode="reflect")
        side = images.shape[-1]
        tops, lefts = torch.randint(0, 2 * pad + 1, (2, len(images))).tolist()
        images = torch.stack([p[:, y : y + side, x : x + side] for p, y, x in zip(padded, tops, lefts, strict=True)])
        flips = torch.rand(len(images)) < 0.5
        images[flips] = images[flips].flip(-1)
    images = images.float() / 255
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return v2.functional.normalize(images, MEAN, STD).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int, dtype: torch.dtype) -> float:
    """Share of correctly classified images, in [0, 1]."""
    model.eval()
    correct = 0
    for chunk, target in zip(images.split(250), labels.split(250), strict=True):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            correct += int((model(prepare(chunk, size, augment=False)).argmax(1) == target).sum())
    return correct / len(labels)


def main() -> None:
    """Train, measure, save the weights and one JSON row beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("folder", "cifar10", "cifar100", "svhn", "mnist"), default="cifar10")
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["layer1", "layer2", "layer3"])
    parser.add_argument("--read-size", type=int, default=32, help="side at which images are kept, pixels")
    parser.add_argument("--size", type=int, default=64, help="side at which the network sees them, pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="peak of the one-cycle schedule (SGD, Nesterov)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle-labels", action="store_true", help="train on labels drawn by lot")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()

    given = {key: value for key, value in vars(args).items() if value is not False}
    given["layers"] = " ".join(args.layers)
    started = time.time()
    torch.manual_seed(args.seed)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    images, labels, classes = read(args.data, args.root, True, args.read_size)
    if args.shuffle_labels:
        labels = labels[torch.randperm(len(labels))]
    test_images, test_labels, _ = read(args.data, args.root, False, args.read_size)
    model = Classifier(args.backbone, args.layers, classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps * args.epochs, pct_start=0.2)
    history = []
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images))[: steps * args.batch_size].view(steps, -1)
        total = 0.0
        for chosen in track(order, description=f"epoch {epoch + 1}/{args.epochs}"):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                logits = model(prepare(images[chosen], args.size, augment=True))
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        history.append(round(total / steps, 4))
        print(f"epoch {epoch + 1}: loss {history[-1]}, {time.time() - started:.0f} s", flush=True)
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.pyramid.net.state_dict().items()
    }
    model.pyramid.net.load_state_dict(tensors)  # measured as it ships, in half precision
    row = {
        "command": "python -m benchmarks.pretrain_teacher "
        + " ".join(f"--{key.replace('_', '-')} {value}".removesuffix(" True") for key, value in given.items()),
        "date": time.strftime("%Y-%m-%d"),
        "test_accuracy": accuracy(model, test_images, test_labels, args.size, torch.float32),
        "loss_by_epoch": history,
        "seconds": round(time.time() - started),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, {"trained_on": args.data, "test_accuracy": str(row["test_accuracy"])})
    args.out.with_suffix(".json").write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
