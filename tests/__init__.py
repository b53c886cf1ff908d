import gc
from typing import Any

from beartype import BeartypeConf, beartype

from madformer_jax.runtime import xla_flags

# XLA flags for programs that run for a moment: compiled in a third of the time, and without YNNPACK, as in main.py.
QUICK = xla_flags.supported(
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_experimental_ynn_fusion_type= "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false",
    ("jaxlib",),
)

# Tracing makes many objects that live long: a twelfth of the tests' time went to looking at them.
gc.set_threshold(100_000, 50, 50)  # as in main.py

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def typecheck(function: Any) -> Any:
    """Checks the types of a function's calls, but not of a nested one, which beartype would compile at each definition."""
    return function if "<locals>" in function.__qualname__ else _beartype(function)
