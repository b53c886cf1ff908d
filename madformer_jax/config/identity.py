"""Facts about every config field: whether it decides results, may change on resume, or is local to a machine.

This table alone says what identifies a run. `runtime.checkpoint` compares the fields that may not
change, `sweeps.sweep_file` names a run by the fields that decide its results, and `modes.export` and
`runtime.stored_config` reset the fields that are local to a machine. A new field of `schema.base`
needs an entry here.
"""

import enum
import os
import re
from collections.abc import Callable, Mapping
from typing import Any


class Fact(enum.Flag):
    """Statement about a field.

    A field may have several facts. Example: `sample.noise`, a file of initial noise, decides images
    (RUN) and is a path of one machine (MACHINE).
    """

    RUN = enum.auto()  # decides weights, images or scores
    RESUME = enum.auto()  # may change when a run is resumed
    MACHINE = enum.auto()  # a path, an address, or a setting of speed and memory, meaningless on another machine


_FIXED = Fact.RUN
_FREE = Fact.RUN | Fact.RESUME
_NEUTRAL = Fact.RESUME  # decides no result and is valid on other machines
# decides no result: a path, an address, or a setting of speed and memory of one machine
_LOCAL = Fact.MACHINE | Fact.RESUME
_FILE = Fact.RUN | Fact.MACHINE
_FREE_FILE = Fact.RUN | Fact.MACHINE | Fact.RESUME

# Section -> facts -> names of fields
_TABLE: dict[str, dict[Fact, str]] = {
    "": {_FIXED: "seed", _LOCAL: "platform compilation_cache profile"},
    "model": {
        _FIXED: "width heads depth diffusion_depth mlp_width blocks unet_channels unet_layers unet_attention "
        "unet_groups unet_heads unet_time_width unet_stride unet_kernel unet_context prediction_type rope time_embedding "
        "clean_timestep hidden_from clean_stream ar_condition param_sets diffusion_attention classes dtype",
        _LOCAL: "attention remat scan_unroll",
    },
    "text": {_FIXED: "vocabulary length caption", _FREE: "truncate", _FILE: "tokenizer"},
    "loss": {_FIXED: "image hidden clean text weighting"},
    "diffusion": {_FIXED: "path time_sampling shift"},
    "codec": {_FIXED: "name patch scaling_factor dtype", _LOCAL: "path"},
    "data": {
        _FIXED: "source drawings split test_share image_size channels crop background flip",
        _NEUTRAL: "max_corrupt max_pixels",
        _LOCAL: "path workers threads batches_ahead",
    },
    "prepare": {_NEUTRAL: "kind shard batch max_corrupt flip"},  # modes.prepare compares its own plan
    "train": {
        _FIXED: "batch ema_decay ema_warmup context_noise label_dropout",
        _FREE: "steps accumulate",
        _NEUTRAL: "log_every sample_every checkpoint_every evaluate_every evaluate_n validate_every validate_n judge keep "
        "keep_every",
        _FREE_FILE: "init_from",
    },
    "optimizer": {_FIXED: "b1 b2 weight_decay clip skip", _FREE: "learning_rate schedule warmup decay"},
    "sample": {
        _FREE: "step n solver spacing steps guidance guidance_schedule guidance_interval prompts labels label_sampling weights "
        "clip_x0",
        _NEUTRAL: "batch shard grid film",
        _FREE_FILE: "noise",
    },
    "evaluate": {
        _FREE: "network split n checkpoints grid degrade",
        _LOCAL: "network_path reference training",
        _FREE_FILE: "images",
    },
    "gallery": {_NEUTRAL: "n grid"},
    "demo": {_NEUTRAL: "n", _LOCAL: "other host port"},
    "convert": {_NEUTRAL: "weights", _LOCAL: "release vae inception to_release"},
    "compile": {_NEUTRAL: "time"},
    "benchmark": {_NEUTRAL: "parts warmup steps"},
    "mesh": {_LOCAL: "data fsdp tensor"},
}

FACTS: dict[str, Fact] = {
    f"{section}.{name}".lstrip("."): facts
    for section, rows in _TABLE.items()
    for facts, names in rows.items()
    for name in names.split()
}

# owner/name or owner/name@revision on the Hugging Face hub
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?")
EMBEDDED_TOKENIZERS = ("drawings",)
DATA_PREFIX = "data:"  # before a split, as value of sample.prompts and evaluate.images
_TEXT_FILE = re.compile(r"\.txt\s*($|[,;])")

# For fields that may hold a path: a function that says whether a value is valid on any machine.
# It overrides MACHINE.
_PORTABLE: dict[str, Callable[[str], bool]] = {
    "codec.path": lambda value: HUB_ID.fullmatch(value) is not None and not os.path.exists(value),
    "evaluate.grid": lambda value: not _TEXT_FILE.search(value),  # it may vary sample.prompts
    "evaluate.images": lambda value: value.startswith(DATA_PREFIX),
    "gallery.grid": lambda value: not _TEXT_FILE.search(value),
    "sample.prompts": lambda value: not _TEXT_FILE.search(value),
    "text.tokenizer": lambda value: value in EMBEDDED_TOKENIZERS,
}


def affects_results(name: str) -> bool:
    """Returns whether a field decides results."""
    return Fact.RUN in _facts(name)


def may_change_on_resume(name: str) -> bool:
    """Returns whether a field may change when a run is resumed."""
    return Fact.RESUME in _facts(name)


def _facts(name: str) -> Fact:
    return FACTS.get(name, Fact.RUN)  # a field without an entry may decide results


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
    if name in _PORTABLE:
        return _PORTABLE[name](value)
    return Fact.MACHINE not in _facts(name)
