"""--mode=tokenizer: a byte-level BPE of `text.vocabulary` tokens, trained on the captions of the config's data.

    python -m madformer_jax.main --config=... --mode=tokenizer --workdir=DIR --config.text.vocabulary=512

Writes DIR/tokenizer.json. The same captions give the same file.
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
from madformer_jax.runtime import storage

MAX_CAPTIONS = 200_000  # of more, as many are taken, evenly over all
MIN_VOCABULARY = 258  # tokens: every byte, begin and end


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains the tokenizer; returns its path, its number of tokens and those of the longest caption.

    Raises:
      ConfigError: a setting is wrong, or the source does not open or has no captions.
    """
    began = time.monotonic()
    c = c.copy_and_resolve_references()
    c.text.length = max(3, c.text.length)  # found out here
    config_lib.validate(c)
    if c.text.vocabulary < MIN_VOCABULARY:
        raise ConfigError(
            f"config.text.vocabulary={c.text.vocabulary}: --mode=tokenizer makes one of {MIN_VOCABULARY} tokens at least."
        )
    captions = _read_captions(c)
    if not captions:
        raise ConfigError(f"config.data.source={c.data.source} has no captions: see docs/text.md on where they lie.")
    path = epath.Path(workdir) / "tokenizer.json"
    if jax.process_index() == 0:
        with storage.wrap_errors(f"{path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(path, text.train_bpe(captions, c.text.vocabulary))
    found = text.open_tokenizer(str(path))
    longest = 2 + max(map(len, found.encode(captions)))
    logging.info(
        "wrote %s from %d captions in %.1f s: config.text.tokenizer=%s, config.text.vocabulary=%d; the longest caption is %d "
        "tokens, begin and end counted (config.text.length)",
        path, len(captions), time.monotonic() - began, path, found.vocabulary, longest,
    )  # fmt: skip
    return {"path": str(path), "vocabulary": found.vocabulary, "longest": longest}


def _read_captions(c: ConfigDict) -> list[str]:
    """Those of the config's split that are not empty."""
    source = sources.open_source(c)
    if c.text.caption == "class":
        return list(source.names)
    count = min(len(source), MAX_CAPTIONS)
    numbers = np.arange(count) * len(source) // max(1, count)
    parts = (source.captions(numbers[at : at + 1000]) for at in range(0, count, 1000))
    return [caption for part in parts for caption in part if caption]
