"""One measurement of BYOL's training step in plain PyTorch, the other side of `mentee-worker bench step`.

A step is what the official code does: two forwards of the student (encoder, projector, predictor), two of the teacher
(encoder, projector; train mode, no gradients), the loss summed over both directions, backward, the optimizer, the moving
average. The views are drawn once and stay in memory: no data loading is measured on either side.

Started by torchrun, several processes share the batch: DistributedDataParallel over gloo, batch norms over each process's
own part, every process's gradient a mean over its part and those averaged.

Prints one JSON object: images_per_s, step_ms (median), n (steps measured), peak_rss_mb, loss (of the last step); with --device cuda also
peak_device_mb (tensors) and peak_reserved_mb (what the allocator took for them). On a GPU the clock is read at a
synchronisation every few steps, not at every step, so that the processor may run ahead.

With --library lightly the step is that of lightly's own benchmark (benchmarks/imagenet/resnet50/byol.py): torchvision's network or
its own for small images, its heads, loss, LARS and moving average; fp16 with a loss scaled as Lightning does, NCHW.

With --serve one process measures again and again, and what was compiled is compiled once: it prints {"ready": true, "ready_s": ...}
after two first steps, then answers every line like {"steps": 20, "warmup": 5} on its input with such an object, which also
says held_mb, the device memory that it keeps while it waits. It ends when its input does.
"""

import argparse
import copy
import json
import math
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (arXiv:1512.03385, figure 5 left), torchvision's layout."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (figure 5 right); the stride is on the 3x3, as in torchvision."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


# block, channels of the stem, width of each stage, blocks in each stage
BACKBONES = {
    "resnet18": (BasicBlock, 64, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": (BasicBlock, 64, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": (Bottleneck, 64, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet101": (Bottleneck, 64, (64, 128, 256, 512), (3, 4, 23, 3)),
    "resnet20": (BasicBlock, 16, (16, 32, 64), (3, 3, 3)),
}


def resnet(name, stem):
    """The encoder up to and with global average pooling, and its number of features."""
    block, channels, widths, depths = BACKBONES[name]
    if stem == "cifar":
        layers = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    else:
        layers = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(3, 2, 1))
    expansion = 4 if block is Bottleneck else 1
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for index in range(depth):
            layers.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
            channels = width * expansion
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), channels


def head(inputs, hidden, outputs):
    """BYOL's projector and predictor: the last layer has neither bias nor norm."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )


class Lars(torch.optim.Optimizer):
    """u = g + wd p; u *= eta |p| / |u|; m = momentum m + u; p -= lr m. One-dimensional parameters: plain momentum."""

    def __init__(self, parameters, lr, momentum, weight_decay, eta):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                u = p.grad
                if p.ndim > 1:
                    u = u.add(p, alpha=group["weight_decay"])
                    p_norm, u_norm = p.norm(), u.norm()
                    adapted = group["eta"] * p_norm / u_norm
                    u = u.mul(torch.where((p_norm > 0) & (u_norm > 0), adapted, 1.0))
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(u)
                p.add_(m, alpha=-group["lr"])


class ForeachLars(Lars):
    """The same numbers by a few kernels over all parameters at once instead of several for each."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = group["params"]
            matrices = [n for n, p in enumerate(parameters) if p.ndim > 1]
            updates = [p.grad for p in parameters]
            weights = [parameters[n] for n in matrices]
            adapted = torch._foreach_add([updates[n] for n in matrices], weights, alpha=group["weight_decay"])
            p_norm, u_norm = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(adapted))
            factor = torch.where((p_norm > 0) & (u_norm > 0), group["eta"] * p_norm / u_norm, 1.0)
            torch._foreach_mul_(adapted, list(factor.unbind()))
            for n, u in zip(matrices, adapted):
                updates[n] = u
            momentum = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(momentum, group["momentum"])
            torch._foreach_add_(momentum, updates)
            torch._foreach_add_(parameters, momentum, alpha=-group["lr"])


class Online(nn.Module):
    """What is trained: both views through student and predictor, in one call, as DistributedDataParallel wants it."""

    def __init__(self, student, predictor):
        super().__init__()
        self.student, self.predictor = student, predictor

    def forward(self, *views):
        return [self.predictor(self.student(view)) for view in views]


def lightly_step(a, views):
    """The step of lightly's benchmark of BYOL, without its online classifier and its logging."""
    import torchvision
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models import ResNetGenerator
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import get_weight_decay_parameters, update_momentum
    from lightly.utils.lars import LARS

    if a.stem == "imagenet":
        backbone = getattr(torchvision.models, a.backbone)()
        features = backbone.fc.in_features
        backbone.fc = nn.Identity()
    else:
        network = ResNetGenerator(a.backbone.replace("resnet", "resnet-"))
        features = network.linear.in_features
        backbone = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))
    projector = BYOLProjectionHead(features, a.projector_hidden, a.projector_out)
    predictor = BYOLPredictionHead(a.projector_out, a.predictor_hidden, a.projector_out)
    for module in (backbone, projector, predictor):
        module.to(a.device)
    teacher, teacher_projector = copy.deepcopy(backbone), copy.deepcopy(projector)
    criterion = NegativeCosineSimilarity()
    decays, others = get_weight_decay_parameters([backbone, projector, predictor])
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.45 * a.batch / 256, momentum=0.9, weight_decay=1e-6)
    half = a.precision == "bf16"
    scaler = torch.amp.GradScaler(a.device, enabled=half and a.device == "cuda")
    views = [view.contiguous() for view in views]

    def student_of(view):
        return predictor(projector(backbone(view).flatten(start_dim=1)))

    @torch.no_grad()
    def teacher_of(view):
        return teacher_projector(teacher(view).flatten(start_dim=1))

    def step():
        update_momentum(backbone, teacher, m=0.99)
        update_momentum(projector, teacher_projector, m=0.99)
        with torch.autocast(a.device, dtype=torch.float16 if a.device == "cuda" else torch.bfloat16, enabled=half):
            targets = [teacher_of(view) for view in views]
            predictions = [student_of(view) for view in views]
            loss = 2 * criterion(targets[0], predictions[1]) + 2 * criterion(targets[1], predictions[0])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step, optimizer


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--backbone", choices=sorted(BACKBONES), default="resnet20")
    arguments.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar")
    arguments.add_argument("--size", type=int, default=32, help="side of a view, pixels")
    arguments.add_argument("--batch", type=int, default=128, help="samples a step, of all processes; each gives two views")
    arguments.add_argument("--projector-hidden", type=int, default=512)
    arguments.add_argument("--projector-out", type=int, default=128)
    arguments.add_argument("--predictor-hidden", type=int, default=512)
    arguments.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    arguments.add_argument("--layout", choices=("channels-last", "contiguous"), default="channels-last")
    arguments.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd")
    arguments.add_argument("--lars", choices=("loop", "foreach"), default="loop", help="one parameter after another, or all at once")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--library", choices=("torch", "lightly"), default="torch", help="whose step")
    arguments.add_argument("--compile", metavar="MODE", help="torch.compile forward and loss: default, reduce-overhead, ...")
    arguments.add_argument("--compiled", choices=("step", "networks"), default="step", help="forward and loss as one, or each network")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    arguments.add_argument("--steps", type=int, default=5, help="steps measured")
    arguments.add_argument("--serve", action="store_true", help="measure whenever a line on the input asks for it")
    a = arguments.parse_args()

    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    cuda = a.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    layout = torch.channels_last if a.layout == "channels-last" else torch.contiguous_format
    encoder, features = resnet(a.backbone, a.stem)
    student = nn.Sequential(encoder, head(features, a.projector_hidden, a.projector_out))
    student.to(a.device, memory_format=layout)
    predictor = head(a.projector_out, a.predictor_hidden, a.projector_out).to(a.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if a.batch % world != 0:
        raise SystemExit(f"error: --batch {a.batch} cannot be shared by {world} processes")
    if world > 1 and (cuda or a.compile or a.serve):
        raise SystemExit("error: several processes measure once, on the CPU, without --compile")
    predict = Online(student, predictor)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        predict = nn.parallel.DistributedDataParallel(predict, gradient_as_bucket_view=True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    online, moving = list(student.parameters()), list(teacher.parameters())

    parameters = online + list(predictor.parameters())
    if a.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=5e-4, foreach=True)
    else:
        lars = Lars if a.lars == "loop" else ForeachLars
        optimizer = lars(parameters, lr=0.2, momentum=0.9, weight_decay=1.5e-6, eta=1e-3)
    views = [torch.randn(a.batch // world, 3, a.size, a.size) for _ in range(2)]
    views = [view.to(a.device).contiguous(memory_format=layout) for view in views]
    tau = 0.996
    if a.library == "lightly" and (world > 1 or a.compile):
        raise SystemExit("error: lightly's step is measured in one process, without --compile")

    def loss_of(*views):
        with torch.autocast(a.device, dtype=torch.bfloat16, enabled=a.precision == "bf16"):
            p1, p2 = predict(*views)
            with torch.no_grad():
                z1, z2 = (teacher(view) for view in views)
        return 4 - 2 * (
            F.cosine_similarity(p1.float(), z2.float()).mean() + F.cosine_similarity(p2.float(), z1.float()).mean()
        )

    if a.compile and a.compiled == "step":
        loss_of = torch.compile(loss_of, mode=a.compile)
    elif a.compile:
        # Once each: a view after the other goes through the same code. A Sequential's own `compile` would leave out everything but
        # its blocks; and what they share must not make their shapes dynamic.
        def compiled(network):
            return torch.compile(network, mode=a.compile, dynamic=False)

        predict.student, predict.predictor, teacher = compiled(student), compiled(predictor), compiled(teacher)

    def step():
        if a.compile:
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(*views)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(moving, online, 1 - tau)
        return loss.detach()

    if a.library == "lightly":
        step, optimizer = lightly_step(a, views)

    def measure(steps, warmup):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(warmup):
            step()
        times = []
        if cuda:
            torch.cuda.synchronize()
        left = steps
        while left > 0:
            run = min(left, max(1, steps // 8)) if cuda else 1
            left -= run
            began = time.perf_counter()
            for _ in range(run):
                loss = step()
            if cuda:
                torch.cuda.synchronize()
            else:
                loss.item()
            times.append((time.perf_counter() - began) / run)
        loss = loss.item()
        if not math.isfinite(loss):
            raise SystemExit(f"error: the loss became {loss}; these times mean nothing")
        median = statistics.median(times)
        result = {
            "images_per_s": a.batch / median,
            "step_ms": 1000 * median,
            "n": steps,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loss": loss,
        }
        if cuda:
            result["peak_device_mb"] = torch.cuda.max_memory_allocated() / 2**20
            result["peak_reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20
        return result

    if a.serve:
        step(), step().item()
        if cuda:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        print(json.dumps({"ready": True, "ready_s": time.perf_counter() - began}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            result = measure(asked.get("steps", a.steps), asked.get("warmup", a.warmup))
            if cuda:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                result["held_mb"] = torch.cuda.memory_reserved() / 2**20
            print(json.dumps(result), flush=True)
        return

    result = measure(a.steps, a.warmup)
    if world > 1:
        first = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        if not first:
            return
    print(json.dumps(result))


if __name__ == "__main__":
    main()
