"""cuDNN's flash attention as XLA products, for tests without a GPU."""

import jax
import jax.numpy as jnp

from madformer_jax.ops.attention import cudnn_calls


def replace_cudnn(monkeypatch):
    """Replaces cuDNN's calls with those of this module."""
    monkeypatch.setattr(cudnn_calls, "flash_attention", flash_attention)
    monkeypatch.setattr(cudnn_calls, "flash_attention_backward", flash_attention_backward)


def _weights(q, k, lengths, lse=None):
    """Returns exp(scores - lse), `(B, S, K, H)`, and the lse."""
    scores = jnp.einsum("bshd,bkhd->bskh", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        scores = jnp.where(jnp.arange(k.shape[1])[:, None] < lengths[:, None, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=2) if lse is None else lse
    return jnp.exp(scores - lse[:, :, None]), lse


def _undefined(x, queries):
    """Replaces the rows behind the first `queries` by NaN."""
    return x.at[:, queries:].set(jnp.nan) if queries is not None else x


def flash_attention(q, k, v, lengths=None, *, queries=None):
    weights, lse = _weights(q, k, lengths)
    return _undefined(jnp.einsum("bskh,bkhd->bshd", weights, v), queries), _undefined(lse, queries)


def flash_attention_backward(q, k, v, lengths, out, lse, gradient, *, queries=None):
    """Computes FlashAttention's backward pass. `out` and `lse` may belong to more keys than `k`."""
    if queries is not None:
        rows = (x[:, :queries] for x in (out, lse, gradient))
        dq, dk, dv = flash_attention_backward(q[:, :queries], k, v, lengths, *rows)
        return _undefined(jnp.pad(dq, ((0, 0), (0, q.shape[1] - queries), (0, 0), (0, 0))), queries), dk, dv
    weights, _ = _weights(q, k, lengths, lse)
    d_weights = jnp.einsum("bshd,bkhd->bskh", gradient, v) - (gradient * out).sum(axis=-1)[:, :, None]
    d_scores = weights * d_weights * q.shape[-1] ** -0.5
    return (
        jnp.einsum("bskh,bkhd->bshd", d_scores, k),
        jnp.einsum("bskh,bshd->bkhd", d_scores, q),
        jnp.einsum("bskh,bshd->bkhd", weights, gradient),
    )
