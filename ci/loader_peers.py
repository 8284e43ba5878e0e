"""One measurement of one peer: `loader_peers.py lightly|albumentations|dali|dali-fast --images DIR --size N --n IMAGES`.

Prints one JSON object. BYOL's two views; below 64 pixels without blur, as for CIFAR. One thread.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lightly(size, blur):
    import torch
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from PIL import Image

    torch.set_num_threads(1)
    off = {} if blur else {"gaussian_blur": 0.0, "cj_strength": 1.0}
    views = BYOLTransform(BYOLView1Transform(input_size=size, **off), BYOLView2Transform(input_size=size, **off))

    def one(path):
        with open(path, "rb") as file:
            return views(Image.open(file).convert("RGB"))

    return one


def albumentations(size, blur):
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import cv2
    import numpy as np

    cv2.setNumThreads(1)

    def view(blurred, solarized):
        steps = [
            A.RandomResizedCrop((size, size), scale=(0.08, 1.0), interpolation=cv2.INTER_CUBIC),
            A.HorizontalFlip(),
            A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
        ]
        if blur:
            steps.append(A.GaussianBlur(blur_limit=(23, 23), sigma_limit=(0.1, 2.0), p=blurred))
        if solarized:
            steps.append(A.Solarize(p=solarized))
        return A.Compose([*steps, A.Normalize(MEAN, STD)])

    first, second = view(1.0, 0.0), view(0.1, 0.2)

    def one(path):
        image = cv2.cvtColor(cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return first(image=image)["image"], second(image=image)["image"]

    return one


def dali(files, size, blur, fast, batch=64):
    """A function that runs so many batches."""
    from nvidia.dali import fn, pipeline_def, types

    interpolation = types.INTERP_LINEAR if fast else types.INTERP_CUBIC
    window = {} if fast else {"window_size": 23}

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=2)
    def pipe():
        encoded, _ = fn.readers.file(files=files, labels=[0] * len(files), random_shuffle=False)
        whole = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        views = []
        for blurred, solarized in ((1.0, 0.0), (0.1, 0.2)):
            x = fn.random_resized_crop(
                whole, size=[size, size], random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], interp_type=interpolation, antialias=True
            )
            mirror = fn.random.coin_flip(probability=0.5)
            jitter = fn.cast(fn.random.coin_flip(probability=0.8), dtype=types.FLOAT)
            color = 1.0 - fn.cast(fn.random.coin_flip(probability=0.2), dtype=types.FLOAT)

            def reach(width):
                return fn.random.uniform(range=[-width, width])

            x = fn.color_twist(
                x,
                brightness=1.0 + jitter * reach(0.4),
                contrast=1.0 + jitter * reach(0.4),
                saturation=(1.0 + jitter * reach(0.2)) * color,
                hue=jitter * reach(36.0),
            )
            if blur:
                sigma = fn.random.uniform(range=[0.1, 2.0])
                if blurred < 1.0:
                    if fn.random.coin_flip(probability=blurred, dtype=types.BOOL):
                        x = fn.gaussian_blur(x, sigma=sigma, **window)
                    else:
                        x = x
                else:
                    x = fn.gaussian_blur(x, sigma=sigma, **window)
            if solarized:
                if fn.random.coin_flip(probability=solarized, dtype=types.BOOL):
                    bright = fn.cast(x >= 128, dtype=types.UINT8)
                    x = fn.cast_like(bright * (255 - x) + (1 - bright) * x, x)
                else:
                    x = x
            views.append(
                fn.crop_mirror_normalize(
                    x, mirror=mirror, dtype=types.FLOAT, output_layout="CHW", mean=[255 * m for m in MEAN], std=[255 * s for s in STD]
                )
            )
        return tuple(views)

    pipeline = pipe()
    pipeline.build()

    def run(batches):
        for _ in range(batches):
            pipeline.run()

    return run, batch


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["lightly", "albumentations", "dali", "dali-fast"])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--n", type=int, required=True)
    a = parser.parse_args()
    files = sorted(str(path) for path in a.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEG files in {a.images}")
    random.Random(0).shuffle(files)
    while len(files) < a.n:
        files += files
    files = files[: a.n]
    blur = a.size > 64
    if a.peer.startswith("dali"):
        run, batch = dali(files, a.size, blur, a.peer == "dali-fast")
        run(4)  # fills the queue
        images = max(1, a.n // batch) * batch
        wall, cpu = time.perf_counter(), time.process_time()
        run(images // batch)
    else:
        one = (lightly if a.peer == "lightly" else albumentations)(a.size, blur)
        for path in files[:24]:
            one(path)
        images = len(files)
        wall, cpu = time.perf_counter(), time.process_time()
        for path in files:
            one(path)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"peer": a.peer, "images_per_cpu_s": images / cpu, "images_per_s": images / wall, "n": images}))


if __name__ == "__main__":
    main()
