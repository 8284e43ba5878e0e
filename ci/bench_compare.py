"""The training step of mentee against the same step in plain PyTorch: `ci/bench step` runs this.

Every round runs each side in its own process, one right behind the other, in turns of order; a ratio is PyTorch's time for a
step over mentee's beside it, so that a machine that slows down for minutes touches neither. More than 1 means that mentee is
faster. Both sides get the same environment, threads, network, batch, precision and memory layout. With --all, PyTorch also runs
contiguous, and with the allocator settings that mentee makes for itself (whole-batch buffers stay mapped), each way beside a run
of mentee of its own; the star marks the fastest of PyTorch's four ways, by its median.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

# name -> network, batch and heads; heads as in the recipes of that backbone
CASES = {
    "resnet20": dict(backbone="resnet20", batch=128, hidden=512, out=128),
    "resnet18": dict(backbone="resnet18", batch=64, hidden=4096, out=256),
}
RECIPE = "byol-cifar10-small"


def worker_command(worker, case, precision, a):
    keys = {
        "model.backbone": f'"{case["backbone"]}"',
        "model.stem": '"cifar"',
        "views.size": 32,
        "method.projector_layers": 2,
        "method.projector_hidden": case["hidden"],
        "method.projector_out": case["out"],
        "method.predictor_hidden": case["hidden"],
        "optimizer.name": f'"{a.optimizer}"',
        "schedule.global_batch": case["batch"],
        "parallel.precision": f'"{precision}"',
        "parallel.threads": a.threads,
    }
    command = [worker, "bench", "step", RECIPE, "--json", "--steps", str(a.steps)]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    return command


def pytorch_command(case, precision, layout, a):
    flags = {
        "--backbone": case["backbone"],
        "--batch": case["batch"],
        "--projector-hidden": case["hidden"],
        "--projector-out": case["out"],
        "--predictor-hidden": case["hidden"],
        "--precision": precision,
        "--layout": layout,
        "--optimizer": a.optimizer,
        "--threads": a.threads,
        "--steps": a.steps,
    }
    command = [sys.executable, str(Path(__file__).with_name("bench_step.py"))]
    for flag, value in flags.items():
        command += [flag, str(value)]
    return command


# How mentee-worker sets up its allocator: freed memory is kept, tensors lie in huge pages.
AS_THE_WORKER = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def measure(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine():
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, load {os.getloadavg()[0]:.1f} at the start"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--worker", required=True, help="the mentee-worker binary")
    arguments.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    arguments.add_argument("--precision", action="append", choices=("f32", "bf16"), help="default: both")
    arguments.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=5, help="steps measured in each process")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--all", action="store_true", help="PyTorch in all of its four ways, compared with the fastest")
    arguments.add_argument("--json", action="store_true", help="print one object instead of the table")
    a = arguments.parse_args()

    environment = dict(os.environ, OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads))
    where = machine()
    cells = [(name, precision) for name in a.case or CASES for precision in a.precision or ("f32", "bf16")]
    layouts = ["channels-last"] + (["contiguous"] if a.all else [])
    ways = [(layout, {}) for layout in layouts]
    ways += [(layout, AS_THE_WORKER) for layout in layouts if a.all]

    # Of every cell and way of PyTorch: pairs of measurements, one right behind the other.
    pairs = {cell: [[] for _ in ways] for cell in cells}
    for round in range(a.rounds):
        for cell in cells:
            case, precision = CASES[cell[0]], cell[1]
            for n, (layout, allocator) in enumerate(ways):
                runs = [
                    (worker_command(a.worker, case, precision, a), environment),
                    (pytorch_command(case, precision, layout, a), environment | allocator),
                ]
                ours_first = (round + n) % 2 == 0
                results = [measure(*run) for run in (runs if ours_first else reversed(runs))]
                pairs[cell][n].append(tuple(results if ours_first else reversed(results)))
        print(f"round {round + 1} of {a.rounds} done", file=sys.stderr)

    rows = []
    for cell in cells:
        all_ours = [ours for way in pairs[cell] for ours, _ in way]
        of_cell = []
        for (layout, allocator), way in zip(ways, pairs[cell]):
            ratios = [theirs["step_ms"] / ours["step_ms"] for ours, theirs in way]
            of_cell.append(
                {
                    "network": cell[0],
                    "batch": CASES[cell[0]]["batch"],
                    "precision": cell[1],
                    "pytorch": layout + (" kept" if allocator else ""),
                    "mentee_ms": statistics.median(ours["step_ms"] for ours in all_ours),
                    "pytorch_ms": statistics.median(theirs["step_ms"] for _, theirs in way),
                    "mentee_images_per_s": statistics.median(ours["images_per_s"] for ours in all_ours),
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                    "mentee_rss_mb": max(ours["peak_rss_mb"] for ours in all_ours),
                    "pytorch_rss_mb": max(theirs["peak_rss_mb"] for _, theirs in way),
                }
            )
        fastest = min(row["pytorch_ms"] for row in of_cell)
        for row in of_cell:
            row["fastest"] = row["pytorch_ms"] == fastest
        rows += of_cell
    if a.json:
        print(json.dumps({"machine": where, "threads": a.threads, "rounds": a.rounds, "rows": rows}, indent=1))
        return
    print(f"{where}; {a.threads} threads, {a.rounds} rounds of {a.steps} steps, {a.optimizer}; ratio = PyTorch's time / mentee's")
    print(f"{'network':9} {'batch':>5} {'type':5} {'PyTorch':18} {'mentee ms':>9} {'PyTorch ms':>10}", end="")
    print(f" {'mentee img/s':>12} {'ratio':>6} {'min':>6} {'max':>6} {'mentee MB':>9} {'PyTorch MB':>10}")
    for r in rows:
        way = r["pytorch"] + (" *" if a.all and r["fastest"] else "")
        print(f"{r['network']:9} {r['batch']:5} {r['precision']:5} {way:18}", end="")
        print(f" {r['mentee_ms']:9.1f} {r['pytorch_ms']:10.1f} {r['mentee_images_per_s']:12.1f}", end="")
        print(f" {r['ratio']:6.3f} {r['ratio_min']:6.3f} {r['ratio_max']:6.3f}", end="")
        print(f" {r['mentee_rss_mb']:9.0f} {r['pytorch_rss_mb']:10.0f}")


if __name__ == "__main__":
    main()
