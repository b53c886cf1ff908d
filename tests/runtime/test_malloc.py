"""Freed memory of programs on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

from madformer_jax.runtime import malloc

CODE = """
import resource
from madformer_jax.runtime import malloc
malloc.keep_all_memory()
bytearray(64 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
@pytest.mark.parametrize(("tunables", "reused"), [(malloc.TUNABLES, True), ("", False)])
def test_freed_memory_is_reused_unless_the_user_has_tunables(tunables, reused):
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10) == reused  # page faults of the second array
