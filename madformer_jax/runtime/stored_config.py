"""Configs that are read from a config.json, and expansion of the paths in a config.

The command line and `sampling.trained_model.load` read the configs of workdirs and exports here.
"""

import os
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import aliases, fields, identity
from madformer_jax.config.schema import TOKENIZER_FILE, base, portable
from madformer_jax.config.table import FIELDS, PATH
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import provenance, storage


def config_from_saved(saved: Any, path: str, trusted: bool | None = None) -> ConfigDict:
    """Returns the config in a config.json. Missing fields have their defaults.

    Fields that are local to a machine have their defaults unless this user wrote the file, so that a
    stranger's file cannot choose paths, devices or addresses. The compilation cache always has its default,
    because the programs in it are executed.

    Args:
      saved: Content of the file.
      path: Path of the file.
      trusted: Whether this user wrote the file; None for a look-up in `runtime.provenance`.

    Raises:
      ConfigError: The content is not a config of this package.
    """
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is damaged: it holds no config.")
    c, known = aliases.current_names(fields.flat(saved), path), fields.flat(base())
    try:
        fields.check(known | c, known)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = base()
    config.update_from_flattened_dict(c)
    config.compilation_cache = known["compilation_cache"]
    trusted = provenance.is_recorded(saved) if trusted is None else trusted
    if not trusted:
        local = identity.machine_specific_fields(fields.flat(config), known)
        if settings := ", ".join(f"{name}={value!r}" for name, value in local.items() if value != TOKENIZER_FILE):
            logging.warning(
                "%s: settings of the machine that wrote it are ignored (docs/weights.md): %s. Set those that you need.",
                path, settings,
            )  # fmt: skip
        config = portable(config)
    if config.text.tokenizer == TOKENIZER_FILE:
        beside = epath.Path(path).parent / TOKENIZER_FILE
        if not trusted or beside.exists() or not os.path.exists(TOKENIZER_FILE):
            config.text.tokenizer = os.fspath(beside)
    return config


def guide_config(c: ConfigDict) -> ConfigDict | None:
    """Returns the config of the model of `sample.guide`; None if the config names none.

    It draws with the settings, the mesh and the codec of `c`, without guidance. The model and the choice of
    weights are the guide's own.

    Raises:
      ConfigError: The folder has no config.
    """
    if not c.sample.guide:
        return None
    path = f"{c.sample.guide.rstrip('/')}/config.json"
    saved = storage.read_json(path)
    if saved is None:
        raise ConfigError(
            f"config.sample.guide={c.sample.guide}: {path} does not exist: give the workdir of a training."
        )
    guide = config_from_saved(saved, path)
    weights, ema = guide.sample.weights, guide.sample.ema
    guide.sample, guide.mesh = c.sample.copy_and_resolve_references(), c.mesh.copy_and_resolve_references()
    guide.codec.path, guide.codec.dtype = c.codec.path, c.codec.dtype
    guide.sample.update({
        "weights": weights, "ema": ema, "step": c.sample.guide_step, "guide": "", "guidance": 1.0, "diffusion_depth": 0,
        "guidance_schedule": "constant", "guidance_interval": base().sample.guidance_interval,
    })  # fmt: skip
    return guide


def expand_paths(c: ConfigDict) -> None:
    """Expands `~` in all fields that are paths. Call it once for a config that a user has given.

    Raises:
      ConfigError: The home folder is unknown.
    """
    is_file = {"sample.prompts": c.sample.prompts.endswith(".txt")}
    paths = {name: value for name, value in fields.flat(c).items() if PATH in FIELDS[name].facts or is_file.get(name)}
    c.update_from_flattened_dict({name: storage.expand(value) for name, value in paths.items()})
