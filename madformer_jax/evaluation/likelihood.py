"""How well a model predicts captions that training never saw: bits a token, beside n-gram models of the same tokens.

An n-gram model is fitted on the captions of training, smoothed as Witten and Bell did (1991): p(w | h) mixes the share of w among
what followed the n - 1 tokens h with the prediction from one token less, by how many different tokens followed h; the last is
1 / vocabulary.
"""

import collections
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.data import sources, text
from madformer_jax.data.source import Source
from madformer_jax.data.text import TokenizedTexts
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import judge
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning

NGRAM_NAMES = {1: "unigram", 3: "trigram"}
MAX_HELD_OUT_CAPTIONS, MAX_TRAINING_CAPTIONS = 5_000, 100_000  # captions, at most
_BATCH_SIZE = 100


class CaptionLikelihood:
    """Captions of `evaluate.split`, whose bits a token are measured, and of training, on which the n-gram models are fitted."""

    def __init__(self, c: ConfigDict):
        """Reads and tokenizes both.

        Raises:
          ConfigError: The captions of a split cannot be read, or none of them says anything.
        """
        self._vocabulary = c.text.vocabulary
        self._held, self._seen = (
            _load_texts(c, c.evaluate.split, MAX_HELD_OUT_CAPTIONS),
            _load_texts(c, c.data.split, MAX_TRAINING_CAPTIONS),
        )
        self.protocol = {
            "split": c.evaluate.split,
            "held_out": _hash_texts(self._held),
            "training": _hash_texts(self._seen),
            "vocabulary": self._vocabulary,
        }

    def scores(self, model: MADFormer, params: Any, mesh: jax.sharding.Mesh) -> dict[str, judge.Score]:
        """Computes bits a token of the model and of the n-gram models.

        The begin token is given and the end is predicted. An image counts once, whatever it looks like.
        """
        found = {"bits": model_bits(model, params, self._held, mesh), **self._of_ngrams}
        out = {name: judge.ratio_of_sums(bits, self._held.lengths - 1) for name, bits in found.items()}
        logging.info("captions: %s", ", ".join(f"{name} {score['value']:.3f}" for name, score in out.items()))
        return out

    @functools.cached_property
    def _of_ngrams(self) -> dict[str, np.ndarray]:
        return {
            f"bits-{name}": ngram_bits(self._seen, self._held, self._vocabulary, order)
            for order, name in NGRAM_NAMES.items()
        }


def open_captions(c: ConfigDict) -> CaptionLikelihood | None:
    """Opens what bits a token need; None for a model that did not learn captions, or where training reads them all.

    Raises:
      ConfigError: See `Captions`.
    """
    return CaptionLikelihood(c) if c.loss.text and c.evaluate.split != c.data.split else None


def check(c: ConfigDict) -> None:
    """Refuses what `open_captions` cannot open, and reads no captions.

    Raises:
      ConfigError: See `Captions`.
    """
    if c.loss.text and c.evaluate.split != c.data.split:
        _open_source(c, c.evaluate.split)


def _open_source(c: ConfigDict, split: str) -> Source:
    c = c.copy_and_resolve_references()
    c.data.split = split
    try:
        return sources.open_source(c)
    except ConfigError as error:
        raise ConfigError(
            f"bits a token need the captions of config.evaluate.split={split!r}: {error} To leave these scores out, set "
            "config.evaluate.split to the split of training."
        ) from None


def _hash_texts(texts: TokenizedTexts) -> str:
    digest = hashlib.sha256(f"{texts.tokens.shape}".encode())
    for array in texts:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _load_texts(c: ConfigDict, split: str, most: int) -> TokenizedTexts:
    """The captions of a split, evenly over it; those that are empty are left out."""
    source = _open_source(c, split)
    count = min(len(source), most)
    captions = text.record_texts(c, source, np.arange(count) * len(source) // max(1, count))
    found = text.encode(c, captions, lambda i: f"a caption of split {split!r}")
    kept = found.lengths > 1
    if not kept.any():
        raise ConfigError(f"the captions of split {split!r} are all empty: bits a token need some.")
    return TokenizedTexts(found.tokens[kept], found.lengths[kept])


def model_bits(model: MADFormer, params: Any, texts: TokenizedTexts, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Bits of each caption (n,), in batches of one compiled shape."""
    side, columns, channels = model.block_shape

    @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
    def bits(params: Any, tokens: Array, lengths: Array) -> Array:
        z = jnp.zeros((len(tokens), model.blocks, side * columns, channels))  # of which the text sees nothing
        t = jnp.zeros(z.shape[:2], jnp.int32)
        logits = model.apply({"params": params}, z, z, t, tokens, lengths, terms=("text",)).text
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(nll, axis=1, where=jnp.arange(1, tokens.shape[1]) < lengths[:, None]) / np.log(2)

    found = []
    for at in range(0, len(texts.tokens), _BATCH_SIZE):
        rows = np.arange(at, at + _BATCH_SIZE).clip(max=len(texts.tokens) - 1)
        found.append(np.asarray(bits(params, texts.tokens[rows], texts.lengths[rows])))
    return np.concatenate(found)[: len(texts.tokens)].astype(np.float64)


def ngram_bits(seen: TokenizedTexts, held: TokenizedTexts, vocabulary: int, order: int) -> np.ndarray:
    """Bits of each held-out caption (n,) under the n-gram model of the captions seen; n is `order`."""
    follows: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for caption in _token_rows(seen):
        for i in range(1, len(caption)):
            for n in range(min(order, i + 1)):
                follows[caption[i - n : i]][caption[i]] += 1
    totals = {history: sum(counts.values()) for history, counts in follows.items()}

    def probability(history: tuple[int, ...], token: int) -> float:
        lower = probability(history[1:], token) if history else 1 / vocabulary
        if history not in totals:
            return lower
        counts = follows[history]
        return (counts[token] + len(counts) * lower) / (totals[history] + len(counts))

    found = []
    for caption in _token_rows(held):
        found.append(
            -sum(np.log2(probability(caption[max(0, i - order + 1) : i], caption[i])) for i in range(1, len(caption)))
        )
    return np.array(found, np.float64)


def _token_rows(texts: TokenizedTexts) -> list[tuple[int, ...]]:
    return [tuple(row[:length].tolist()) for row, length in zip(texts.tokens, texts.lengths)]
