"""What ranks cost and what makes them cheap, on one machine: `ci/bench ranks` runs this.

Every round runs each of these once, in its own processes, in turns of order, on the same network and global batch:

- one worker with all threads, the yardstick;
- as many workers of one thread each, with synchronised batch norms; and with each worker's own, as DDP has them;
- with --ablate, those without one of the things that make them fast: gradients summed after the backward pass instead of beside it, a
  message a tensor instead of large buckets, the two views one after the other;
- PyTorch in one process with all threads, and its DistributedDataParallel over gloo (torchrun) with as many processes of
  one thread, channels-last, without synchronised batch norms.

Ratios are made within a round: the yardstick's time over the time of the line, and its spread over the rounds.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

from bench_compare import CASES, machine, measure, pytorch_command, worker_command

OURS = {
    "mentee, 1 worker": (1, []),
    "mentee, N workers": (None, []),
    "  norms by worker": (None, ["--set", "parallel.sync_batch_norm=false"]),
    "  without overlap": (None, ["--without", "overlap"]),
    "  a message a tensor": (None, ["--set", "parallel.bucket_mib=1e-9"]),
    "  views one by one": (None, ["--without", "one-pass"]),
    "  without all three": (None, ["--without", "overlap", "--without", "one-pass", "--set", "parallel.bucket_mib=1e-9"]),
}
# Those of --ablate.
ABLATION = ("  without overlap", "  a message a tensor", "  views one by one", "  without all three")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mentee", required=True, help="the mentee binary")
    arguments.add_argument("--case", choices=sorted(CASES), default="resnet18")
    arguments.add_argument("--precision", action="append", choices=("f32", "bf16"), help="default: both")
    arguments.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--ablate", action="store_true", help="also without overlap, without buckets, views one by one")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=5, help="steps measured in each process")
    a = arguments.parse_args()

    case, where = CASES[a.case], machine()
    torchrun = [str(Path(sys.executable).with_name("python")), "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={a.workers}", "--local-addr=127.0.0.1"]
    runs = []
    for precision in a.precision or ("f32", "bf16"):
        for name, (workers, more) in OURS.items():
            if name in ABLATION and not a.ablate:
                continue
            a.threads = a.workers // (workers or a.workers)
            command = worker_command(a.mentee, case, precision, a) + ["--warmup", "2", "--workers", str(workers or a.workers)] + more
            runs.append(((precision, name), command, a.threads))
        a.threads = a.workers
        runs.append(((precision, "PyTorch, 1 process"), pytorch_command(case, precision, "channels-last", a), a.threads))
        a.threads = 1
        ddp = torchrun + pytorch_command(case, precision, "channels-last", a)[1:]
        runs.append(((precision, "PyTorch, N processes of DDP"), ddp, 1))

    results = {key: [] for key, _, _ in runs}
    for round in range(a.rounds):
        for key, command, threads in runs if round % 2 == 0 else reversed(runs):
            environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
            environment["GLOO_SOCKET_IFNAME"] = "lo"
            results[key].append(measure(command, environment))
        print(f"round {round + 1} of {a.rounds} done", file=sys.stderr)

    print(f"{where}; N = {a.workers}; {a.case}, global batch {case['batch']}, {a.rounds} rounds of {a.steps} steps, {a.optimizer}")
    print("ratio = time of `mentee, 1 worker` / time of the line, in the same round")
    print(f"{'type':5} {'':28} {'ms a step':>9} {'ratio':>6} {'min':>6} {'max':>6} {'communication ms: all':>21} {'waited for':>10}")
    for (precision, name), measured in results.items():
        yardstick = results[precision, "mentee, 1 worker"]
        ratios = [y["step_ms"] / m["step_ms"] for y, m in zip(yardstick, measured)]
        median = statistics.median(m["step_ms"] for m in measured)
        print(f"{precision:5} {name:28} {median:9.1f} {statistics.median(ratios):6.3f} {min(ratios):6.3f} {max(ratios):6.3f}", end="")
        if measured[0].get("world_size", 1) > 1:
            total = statistics.median(m["communication_ms"] for m in measured)
            exposed = statistics.median(m["breakdown_ms"]["reduce"] for m in measured)
            print(f" {total:21.1f} {exposed:10.1f}", end="")
        print()
    for precision in a.precision or ("f32", "bf16"):
        theirs = results[precision, "PyTorch, N processes of DDP"]
        for name in ("mentee, N workers", "  norms by worker"):
            ratios = [t["step_ms"] / o["step_ms"] for o, t in zip(results[precision, name], theirs)]
            print(f"{precision}: {name.strip()}, against DDP: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
