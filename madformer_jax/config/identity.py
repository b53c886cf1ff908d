"""Identity of a run: the fields that decide results, may change on resume, or are local to a machine.

`config.table` has these facts of every field. `runtime.checkpoint` compares the fields that may not change,
`sweeps.sweep_file` names a run by the fields that decide its results, and `modes.export` and
`runtime.stored_config` reset the fields that are local to a machine.
"""

from collections.abc import Mapping
from typing import Any

from madformer_jax.config.table import FIELDS, FIXED, Fact


def affects_results(name: str) -> bool:
    """Returns whether a field decides results."""
    return Fact.NEUTRAL not in _facts(name)


def may_change_on_resume(name: str) -> bool:
    """Returns whether a field may change when a run is resumed."""
    return Fact.RESUME in _facts(name)


def _facts(name: str) -> Fact:
    return FIELDS[name].facts if name in FIELDS else FIXED  # an unknown field may decide results


def identifying_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that identify a run, because they decide its results, with their values.

    Args:
      values: A flat config, or only its fields that are not at their defaults.
      defaults: A flat config with every field.
    """
    return {name: values.get(name, default) for name, default in defaults.items() if affects_results(name)}


def machine_specific_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a flat config whose values are not valid on another machine.

    A value at its default is valid anywhere. So are hub ids, names of embedded tokenizers and splits of
    the config's data set, in fields that may hold a path.
    """
    return {
        name: values[name]
        for name, default in defaults.items()
        if values[name] != default and not _is_portable(name, values[name])
    }


def _is_portable(name: str, value: Any) -> bool:
    if name in FIELDS and (is_portable := FIELDS[name].is_portable):
        return is_portable(value)
    return Fact.LOCAL not in _facts(name)
