"""BYOL on 32-pixel images in plain PyTorch, by the settings of lightly's benchmark for CIFAR-10 when its 86.9 % were measured (commit
42a6a924 of April 2023, docs/source/getting_started/benchmarks/cifar10_benchmark.py: both views are SimCLR's at strength 0.5, without
blur): the other side of `gpu_check.py --parts learn`, which asks whether mentee learns as much.

DATA is a folder of shards that `mentee shard` wrote, with train/ and test/. Images lie on the device as bytes; views are made there by
torchvision's definitions (bilinear crops, jitter in a random order, grey, solarization of view 2 if asked for), the order of the jitter's
parts being one for a whole batch. SGD with the same decay for all parameters, cosine by epoch, teacher 0.99. Every few epochs and at the
end it prints one JSON object: epoch, loss (of both views, 2 - 2 cos each: the last step's), knn_top1 (k = 200, T = 0.1, cosine, all
training images), seconds. With --network lightly there is no ReLU behind the first norm (its encoder is put together of the modules of a
ResNet whose first ReLU is a function), and the heads' biases are in their last layers instead of their first.
"""

import argparse
import copy
import io
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bench_step import head, resnet

SIDE = 32
GREY = (0.2989, 0.587, 0.114)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as lightly has it
TRIES = 10  # of a crop, as torchvision has it


def files(folder):
    """Extension and content of everything in the shards of a folder, in order."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                yield entry.name.rsplit(".", 1)[-1], archive.extractfile(entry).read()


def read(folder, limit):
    """Images [N, 3, 32, 32] of bytes, and labels [N]."""
    images, labels = [], []
    for extension, data in files(folder):
        if extension in ("jpg", "jpeg", "png"):
            images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        elif extension == "cls":
            labels.append(int(data))
            if len(labels) == limit:
                break
    if not images or len(images) != len(labels) or any(image.shape != (SIDE, SIDE, 3) for image in images):
        raise SystemExit(f"error: {folder}: {len(images)} images and {len(labels)} labels; wanted are labelled images of 32 pixels")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


class Views:
    """Draws views of a batch [N, 3, 32, 32] in [0, 1]."""

    def __init__(self, device, smallest, saturation):
        self.device, self.smallest, self.saturation = device, smallest, saturation
        self.mean, self.std, self.weights = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD, GREY))

    def uniform(self, shape, low, high):
        return torch.rand(shape, device=self.device) * (high - low) + low

    def chance(self, n, p):
        return (torch.rand(n, device=self.device) < p).view(-1, 1, 1, 1)

    def crop(self, x):
        n = len(x)
        area = self.uniform((n, TRIES), self.smallest, 1.0) * SIDE * SIDE
        ratio = torch.exp(self.uniform((n, TRIES), math.log(3 / 4), math.log(4 / 3)))
        widths, heights = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= SIDE) & (heights > 0) & (heights <= SIDE)
        first, any_fits = fits.float().argmax(1, keepdim=True), fits.any(1)
        width, height = (torch.where(any_fits, v.gather(1, first)[:, 0], float(SIDE)) for v in (widths, heights))
        left, top = (torch.floor(torch.rand(n, device=self.device) * (SIDE - v + 1)) for v in (width, height))
        at = (torch.arange(SIDE, device=self.device) + 0.5) / SIDE

        def positions(start, length):
            inside = start[:, None] + at * length[:, None] - 0.5
            return torch.minimum(torch.maximum(inside, start[:, None]), (start + length - 1)[:, None])

        across, down = positions(left, width), positions(top, height)
        across = torch.where((torch.rand(n, device=self.device) < 0.5)[:, None], across.flip(1), across)
        across, down = ((2 * v + 1) / SIDE - 1 for v in (across, down))
        grid = torch.stack([across[:, None, :].expand(n, SIDE, SIDE), down[:, :, None].expand(n, SIDE, SIDE)], -1)
        return F.grid_sample(x, grid, mode="bilinear", align_corners=False, padding_mode="border")

    def grey(self, x):
        return (x * self.weights).sum(1, keepdim=True)

    def turn(self, x, by):
        """Turns the hue by `by` [N] of a full turn."""
        r, g, b = x.unbind(1)
        value, least = x.amax(1), x.amin(1)
        chroma = value - least
        saturation = torch.where(value > 0, chroma / value.clamp_min(1e-8), 0.0)
        divisor = torch.where(chroma > 0, chroma, 1.0)
        rc, gc, bc = (value - r) / divisor, (value - g) / divisor, (value - b) / divisor
        hue = torch.where(value == r, bc - gc, torch.where(value == g, 2 + rc - bc, 4 + gc - rc))
        hue = (hue / 6 + 1 + by.view(-1, 1, 1)) % 1.0
        sector = torch.floor(hue * 6)
        part, sector = hue * 6 - sector, (sector.long() % 6)[:, None]
        p, q, t = value * (1 - saturation), value * (1 - saturation * part), value * (1 - saturation * (1 - part))
        channels = ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q))
        return torch.cat([torch.stack(channel, 1).gather(1, sector) for channel in channels], 1)

    def jitter(self, x):
        n = len(x)
        for part in torch.randperm(4).tolist():
            factor = self.uniform((n, 1, 1, 1), 0.6, 1.4)
            if part == 0:
                x = (x * factor).clamp(0, 1)
            elif part == 1:
                x = (x * factor + self.grey(x).mean((2, 3), keepdim=True) * (1 - factor)).clamp(0, 1)
            elif part == 2:
                factor = self.uniform((n, 1, 1, 1), 1 - self.saturation, 1 + self.saturation)
                x = (x * factor + self.grey(x) * (1 - factor)).clamp(0, 1)
            else:
                x = self.turn(x, self.uniform(n, -0.1, 0.1))
        return x

    def draw(self, x, solarize):
        x = self.crop(x)
        x = torch.where(self.chance(len(x), 0.8), self.jitter(x), x)
        x = torch.where(self.chance(len(x), 0.2), self.grey(x).expand_as(x), x)
        if solarize > 0:
            x = torch.where(self.chance(len(x), solarize) & (x >= 0.5), 1 - x, x)
        return self.normal(x)

    def normal(self, x):
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def as_lightly(backbone, heads):
    """What --network lightly means."""
    assert isinstance(backbone[2], nn.ReLU)
    backbone[2] = nn.Identity()
    for head_ in heads:
        first, last = head_[0], head_[-1]
        head_[0] = nn.Linear(first.in_features, first.out_features, bias=False)
        head_[-1] = nn.Linear(last.in_features, last.out_features)


def initialise(module, as_in):
    """PyTorch's own initial weights as they are, or drawn as mentee draws them: both papers' codes."""
    for layer in module.modules() if as_in == "mentee" else ():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            # A normal cut off at twice its width, as Haiku's Linear has it.
            std = 1 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("data", type=Path)
    add("--backbone", default="resnet18")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=0.12, help="per 256 images; default: %(default)s")
    add("--weight-decay", type=float, default=5e-4)
    add("--smallest-crop", type=float, default=0.08, help="part of the area")
    add("--saturation", type=float, default=0.4, help="largest change")
    add("--solarize", type=float, default=0.0, help="probability in view 2")
    add("--hidden", type=int, default=1024)
    add("--out", type=int, default=256)
    add("--precision", choices=("f32", "tf32", "bf16"), default="bf16", help="bf16: autocast")
    add("--init", choices=("torch", "mentee"), default="torch", help="whose initial weights")
    add("--network", choices=("mentee", "lightly"), default="mentee", help="whose first layers and biases")
    add("--every", type=int, default=5, help="epochs between evaluations")
    add("--device", default="cuda")
    add("--limit", type=int, default=0, help="so many images of a split only, to try this script")
    add("--seed", type=int, default=0)
    a = arguments.parse_args()

    torch.manual_seed(a.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = a.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    train, labels, test, expected = (t.to(a.device) for split in ("train", "test") for t in read(a.data / split, a.limit))
    classes = int(labels.max()) + 1
    views = Views(a.device, a.smallest_crop, a.saturation)

    backbone, features = resnet(a.backbone, "cifar")
    projector, predictor = head(features, a.hidden, a.out), head(a.out, a.hidden, a.out)
    if a.network == "lightly":
        as_lightly(backbone, (projector, predictor))
    student = nn.Sequential(backbone, projector)
    initialise(student, a.init)
    initialise(predictor, a.init)
    student.to(a.device).to(memory_format=torch.channels_last)
    predictor.to(a.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    lr = a.lr * a.batch / 256
    parameters = [*student.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=a.weight_decay, foreach=True)
    taught, own = list(teacher.parameters()), list(student.parameters())

    def autocast():
        return torch.autocast(torch.device(a.device).type, dtype=torch.bfloat16, enabled=a.precision == "bf16")

    def cosine(prediction, target):
        return F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()

    def step(x):
        one, two = views.draw(x, 0.0), views.draw(x, a.solarize)
        with autocast():
            with torch.no_grad():
                targets = teacher(one), teacher(two)
            predictions = predictor(student(one)), predictor(student(two))
        loss = -0.5 * (cosine(predictions[0], targets[1]) + cosine(predictions[1], targets[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(taught, own, 0.01)
        return loss.detach()

    @torch.no_grad()
    def features_of(images):
        backbone.eval()
        with autocast():
            out = [backbone(views.normal(part.float() / 255)).float() for part in images.split(1000)]
        backbone.train()
        return F.normalize(torch.cat(out), dim=1)

    @torch.no_grad()
    def knn():
        bank, right = features_of(train), 0
        for queries, wanted in zip(features_of(test).split(1000), expected.split(1000)):
            cosines, at = (queries @ bank.T).topk(min(200, len(bank)), 1)
            votes = torch.zeros(len(queries), classes, device=a.device)
            votes.scatter_add_(1, labels[at], ((cosines - 1) / 0.1).exp())
            right += int((votes.argmax(1) == wanted).sum())
        return 100 * right / len(test)

    began = time.monotonic()
    for epoch in range(1, a.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / a.epochs))
        order = torch.randperm(len(train), device=a.device)
        for at in range(0, len(train) - a.batch + 1, a.batch):
            loss = step(train[order[at : at + a.batch]].float() / 255)
        if epoch % a.every == 0 or epoch == a.epochs:
            line = {"epoch": epoch, "loss": 4 + 4 * loss.item(), "knn_top1": knn(), "seconds": time.monotonic() - began}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
