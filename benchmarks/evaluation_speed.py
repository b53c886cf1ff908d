"""Measures Inception features per second, ours against torch-fidelity's network.

    pip install torch torch-fidelity
    python -m benchmarks.evaluation_speed theirs 64 192
    python -m benchmarks.evaluation_speed ours 64 192

The arguments are the implementation, the side of the images and their number (docs/evaluation.md).
Both use the same random images and random weights in the shapes of the checkpoint. The printed mean
of the features must agree.
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPES = Path(__file__).parent.parent / "tests" / "reference" / "inception_fid_state_dict.json"
BATCH = 32  # images in a batch of torch-fidelity


def weights() -> dict[str, np.ndarray]:
    def draw(name: str, shape: list[int]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return np.zeros((), np.int64)
        x = rng.standard_normal(shape)
        if name.endswith("running_var"):
            x = 0.5 + rng.random(shape)
        elif len(shape) > 1:
            x *= np.sqrt(2.0 / np.prod(shape[1:]))
        else:
            x = 0.1 * x + name.endswith("weight")
        return x.astype(np.float32)

    return {name: draw(name, shape) for name, shape in json.loads(SHAPES.read_text()).items()}


def theirs(images: np.ndarray) -> Callable[[], np.ndarray]:
    import torch

    package = types.ModuleType("torch_fidelity")  # its __init__ imports torchvision
    package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pth")
        torch.save({name: torch.from_numpy(x) for name, x in weights().items()}, path)
        net = FeatureExtractorInceptionV3(
            "net", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
        ).eval()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def run() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([net(x[i : i + BATCH])[0].numpy() for i in range(0, len(x), BATCH)])

    return run


def ours(images: np.ndarray) -> Callable[[], np.ndarray]:
    from madformer_jax.runtime import xla_flags

    xla_flags.disable_ynnpack("cpu")
    from madformer_jax.evaluation.networks import inception_weights, registry
    from madformer_jax.evaluation.networks.inception import Inception

    extract = registry.make_extractor(Inception(inception_weights.from_torch(weights())))
    return lambda: extract(images).features


if __name__ == "__main__":
    side, n = int(sys.argv[2]), int(sys.argv[3])
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    run = {"theirs": theirs, "ours": ours}[sys.argv[1]](images)
    run()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        features = run()
        times.append(time.perf_counter() - began)
    print(f"{sys.argv[1]}: {n / min(times):.1f} images/s, mean feature {np.abs(features).mean():.6f}")
