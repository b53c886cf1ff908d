"""Flat names of config fields, as in {"model.width": 96}, and checks of names and types.

Modules that compare, hash or store configs use `flat`. The command line and the readers of stored
configs call `check`; `validation` checks the values.
"""

import difflib
import json
from collections.abc import Mapping, Set
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError

Section: TypeAlias = Mapping[str, Any] | ConfigDict


def flat(c: Section, prefix: str = "") -> dict[str, Any]:
    """Returns field -> value of a config or a section, with lists turned into tuples.

    Args:
      c: The config or section, which may be nested.
      prefix: Text before each name.
    """
    fields: dict[str, Any] = {}
    for name, value in c.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return fields


def suggestion(name: str, known: Mapping[str, Any]) -> str:
    """Returns the end of an error message: the most similar field, or the names of all sections."""
    near = difflib.get_close_matches(name, known, 1)
    sections = ", ".join(sorted({field.partition(".")[0] for field in known if "." in field}))
    return f"did you mean config.{near[0]}?" if near else f"the sections are {sections}."


def check(c: Section, like: Section) -> None:
    """Checks that a config has exactly the fields of another config, with values of the same types.

    Raises:
      ConfigError: Names the first wrong field.
    """
    values, known = flat(c), flat(like)
    sections = {".".join(parts[:n]) for parts in (field.split(".") for field in known) for n in range(1, len(parts))}
    for name, value in values.items():
        if name in sections:
            raise ConfigError(f"config.{name}={value!r} must be a section with fields of its own.")
        if name not in known:
            raise ConfigError(f"config.{name} is not a field: {suggestion(name, known)}")
        if not _has_type_of(value, known[name]):
            kind = type(known[name]).__name__
            kind += f" of {type(known[name][0]).__name__}" if kind == "tuple" else ""
            raise ConfigError(f"config.{name}={value!r} must be of type {kind}.")
    missing = [name for name in known if name not in values]
    if missing:
        raise ConfigError(
            f"config.{missing[0]} is missing: a config file starts from config.base(), which has every field."
        )


def _has_type_of(value: Any, like: Any) -> bool:
    """Returns whether two values have the same type. An integer also counts as a float."""
    if isinstance(value, bool) or isinstance(like, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    if isinstance(like, tuple):
        return isinstance(value, tuple) and all(_has_type_of(item, like[0]) for item in value)
    return isinstance(value, int | float if isinstance(like, float) else type(like))


def python_items(value: Any) -> list[Any] | None:
    """Returns the items of a sequence or array of a Python caller; None if the value has no order of items."""
    if isinstance(value, Mapping | Set | bytes):
        return None
    try:
        return list(value)
    except TypeError:  # also of an array without axes
        return None


def json_list(text: str) -> list[Any] | None:
    """Returns the items of a field that is written as a JSON list, as in '["a", 3]'; None if it is plain text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except ValueError:
        return None
    return items if isinstance(items, list) else None
