"""Repeats the steps that `mentee trace RECIPE --out DIR` recorded, in plain PyTorch, and compares: `replay.py DIR [--json]`.

Written from the papers and PyTorch's modules alone. Every step starts from the recorded weights, so that rounding of one step
does not reach the next. Compared: the loss, every gradient, every updated parameter, momentum and running statistic of student
and teacher; each tensor's largest difference relative to its largest element, or to a thousandth of the largest in all tensors
where that is more: a bias before a norm has no gradient, and what rounding leaves of it has no meaning.
"""

import argparse
import json
import math
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

KINDS = {"F64": torch.float64, "F32": torch.float32}
# expansion, width of the stem, widths, blocks
BACKBONES = {
    "resnet18": (1, 64, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": (1, 64, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": (4, 64, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet101": (4, 64, (64, 128, 256, 512), (3, 4, 23, 3)),
    "resnet20": (1, 16, (16, 32, 64), (3, 3, 3)),
}


def read(path):
    """A safetensors file: name -> tensor."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = torch.frombuffer(data, dtype=KINDS[entry["dtype"]], offset=8 + length + begin, count=math.prod(entry["shape"]))
            out[name] = values.reshape(entry["shape"]).clone()
    return out


class Block(nn.Module):
    """A residual block of torchvision's ResNets, basic (expansion 1) or bottleneck (4)."""

    def __init__(self, inputs, width, stride, expansion):
        super().__init__()
        bottleneck = expansion > 1
        outputs = width * expansion
        plan = [(width, 1, 1), (width, 3, stride), (outputs, 1, 1)] if bottleneck else [(width, 3, stride), (outputs, 3, 1)]
        channels = inputs
        self.count = len(plan)
        for n, (out, kernel, step) in enumerate(plan, 1):
            setattr(self, f"conv{n}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(out))
            channels = out
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for n in range(1, self.count + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            if n < self.count:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    def __init__(self, name, stem):
        super().__init__()
        expansion, channels, widths, depths = BACKBONES[name]
        self.small = stem == "cifar"
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False) if self.small else nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = len(widths)
        for stage, (width, depth) in enumerate(zip(widths, depths), 1):
            blocks = []
            for index in range(depth):
                blocks.append(Block(channels, width, 2 if stage > 1 and index == 0 else 1, expansion))
                channels = width * expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.features = channels

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if not self.small:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


def byol_mlp(widths):
    """Linear, norm, ReLU, …, Linear without bias (arXiv:2006.07733, section 3.3)."""
    layers = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


def simsiam_projector(widths):
    """Linear and norm throughout, ReLU between; the last norm is plain (arXiv:2011.10566, section 4)."""
    layers = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    last = nn.Linear(widths[-2], widths[-1])
    last.bias.requires_grad_(False)
    return nn.Sequential(*layers, last, nn.BatchNorm1d(widths[-1], affine=False))


def simsiam_predictor(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))


def moco_mlp(widths, last_norm):
    """Linear layers without bias, norm and ReLU between, at the end a plain norm or nothing (facebookresearch/moco-v3)."""
    layers = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))


def network(recipe, with_predictor):
    method = recipe["method"]
    backbone = Backbone(recipe["model"]["backbone"], recipe["model"]["stem"])
    hidden, out, narrow = method["projector_hidden"], method["projector_out"], method["predictor_hidden"]
    widths = [backbone.features] + [hidden] * (method["projector_layers"] - 1) + [out]
    projector, predictor = {
        "byol": (lambda: byol_mlp(widths), lambda: byol_mlp([out, narrow, out])),
        "simsiam": (lambda: simsiam_projector(widths), lambda: simsiam_predictor(out, narrow)),
        "mocov3": (lambda: moco_mlp(widths, True), lambda: moco_mlp([out, narrow, out], False)),
    }[method["name"]]
    parts = {"backbone": backbone, "projector": projector()}
    if with_predictor and method["predictor"]:
        parts["predictor"] = predictor()
    return nn.ModuleDict(parts)


def load(module, tensors, prefix):
    own = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    assert own.keys() == found.keys(), sorted(own.keys() ^ found.keys())
    module.load_state_dict({name: value.to(own[name].dtype) for name, value in found.items()}, strict=False)


def project(net, view):
    return net["projector"](net["backbone"](view))


def predict(net, z):
    return net["predictor"](z) if "predictor" in net else z


def loss_of(recipe, student, teacher, views):
    cosine = lambda p, t: (F.normalize(p, dim=1) * F.normalize(t, dim=1)).sum(1).mean()
    z = [project(student, view) for view in views]
    p = [predict(student, one) for one in z]
    if teacher is not None:
        with torch.no_grad():
            t = [project(teacher, view) for view in views]
    else:
        t = [one.detach() for one in z] if recipe["method"]["stop_gradient"] else z
    if recipe["method"]["name"] == "mocov3":
        temperature, own = recipe["method"]["temperature"], torch.arange(len(p[0]))
        logits = lambda q, k: F.normalize(q, dim=1) @ F.normalize(k, dim=1).detach().T / temperature
        return 2 * temperature * (F.cross_entropy(logits(p[0], t[1]), own) + F.cross_entropy(logits(p[1], t[0]), own))
    both = cosine(p[0], t[1]) + cosine(p[1], t[0])
    return 4 - 2 * both if recipe["method"]["name"] == "byol" else -both / 2


@torch.no_grad()
def update(recipe, rates, student, momentum):
    optimizer = recipe["optimizer"]
    if optimizer["clip_norm"] > 0:
        nn.utils.clip_grad_norm_(student.parameters(), optimizer["clip_norm"])
    for name, p in student.named_parameters():
        if not p.requires_grad:
            continue
        excluded = optimizer["exclude_bias_and_norm"] and p.ndim == 1
        decay = 0.0 if excluded else rates["weight_decay"]
        u = p.grad + decay * p
        if optimizer["name"] == "lars" and not excluded:
            size, length = p.norm(), u.norm()
            if size > 0 and length > 0:
                u = u * (optimizer["lars_eta"] * size / length)
        v = momentum[f"momentum.student.{name}"]
        v.mul_(optimizer["momentum"]).add_(u)
        p -= (rates["predictor_lr"] if name.startswith("predictor.") else rates["lr"]) * v


def compare(found, expected):
    """The largest relative difference of any tensor, and which has it; one that is not finite is larger than all."""
    worst, where = 0.0, ""
    floor = 1e-3 * max((value.abs().max().item() for value in expected.values()), default=0.0)
    for name, value in expected.items():
        scale = max(value.abs().max().item(), floor)
        difference = (found[name].to(value.dtype) - value).abs().max().item()
        relative = difference / scale if scale > 0 else difference
        if not math.isfinite(relative):
            return relative, name
        if relative > worst:
            worst, where = relative, name
    return worst, where


def replay(folder, recipe, step):
    kind = {"f64": torch.float64, "f32": torch.float32}[recipe["parallel"]["precision"]]
    before = read(folder / "before.safetensors")
    both = read(folder / "views.safetensors")["views"].to(kind)
    student = network(recipe, True).to(kind).train()
    load(student, before, "student.")
    teacher = None
    if recipe["method"]["teacher"] != "shared":
        teacher = network(recipe, False).to(kind).train()
        load(teacher, before, "teacher.")
    loss = loss_of(recipe, student, teacher, both.chunk(2))
    loss.backward()
    recorded = read(folder / "gradients.safetensors")
    gradients = {
        f"student.{name}": torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in student.named_parameters()
    }
    assert gradients.keys() == recorded.keys(), sorted(gradients.keys() ^ recorded.keys())
    momentum = {name: value.clone() for name, value in before.items() if name.startswith("momentum.")}
    rates = step["rates"]
    update(recipe, rates, student, momentum)
    if recipe["method"]["teacher"] == "ema":
        with torch.no_grad():
            for name, p in teacher.named_parameters():
                p.mul_(rates["tau"]).add_(student.get_parameter(name), alpha=1 - rates["tau"])
    after = read(folder / "after.safetensors")
    found = dict(momentum)
    for prefix, module in (("student.", student), ("teacher.", teacher)):
        if module is not None:
            found |= {prefix + name: value for name, value in module.state_dict().items()}
    part = lambda prefix: {name: value for name, value in after.items() if name.startswith(prefix)}
    moved = max((after[name] - before[name]).abs().max().item() for name in part("student."))
    assert moved > 0, "the recorded step changed nothing"
    return {
        "loss": abs(loss.item() - step["loss"]) / abs(step["loss"]),
        "gradients": compare(gradients, recorded),
        "student": compare(found, part("student.")),
        "momentum": compare(found, part("momentum.")),
        "teacher": compare(found, part("teacher.")),
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("trace", type=Path, help="the folder that `mentee trace` wrote")
    arguments.add_argument("--json", action="store_true", help="the largest of all steps as one JSON object")
    a = arguments.parse_args()
    trace = json.loads((a.trace / "trace.json").read_text())
    recipe = trace["recipe"]
    if recipe["optimizer"]["name"] == "adamw" or recipe["parallel"]["norm_statistics"] != "batch":
        raise SystemExit("error: replay.py knows SGD and LARS, and norms over the batch")
    worst = {}
    if not a.json:
        method, optimizer, precision = recipe["method"]["name"], recipe["optimizer"]["name"], recipe["parallel"]["precision"]
        print(f"{method}, {optimizer}, {precision}: largest relative differences to PyTorch {torch.__version__}")
    last = None
    for step in trace["steps"]:
        folder = a.trace / f"step-{step['step']:04}"
        before = read(folder / "before.safetensors")
        if last is not None:
            assert before.keys() == last.keys() and all(torch.equal(before[name], last[name]) for name in last), "a gap between steps"
        last = read(folder / "after.safetensors")
        result = replay(folder, recipe, step)
        where = ", ".join(value[1] for value in result.values() if isinstance(value, tuple))
        result = {name: value[0] if isinstance(value, tuple) else value for name, value in result.items()}
        if not a.json:
            print(f"step {step['step']}: " + "  ".join(f"{name} {value:.1e}" for name, value in result.items()) + f"  ({where})")
        lost = [name for name, value in result.items() if not math.isfinite(value)]
        if lost:
            raise SystemExit(f"error: step {step['step']}: not finite: {', '.join(lost)} ({where})")
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in result.items()}
    if a.json:
        print(json.dumps(worst))
    else:
        print("largest: " + "  ".join(f"{name} {value:.1e}" for name, value in worst.items()))


if __name__ == "__main__":
    main()
