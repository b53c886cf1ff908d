"""Captions as tokens: a tokenizer's file, the tokenizer in it, and rows of tokens with their lengths.

A caption is a begin token, its own, and an end token; behind them stands padding up to T, which the model sees nothing of. Data
workers tokenise: nothing here imports JAX.
"""

import base64
import binascii
import codecs
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # of the tokenizers that we train; Llama 3's names
_BEGIN_TOKENS = (BEGIN, "<|startoftext|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>")  # what others call them
_END_TOKENS = (END, "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_EMBEDDED_FILES = {"drawings": "drawings.tokenizer.json"}  # files of this package
# How Llama 3 splits text into words before it merges bytes, and how many special tokens stand behind its ranks, the first two
# of them begin and end.
_LLAMA3_SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL_TOKEN_COUNT = 256
_UNKNOWN = -1  # the unknown token of a tokenizer that has none


class Tokenizer(NamedTuple):
    """A tokenizer and the tokens that it reserves.

    `encode` treats each text alone, adds no begin and end, pads and cuts nothing, and reads the
    names of control tokens as ordinary text where the tokenizer can spell them.
    """

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    vocabulary: int  # the highest token + 1; some tokens below it may be unused
    begin: int
    end: int
    control: dict[int, str]  # tokens that stand for no text (begin, end, padding, ...) and their names
    unknown: int | None  # replaces text that the tokenizer does not know; None if it knows every byte
    sha256: str  # of the file
    ranks: bool = False  # the file holds tiktoken's ranks


class TokenizedTexts(NamedTuple):
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
    content = _read_file(name)
    is_json = content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    found = _load_tokenizer_json(name, content) if is_json else _load_tiktoken_ranks(name, content)
    return found._replace(sha256=hashlib.sha256(content).hexdigest())


def exportable_file(name: str) -> str | None:
    """The content of a user's tokenizer.json, to be kept with a model; None for this package's, and for tiktoken's ranks, which
    may not be given away freely.

    Raises:
      ConfigError: as `open_tokenizer`.
    """
    if not name or name in _EMBEDDED_FILES or open_tokenizer(name).ranks:
        return None
    return _read_file(name).decode()


def _read_file(name: str) -> bytes:
    with storage.wrap_errors(f"config.text.tokenizer={name!r} cannot be read"):
        if name in _EMBEDDED_FILES:
            return (importlib.resources.files(__package__) / _EMBEDDED_FILES[name]).read_bytes()
        return bytes(storage.retry(epath.Path(name).read_bytes))


def _load_tokenizer_json(name: str, content: bytes) -> Tokenizer:
    import tokenizers

    spec = storage.decode_text(content, f"config.text.tokenizer={name!r}")
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(_context_free_spec(json.loads(spec))))
    except Exception as error:  # it raises bare Exceptions
        raise ConfigError(f"config.text.tokenizer={name!r} is no tokenizer.json: {first_line(error)}.") from None
    found.encode_special_tokens = True
    begin, end = (
        _find_control_token(found, name, "begin", _BEGIN_TOKENS),
        _find_control_token(found, name, "end", _END_TOKENS),
    )
    added = {i: token.content for i, token in found.get_added_tokens_decoder().items() if token.special}
    model = json.loads(found.to_str())["model"]
    unknown = model["unk_id"] if "unk_id" in model else found.token_to_id(model["unk_token"])
    unknown = _UNKNOWN if unknown is None else unknown

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return [row.ids for row in found.encode_batch(texts, add_special_tokens=False)]
        except Exception:  # bare; the text has an unknown part, and the model has no token for it
            return [[unknown]] if len(texts) == 1 else [encode([text])[0] for text in texts]

    control = added | {i: str(found.id_to_token(i)) for i in (begin, end)}
    control.pop(unknown, None)
    vocabulary = max(found.get_vocab().values()) + 1
    return Tokenizer(encode, found.decode, vocabulary, begin, end, control, unknown, "")


def _find_control_token(found: Any, name: str, what: str, known: Sequence[str]) -> int:
    """Returns the token of the first word of `known` that the tokenizer has one for."""
    for word in known:
        token: int | None = found.token_to_id(word)
        if token is not None:
            return token
    raise ConfigError(f"config.text.tokenizer={name!r} has no token for {what}: none of {', '.join(known)}.")


def _context_free_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a tokenizer.json with everything off that makes tokens depend on more than the text.

    Padding and truncation depend on the batch, dropout on chance. Names of control tokens are text:
    the model of a Unigram tokenizer holds them as pieces, and they get a score below any other
    spelling. A BPE model drops what it does not know, unless it has an unknown token.
    """
    model = dict(spec["model"])
    added = [dict(token) for token in spec.get("added_tokens", [])]
    for token in added:
        token["special"] = token["special"] or token["content"] in (*_BEGIN_TOKENS, *_END_TOKENS)
    special = {token["content"] for token in added if token["special"]}
    if isinstance(model["vocab"], list):  # Unigram
        lowest = min((score for _, score in model["vocab"]), default=0.0)
        model["vocab"] = [
            [piece, lowest * (len(piece) + 1) - 1 if piece in special else score] for piece, score in model["vocab"]
        ]
    elif "merges" in model:  # BPE
        begin = next((word for word in _BEGIN_TOKENS if word in model["vocab"]), BEGIN)
        model |= {"dropout": None, "unk_token": model.get("unk_token") or begin}
    return {**spec, "padding": None, "truncation": None, "added_tokens": added, "model": model}


def _load_tiktoken_ranks(name: str, content: bytes) -> Tokenizer:
    import tiktoken

    try:
        lines = map(bytes.split, content.removeprefix(codecs.BOM_UTF8).splitlines())
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"config.text.tokenizer={name!r} is neither a tokenizer.json nor tiktoken's ranks: {first_line(error)}."
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConfigError(f"config.text.tokenizer={name!r} is damaged: ranks are missing or twice there.")
    found = tiktoken.Encoding(
        os.path.basename(name), pat_str=_LLAMA3_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    count = len(ranks)
    return Tokenizer(
        found.encode_ordinary_batch,
        lambda tokens: found.decode([token for token in tokens if token < count]),
        vocabulary=count + _SPECIAL_TOKEN_COUNT,
        begin=count,
        end=count + 1,
        control={},  # ordinary encoding never yields one
        unknown=None,
        sha256="",
        ranks=True,
    )


def train_bpe(captions: Iterable[str], vocabulary: int) -> str:
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


def tokenizer_for_config(c: ConfigDict) -> Tokenizer:
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
            f"config.text.vocabulary={c.text.vocabulary}, but the tokens of config.text.tokenizer={c.text.tokenizer!r} run from 0 "
            f"to {found.vocabulary - 1}: set config.text.vocabulary={found.vocabulary}."
        )
    return found


def tokenizer_identity(c: ConfigDict) -> dict[str, str]:
    """Returns the checksum of the tokenizer's file, as a checkpoint stores it; empty without captions."""
    return {"tokenizer": tokenizer_for_config(c).sha256} if c.text.vocabulary else {}


def check_tokenizer_identity(c: ConfigDict, meta: Mapping[str, Any], step: int, workdir: str) -> None:
    """Compares the tokenizer's file with that of a checkpoint. Checkpoints of older versions name none.

    Args:
      meta: What the checkpoint of `step` in `workdir` says of itself.

    Raises:
      ConfigError: The file's content has changed.
    """
    for name, sha256 in tokenizer_identity(c).items():
        if meta.get(name, sha256) != sha256:
            raise ConfigError(
                f"config.text.tokenizer={c.text.tokenizer!r} has changed since step {step} of {workdir}: its SHA-256 was "
                f"{meta[name][:12]}... and is {sha256[:12]}.... Bring the old file back, or train in another --workdir."
            )


def strip_bom(text: str, name: str) -> str:
    """Removes byte-order marks before a text.

    Args:
      text: A caption, a prompt or the name of a class.
      name: What the error names: the file that the text comes from.

    Raises:
      ConfigError: The text is not valid Unicode: it holds half of a surrogate pair, or bytes that were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: {text!r} is not valid Unicode ({error.reason}). Correct the text.") from None
    return text.lstrip("\ufeff")


def conditioning_texts(c: ConfigDict, given: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """What is said of images: their captions, or as `text.caption` wants it the names of their classes; "" for nothing."""
    if c.text.caption == "caption":
        return list(given)
    return [names[label] if names else "" for label in labels.tolist()]


def record_texts(c: ConfigDict, source: Source, numbers: np.ndarray) -> list[str]:
    """`captions` of records of a source, without their images where it can."""
    if c.text.caption == "class":
        return conditioning_texts(c, (), source.read(numbers).labels, source.names)
    return source.captions(numbers)


def encode(c: ConfigDict, texts: Sequence[str], names: Callable[[int], str]) -> TokenizedTexts:
    """Texts as `config.text` wants them; an empty one is the token "none".

    Args:
      names: what a person calls text i, in an error.

    Raises:
      ConfigError: a text is longer than `text.length` and `text.truncate` is False, the tokenizer does not know a part of it or
        reads a part as a control token, or as `clean`.
    """
    found, length, none = tokenizer_for_config(c), c.text.length, c.text.vocabulary
    texts = [strip_bom(text, names(i)) for i, text in enumerate(texts)]
    rows = np.full((len(texts), length), found.end, np.int32)  # padding: any token will do
    lengths = np.ones(len(texts), np.int32)
    for i, ids in enumerate(found.encode(texts)):
        if not texts[i].strip():
            rows[i, 0] = none
            continue
        if found.unknown is not None and found.unknown in ids:
            raise ConfigError(f"{names(i)}: {texts[i]!r} has a part that the tokenizer does not know.")
        if control := found.control.keys() & ids:
            words = ", ".join(sorted(found.control[i] for i in control))
            raise ConfigError(
                f"{names(i)}: {texts[i]!r} holds {words}, which the tokenizer knows as a control token alone. Remove it."
            )
        if len(ids) > length - 2 and not c.text.truncate:
            raise ConfigError(
                f"{names(i)}: {texts[i]!r} is {len(ids) + 2} tokens long, begin and end counted, more than config.text.length="
                f"{length}: shorten it, or cut what is too long by config.text.truncate=True."
            )
        ids = [found.begin, *ids[: length - 2], found.end]
        rows[i, : len(ids)], lengths[i] = ids, len(ids)
    return TokenizedTexts(rows, lengths)
