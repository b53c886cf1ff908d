"""A process of `benchmarks.compare`: it times a product and a call whenever a line comes in."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from madformer_jax.runtime import malloc

PRODUCTS = 3


def tune_cpu(is_cpu: bool) -> None:
    """Lets the allocator keep freed memory on a CPU, on both sides as in the command of this package."""
    if is_cpu:
        malloc.keep_all_memory()


def seconds(function: Callable[[], Any]) -> float:
    """Returns the time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def serve(facts: dict[str, Any], run: Callable[[], Any], product: Callable[[], Any], product_flops: float) -> None:
    """Warms up, writes the facts, and takes turns until the input ends.

    Args:
      facts: Facts of this side that the parent process prints.
      run: Computes once and waits for the result.
      product: Computes a matrix product and waits for the result.
      product_flops: Its FLOPs.
    """
    run()
    product()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        # While a process waits for its turn, a virtual machine can give its free memory to the host. The first call
        # then waits for memory: on one machine a training step took 14 s in place of 8.
        run()
        best = min(seconds(product) for _ in range(PRODUCTS))
        cpu = time.process_time()
        result = {"seconds": seconds(run), "product": product_flops / best / 1e12}
        print(json.dumps({**result, "cpu_seconds": time.process_time() - cpu}), flush=True)
