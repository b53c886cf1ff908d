"""Bits per token of held-out captions, of a model and of n-gram models.

`modes.evaluate` calls it for models with a text loss (`loss.text`).

The n-gram models are fitted on the training captions with Witten-Bell smoothing (1991). Let c(h, w)
be how often token w followed the n - 1 tokens h, c(h) its sum over w, and t(h) the number of
different tokens that followed h. Then p(w | h) = (c(h, w) + t(h) p(w | h')) / (c(h) + t(h)), where
h' is h without its first token. Below the unigram, p is 1 / vocabulary. `NGRAM_NAMES` lists the
orders.
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
from madformer_jax.evaluation import score_summary
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning

NGRAM_NAMES = {1: "unigram", 3: "trigram"}
MAX_HELD_OUT_CAPTIONS, MAX_TRAINING_CAPTIONS = 5_000, 100_000
_BATCH_SIZE = 100


class CaptionLikelihood:
    """Bits per token of the captions of `evaluate.split`, of a model and of n-gram models.

    Attributes:
      protocol: JSON that identifies the captions.
    """

    def __init__(self, c: ConfigDict):
        """Reads and tokenizes the captions of `evaluate.split` and `data.split`.

        Raises:
          ConfigError: The captions of a split cannot be read or are all empty.
        """
        self._vocabulary = c.text.vocabulary
        self._held_out = _load_texts(c, c.evaluate.split, MAX_HELD_OUT_CAPTIONS)
        self._training = _load_texts(c, c.data.split, MAX_TRAINING_CAPTIONS)
        self.protocol = {
            "split": c.evaluate.split,
            "held_out": _hash_texts(self._held_out),
            "training": _hash_texts(self._training),
            "vocabulary": self._vocabulary,
        }

    def scores(self, model: MADFormer, params: Any, mesh: jax.sharding.Mesh) -> dict[str, score_summary.Score]:
        """Computes bits per token of the model and of the n-gram models.

        The begin token is given and the end token is predicted. An image counts as one token.
        """
        caption_bits = {"bits": model_bits(model, params, self._held_out, mesh), **self._ngram_bits}
        out = {
            name: score_summary.ratio_of_sums(bits, self._held_out.lengths - 1) for name, bits in caption_bits.items()
        }
        logging.info("captions: %s", ", ".join(f"{name} {score['value']:.3f}" for name, score in out.items()))
        return out

    @functools.cached_property
    def _ngram_bits(self) -> dict[str, np.ndarray]:
        return {
            f"bits-{name}": ngram_bits(self._training, self._held_out, self._vocabulary, order)
            for order, name in NGRAM_NAMES.items()
        }


def open_captions(c: ConfigDict) -> CaptionLikelihood | None:
    """Opens the captions for the bits per token.

    Returns:
      The captions. None if the model has no text loss, or if `evaluate.split` is the training
      split.

    Raises:
      ConfigError: See `CaptionLikelihood`.
    """
    return CaptionLikelihood(c) if c.loss.text and c.evaluate.split != c.data.split else None


def check(c: ConfigDict) -> None:
    """Checks that `open_captions` can open the source, without reading captions.

    Raises:
      ConfigError: The source does not open.
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
            f"bits per token need the captions of config.evaluate.split={split!r}: {error} To leave these scores out, set "
            "config.evaluate.split to the split of training."
        ) from None


def _hash_texts(texts: TokenizedTexts) -> str:
    digest = hashlib.sha256(f"{texts.tokens.shape}".encode())
    for array in texts:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _load_texts(c: ConfigDict, split: str, max_captions: int) -> TokenizedTexts:
    """Loads at most `max_captions` captions, evenly from a split, without empty ones."""
    source = _open_source(c, split)
    count = min(len(source), max_captions)
    captions = text.record_texts(c, source, np.arange(count) * len(source) // max(1, count))
    texts = text.encode(c, captions, lambda i: f"a caption of split {split!r}")
    nonempty = texts.lengths > 1
    if not nonempty.any():
        raise ConfigError(f"the captions of split {split!r} are all empty: bits per token need some.")
    return TokenizedTexts(texts.tokens[nonempty], texts.lengths[nonempty])


def model_bits(model: MADFormer, params: Any, texts: TokenizedTexts, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Computes the bits of each caption (n,) under the model."""

    @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
    def bits(params: Any, tokens: Array, lengths: Array) -> Array:
        # Text tokens do not attend to the latents.
        z = jnp.zeros((len(tokens), *model.config.sizes.block_shape))
        t = jnp.zeros(z.shape[:2], jnp.int32)
        logits = model.apply({"params": params}, z, z, t, tokens, lengths, terms=("text",)).text
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(nll, axis=1, where=jnp.arange(1, tokens.shape[1]) < lengths[:, None]) / np.log(2)

    batches = []
    for first in range(0, len(texts.tokens), _BATCH_SIZE):
        # All batches have one compiled shape.
        rows = np.arange(first, first + _BATCH_SIZE).clip(max=len(texts.tokens) - 1)
        batches.append(np.asarray(bits(params, texts.tokens[rows], texts.lengths[rows])))
    return np.concatenate(batches)[: len(texts.tokens)].astype(np.float64)


def ngram_bits(training: TokenizedTexts, held_out: TokenizedTexts, vocabulary: int, order: int) -> np.ndarray:
    """Computes the bits of each held-out caption (n,) under the model of `order`-grams of the training captions."""
    follows: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for caption in _token_rows(training):
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

    caption_bits = []
    for caption in _token_rows(held_out):
        caption_bits.append(
            -sum(np.log2(probability(caption[max(0, i - order + 1) : i], caption[i])) for i in range(1, len(caption)))
        )
    return np.array(caption_bits, np.float64)


def _token_rows(texts: TokenizedTexts) -> list[tuple[int, ...]]:
    """Returns the tokens of each text without padding."""
    return [tuple(row[:length].tolist()) for row, length in zip(texts.tokens, texts.lengths)]
