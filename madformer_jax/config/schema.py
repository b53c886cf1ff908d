"""Functions on whole configs: the default config, validation, differences, variants, labels.

Config files and the command line start from `base`, whose defaults suit new training;
`weights.release_config` has the settings of the PyTorch release. To add a field, see `table`, and to rename
a field, see `aliases`.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import class_labels, fields, identity, seeds, validation
from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.config.table import SECTIONS
from madformer_jax.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"  # as text.tokenizer in an export's config.json: the file next to it


def base() -> ConfigDict:
    """Returns a config with every field of `config.table` at its default.

    It is locked, so that a config file cannot set a misspelled field.
    """
    defaults = {
        section: {name: field.default for name, field in fields.items()} for section, (_, fields) in SECTIONS.items()
    }
    return ConfigDict(defaults.pop("") | defaults).lock()


def differences(c: ConfigDict) -> dict[str, Any]:
    """Returns the fields that are not at their defaults, with their values: {"model.width": 96}."""
    defaults = fields.flat(base())
    return {name: value for name, value in fields.flat(c).items() if name not in defaults or value != defaults[name]}


def portable(c: ConfigDict) -> ConfigDict:
    """Returns a copy that is valid on any machine.

    Fields that are local to this machine have their defaults. The tokenizer's file is the one next to
    config.json.
    """
    copy, defaults = c.copy_and_resolve_references(), fields.flat(base())
    for name in identity.machine_specific_fields(fields.flat(c), defaults):
        copy.update_from_flattened_dict({name: TOKENIZER_FILE if name == "text.tokenizer" else defaults[name]})
    return copy


def variant(text: str, numbers: dict[str, int], words: tuple[str, ...] = ()) -> dict[str, int]:
    """Reads a config file's argument, as in `ffhq1024.py:D=7,tiny`.

    Args:
      text: The text after the colon; "" if the argument has none.
      numbers: Names that take a number, with their defaults.
      words: Names without a value.

    Returns:
      The value of each name. A name of `words` has the value 1 if `text` contains it, else 0.

    Raises:
      ConfigError: A name is unknown, or its value is not a number.
    """
    chosen = numbers | dict.fromkeys(words, 0)
    for setting in text.split(",") if text else ():
        name, equals, value = setting.partition("=")
        if name in numbers and value.isdecimal():
            chosen[name] = int(value)
        elif name in words and not equals:
            chosen[name] = 1
        else:
            known = ", ".join([*(f"{name}=<number>" for name in numbers), *words])
            raise ConfigError(f"--config: variant {setting!r} is unknown: it is made of {known}, separated by commas.")
    return chosen


def as_tiny(c: ConfigDict) -> None:
    """Shrinks a config to a few steps of a small model on the embedded digits, with the same share of diffusion layers.

    Args:
      c: The config, which is changed.

    Raises:
      ConfigError: D is not from 1 to N.
    """
    validation.check_depth(c)
    tiny_depths = [max(1, round(4 * d / c.model.depth)) for d in (c.model.diffusion_depth, *c.train.elastic_depths)]
    c.model.depth, c.model.diffusion_depth = 4, tiny_depths[0]
    if c.train.elastic_depth:
        c.train.elastic_depths = tuple(dict.fromkeys(tiny_depths[1:]))
    c.model.width, c.model.heads, c.model.mlp_width = 64, 4, 128
    c.model.unet_channels, c.model.unet_layers, c.model.unet_time_width = (16, 32), 1, 32
    c.model.unet_attention, c.model.unet_groups, c.model.unet_heads = (False, True), 8, 8
    c.model.classes = min(c.model.classes, 10)
    if c.text.vocabulary:  # captions are the names of the digits
        c.text.tokenizer, c.text.vocabulary, c.text.length, c.text.caption = "drawings", 835, 4, "class"
        c.sample.prompts = "0;1;2;3;4;5;6;7;8;9"
    c.codec.name, c.codec.patch = "pixel", 2  # which needs no VAE
    c.data.source, c.data.image_size, c.data.channels = "digits", 32, 1
    c.train.steps, c.train.log_every, c.train.sample_every = 20, 5, 0
    c.train.batch = c.sample.n = c.sample.batch = 16
    c.sample.steps = 4
    c.evaluate.network, c.evaluate.n = "classifier", 16


def split_config_flag(value: str) -> tuple[str, str, str]:
    """Splits FILE:variant of --config into path, colon and variant. The path may contain colons."""
    ends = [i for i, character in enumerate(value) if character == ":"] + [len(value)]
    end = next((i for i in ends if os.path.isfile(value[:i])), ends[0])
    return value[:end], value[end : end + 1], value[end + 1 :]


def validate(c: ConfigDict) -> Sizes:
    """Checks a whole config and returns its sizes.

    Raises:
      ConfigError: Names the first wrong setting.
    """
    fields.check(c, base())
    validation.check(c)
    return derive_sizes(c)


def sample_labels(c: ConfigDict) -> list[int]:
    """Returns the class of each of the `sample.n` images; empty without classes.

    Images take the labels of `sample.labels` in turn. With `sample.label_sampling="random"` each image's label is drawn from
    them, all equally likely.

    Raises:
      ConfigError: A label is not a class number of the model.
    """
    chosen = class_labels.parse(c.sample.labels, c.model.classes)
    if chosen and c.sample.label_sampling == "random":
        return random.Random(seeds.of(c, "sample")).choices(chosen, k=c.sample.n)
    return [chosen[i % len(chosen)] for i in range(c.sample.n)] if chosen else []


def resolve_label_numbers(c: ConfigDict, names: Sequence[str]) -> None:
    """Replaces the labels in `sample.labels` by class numbers. A second call changes nothing.

    Args:
      c: The config, which is changed.
      names: Names of all classes in order; empty if the data name none.

    Raises:
      ConfigError: A label is not a class, or it is ambiguous.
    """
    if c.sample.labels:
        chosen = class_labels.parse(c.sample.labels, c.model.classes, names)
        c.sample.labels = class_labels.from_numbers(chosen)
