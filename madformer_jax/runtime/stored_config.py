"""The config of a folder, as its config.json holds it, and paths of a config as this machine has them."""

import os
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import aliases, fields, identity, validation
from madformer_jax.config.schema import TOKENIZER_FILE, base, portable
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import provenance, storage


def config_from_saved(saved: Any, path: str, trusted: bool | None = None) -> ConfigDict:
    """Returns the config of a folder from the content of its config.json. Missing fields have their defaults.

    A stranger's file chooses no path, no device and no address: fields of the machine have their defaults unless this user wrote
    the file. The compilation cache has its default in any case, because the programs in it are executed.

    Args:
      saved: The content.
      path: The file's name.
      trusted: Whether this user wrote the file; None looks it up (`runtime.provenance`).

    Raises:
      ConfigError: The content is not a config of this package.
    """
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is damaged: it holds no config.")
    c, known = aliases.current_names(fields.flat(saved), path), fields.flat(base())
    c.pop("model.text_length", None)  # of older configs, in which it could only be 1
    try:
        fields.check(known | c, known)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = base()
    config.update_from_flattened_dict(c)
    config.compilation_cache = known["compilation_cache"]
    trusted = provenance.is_recorded(saved) if trusted is None else trusted
    if not trusted:
        _log_ignored(path, identity.machine_specific_fields(fields.flat(config), known))
        config = portable(config)
    beside = epath.Path(path).parent / TOKENIZER_FILE
    if config.text.tokenizer == TOKENIZER_FILE and (
        not trusted or beside.exists() or not os.path.exists(TOKENIZER_FILE)
    ):
        config.text.tokenizer = os.fspath(beside)
    return config


def _log_ignored(path: str, values: Mapping[str, Any]) -> None:
    given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != TOKENIZER_FILE)
    if given:
        logging.warning(
            "%s: settings of the machine that wrote it are ignored (docs/weights.md): %s. Set those that you need.",
            path,
            given,
        )


def expand_paths(c: ConfigDict) -> None:
    """Expands `~` in all fields that are paths. Call it at the edge: once for a config that a user has given.

    Raises:
      ConfigError: The home folder is unknown.
    """
    prompts = ("sample.prompts",) if c.sample.prompts.endswith(".txt") else ()
    for field in (*validation.PATHS, *prompts):
        section, _, name = field.rpartition(".")
        owner = c[section] if section else c
        owner[name] = storage.expand(owner[name])
