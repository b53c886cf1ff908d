"""The check of the TPU's kernels at start, with kernels in Pallas' interpreter."""

import dataclasses

import pytest

from madformer_jax.ops.attention import api, self_check
from madformer_jax.ops.attention.base import Attention
from madformer_jax.ops.attention.pallas import PallasAttention
from madformer_jax.ops.attention.xla_blocks import XlaBlocks

CASE = ("float32", 8, 4)


@dataclasses.dataclass(frozen=True)
class Broken(PallasAttention):
    """A kernel that loses a twentieth of its output in training."""

    def block_attention(self, *args, **kwargs):
        return [0.95 * x for x in super().block_attention(*args, **kwargs)]


@pytest.fixture(autouse=True)
def forget_checks():
    self_check.verified.cache_clear()
    yield
    self_check.verified.cache_clear()


def test_a_right_kernel_is_used(monkeypatch):
    kernel = PallasAttention(interpret=True)
    error = self_check.largest_error(kernel, *CASE)
    assert error < 1e-3
    monkeypatch.setattr(self_check, "largest_error", lambda *case: error)
    assert self_check.verified(kernel, *CASE) is kernel


@pytest.mark.parametrize(
    "kernel, words", [(Broken(interpret=True), "differs from plain JAX by 5"), (None, "does not run")]
)
def test_a_wrong_kernel_is_given_up_with_a_warning(kernel, words, caplog):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such instruction")

    kernel = kernel or type("Failing", (PallasAttention,), {"block_attention": fail})(interpret=True)
    assert isinstance(self_check.verified(kernel, *CASE), XlaBlocks)
    assert words in caplog.text and "using 'blocks'" in caplog.text


@pytest.mark.parametrize("backend, checks", [("tpu", 1), ("gpu", 1), ("cpu", 0)])
def test_kernels_are_checked_on_their_own_device_only(backend, checks, monkeypatch):
    """A program that is compiled for a TPU or GPU on another machine cannot be run there."""
    calls = []

    def verified(attention: Attention, *case):
        calls.append(case)
        return attention

    monkeypatch.setattr(api, "verified", verified)
    monkeypatch.setattr(api.jax, "default_backend", lambda: backend)
    assert api.choose("auto", "tpu", "bfloat16", 64, 256).name == "pallas"
    assert api.choose("auto", "gpu", "bfloat16", 64, 256).name == "cudnn"
    assert calls == [("bfloat16", 64, 256)] * checks
    assert api.choose("auto", "cpu", "float32", 64, 256).name == "blocks"
