"""Kills --mode=prepare at random moments and checks the finished folder.

    python -m tests.support.kill_prepare

runs it at full size. tests/modes/test_prepare.py runs it with fewer images.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from madformer_jax.config import schema as config_lib
from madformer_jax.data import records
from madformer_jax.modes import prepare

IMAGES, CORRUPT, KILLS = 1000, 20, 3
SCRIPT = """import json, sys
from ml_collections import ConfigDict
from madformer_jax.modes import prepare

prepare.run(ConfigDict(json.loads(sys.argv[1])), sys.argv[2], process_index=0, process_count=1)
"""


def make_images(folder: pathlib.Path, count: int, corrupt: Collection[int] = ()) -> None:
    """Writes images of two classes that encode their number.

    Image i has class i % 2, the red value i % 256 and the green value i // 256. The files of images in
    `corrupt` are truncated.
    """
    for i in range(count):
        path = folder / str(i % 2) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((8, 10, 3), np.uint8)
        pixels[...] = i % 256, i // 256, 0
        pixels[:, 5:, 2] = 200
        Image.fromarray(pixels).save(path)
        if i in corrupt:
            os.truncate(path, 45)


def run(config: ConfigDict, out: str, kills: int, seed: int) -> int:
    """Prepares in a process that is killed `kills` times, and then finishes in this process.

    Each kill waits for another finished shard, so that each run does some work.

    Returns:
      How often the process was alive when it was killed.
    """
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        finished = _finished(out)
        command = [sys.executable, "-c", SCRIPT, config.to_json(), out]
        root = os.path.dirname(os.path.dirname(os.path.dirname(config_lib.__file__)))
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
        while process.poll() is None and _finished(out) == finished:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    prepare.run(config, out, process_index=0, process_count=1)
    return killed


def _finished(out: str) -> int:
    if not os.path.isdir(out):
        return 0
    return sum(file.endswith(".arrayrecord.json") for file in os.listdir(out))


def check(out: str) -> list[int]:
    """Checks all checksums and labels of a finished folder. Returns its image numbers, sorted."""
    manifest = json.loads((pathlib.Path(out) / records.MANIFEST).read_text())
    for shard in manifest["shards"]:
        content = (pathlib.Path(out) / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"], shard["file"]
    prepared = records.Records(out)
    batch = prepared.read(np.arange(len(prepared)))
    images = batch.arrays["image"]
    numbers = images[:, 0, 0, 0] + 256 * images[:, 0, 0, 1].astype(int)
    assert (batch.labels == numbers % 2).all()
    assert len(numbers) == manifest["records"]
    return sorted(numbers.tolist())


def main() -> None:
    corrupt = random.Random(0).sample(range(IMAGES), CORRUPT)
    with tempfile.TemporaryDirectory() as folder:
        make_images(pathlib.Path(folder) / "images", IMAGES, corrupt)
        c = config_lib.base()
        c.data.source, c.data.path, c.data.image_size, c.data.split = "folder", f"{folder}/images", 8, "all"
        c.model.blocks = c.model.unet_stride = 1  # --mode=prepare validates these too
        c.prepare.shard = 20
        killed = run(c, f"{folder}/out", KILLS, seed=int(time.time()))
        numbers = check(f"{folder}/out")
    assert numbers == [i for i in range(IMAGES) if i not in corrupt]
    print(
        f"killed {killed} times: {len(numbers)} records of {IMAGES} images, {CORRUPT} of them corrupt; checksums valid"
    )


if __name__ == "__main__":
    main()
