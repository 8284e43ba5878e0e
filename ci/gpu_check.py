"""The checks of a package that `ci/gpu-check --pack` made, on a machine with an NVIDIA GPU: `ci/gpu-check --run` runs this.

The machine needs Linux on x86-64 and Python with torch 2.11 of CUDA 13; its libtorch is the one that is used. No part stops the
next; OUT/gpu-check.json is written anew after each part and each measurement, so that what a killed run has found is there.

  smoke    the GPU, the libraries, `mentee-worker doctor`
  parity   the first steps of a run on the CPU and on the GPU, every tensor compared, in f64, f32 and bf16
  step     BYOL's training step against PyTorch's on the same GPU, in turns; a ratio is PyTorch's time over mentee's in one round
  nccl     two processes on one GPU: all-reduce, losses of 2 ranks against 1, what is said when a rank is killed
  resident views made by the GPU of images that it holds: the same losses as with the loader's, and what it buys with one thread
  overlap  the teacher's pass on a stream of its own: the same losses, and what it buys, in turns
  profile  where the GPU's time goes in a step
  train    BYOL to the end on the packed images, with nearest neighbours (only when named)
  learn    the same settings here and in byol_reference.py, plain PyTorch: nearest neighbours of both on the way (only when named)
"""

import argparse
import importlib.util
import json
import math
import os
import queue
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {"smoke": 60, "parity": 180, "step": 420, "nccl": 240, "resident": 90, "overlap": 180, "profile": 90, "train": 3600, "learn": 3600}  # seconds at most
DEFAULT_PARTS = "smoke,parity,resident,step,nccl,overlap,profile"
RECIPE = "byol-cifar10-resnet18"
# name -> arguments of bench_step.py. LARS in a loop over parameters is how it is shipped; at its fastest it is not.
WAYS = {
    "eager": ["--lars", "loop"],
    "eager-foreach": ["--lars", "foreach"],
    "compile": ["--lars", "foreach", "--compile", "default"],
    # Several times as fast to compile: a ResNet-50's step takes minutes.
    "compile-networks": ["--lars", "foreach", "--compile", "default", "--compiled", "networks"],
    "reduce-overhead": ["--lars", "foreach", "--compile", "reduce-overhead"],
    "max-autotune": ["--lars", "foreach", "--compile", "max-autotune-no-cudagraphs"],
    "lightly": ["--library", "lightly"],
}
# Parity in f64: the largest relative difference of any tensor. In f32 and bf16 rounding grows within one pass, on any processor;
# there the GPU's whole gradient may be so many times as far from the CPU's in f64 as the CPU's own of that precision is.
EXACT = 1e-9
TIMES_AS_FAR = 1.5
# lightly's benchmark for CIFAR-10, as byol_reference.py has it. Our loss is four times lightly's, so that a quarter of its learning rate
# and four times its weight decay make the same update.
AS_LIGHTLY = {
    "views.preset": "byol-cifar", "views.resize": "bilinear", "views.saturation": 0.4, "views.solarize": [0.0, 0.0],
    "views.mean": [0.485, 0.456, 0.406], "views.std": [0.229, 0.224, 0.225],
    "method.tau_schedule": "constant", "method.tau_base": 0.99,
    "method.projector_hidden": 1024, "method.projector_out": 256, "method.predictor_hidden": 1024,
    "optimizer.name": "sgd", "optimizer.base_lr": 0.03, "optimizer.weight_decay": 2e-3, "optimizer.exclude_bias_and_norm": False,
    "schedule.global_batch": 128, "schedule.warmup_epochs": 0, "schedule.decay": "cosine-per-epoch",
}
# What two runs of one recipe may differ by, in percent of kNN.
LEARN_TOLERANCE = 2.0
# 2 ranks against 1: precision, the largest relative difference of a loss, and what else the recipe has.
RANK_CASES = {
    "f64": ("f64", 1e-9, {}),
    "f32": ("f32", 1e-3, {}),
    "odd shares, micro-batches, clipping": (
        "f64", 1e-9, {"schedule.global_batch": 33, "parallel.micro_batches": 3, "optimizer.clip_norm": 0.1}
    ),
    "mocov3": ("f64", 1e-9, {"method.name": "mocov3", "method.temperature": 0.2}),
}
# What a PyTorch process may keep while another is measured.
HELD_MB = 8192
TAIL = 3000


# One of two processes on a device. With GPU_CHECK_WATCH its process number, its errors and how it ended go into that folder, and mpiexec
# hears of its end only when the folder holds `done`: it would end the other process before that can say anything.
RANK = r"""#!/bin/sh
rank=${PMI_RANK:-0}
visible=${CUDA_VISIBLE_DEVICES:-0}
export NCCL_HOSTID=host$rank CUDA_VISIBLE_DEVICES=${visible%%,*}
[ -n "$GPU_CHECK_WATCH" ] || exec "$@"
"$@" 2>"$GPU_CHECK_WATCH/stderr-$rank" &
echo $! >"$GPU_CHECK_WATCH/pid-$rank"
wait $!
code=$?
echo $code >"$GPU_CHECK_WATCH/code-$rank"
while [ ! -e "$GPU_CHECK_WATCH/done" ]; do sleep 0.2; done
exit $code
"""


class OutOfTime(Exception):
    pass


class Failed(Exception):
    """A message, and more for the JSON."""

    def __init__(self, message, **more):
        super().__init__(message)
        self.more = more


def sets(keys):
    """`--set` arguments; words are quoted as TOML wants them."""
    out = []
    for key, value in keys.items():
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, (str, Path)):
            value = json.dumps(str(value))
        out += ["--set", f"{key}={value}"]
    return out


def environment():
    """This process's variables with the package's programs and libraries, and libtorch's."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        raise SystemExit(f"error: {sys.executable} has no torch: run this with a Python that has torch 2.11")
    torch = Path(found.origin).parent
    libraries = [HERE / "lib", HERE / "lib/mpich", torch / "lib"]
    wheels = importlib.util.find_spec("nvidia")  # a folder that several wheels share
    for place in (wheels.submodule_search_locations or []) if wheels else []:
        libraries += sorted(path for path in Path(place).glob("*/lib") if path.is_dir())
    own = os.environ
    return dict(
        own,
        PATH=f"{HERE / 'bin'}:{own.get('PATH', '')}",
        PYTHONPATH=":".join([str(HERE / "site"), *filter(None, [own.get("PYTHONPATH")])]),
        LD_LIBRARY_PATH=":".join([*map(str, libraries), *filter(None, [own.get("LD_LIBRARY_PATH")])]),
        PYTHONUNBUFFERED="1",
    )


def read_safetensors(path):
    """name -> float64 tensor."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, _ = entry["data_offsets"]
            count = math.prod(entry["shape"])
            values = torch.frombuffer(data, dtype=kinds[entry["dtype"]], offset=8 + length + begin, count=count)
            out[name] = values.double()
    return out


def compare(found, expected):
    """The largest relative difference of any tensor in L2 norm, which has it, and that of all together.

    A tensor that is much smaller than the others is measured by a thousandth of the largest one's root mean square: a bias before a
    norm has no gradient, and what rounding leaves of it has no meaning.
    """
    if found.keys() != expected.keys():
        raise Failed(f"other tensors: {sorted(found.keys() ^ expected.keys())[:5]}")
    norms = {name: value.norm().item() for name, value in expected.items()}
    size = {name: max(1, value.numel()) for name, value in expected.items()}
    floor = 1e-3 * max((norms[name] / math.sqrt(size[name]) for name in norms), default=0.0)
    worst, where, total = 0.0, "", 0.0
    for name, value in expected.items():
        difference = (found[name] - value).norm().item()
        if not math.isfinite(difference):
            raise Failed(f"{name} is not finite")
        total += difference**2
        scale = max(norms[name], floor * math.sqrt(size[name]))
        relative = difference / scale if scale > 0 else difference
        if relative > worst:
            worst, where = relative, name
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    return {"worst": worst, "tensor": where, "flat": math.sqrt(total) / whole if whole > 0 else math.sqrt(total)}


def read_lines(path):
    """The complete lines of a metrics.jsonl."""
    try:
        text = path.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


class Peer:
    """A PyTorch process that measures when it is asked to."""

    def __init__(self, check, case, way):
        self.way, self.ready, self.held_mb, self.failure = way, None, 0.0, None
        flags = {
            "--backbone": case["backbone"],
            "--stem": case["stem"],
            "--size": case["size"],
            "--batch": case["batch"],
            "--projector-hidden": case["hidden"],
            "--projector-out": case["out"],
            "--predictor-hidden": case["hidden"],
            "--precision": case["precision"],
            "--optimizer": "lars",
            "--threads": check.a.threads,
            "--device": check.a.device,
        }
        command = [sys.executable, str(HERE / "bench_step.py"), "--serve", *WAYS[way]]
        for flag, value in flags.items():
            command += [flag, str(value)]
        self.stderr = tempfile.TemporaryFile(dir=check.temporary)
        self.process = subprocess.Popen(
            command, env=check.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
            start_new_session=True,
        )
        self.lines, self.starting = queue.Queue(), threading.Lock()
        threading.Thread(target=self.listen, daemon=True).start()
        check.children.add(self.process)

    def listen(self):
        for line in self.process.stdout:
            try:
                self.lines.put(json.loads(line))
            except ValueError:
                pass  # a library's own words
        self.lines.put(None)

    def wait(self, seconds):
        try:
            answer = self.lines.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.end()
            self.failure = OutOfTime(f"PyTorch ({self.way}) did not answer in {seconds:.0f} s")
            raise self.failure from None
        if answer is None:
            tail = self.tail()
            self.end()
            said = tail.strip().splitlines() or ["no word"]
            self.failure = Failed(f"PyTorch ({self.way}) ended: {said[-1]}", stderr=tail)
            raise self.failure
        return answer

    def tail(self):
        self.process.wait()
        self.stderr.seek(max(0, self.stderr.seek(0, 2) - TAIL))
        return self.stderr.read().decode(errors="replace")

    def start(self, seconds):
        """Waits until it is compiled."""
        with self.starting:
            if self.failure is not None:
                raise self.failure
            if self.ready is None:
                self.ready = self.wait(seconds)["ready_s"]

    def measure(self, steps, warmup, seconds):
        until = time.monotonic() + seconds
        self.start(seconds)
        try:
            self.process.stdin.write(json.dumps({"steps": steps, "warmup": warmup}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, and wait() says so
        answer = self.wait(until - time.monotonic())
        self.held_mb = answer.get("held_mb", 0.0)
        return answer

    def end(self):
        kill(self.process)


def kill(process):
    """Ends a process that we started, with its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Check:
    def __init__(self, a):
        self.a = a
        self.environment = environment()
        self.out = Path(a.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.temporary / "inductor"), "TRITON_CACHE_DIR": str(self.temporary / "triton")}
        self.environment = {**cache, **self.environment}
        self.began = time.monotonic()
        self.until = self.began + a.budget
        self.part_until = self.until
        self.children = set()
        self.peers = {}
        self.warming, self.timing = None, False
        self.data = None
        revision = HERE / "revision"
        self.result = {
            "revision": revision.read_text().strip() if revision.exists() else None,
            "device": a.device,
            "arguments": sys.argv[1:],
            "parts": {},
        }

    # Running things.

    def left(self, most=math.inf):
        seconds = min(self.part_until - time.monotonic(), most)
        if seconds <= 0:
            raise OutOfTime("no time is left")
        return seconds

    def run(self, command, most=math.inf, may_fail=False, extra=None):
        """Runs it to its end: returncode, seconds, stdout, stderr."""
        most = self.left(most)
        began = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command], env={**self.environment, **(extra or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.temporary, start_new_session=True,
        )
        self.children.add(process)
        try:
            stdout, stderr = (text.decode(errors="replace") for text in process.communicate(timeout=most))
        except subprocess.TimeoutExpired:
            kill(process)
            _, stderr = process.communicate()
            tail = stderr.decode(errors="replace")[-TAIL:]
            raise Failed(f"{self.short(command)} was not done after {most:.0f} s", stderr=tail) from None
        finally:
            self.children.discard(process)
        done = {"returncode": process.returncode, "seconds": time.monotonic() - began, "stdout": stdout, "stderr": stderr[-TAIL:]}
        if process.returncode != 0 and not may_fail:
            lines = [line for line in stderr.splitlines() if line.strip()]
            said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no word")
            message = f"{self.short(command)} ended with {process.returncode}: {said[:300]}"
            raise Failed(message, stderr=done["stderr"], command=[str(part) for part in command])
        return done

    @staticmethod
    def short(command):
        return " ".join(Path(str(part)).name if index == 0 else str(part) for index, part in enumerate(command))[:80]

    @property
    def worker(self):
        return HERE / "bin/mentee-worker"

    @property
    def on_device(self):
        """Keys that choose the device; none for the CPU."""
        return {} if self.a.device == "cpu" else {"parallel.device": self.a.device}

    @property
    def small(self):
        return self.a.device == "cpu"

    @property
    def network(self):
        """Keys of a network that is quick."""
        keys = {
            "method.projector_hidden": 256, "method.projector_out": 256, "method.predictor_hidden": 256,
            "schedule.global_batch": 16 if self.small else 32,
        }
        return keys | ({"model.backbone": "resnet20"} if self.small else {})

    def images(self):
        """Where the packed images are."""
        if self.data is None:
            with tarfile.open(HERE / "data.tar.xz") as archive:
                archive.extractall(self.temporary, filter="data")
            self.data = self.temporary / "data"
        return self.data

    def save(self):
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        text = json.dumps(self.result, indent=1, default=str)
        new = self.out / "gpu-check.json.new"
        new.write_text(text + "\n")
        new.replace(self.out / "gpu-check.json")

    def part(self, name):
        most = self.a.timeout.get(name, PARTS[name])
        part = self.result["parts"][name] = {"ok": None}
        began = time.monotonic()
        self.part_until = min(self.until, began + most)
        try:
            self.left()
            part["ok"] = getattr(self, name)(part)
        except (Failed, OutOfTime) as error:
            part |= {"ok": False, "error": str(error), **getattr(error, "more", {})}
        except Exception as error:  # of this script: it must not stop the next part
            part |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        part["seconds"] = round(time.monotonic() - began, 1)
        self.save()
        state = {True: "ok", False: "FAILED", None: "not available"}[part["ok"]]
        said = part.get("error") or part.get("summary", "")
        print(f"gpu-check: {name:8} {state:13} {part['seconds']:7.1f} s  {said}", flush=True)

    def stopped(self):
        """What was under way is not well, and what was to come was not tried."""
        self.result["stopped"] = True
        for part in self.result["parts"].values():
            if "seconds" not in part:
                part |= {"ok": False, "error": "stopped"}

    def end(self):
        for process in [*self.children, *(peer.process for peer in self.peers.values())]:
            kill(process)
        shutil.rmtree(self.temporary, ignore_errors=True)

    # The parts. Each fills a dictionary, and returns whether all was well: None means that it could not be tried.

    def smoke(self, part):
        facts = "name,driver_version,memory.total,clocks.max.sm,power.limit,compute_cap"
        try:
            said = self.run(["nvidia-smi", f"--query-gpu={facts}", "--format=csv,noheader"], 30, may_fail=True)
            part["nvidia_smi"] = dict(zip(facts.split(","), said["stdout"].strip().split(", ")))
        except FileNotFoundError:
            part["nvidia_smi"] = None
        code = (
            "import json, torch; c = torch.cuda.is_available(); p = torch.cuda.get_device_properties(0) if c else None; "
            "print(json.dumps(dict(torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), "
            "device=p.name if c else None, memory_mb=p.total_memory / 2**20 if c else None, "
            "nccl=torch.cuda.nccl.version() if c else None)))"
        )
        part["python"] = json.loads(self.run([sys.executable, "-c", code], 60)["stdout"].strip().splitlines()[-1])
        part["cores"] = len(os.sched_getaffinity(0))
        version = self.run([HERE / "bin/mentee", "--version"], 20)
        part["mentee"] = version["stdout"].strip()
        done = self.run([self.worker, "doctor", RECIPE, *sets(self.on_device)], 60)
        part["doctor"] = json.loads(done["stdout"].strip().splitlines()[-1])
        devices = part["doctor"].get("devices", {})
        python = part["python"]
        part["summary"] = f"{python['device']}, torch {python['torch']}, the worker finds {devices.get('count')} devices"
        if devices.get("problem"):
            part["summary"] += f" ({devices['problem']})"
        return self.small or devices.get("count", 0) > 0

    def trace(self, stem, precision, side, steps):
        keys = self.network | {"data.path": self.images(), "parallel.precision": precision}
        keys |= {"model.stem": stem, "views.size": 64 if stem == "imagenet" and not self.small else 32}
        keys |= self.on_device if side == "device" else ({} if self.small else {"parallel.device": "cpu"})
        if self.small and side == "device":
            keys["parallel.threads"] = 1  # something has to differ
        out = self.temporary / f"trace-{side}"
        command = [self.worker, "trace", RECIPE, "--steps", steps, "--out", out, *sets(keys)]
        return out, self.run(command)["seconds"]

    def parity(self, part):
        self.images()
        rows = part.setdefault("rows", {})
        for stem in self.a.stems.split(","):
            exact = None  # the CPU's gradient in f64
            for precision in self.a.precisions.split(","):
                row = rows[f"{stem} {precision}"] = {}
                exact = self.parity_of(row, stem, precision, exact)
                self.save()
        words = [
            f"{name} {row['gradients']['worst']:.1e}" + (
                " (from f64: {device:.1e}, the CPU's {host:.1e})".format(**row["from_f64"]) if "from_f64" in row else ""
            ) if "gradients" in row else f"{name} failed"
            for name, row in rows.items()
        ]
        recorded = part["recorded"] = self.recorded()
        words.append(f"steps as one graph and kernel by kernel {recorded['difference']:.1e}")
        part["summary"] = "gradients: " + ", ".join(words)
        return all(row["ok"] for row in rows.values()) and recorded["difference"] <= EXACT

    def recorded(self):
        """The loss of the eighth step, f64, of passes that are recorded as one graph and of others."""
        case = self.cases()[0] | {"precision": "f64", "batch": 8 if self.small else 64}
        command = [*self.step_command(case), "--steps", 8, "--warmup", 0]
        losses = []
        for more in ([], ["--without", "graph"]):
            losses.append(json.loads(self.run([*command, *more])["stdout"].strip().splitlines()[-1])["loss"])
        return {"losses": losses, "difference": abs(losses[0] - losses[1]) / abs(losses[1])}

    def parity_of(self, row, stem, precision, exact):
        """Fills `row`; returns the CPU's gradient in f64."""
        done = {}

        def side_of(side):
            try:
                done[side] = self.trace(stem, precision, side, 3)
            except Exception as error:  # handed to the main thread
                done[side] = error

        threads = [threading.Thread(target=side_of, args=(side,)) for side in ("host", "device")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            for side in ("host", "device"):
                if isinstance(done[side], Exception):
                    raise done[side]
                row[f"{side}_s"] = done[side][1]
            row |= self.compare_traces(done["host"][0], done["device"][0])
            sides = [read_safetensors(done[side][0] / "step-0000/gradients.safetensors") for side in ("host", "device")]
            if precision == "f64":
                exact = sides[0]
                row["ok"] = all(row[name]["worst"] <= EXACT for name in ("before", "gradients", "after"))
            elif exact is None:
                raise Failed("f64 has to be compared first")
            else:
                host, device = (compare(side, exact)["flat"] for side in sides)
                row["from_f64"] = {"host": host, "device": device}
                row["ok"] = device <= TIMES_AS_FAR * host
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}", **getattr(error, "more", {})}
        for side in ("host", "device"):
            shutil.rmtree(self.temporary / f"trace-{side}", ignore_errors=True)
        return exact

    @staticmethod
    def compare_traces(host, device):
        row = {}
        for name in ("views", "before", "gradients", "after"):
            file = f"step-0000/{name}.safetensors"
            row[name] = compare(read_safetensors(device / file), read_safetensors(host / file))
        losses = [[step["loss"] for step in json.loads((folder / "trace.json").read_text())["steps"]] for folder in (host, device)]
        row["losses_host"], row["losses_device"] = losses
        row["loss_differences"] = [abs(a - b) / abs(a) for a, b in zip(*losses)]
        return row

    # Speed.

    def cases(self):
        out = []
        for text in self.a.cases.split(","):
            backbone, size, batch = text.split(":")
            case = dict(name=text, backbone=backbone, size=int(size), batch=int(batch), hidden=4096, out=256)
            case["precision"] = self.a.step_precision
            case["stem"] = "imagenet" if case["size"] > 64 else "cifar"
            case["steps"] = self.a.steps or (2 if self.small else 20 if case["stem"] == "imagenet" else 40)
            if self.small:
                case |= dict(hidden=512, out=128)
            out.append(case)
        return out

    def step_command(self, case):
        keys = {
            "model.backbone": case["backbone"],
            "model.stem": case["stem"],
            "views.size": case["size"],
            "method.projector_layers": 2,
            "method.projector_hidden": case["hidden"],
            "method.projector_out": case["out"],
            "method.predictor_hidden": case["hidden"],
            "optimizer.name": "lars",
            "schedule.global_batch": case["batch"],
            "parallel.precision": case["precision"],
            "parallel.threads": self.a.threads,
        } | self.on_device
        return [self.worker, "bench", "step", RECIPE, "--json", *sets(keys), *self.a.step_args.split()]

    def prewarm(self):
        """Compiles while nothing is timed."""

        def work():
            for case in self.cases():
                for way in self.a.ways.split(","):
                    if self.timing:
                        return
                    if "--compile" in WAYS[way] and way != "reduce-overhead" and (case["name"], way) not in self.peers:
                        peer = self.peers[case["name"], way] = Peer(self, case, way)
                        try:
                            peer.start(max(1.0, self.until - time.monotonic()))
                        except (Failed, OutOfTime):
                            pass  # said again when it is measured

        self.warming = threading.Thread(target=work, daemon=True)
        self.warming.start()

    def pytorch(self, case, way):
        key = (case["name"], way)
        peer = self.peers.get(key)
        if peer is not None and peer.failure is not None:
            raise peer.failure
        if peer is None or peer.process.poll() is not None:
            peer = self.peers[key] = Peer(self, case, way)
        result = peer.measure(case["steps"], 3 if not self.small else 1, self.left())
        result["ready_s"] = peer.ready
        if peer.held_mb > HELD_MB:
            peer.end()
        return result

    def mentee_step(self, case):
        warmup = 1 if self.small else 10
        command = [*self.step_command(case), "--steps", case["steps"], "--warmup", warmup]
        return json.loads(self.run(command)["stdout"].strip().splitlines()[-1])

    def step(self, part):
        if self.warming is not None:
            self.warming.join(timeout=self.left() / 2)
        self.timing = True
        rows = part.setdefault("cases", {})
        ways = self.a.ways.split(",")
        end, cases = self.part_until, self.cases()
        for index, case in enumerate(cases):
            # What a case does not use the next may.
            now = time.monotonic()
            self.part_until = now + (end - now) / (len(cases) - index)
            row = rows[case["name"]] = {"runs": {"mentee": [], **{way: [] for way in ways}}, "errors": {}}
            dead = set()
            longest = 0.0
            for round in range(self.a.rounds):
                began = time.monotonic()
                if began + longest > self.part_until:
                    row["stopped"] = f"no time for more than {round} of {self.a.rounds} rounds"
                    break
                for who in ["mentee", *ways] if round % 2 == 0 else [*reversed(ways), "mentee"]:
                    result = None
                    if who not in dead:
                        try:
                            result = self.mentee_step(case) if who == "mentee" else self.pytorch(case, who)
                        except (Failed, OutOfTime, ValueError) as error:
                            row["errors"][who] = {"error": str(error), **getattr(error, "more", {})}
                            dead.add(who)
                    row["runs"][who].append(result)
                    self.ratios(row, ways)
                    self.save()
                if round > 0:
                    longest = max(longest, time.monotonic() - began)
            for way in ways:
                if peer := self.peers.pop((case["name"], way), None):
                    peer.end()
        self.part_until = end
        words = []
        for name, row in rows.items():
            ours = row.get("mentee", {}).get("images_per_s")
            ratios = ", ".join(f"{row[way]['ratio']:.2f}x {way}" for way in ways if "ratio" in row.get(way, {}))
            words.append(f"{name}: {ours:.0f} images/s, {ratios or 'no ratio'}" if ours else f"{name}: nothing measured")
        part["summary"] = "; ".join(words)
        return all(not row["errors"] and "mentee" in row for row in rows.values())

    @staticmethod
    def ratios(row, ways):
        ours = row["runs"]["mentee"]
        for who in ["mentee", *ways]:
            done = [run for run in row["runs"][who] if run]
            if not done:
                continue
            out = row[who] = {
                "step_ms": statistics.median(run["step_ms"] for run in done),
                "images_per_s": statistics.median(run["images_per_s"] for run in done),
                "rounds": len(done),
            }
            for key in ("peak_device_mb", "peak_reserved_mb", "peak_rss_mb"):
                if all(run.get(key) is not None for run in done):
                    out[key] = max(run[key] for run in done)
            if who != "mentee":
                each = [its["step_ms"] / our["step_ms"] for our, its in zip(ours, row["runs"][who]) if our and its]
                if each:
                    out |= {"ratio": statistics.median(each), "ratio_min": min(each), "ratio_max": max(each)}

    # Two processes on one GPU.

    def ranks(self, number, command):
        """NCCL takes two processes on one device for two machines with one each, if they say they are on two."""
        wrapper = self.temporary / "rank.sh"
        if not wrapper.exists():
            wrapper.write_text(RANK)
            wrapper.chmod(0o755)
        return [HERE / "bin/mpiexec", "-launcher", "fork", "-n", number, *self.a.mpi_args.split(), wrapper, *command]

    def short_run(self, name, precision, **more):
        folder = self.temporary / name
        keys = self.network | {
            "data.path": self.images(),
            "parallel.precision": precision,
            "parallel.threads": max(1, self.a.threads // 2),
            "parallel.decode_threads": max(1, self.a.threads // 2),
            "run.log_every_steps": 1,
            "eval.knn_every_epochs": 0,
            "checkpoint.every_epochs": 0,
            **self.on_device,
            **more,
        }
        return folder, [self.worker, RECIPE, "--run-dir", folder, *sets(keys)]

    def nccl(self, part):
        ok = True
        # A network so deep that a whole step is more than a stream takes, on a device.
        deep = {} if self.small else {"model.backbone": "resnet50"}
        tests = (
            ("all_reduce", self.all_reduce),
            ("invariance", self.invariance),
            ("killed_rank", lambda its: self.lost_rank(its, signal.SIGKILL, {})),
            ("hung_rank", lambda its: self.lost_rank(its, signal.SIGSTOP, deep)),
        )
        for name, test in tests:
            its = part[name] = {}
            try:
                its["ok"] = test(its)
            except (Failed, OutOfTime, ValueError) as error:
                its |= {"ok": False, "error": str(error), **getattr(error, "more", {})}
            ok = ok and its["ok"]
            self.save()
        tests = [(name, its) for name, its in part.items() if isinstance(its, dict)]
        part["summary"] = "; ".join(f"{name}: {its.get('summary') or its.get('error')}" for name, its in tests)
        return ok

    def all_reduce(self, its):
        command = [self.worker, "bench", "allreduce", "--json", "--seconds", "0.3", "--device", self.a.device]
        done = self.run(self.ranks(2, command), 60, extra={"NCCL_DEBUG": "WARN"})
        # NCCL has its say on stdout too.
        text = done["stdout"]
        its["rows"], _ = json.JSONDecoder().raw_decode(text, max(text.find("[{"), 0))
        its["summary"] = f"of {len(its['rows'])} sizes on {self.a.device}"
        return bool(its["rows"])

    def invariance(self, its):
        ok = True
        for case, (precision, tolerance, more) in RANK_CASES.items():
            losses = {}
            for number in (1, 2):
                folder, command = self.short_run(f"ranks-{number}", precision, **{"schedule.max_steps": 10, **more})
                self.run(self.ranks(number, command), 90, extra={"NCCL_DEBUG": "WARN"})
                losses[number] = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
                shutil.rmtree(folder, ignore_errors=True)
            complete = len(losses[1]) == len(losses[2]) == 10
            worst = max((abs(a - b) / abs(a) for a, b in zip(losses[1], losses[2])), default=math.inf)
            its[case] = {"losses": losses, "worst": worst, "tolerance": tolerance, "ok": complete and worst <= tolerance}
            ok = ok and its[case]["ok"]
        its["summary"] = ", ".join(f"{case} {its[case]['worst']:.1e}" for case in RANK_CASES)
        return ok

    def lost_rank(self, its, how, more):
        """Rank 1 gets the signal `how`; rank 0 must end, and say why."""
        deadline = 10
        more = {"schedule.epochs": 1000, "parallel.timeout_s": deadline, **more}
        folder, command = self.short_run(f"lost-{how}", "f32", **more)
        watch = self.temporary / f"watch-{how}"
        watch.mkdir()
        process = subprocess.Popen(
            [str(part) for part in self.ranks(2, command)], env={**self.environment, "GPU_CHECK_WATCH": str(watch)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.temporary, start_new_session=True,
        )
        self.children.add(process)
        code, survivor, lost = watch / "code-0", None, None
        try:
            until = time.monotonic() + self.left(60)
            while sum(line["kind"] == "train" for line in read_lines(folder / "metrics.jsonl")) < 5:
                if process.poll() is not None or code.exists() or time.monotonic() > until:
                    raise Failed("two ranks did not get to step 5", said=self.said(watch, folder))
                time.sleep(0.05)
            survivor, lost = (int((watch / f"pid-{rank}").read_text()) for rank in (0, 1))
            os.kill(lost, how)
            began = time.monotonic()
            while is_running(survivor) and time.monotonic() - began < self.left(3 * deadline + 30):
                time.sleep(0.02)
            its["survivor_ended_after_s"] = round(time.monotonic() - began, 2)
            its["deadline_s"] = deadline
            ended = not is_running(survivor)
            time.sleep(0.3)
            # None: by its own MPI_Abort, which ends what would have written it too.
            its["survivor_code"] = code.read_text().strip() if code.exists() else None
        finally:
            (watch / "done").touch()
            for rank in (survivor, lost):
                if rank is not None and is_running(rank):
                    os.kill(rank, signal.SIGKILL)
            kill(process)
            self.children.discard(process)
        its["said"] = self.said(watch, folder)
        errors = [line for line in its["said"].get("stderr-0", "").splitlines() if "error" in line.lower()]
        end = "ended" if ended else "did NOT end"
        its["summary"] = f"the other {end} after {its['survivor_ended_after_s']} s: {(errors or ['nothing said'])[0][:200]}"
        return ended and bool(errors)

    @staticmethod
    def said(watch, folder):
        paths = sorted(watch.glob("stderr-*")) + sorted((folder / "logs").glob("rank-*.jsonl"))
        return {path.name: path.read_text(errors="replace")[-TAIL:] for path in paths}

    # Images on the GPU.

    def resident(self, part):
        """Losses in f32, which are the same in every run, and speeds in bf16 with one thread that decodes."""
        if self.small:
            part["summary"] = "on the processor the loader makes all views"
            return None
        cases = {"f32": ({"schedule.max_steps": 150}, 4), "bf16": ({"schedule.global_batch": 512, "schedule.max_steps": 250}, 1)}
        for precision, (more, threads) in cases.items():
            its = part[precision] = {}
            for how in ("never", "always"):
                more |= {"data.resident": how, "parallel.decode_threads": threads}
                folder, command = self.short_run(f"resident-{precision}-{how}", precision, **more)
                self.run(command)
                lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
                held = [line for line in read_lines(folder / "logs/rank-00000.jsonl") if "the device holds all images" in json.dumps(line)]
                last = lines[-len(lines) // 4 :]
                its[how] = {
                    "losses": [line["loss"] for line in lines],
                    "said": held,
                    "images_per_s": statistics.median(line["images_per_s"] for line in last),
                    "data_wait_ms": statistics.median(line["data_wait_ms"] for line in last),
                }
                shutil.rmtree(folder, ignore_errors=True)
            self.save()
        same = part["f32"]["never"]["losses"] == part["f32"]["always"]["losses"]
        held = all(its["always"]["said"] and not its["never"]["said"] for its in (part["f32"], part["bf16"]))
        never, always = (part["bf16"][how]["images_per_s"] for how in ("never", "always"))
        words = "the same losses" if same else "OTHER LOSSES"
        words += "" if held else ", the GPU did NOT take over"
        part["summary"] = f"{words}; images/s with one thread: loader {never:.0f}, GPU {always:.0f}"
        return same and held

    # The teacher's pass beside the student's.

    def overlap(self, part):
        """Losses of eight steps in f64, recorded as one graph and not, which are the same on one stream and on two; steps in bf16."""
        if self.small:
            part["summary"] = "on the processor there is one stream"
            return None
        sides = {"one stream": [], "two streams": ["--set", "parallel.overlap_teacher=true"]}

        def bench(case, *more):
            return json.loads(self.run([*self.step_command(case), *more])["stdout"].strip().splitlines()[-1])

        exact = self.cases()[0] | {"precision": "f64", "batch": 64}
        losses = part["losses"] = {
            f"{graph}, {side}": bench(exact, "--steps", 8, "--warmup", 0, *without, *more)["loss"]
            for graph, without in {"recorded": [], "one by one": ["--without", "graph"]}.items()
            for side, more in sides.items()
        }
        self.save()
        off = max(losses.values()) - min(losses.values())
        words = ["the same losses" if off <= EXACT * abs(max(losses.values())) else f"OTHER LOSSES, by {off:.1e}"]
        rows = part.setdefault("cases", {})
        for case in self.cases():
            row = rows[case["name"]] = {side: [] for side in sides}
            for round in range(min(2, self.a.rounds)):
                for side in sides if round % 2 == 0 else reversed(sides):
                    row[side].append(bench(case, "--steps", case["steps"], "--warmup", 10, *sides[side]))
                self.save()
            one, two = (statistics.median(run["step_ms"] for run in row[side]) for side in sides)
            row["ratio"] = one / two
            # Kernels that run at once take longer, one by one, than the GPU is busy.
            kernels = bench(case, "--kernels", "--steps", 5, "--warmup", 10, *sides["two streams"])["kernels"]
            row["at_once"] = sum(kernel["ms"] for kernel in kernels["each"]) / kernels["busy_ms"]
            if row["at_once"] < 1.001:
                words[0] = "NOTHING RUNS AT ONCE"
            words.append(f"{case['name']}: {one:.2f} ms on one stream, {two:.2f} on two ({one / two:.3f}x)")
        part["summary"] = "; ".join(words)
        return words[0] == "the same losses"

    # Where the time goes.

    def profile(self, part):
        rows = part.setdefault("cases", {})
        words, ok = [], True
        for case in self.cases():
            row = rows[case["name"]] = {}
            try:
                command = [*self.step_command(case), "--kernels", "--steps", case["steps"], "--warmup", 1 if self.small else 10]
                done = json.loads(self.run(command)["stdout"].strip().splitlines()[-1])
            except (Failed, OutOfTime, ValueError) as error:
                row |= {"error": str(error), **getattr(error, "more", {})}
                words.append(f"{case['name']}: {error}")
                ok = False
                continue
            kernels, kinds = done["kernels"], {}
            for kernel in kernels["each"]:
                kind = kernel_kind(kernel["name"])
                kinds[kind] = kinds.get(kind, 0.0) + kernel["ms"]
            all_ms = sum(kinds.values())
            row |= {"step_ms": done["step_ms"], "kind_ms": dict(sorted(kinds.items(), key=lambda it: -it[1])), **kernels}
            row["each"] = [{**kernel, "name": kernel["name"][:160]} for kernel in kernels["each"][:60]]
            shares = ", ".join(f"{kind} {100 * ms / all_ms:.0f} %" for kind, ms in row["kind_ms"].items()) if all_ms > 0 else "nothing ran"
            words.append(f"{case['name']}: {shares}; idle {kernels['idle_percent']:.1f} %")
            self.save()
        part["summary"] = "; ".join(words)
        return ok

    # A whole run.

    def train(self, part):
        a = self.a
        keys = {
            "schedule.epochs": a.epochs,
            "schedule.warmup_epochs": min(10, a.epochs / 10),
            "eval.knn_every_epochs": a.epochs,
        }
        if self.small:
            keys |= self.network | {"schedule.global_batch": 64, "run.log_every_steps": 1}
        self.whole_run(part, "train", a.train_recipe, keys)
        knn = [f"{line['knn_top1']:.2f} %" for line in part["evals"] if "knn_top1" in line]
        wait = 100 * (part.get("data_wait_share") or 0.0)
        speed = f"{part['wall_s']} s, {part.get('images_per_s', 0):.0f} images/s, waiting for data {wait:.1f} %"
        part["summary"] = f"{speed}, kNN {knn[-1] if knn else 'none'}"
        return bool(knn)

    def learn(self, part):
        a = self.a
        every = max(1, a.epochs // 4)
        keys = AS_LIGHTLY | {"schedule.epochs": a.epochs, "eval.knn_every_epochs": every}
        command = [sys.executable, HERE / "byol_reference.py", self.images(), "--epochs", a.epochs, "--every", every, "--init", "mentee"]
        if self.small:
            keys |= self.network | {"schedule.global_batch": 64}
            command += ["--backbone", "resnet20", "--batch", 64, "--hidden", 256, "--precision", "f32", "--device", "cpu"]
        self.whole_run(part, "learn", a.train_recipe, keys)
        ours = {line["epoch"]: line["knn_top1"] for line in part["evals"]}
        if a.without_pytorch:
            part["summary"] = f"{part['wall_s']} s; kNN after " + "; ".join(f"{n} epochs {top1:.2f} %" for n, top1 in ours.items())
            return bool(ours)
        command += a.learn_args.split()
        part["pytorch_command"] = [str(word) for word in command]
        lines = [json.loads(line) for line in self.run(command)["stdout"].splitlines() if line.startswith("{")]
        part["pytorch"] = lines
        theirs = {line["epoch"]: line["knn_top1"] for line in lines}
        both = sorted(ours.keys() & theirs.keys())
        part["summary"] = "kNN of mentee and PyTorch after " + "; ".join(f"{n} epochs {ours[n]:.2f} % {theirs[n]:.2f} %" for n in both)
        return bool(both) and ours[both[-1]] >= theirs[both[-1]] - LEARN_TOLERANCE

    def whole_run(self, part, name, recipe, keys):
        """`mentee run` on the packed images; what it says of itself goes into `part`."""
        folder = self.temporary / name
        keys = keys | {
            "data.path": self.images(),
            "parallel.precision": "f32" if self.small else "bf16",
            "checkpoint.every_epochs": 0,
            **self.on_device,
        }
        command = [HERE / "bin/mentee", "run", recipe, "--run-dir", folder, *sets(keys)]
        for text in self.a.train_set:
            command += ["--set", text]
        part["command"] = [str(word) for word in command]
        sampler = None
        if not self.small:
            query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
            try:
                sampler = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
                self.children.add(sampler)
            except OSError:
                pass
            samples = []
            if sampler is not None:
                threading.Thread(target=lambda: samples.extend(sampler.stdout), daemon=True).start()
        began = time.monotonic()
        failure = None
        try:
            self.run(command)
        except Failed as error:
            failure = error
        part["wall_s"] = round(time.monotonic() - began, 1)
        if sampler is not None:
            kill(sampler)
            pairs = [tuple(map(float, line.split(","))) for line in samples if re.fullmatch(r"[\d. ]+,[\d. ]+\n", line)]
            if pairs:
                part["gpu_utilization_percent"] = statistics.mean(pair[0] for pair in pairs)
                part["gpu_memory_mb"] = max(pair[1] for pair in pairs)
        lines = read_lines(folder / "metrics.jsonl")
        steps = [line for line in lines if line["kind"] == "train"]
        part["evals"] = [line for line in lines if line["kind"] == "eval"]
        if steps:
            settled = steps[len(steps) // 10 :]
            part["images_per_s"] = statistics.median(line["images_per_s"] for line in settled)
            part["step_ms"] = statistics.median(line["step_ms"] for line in settled)
            waited, all_ms = (sum(line[key] for line in settled) for key in ("data_wait_ms", "step_ms"))
            part["data_wait_share"] = waited / all_ms if all_ms > 0 else None
            part["last"] = steps[-1]
            shutil.copy(folder / "metrics.jsonl", self.out / f"{name}-metrics.jsonl")
        if failure is not None:
            raise failure


KERNEL_KINDS = (
    ("communication", r"nccl"),
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit|winograd|cudnn.*(xmma|cutlass)|nhwckcrs|engine"),
    ("norm", r"batch_?norm|bn_|_bn|^(grad_)?(moments|input|apply)_|^(combine|finish)_|welford"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|splitk"),
    ("optimizer", r"multi_tensor|foreach|lars|sgd|adam|lerp|^(ema|momentum|chunk_norms|squares)_"),
    ("pooling", r"pool"),
    ("copy", r"copy|transpose|cat|convert|cast|nchw|nhwc"),
    ("elementwise", r"elementwise|pointwise|vectorized|relu|add|mul|fill"),
    ("reduction", r"reduce|sum"),
)


def kernel_kind(name):
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def table(result):
    """What was found, for people."""
    lines = []
    for name, part in result["parts"].items():
        state = {True: "ok", False: "FAILED", None: "not available"}[part["ok"]]
        lines.append(f"{name:9} {state:13} {part.get('seconds', 0):7.1f} s  {part.get('error') or part.get('summary', '')}")
    parity = result["parts"].get("parity", {}).get("rows", {})
    if parity:
        heads = ("before", "views", "gradients", "flat", "after", "loss 0", "loss 2")
        lines += ["", f"{'parity':13} " + " ".join(f"{name:>9}" for name in heads) + "  worst gradient"]
    for name, row in parity.items():
        if "gradients" in row:
            values = [row["before"]["worst"], row["views"]["worst"], row["gradients"]["worst"], row["gradients"]["flat"]]
            values += [row["after"]["worst"], row["loss_differences"][0], row["loss_differences"][-1]]
            lines.append(f"{name:13} " + " ".join(f"{value:9.1e}" for value in values) + f"  {row['gradients']['tensor']}")
        else:
            lines.append(f"{name:13} {row.get('error', '')}")
    cases = result["parts"].get("step", {}).get("cases", {})
    if cases:
        lines += ["", f"{'step':20} {'':16} {'ms':>9} {'images/s':>10} {'ratio':>6} {'min':>6} {'max':>6} {'peak MB':>9} {'rounds':>6}"]
    for name, row in cases.items():
        for who in row["runs"]:
            its = row.get(who)
            if its is None:
                lines.append(f"{name:20} {who:16} {row['errors'].get(who, {}).get('error', 'not measured')}")
                continue
            ratio = " ".join(f"{its[key]:6.3f}" if key in its else " " * 6 for key in ("ratio", "ratio_min", "ratio_max"))
            peak = f"{its['peak_device_mb']:9.0f}" if "peak_device_mb" in its else " " * 9
            lines.append(f"{name:20} {who:16} {its['step_ms']:9.2f} {its['images_per_s']:10.1f} {ratio} {peak} {its['rounds']:6}")
    return "\n".join(lines)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--out", required=True, help="a folder for gpu-check.json, gpu-check.txt and the log of a training run")
    add("--parts", default=DEFAULT_PARTS, help="default: %(default)s")
    add("--budget", type=float, default=3600, metavar="SECONDS", help="for all parts together")
    add("--timeout", action="append", default=[], metavar="PART=SECONDS", help="for one part")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try this script itself")
    add("--threads", type=int, default=min(16, len(os.sched_getaffinity(0))))
    add("--precisions", default="f64,f32,bf16", help="of parity")
    add("--stems", help="of parity's network; default: cifar,imagenet, which have layers of their own")
    add("--cases", help="of step, BACKBONE:SIZE:BATCH,...; default: resnet18:32:512,resnet50:224:256,resnet18:32:1024")
    add("--ways", help=f"of PyTorch, of {', '.join(WAYS)}; default: eager, compile-networks, and lightly if it was packed")
    add("--step-precision", choices=("f32", "bf16"), default="bf16")
    add("--step-args", default="", help="more arguments for `bench step` of mentee, in one word")
    add("--rounds", type=int, help="of step; default: 5")
    add("--steps", type=int, help="measured in a round; default: 20 or 40")
    add("--no-prewarm", action="store_true", help="compile PyTorch's step when it is measured, not beside the parts before")
    add("--mpi-args", default="", help="more arguments for mpiexec, in one word")
    add("--epochs", type=int, default=1, help="of train and learn")
    add("--train-recipe", default=RECIPE)
    add("--train-set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe of train and learn")
    add("--without-pytorch", action="store_true", help="learn: mentee's side alone")
    add("--learn-args", default="", help="more arguments for byol_reference.py, in one word")
    a = arguments.parse_args()
    small = a.device == "cpu"
    a.cases = a.cases or ("resnet20:32:16" if small else "resnet18:32:512,resnet50:224:256,resnet18:32:1024")
    a.stems = a.stems or ("cifar" if small else "cifar,imagenet")
    lightly = ",lightly" if (HERE / "site/lightly").is_dir() else ""
    a.ways = a.ways or ("eager,eager-foreach" if small else f"eager,compile-networks{lightly}")
    a.rounds = a.rounds or (2 if small else 5)
    parts = a.parts.split(",")
    for name in parts:
        if name not in PARTS:
            arguments.error(f"--parts: no part is named {name}; there are {', '.join(PARTS)}")
    for way in a.ways.split(","):
        if way not in WAYS:
            arguments.error(f"--ways: no way is named {way}; there are {', '.join(WAYS)}")
    try:
        a.timeout = {name: float(value) for name, value in (text.split("=") for text in a.timeout)}
    except ValueError:
        arguments.error("--timeout wants PART=SECONDS")

    # So that `timeout` leaves a table and no processes.
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    check = Check(a)
    for program in (HERE / "bin").iterdir():
        if not os.access(program, os.X_OK):
            program.chmod(0o755)
    try:
        if "step" in parts and parts.index("step") > 0 and not a.no_prewarm:
            check.prewarm()
        for name in parts:
            check.part(name)
    except KeyboardInterrupt:
        check.stopped()
        print("gpu-check: stopped", flush=True)
    finally:
        try:
            check.save()
            text = table(check.result)
            (check.out / "gpu-check.txt").write_text(text + "\n")
            print(f"\n{text}", flush=True)
        finally:
            check.end()
    failed = any(part["ok"] is False for part in check.result["parts"].values())
    return 1 if failed or check.result.get("stopped") else 0


if __name__ == "__main__":
    sys.exit(main())
