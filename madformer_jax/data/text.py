"""Tokenization of captions: tokenizer files, and rows of tokens with their lengths.

`pipeline` encodes captions here, `sampling/prompts.py` encodes prompts, and `--mode=tokenizer`
trains a tokenizer. A row holds a begin token, the tokens of the caption, an end token, and padding
up to T tokens, which the model does not see. A new kind of tokenizer file needs a loader that
`open_tokenizer` calls. Data workers tokenize, so this module must not import JAX.
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

from madformer_jax.config.table import EMBEDDED_TOKENIZERS
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import storage

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # names in Llama 3, and in tokenizers that we train
# Names in tokenizers of other sources. The first name that a tokenizer knows is used.
_BEGIN_TOKENS = (BEGIN, "<|startoftext|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>")
_END_TOKENS = (END, "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_EMBEDDED_FILES = {name: f"{name}.tokenizer.json" for name in EMBEDDED_TOKENIZERS}  # in this package
# Llama 3's pattern for splitting text into words before merging bytes.
_LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKEN_COUNT = 256  # Llama 3's special tokens, which follow its ranks; the first two are begin and end
_READ_AT_ONCE = 256  # records, in `record_texts`
_UNKNOWN = -1  # the unknown token of a tokenizer that has none


class Tokenizer(NamedTuple):
    """A tokenizer and the tokens that it reserves.

    `encode` treats each text separately. It adds no begin and end token and neither pads nor
    truncates. It reads the names of control tokens as ordinary text if the tokenizer can spell
    them.
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
    """Captions as input of the model: NumPy arrays, and JAX arrays on the device."""

    tokens: Any  # int32 (b, T)
    lengths: Any  # int32 (b,), from 1 to T


@functools.cache
def open_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer.json of Hugging Face, or tiktoken's ranks (Llama 3's tokenizer.model).

    Args:
      name: A path, also in a bucket; or "drawings" for the tokenizer embedded in this package.

    Raises:
      ConfigError: The file does not exist, is of an unknown kind or damaged, or has no begin or end
        token.
    """
    content = _read_file(name)
    is_json = content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    tokenizer = _load_tokenizer_json(name, content) if is_json else _load_tiktoken_ranks(name, content)
    return tokenizer._replace(sha256=hashlib.sha256(content).hexdigest())


def exportable_content(name: str) -> str | None:
    """Returns the content of a user's tokenizer.json, to be exported with a model.

    Returns:
      None for an embedded tokenizer, and for tiktoken's ranks, whose license restricts
      distribution.

    Raises:
      ConfigError: See `open_tokenizer`.
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
        model = tokenizers.Tokenizer.from_str(json.dumps(_context_free_spec(json.loads(spec))))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"config.text.tokenizer={name!r} is not a tokenizer.json: {first_line(error)}.") from None
    model.encode_special_tokens = True
    begin = _find_control_token(model, name, "begin", _BEGIN_TOKENS)
    end = _find_control_token(model, name, "end", _END_TOKENS)
    added = {i: token.content for i, token in model.get_added_tokens_decoder().items() if token.special}
    model_spec = json.loads(model.to_str())["model"]
    unknown = model_spec["unk_id"] if "unk_id" in model_spec else model.token_to_id(model_spec["unk_token"])
    unknown = _UNKNOWN if unknown is None else unknown

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return [row.ids for row in model.encode_batch(texts, add_special_tokens=False)]
        except Exception:  # a bare Exception: a text has an unknown part, and the model has no unknown token
            return [[unknown]] if len(texts) == 1 else [encode([text])[0] for text in texts]

    control = added | {i: str(model.id_to_token(i)) for i in (begin, end)}
    control.pop(unknown, None)
    vocabulary = max(model.get_vocab().values()) + 1
    return Tokenizer(encode, model.decode, vocabulary, begin, end, control, unknown, "")


def _find_control_token(model: Any, name: str, role: str, words: Sequence[str]) -> int:
    """Returns the token of the first of `words` that the tokenizer knows."""
    for word in words:
        token: int | None = model.token_to_id(word)
        if token is not None:
            return token
    raise ConfigError(f"config.text.tokenizer={name!r} has no token for {role}: none of {', '.join(words)}.")


def _context_free_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Changes the content of a tokenizer.json so that tokens depend on the text alone.

    Padding and truncation, which depend on the batch, and random dropout are disabled. Names of
    control tokens must be read as text. A Unigram model lists them among its pieces, so their score
    is set below that of any other spelling. A BPE model drops unknown text unless it has an unknown
    token, so it gets one.
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
        raise ConfigError(f"config.text.tokenizer={name!r} is damaged: ranks are missing or repeated.")
    encoding = tiktoken.Encoding(
        os.path.basename(name), pat_str=_LLAMA3_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    count = len(ranks)
    return Tokenizer(
        encoding.encode_ordinary_batch,
        lambda tokens: encoding.decode([token for token in tokens if token < count]),
        vocabulary=count + _SPECIAL_TOKEN_COUNT,
        begin=count,
        end=count + 1,
        control={},  # ordinary encoding never returns control tokens
        unknown=None,
        sha256="",
        ranks=True,
    )


def train_bpe(captions: Iterable[str], vocabulary: int) -> str:
    """Trains a byte-level BPE tokenizer and returns its tokenizer.json. The same captions give the same file.

    `vocabulary` is the number of tokens, including begin and end.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    # The space gives the first word of a text the same tokens as elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return str(tokenizer.to_str())


# ---- for a config


def tokenizer_for_config(c: ConfigDict) -> Tokenizer:
    """Opens the tokenizer of `config.text`.

    Raises:
      ConfigError: `text.tokenizer` is empty, its vocabulary differs from `text.vocabulary`, or the
        file cannot be used (see `open_tokenizer`).
    """
    if not c.text.tokenizer:
        raise ConfigError(
            "config.text.tokenizer is empty: name the file that turns captions into tokens (docs/text.md)."
        )
    tokenizer = open_tokenizer(c.text.tokenizer)
    if tokenizer.vocabulary != c.text.vocabulary:
        raise ConfigError(
            f"config.text.vocabulary={c.text.vocabulary}, but the tokens of config.text.tokenizer="
            f"{c.text.tokenizer!r} run from 0 to {tokenizer.vocabulary - 1}: "
            f"set config.text.vocabulary={tokenizer.vocabulary}."
        )
    return tokenizer


def tokenizer_identity(c: ConfigDict) -> dict[str, str]:
    """Returns the entry that identifies the tokenizer in a checkpoint; {} without captions."""
    return {"tokenizer": tokenizer_for_config(c).sha256} if c.text.vocabulary else {}


def check_tokenizer_identity(c: ConfigDict, meta: Mapping[str, Any], step: int, workdir: str) -> None:
    """Checks that the tokenizer's file is the one that a checkpoint, with metadata `meta`, was trained with.

    Raises:
      ConfigError: The content of the file has changed.
    """
    for name, sha256 in tokenizer_identity(c).items():
        if meta[name] != sha256:
            raise ConfigError(
                f"config.text.tokenizer={c.text.tokenizer!r} has changed since step {step} of {workdir}: its SHA-256 was "
                f"{meta[name][:12]}... and is {sha256[:12]}.... Bring the old file back, or train in another --workdir."
            )


def strip_bom(text: str, name: str) -> str:
    """Removes byte-order marks at the start of a text.

    Args:
      text: A caption, a prompt or the name of a class.
      name: Origin of the text for the message, such as its file.

    Raises:
      ConfigError: The text is not valid Unicode: it holds half of a surrogate pair, or bytes that
        were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: {text!r} is not valid Unicode ({error.reason}). Correct the text.") from None
    return text.lstrip("\ufeff")


def conditioning_texts(c: ConfigDict, captions: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns the texts that condition b images, "" for none: captions or class names, by `text.caption`.

    Args:
      c: The config.
      captions: Captions of the images; not used with `text.caption=class`.
      labels: Classes of the images, int (b,).
      names: Names of the classes; may be empty.
    """
    if c.text.caption == "caption":
        return list(captions)
    return [names[label] if names else "" for label in labels.tolist()]


def record_texts(c: ConfigDict, source: Source, numbers: np.ndarray) -> list[str]:
    """Returns the conditioning texts of records, if possible without reading their images."""
    texts: list[str] = []
    for first in range(0, len(numbers), _READ_AT_ONCE):  # prepared records are read with their images
        batch = numbers[first : first + _READ_AT_ONCE]
        if c.text.caption == "class":
            texts += conditioning_texts(c, (), source.labels(batch), source.names)
        else:
            texts += source.captions(batch)
    return texts


def encode(c: ConfigDict, texts: Sequence[str], names: Callable[[int], str]) -> TokenizedTexts:
    """Tokenizes texts as `config.text` says. An empty text becomes the null token.

    Args:
      c: The config.
      texts: The texts.
      names: Returns the name of text i for messages.

    Raises:
      ConfigError: A text is longer than `text.length` and `text.truncate` is False, the tokenizer
        does not know a part of it or reads a part as a control token, or it is not valid Unicode.
    """
    tokenizer, length, null_token = tokenizer_for_config(c), c.text.length, c.text.vocabulary
    texts = [strip_bom(text, names(i)) for i, text in enumerate(texts)]
    rows = np.full((len(texts), length), tokenizer.end, np.int32)  # the model does not see the padding
    lengths = np.ones(len(texts), np.int32)
    for i, ids in enumerate(tokenizer.encode(texts)):
        if not texts[i].strip():
            rows[i, 0] = null_token
            continue
        if tokenizer.unknown is not None and tokenizer.unknown in ids:
            raise ConfigError(f"{names(i)}: {texts[i]!r} has a part that the tokenizer does not know.")
        if control := tokenizer.control.keys() & ids:
            words = ", ".join(sorted(tokenizer.control[i] for i in control))
            raise ConfigError(
                f"{names(i)}: {texts[i]!r} holds {words}, which the tokenizer can read only as a control token: "
                "remove it from the text."
            )
        if len(ids) > length - 2 and not c.text.truncate:
            raise ConfigError(
                f"{names(i)}: {texts[i]!r} is {len(ids) + 2} tokens long, including begin and end, more than "
                f"config.text.length={length}: shorten it, or set config.text.truncate=True."
            )
        ids = [tokenizer.begin, *ids[: length - 2], tokenizer.end]
        rows[i, : len(ids)], lengths[i] = ids, len(ids)
    return TokenizedTexts(rows, lengths)
