"""BYOL's two views of every image: mentee's loader beside those people use in Python. `ci/bench loader` runs this.

All on one core, in turns (one measurement of each a round, so that what else the machine does meets all of them), in images per
second of processor time; two views of an image count as one image. Ratios are medians of the rounds' own ratios.

The peers do what their users do: lightly's BYOLTransform (bilinear, Pillow's blur of three boxes), albumentations on OpenCV (8-bit
colours, 23-tap blur), DALI (fixed order of colours as one matrix; `dali` bicubic with 23 taps, `dali-fast` bilinear with 3 sigma).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def peer(name, folder, size, images):
    """One measurement of a peer; None when it cannot run here."""
    command = [sys.executable, str(HERE / "loader_peers.py"), name, "--images", str(folder), "--size", str(size), "--n", str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{name}: cannot run here: {last}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])["images_per_cpu_s"]


def mentee(binary, recipe, data, images):
    command = [binary, "bench", "loader", recipe, "--data", str(data), "--images", str(images), "--rounds", "1", "--threads", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}: {done.stderr.strip()}")
    return json.loads(done.stdout)["images_per_cpu_s"]


def compare(title, ours, peers, rounds):
    """`ours` and `peers`: name -> a measurement."""
    found = {name: [] for name in (*ours, *peers)}
    for at in range(rounds):
        for name, measure in (*ours.items(), *peers.items()):
            if found[name] is None:
                continue
            speed = measure()
            found[name] = None if speed is None else [*found[name], speed]
        print(f"{title}, round {at + 1} of {rounds}:", ", ".join(f"{n} {s[-1]:.0f}" for n, s in found.items() if s), flush=True)
    main = next(iter(ours))
    print(f"\n{title}: images per CPU-second, one core\n")
    print(f"| pipeline | median | least | most | {main} is |")
    print("|---|---|---|---|---|")
    for name, speeds in found.items():
        if not speeds:
            continue
        ratio = statistics.median(a / b for a, b in zip(found[main], speeds))
        print(f"| {name} | {statistics.median(speeds):.0f} | {min(speeds):.0f} | {max(speeds):.0f} | {ratio:.2f}x |")
    print()


def main():
    parser = argparse.ArgumentParser(prog="ci/bench loader")
    parser.add_argument("--mentee", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--photos", type=Path, help="a tar of photographs (JPEG), or mentee's shards of them")
    parser.add_argument("--cifar", type=Path, help="a folder of CIFAR's images as JPEG files")
    parser.add_argument("--cifar-shards", type=Path, help="the same as mentee's shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="lightly,albumentations,dali,dali-fast")
    parser.add_argument("--threads", default="1,2", help="then mentee's loader with so many threads")
    a = parser.parse_args()
    if not (a.photos or a.cifar):
        parser.error("nothing to measure: give --photos, --cifar or both")
    core = min(os.sched_getaffinity(0))
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    names = [name for name in a.peers.split(",") if name]
    with tempfile.TemporaryDirectory() as scratch:
        if a.photos:
            folder = Path(scratch) / "photos"
            with tarfile.open(a.photos) as tar:
                tar.extractall(folder, filter="data")
            recipe = "byol-imagenet-resnet50-100ep"
            compare(
                "Photos at 224 pixels",
                {"mentee": lambda: mentee(a.mentee, recipe, a.photos, 1600)},
                {name: (lambda name=name: peer(name, folder, 224, 200)) for name in names},
                a.rounds,
            )
        if a.cifar:
            recipe = "byol-cifar10-resnet18"
            ours = {"mentee": lambda: mentee(a.mentee, recipe, a.cifar_shards or a.cifar, 20000)}
            if a.cifar_shards:
                ours["mentee, loose files"] = lambda: mentee(a.mentee, recipe, a.cifar, 20000)
            compare(
                "CIFAR at 32 pixels",
                ours,
                {name: (lambda name=name: peer(name, a.cifar, 32, 4000)) for name in names if name != "dali-fast"},
                a.rounds,
            )
    os.sched_setaffinity(0, everything)
    for recipe, data in (("byol-imagenet-resnet50-100ep", a.photos), ("byol-cifar10-resnet18", a.cifar_shards or a.cifar)):
        if data:
            print(f"{recipe} by number of decode threads:")
            subprocess.run([a.mentee, "bench", "loader", recipe, "--data", str(data), "--threads", a.threads], check=True)


if __name__ == "__main__":
    main()
