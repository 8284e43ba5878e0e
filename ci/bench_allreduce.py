"""This project's all-reduce against MPI_Allreduce in a plain C program, in turns, on this machine.

Each size and number of ranks is measured by both programs in every round, one right after the other and in changing order.
The ratio of a round is our bandwidth over the C program's in the same round: more than 1 means that ours is faster. Both
use the same MPI library with its defaults. The C program spins while it waits; with more ranks than cores one of its calls
can take seconds, so that a run has a limit: a size that it does not finish in time, and all larger ones, have no ratio.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys

from bench_compare import machine

KIB, MIB = 1 << 10, 1 << 20
SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 400 * MIB]


def measure(program, ranks, size, a):
    """Bytes a second, or None if the program needed longer than the limit."""
    command = [a.mpirun, "-n", str(ranks), program, str(a.seconds), str(size)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        stdout, stderr = child.communicate(timeout=a.limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)  # mpirun ends its ranks
        try:
            child.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        return None
    if child.returncode != 0:
        sys.stderr.write(stderr)
        raise SystemExit(f"error: {' '.join(command)} ended with {child.returncode}")
    row = json.loads(stdout.strip().splitlines()[-1])
    assert (row["bytes"], row["ranks"]) == (size, ranks), row
    return row["bytes"] / row["seconds"]


def text(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mpirun", required=True)
    arguments.add_argument("--ours", required=True, help="the example all_reduce of mentee-collectives")
    arguments.add_argument("--theirs", required=True, help="ci/bench_allreduce.c, compiled")
    arguments.add_argument("--ranks", type=int, action="append", help="default: 2 and 4")
    arguments.add_argument("--size", type=int, action="append", help="in bytes; default: 4 KiB to 400 MiB")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=0.2, help="about how long each measurement repeats a size")
    arguments.add_argument("--limit", type=float, default=60, help="seconds that one run may take")
    arguments.add_argument("--json", action="store_true", help="print one object instead of the table")
    a = arguments.parse_args()

    where = machine()
    sizes = a.size or SIZES
    measured = {(ranks, size): ([], []) for ranks in a.ranks or (2, 4) for size in sizes}
    too_long = {}  # ranks -> the size that the C program did not finish in time
    for round in range(a.rounds):
        for (ranks, size), (ours, theirs) in measured.items():
            runs = [(ours, a.ours), (theirs, a.theirs)]
            for results, program in runs if round % 2 == 0 else reversed(runs):
                if program == a.theirs and size >= too_long.get(ranks, size + 1):
                    continue
                rate = measure(program, ranks, size, a)
                if rate is not None:
                    results.append(rate)
                elif program == a.theirs:
                    too_long[ranks] = size
                else:
                    raise SystemExit(f"error: {a.ours} did not finish {text(size)} on {ranks} ranks in {a.limit} s")
        print(f"round {round + 1} of {a.rounds} done", file=sys.stderr)

    rows = []
    for (ranks, size), (ours, theirs) in measured.items():
        row = {"ranks": ranks, "bytes": size, "ours": statistics.median(ours)}
        if size < too_long.get(ranks, size + 1):
            ratios = [o / t for o, t in zip(ours, theirs)]
            row["theirs"] = statistics.median(theirs)
            row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row)
    if a.json:
        print(json.dumps({"machine": where, "rounds": a.rounds, "rows": rows}, indent=1))
        return
    print(f"{where}; {a.rounds} rounds; ratio = our bandwidth / that of MPI_Allreduce in C")
    print(f"{'ranks':>5} {'message':>8} {'ours MB/s':>10} {'C MB/s':>10} {'ratio':>8} {'min':>8} {'max':>8}")
    for r in rows:
        print(f"{r['ranks']:5} {text(r['bytes']):>8} {r['ours'] / 1e6:10.1f}", end="")
        if "theirs" in r:
            print(f" {r['theirs'] / 1e6:10.1f} {r['ratio']:8.2f} {r['ratio_min']:8.2f} {r['ratio_max']:8.2f}")
        else:
            print(f" not done after {a.limit:g} s")


if __name__ == "__main__":
    main()
