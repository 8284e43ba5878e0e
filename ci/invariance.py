"""The loss curve and the final weights on several numbers of ranks, compared: `ci/invariance` runs this.

In f64, whose rounding stays invisible for some tens of steps: ResNet-20, synchronised batch norms, BYOL with LARS and
SimSiam with SGD, at a global batch that 2, 3 and 4 ranks share equally (96) and one that none of them does (97). For every
number of ranks the largest relative difference to one rank: of the loss, over all steps; of the final tensors (student,
teacher, momentum, running statistics), each by its own largest element. More than 1e-9 anywhere is an error. A bias before a norm
has no gradient: where it starts at zero, it and its momentum stay what rounding leaves of zero. So a tensor is measured by a
millionth of the largest element of its kind, if that is more than its own.

In f32 rounding grows by a factor of several every step, so that after 200 steps runs differ visibly. The yardstick is rounding
itself: runs on one rank in which, after the first step, the lowest bit of one weight was flipped. The difference of each number
of ranks to one rank must be within what such a flip makes (twice the largest: the yardstick is itself a small sample).
"""

import argparse
import array
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = "byol-cifar10-small"
BOUND = 1e-9
BYOL = ["method.name=byol", "views.preset=byol-cifar", "optimizer.name=lars", "optimizer.base_lr=0.2", "optimizer.weight_decay=1.5e-6"]
SIMSIAM = ["method.name=simsiam", "views.preset=simsiam-cifar", "method.predictor_hidden=128", "optimizer.name=sgd", "optimizer.base_lr=0.03"]
# One rank, and one bit of one of these flipped after the first step.
FLIPS = ["student.backbone.conv1.weight", "student.backbone.layer2.1.conv2.weight", "student.projector.0.weight"]


def quoted(pair):
    key, value = pair.split("=", 1)
    return pair if value[0].isdigit() else f'{key}="{value}"'


def train(a, folder, name, workers, batch, steps, precision, settings, flip=None):
    run_dir = folder / name
    command = [a.mentee, "run", RECIPE, "--workers", str(workers), "--run-dir", str(run_dir)]
    sets = settings + [f"schedule.global_batch={batch}", f"schedule.max_steps={steps}", f"parallel.precision={precision}"]
    sets += [f"data.path={a.data}", "eval.knn_every_epochs=0", "run.log_every_steps=1", "views.size=32"]
    for pair in sets:
        command += ["--set", quoted(pair)]
    environment = dict(os.environ)
    if flip is not None:
        environment["MENTEE_FAULTS"] = f"flip:rank=0,step=0,tensor={flip}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == steps, (name, len(losses))
    assert all(line["world_size"] == workers for line in lines if line["kind"] == "train"), name
    return losses, tensors(run_dir)


def tensors(run_dir):
    """Every tensor of the newest checkpoint, by name."""
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    out = {}
    for path in sorted(newest.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            out[name] = array.array({"F64": "d", "F32": "f"}[entry["dtype"]], data[begin:end])
    return out


def largest_of(values):
    """NaN where one of them is: `max` passes over it."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def differences(one, other):
    """The largest relative differences: of losses, of tensors; and the tensor that has it. NaN is larger than all."""
    loss = largest_of(abs(x - y) / abs(x) for x, y in zip(one[0], other[0]))
    assert one[1].keys() == other[1].keys()
    kind = lambda name: name.split(".")[0]
    size = {name: max(map(abs, values)) for name, values in one[1].items()}
    largest = {}
    for name in size:
        largest[kind(name)] = max(largest.get(kind(name), 0.0), size[name])
    worst, where = 0.0, ""
    for name, values in one[1].items():
        scale = max(size[name], 1e-6 * largest[kind(name)])
        difference = largest_of(abs(x - y) for x, y in zip(values, other[1][name]))
        relative = difference / scale if scale > 0 else difference
        if math.isnan(relative):
            return loss, relative, name
        if relative >= worst:
            worst, where = relative, name
    return loss, worst, where


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mentee", required=True, help="the mentee binary")
    arguments.add_argument("--data", required=True, type=lambda path: str(Path(path).resolve()), help="a sharded image set")
    arguments.add_argument("--steps", type=int, default=30, help="of each run in f64")
    arguments.add_argument("--steps-f32", type=int, default=200, help="of each run in f32; 0: none")
    arguments.add_argument("--ranks", type=int, action="append", help="default: 2, 3 and 4")
    a = arguments.parse_args()
    ranks = a.ranks or [2, 3, 4]
    folder = Path(tempfile.mkdtemp(prefix="mentee-invariance-"))
    failed = False

    print(f"f64, {a.steps} steps: largest relative difference to one rank", flush=True)
    print(f"{'':16} {'batch':>5} {'ranks':>5} {'loss':>9} {'tensors':>9}  where")
    for name, settings in (("BYOL, LARS", BYOL), ("SimSiam, SGD", SIMSIAM)):
        for batch in (96, 97):
            run = lambda n: train(a, folder, f"{name.split(',')[0]}-{batch}-{n}", n, batch, a.steps, "f64", settings)
            one = run(1)
            for n in ranks:
                loss, tensor, where = differences(one, run(n))
                failed |= not largest_of((loss, tensor)) <= BOUND
                print(f"{name:16} {batch:5} {n:5} {loss:9.1e} {tensor:9.1e}  {where}", flush=True)

    if a.steps_f32 > 0:
        print(f"\nf32, BYOL, LARS, batch 96, {a.steps_f32} steps: difference to one rank; the last loss, and the largest of all steps")
        run = lambda name, n, flip=None: train(a, folder, name, n, 96, a.steps_f32, "f32", BYOL, flip)[0]
        one, rounding, worlds = run("f32-1", 1), [], []
        for n, flip in enumerate(FLIPS):
            losses = run(f"f32-flip-{n}", 1, flip)
            rounding.append(largest_of(abs(x - y) for x, y in zip(one, losses)))
            print(f"1 rank, a bit of {flip}: {abs(one[-1] - losses[-1]):.2e} {rounding[-1]:.2e}", flush=True)
        for n in ranks:
            losses = run(f"f32-{n}", n)
            worlds.append(largest_of(abs(x - y) for x, y in zip(one, losses)))
            print(f"{n} ranks: {abs(one[-1] - losses[-1]):.2e} {worlds[-1]:.2e}", flush=True)
        print(f"the loss itself goes from {one[0]:.4f} to {one[-1]:.4f}")
        failed |= not largest_of(worlds) <= 2 * largest_of(rounding)
    shutil.rmtree(folder)
    if failed:
        raise SystemExit("error: the number of ranks shows")


if __name__ == "__main__":
    main()
