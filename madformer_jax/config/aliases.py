"""Former names of config fields, which still work and log one warning each.

To rename a field, change it in `table`, and add a line to `RENAMED` here. Everything that
reads fields by name passes through `current_names`: the command line, config files, the overrides of a sweep, arguments of
`Model.sample`, and the configs that workdirs, exports and results have stored. Hashes that name runs, samplings and
evaluations are computed over `first_names`, so that a renamed field does not change them.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

# Former name -> current name, both in the same section. Drop the warning and `accept_in_config_file` for a name after one
# release, but keep the line: stored files and hashes need it for ever.
RENAMED = {
    "model.predicts": "model.prediction_type",
    "model.neighbours": "model.unet_context",
    "sample.clip": "sample.clip_x0",
}
_FIRST_NAMES = {current: former for former, current in RENAMED.items()}

_warned: set[str] = set()  # former names that this process has warned of


def current_name(name: str, source: str) -> str:
    """Returns the current name of a field, and logs a warning the first time that a former name is used.

    Args:
      name: Section and field, as in "model.predicts".
      source: Where the name is used, for the warning.
    """
    if name not in RENAMED:
        return name
    if name not in _warned:
        _warned.add(name)
        logging.warning(
            "%s: config.%s is now config.%s. The old name works until the next release.", source, name, RENAMED[name]
        )
    return RENAMED[name]


def current_names(values: Mapping[str, Any], source: str, section: str = "") -> dict[str, Any]:
    """Returns fields under their current names.

    Args:
      values: Field -> value; flat, as in {"model.predicts": "x0"}, or nested.
      source: Where the names are used, for the warning.
      section: The section that `values` are of, with a dot at its end.
    """
    renamed = {}
    for name, value in values.items():
        field = f"{section}{name}"
        if isinstance(value, Mapping):
            value = current_names(value, source, f"{field}.")
        renamed[current_name(field, source).removeprefix(section) if field in RENAMED else name] = value
    return renamed


def first_names(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Returns the fields of a flat config, or of one section, under the names that they had first.

    Args:
      values: Field -> value.
      section: The section that `values` are of, with a dot at its end.
    """
    return {first_name(f"{section}{name}").removeprefix(section): value for name, value in values.items()}


def first_name(name: str) -> str:
    """Returns the name that a field had first."""
    return _FIRST_NAMES.get(name, name)


class _Section(ConfigDict):
    """A section of a config file's config, which can be read and written by former names of its fields."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(_current_key(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_current_key(key), value)


_SECTIONS = sorted({name.partition(".")[0] for name in RENAMED})
_FORMER_KEYS = {name.partition(".")[2]: name for name in RENAMED}


def _current_key(key: str) -> str:
    if key not in _FORMER_KEYS:
        return key
    return current_name(_FORMER_KEYS[key], "the config file").partition(".")[2]


def accept_in_config_file(c: ConfigDict) -> ConfigDict:
    """Lets a config file use former names of fields: in attributes, items and `update`.

    Args:
      c: The config, whose sections are replaced.

    Returns:
      The same config.
    """
    for name in _SECTIONS:
        c[name] = _Section(c[name])
    return c
