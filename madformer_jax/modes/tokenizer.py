"""--mode=tokenizer: trains a byte-level BPE tokenizer on the captions of the config's data.

    python -m madformer_jax.main --config=... --mode=tokenizer --workdir=DIR --config.text.vocabulary=512

Writes DIR/tokenizer.json. Equal captions give equal bytes. `data.text` trains and opens tokenizers.
"""

import time
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.data import sources, text
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import partitioning, storage

MAX_CAPTIONS = 200_000  # larger data sets are subsampled evenly to this number
MIN_VOCABULARY = 258  # every byte, the begin and the end token


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains the tokenizer.

    Returns:
      The path, the size of the vocabulary, and the number of tokens of the longest caption.

    Raises:
      ConfigError: A setting is wrong, or the source does not open or has no captions.
    """
    began = time.monotonic()
    c = c.copy_and_resolve_references()
    c.text.length = max(3, c.text.length)  # passes validation; the length that the captions need is logged below
    config_lib.validate(c)
    if c.text.vocabulary < MIN_VOCABULARY:
        raise ConfigError(
            f"config.text.vocabulary={c.text.vocabulary} is too small for --mode=tokenizer: use at least {MIN_VOCABULARY}."
        )
    captions = _read_captions(c)
    if not captions:
        raise ConfigError(f"config.data.source={c.data.source} has no captions: docs/text.md says how to add them.")
    path = epath.Path(workdir) / "tokenizer.json"
    if jax.process_index() == 0:
        with storage.wrap_errors(f"{path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(path, text.train_bpe(captions, c.text.vocabulary))
    partitioning.sync("tokenizer")  # The other processes must not read an older file.
    tokenizer = text.open_tokenizer(str(path))
    longest = 2 + max(map(len, tokenizer.encode(captions)))
    logging.info(
        "wrote %s from %d captions in %.1f s: use it with config.text.tokenizer=%s and config.text.vocabulary=%d. The longest "
        "caption has %d tokens with begin and end (config.text.length).",
        path, len(captions), time.monotonic() - began, path, tokenizer.vocabulary, longest,
    )  # fmt: skip
    return {"path": str(path), "vocabulary": tokenizer.vocabulary, "longest": longest}


def _read_captions(c: ConfigDict) -> list[str]:
    """Returns the captions of the config's split that are not empty, at most `MAX_CAPTIONS`."""
    source = sources.open_source(c)
    if c.text.caption == "class":
        return list(source.names)
    count = min(len(source), MAX_CAPTIONS)
    numbers = np.arange(count) * len(source) // max(1, count)
    parts = (source.captions(numbers[at : at + 1000]) for at in range(0, count, 1000))
    return [caption for captions in parts for caption in captions if caption]
