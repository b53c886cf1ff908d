"""Captions as tokens: a tokenizer's file, the tokenizer in it, and rows of tokens with their lengths.

A caption is a begin token, its own, and an end token; behind them stands padding up to T, which the model sees nothing of. Data
workers tokenise: nothing here imports JAX.
"""

import base64
import binascii
import functools
import importlib.resources
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # of the tokenizers that we train; Llama 3's names
_BEGINS = (BEGIN, "<|startoftext|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>")  # what others call them
_ENDS = (END, "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_EMBEDDED = {"drawings": "drawings.tokenizer.json"}  # files of this package
# How Llama 3 splits text into words before it merges bytes, and how many special tokens stand behind its ranks, the first two
# of them begin and end.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL = 256


class Tokenizer(NamedTuple):
    """What a file says."""

    encode: Callable[[list[str]], list[list[int]]]  # texts -> tokens, without begin and end
    decode: Callable[[list[int]], str]
    vocabulary: int  # tokens run from 0 to vocabulary - 1
    begin: int
    end: int
    unknown: int | None  # what stands for all that the tokenizer does not know; None where it knows every byte
    ranks: bool = False  # of tiktoken


class Texts(NamedTuple):
    """Captions as the model reads them: arrays of NumPy, and later of JAX."""

    tokens: Any  # int32 (b, T)
    lengths: Any  # int32 (b,), from 1 to T


@functools.cache
def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file: a tokenizer.json of Hugging Face, or tiktoken's ranks (Llama 3's tokenizer.model).

    Args:
      name: a path, one in a bucket too; or "drawings" for the one that comes with this package.

    Raises:
      ConfigError: the file is not there, of no known kind or damaged, or has no tokens for begin and end.
    """
    content = _content(name)
    return _of_json(name, content) if content.lstrip()[:1] == b"{" else _of_ranks(name, content)


def own_file(name: str) -> str | None:
    """The content of a user's tokenizer.json, to be kept with a model; None for this package's, and for tiktoken's ranks, which
    may not be given away freely.

    Raises:
      ConfigError: as `open_tokenizer`.
    """
    if not name or name in _EMBEDDED or open_tokenizer(name).ranks:
        return None
    return _content(name).decode()


def _content(name: str) -> bytes:
    with storage.errors(f"config.text.tokenizer={name!r} cannot be read"):
        if name in _EMBEDDED:
            return (importlib.resources.files(__package__) / _EMBEDDED[name]).read_bytes()
        return bytes(storage.retry(epath.Path(name).read_bytes))


def _of_json(name: str, content: bytes) -> Tokenizer:
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # it raises bare Exceptions
        raise ConfigError(f"config.text.tokenizer={name!r} is no tokenizer.json: {first_line(error)}.") from None
    ids: list[int] = []
    for what, known in (("begin", _BEGINS), ("end", _ENDS)):
        token = next((token for word in known if (token := found.token_to_id(word)) is not None), None)
        if token is None:
            raise ConfigError(f"config.text.tokenizer={name!r} has no token for {what}: none of {', '.join(known)}.")
        ids.append(token)
    unknown = getattr(found.model, "unk_token", None)

    def encode(texts: list[str]) -> list[list[int]]:
        return [row.ids for row in found.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(
        encode, found.decode, found.get_vocab_size(), ids[0], ids[1], unknown and found.token_to_id(unknown)
    )


def _of_ranks(name: str, content: bytes) -> Tokenizer:
    import tiktoken

    try:
        ranks = {
            base64.b64decode(word, validate=True): int(rank) for word, rank in map(bytes.split, content.splitlines())
        }
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"config.text.tokenizer={name!r} is neither a tokenizer.json nor tiktoken's ranks: {first_line(error)}."
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConfigError(f"config.text.tokenizer={name!r} is damaged: ranks are missing or twice there.")
    found = tiktoken.Encoding(os.path.basename(name), pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})
    count = len(ranks)
    return Tokenizer(
        found.encode_ordinary_batch,
        lambda tokens: found.decode([token for token in tokens if token < count]),
        count + _SPECIAL,
        count,
        count + 1,
        None,
        ranks=True,
    )


def train(captions: Iterable[str], vocabulary: int) -> str:
    """A byte-level BPE of so many tokens, begin and end among them, as the content of a tokenizer.json.

    It knows every byte, and the same captions give the same file.
    """
    from tokenizers import Tokenizer as Tokens
    from tokenizers import decoders, models, pre_tokenizers, trainers

    found: Any = Tokens(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is the same at the start
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(captions, trainer)
    return str(found.to_str())


# ---- for a config


def of(c: ConfigDict) -> Tokenizer:
    """The tokenizer of `config.text`.

    Raises:
      ConfigError: none is named, its vocabulary is not `text.vocabulary`, or as `open_tokenizer`.
    """
    if not c.text.tokenizer:
        raise ConfigError(
            "config.text.tokenizer is empty: name the file that turns captions into tokens (docs/text.md)."
        )
    found = open_tokenizer(c.text.tokenizer)
    if found.vocabulary != c.text.vocabulary:
        raise ConfigError(
            f"config.text.vocabulary={c.text.vocabulary}, but config.text.tokenizer={c.text.tokenizer!r} has "
            f"{found.vocabulary} tokens: set config.text.vocabulary={found.vocabulary}."
        )
    return found


def captions(c: ConfigDict, given: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """What is said of images: their captions, or as `text.caption` wants it the names of their classes; "" for nothing."""
    if c.text.caption == "caption":
        return list(given)
    return [names[label] if names else "" for label in labels.tolist()]


def of_records(c: ConfigDict, source: Source, numbers: np.ndarray) -> list[str]:
    """`captions` of records of a source, without their images where it can."""
    if c.text.caption == "class":
        return captions(c, (), source.read(numbers).labels, source.names)
    return source.captions(numbers)


def encode(c: ConfigDict, texts: Sequence[str], names: Callable[[int], str]) -> Texts:
    """Texts as `config.text` wants them; an empty one is the token "none".

    Args:
      names: what a person calls text i, in an error.

    Raises:
      ConfigError: a text is longer than `text.length` and `text.truncate` is False, or the tokenizer does not know a part of it.
    """
    found, length, none = of(c), c.text.length, c.text.vocabulary
    rows = np.full((len(texts), length), found.end, np.int32)  # padding: any token will do
    lengths = np.ones(len(texts), np.int32)
    for i, ids in enumerate(found.encode(list(texts))):
        if not texts[i].strip():
            rows[i, 0] = none
            continue
        if found.unknown is not None and found.unknown in ids:
            raise ConfigError(f"{names(i)}: {texts[i]!r} has a part that the tokenizer does not know.")
        if len(ids) > length - 2 and not c.text.truncate:
            raise ConfigError(
                f"{names(i)}: {texts[i]!r} is {len(ids) + 2} tokens long, begin and end counted, more than config.text.length="
                f"{length}: shorten it, or cut what is too long by config.text.truncate=True."
            )
        ids = [found.begin, *ids[: length - 2], found.end]
        rows[i, : len(ids)], lengths[i] = ids, len(ids)
    return Texts(rows, lengths)
