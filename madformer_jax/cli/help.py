"""Pages of --help, docs/reference.md, and the text after a training.

Modes are described by the first sentence of their modules, and fields by `config.table`.
Add a mode's sections of fields to `_SECTIONS`.
"""

import ast
import functools
import importlib.resources
import math
import os
import pkgutil
import textwrap
from collections.abc import Mapping

from ml_collections import ConfigDict

from madformer_jax import modes
from madformer_jax.config.table import SECTIONS, Fact, Field
from madformer_jax.runtime import console

_COMMAND = "python -m madformer_jax"
_WIDTH = 118
_SHOWN_FACTS = {"resume": Fact.RESUME, "machine": Fact.LOCAL}

# Sections on the page of a mode, besides the section of its own name. After training, the workdir's config
# decides the shapes of a model, so those pages do not list the model's fields.
_SECTIONS = {
    "train": ("model", "text", "loss", "diffusion", "codec", "data", "optimizer", "sample", "mesh"),
    "sample": ("mesh",),
    "evaluate": ("sample", "data", "mesh"),
    "reference": ("evaluate", "data"),
    "prepare": ("data", "codec"),
    "tokenizer": ("text", "data"),
    "benchmark": ("model", "train", "sample", "data", "mesh"),
    "compile": ("model", "train", "sample", "mesh"),
    "export": ("sample",),
    "gallery": ("sample",),
    "demo": ("sample",),
    "probe": ("data", "mesh"),
    "sweep": ("model", "train", "evaluate", "sample"),
}

_EXAMPLES = f"""\
Train on the embedded digits and draw samples, then draw more of some of them, and judge the run:

  {_COMMAND} --config=configs/digits.py --workdir=runs/digits
  {_COMMAND} --workdir=runs/digits --mode=sample --config.sample.labels=3,7 --config.sample.guidance=2
  {_COMMAND} --workdir=runs/digits --mode=reference
  {_COMMAND} --workdir=runs/digits --mode=evaluate"""


@functools.cache
def mode_summaries() -> dict[str, str]:
    """Returns mode -> first sentence of the docstring of its module."""
    names = [module.name for module in pkgutil.iter_modules(modes.__path__)]
    summaries = {}
    for mode in sorted(names, key=lambda name: (name != "train", name)):
        source = (importlib.resources.files(modes) / f"{mode}.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
        summaries[mode] = " ".join(first.removeprefix(f"--mode={mode}: ").split()).partition(". ")[0].rstrip(".")
    return summaries


def page(mode: str | None, flags: Mapping[str, str] | None = None) -> str:
    """Returns the help page of a mode, or of all modes for None.

    Args:
      mode: The mode.
      flags: Flag -> its description. The page of a mode has those whose description names the mode.
    """
    flags = {name: doc for name, doc in (flags or {}).items() if mode is None or f"--mode={mode}" in doc}
    lines = [f"  --{name:15} {doc}" for name, doc in flags.items()]
    text = _overview_page() if mode is None else _mode_page(mode)
    return "\n".join([text, *(["", "Flags:", ""] if lines else []), *lines])


def reference_page() -> str:
    """Returns docs/reference.md: every field with its default, its description and its facts."""
    lines = [
        "# Every field", "",
        "Set as `--config.field=value`. Made by `python -m madformer_jax.cli.help` from `config/table.py`.", "",
        "*resume*: the field may change when a run is resumed. *machine*: it is a path or a setting of",
        "one machine. Exports leave such a field out, and another user's config.json cannot set it.",
    ]  # fmt: skip
    for section, (doc, fields) in SECTIONS.items():
        title = f"## {section or 'The run'}{': ' if doc else ''}{doc}"
        lines += ["", title, "", "| field | default | | facts |", "|---|---|---|---|"]
        for name, field in fields.items():
            marks = [mark for mark, fact in _SHOWN_FACTS.items() if fact in field.facts]
            cells = f"{section}.{name}".lstrip("."), repr(field.default), _describe(field, "`"), ", ".join(marks)
            lines.append("| `{}` | `{}` | {} | {} |".format(*cells))
    return "\n".join(lines) + "\n"


def _describe(field: Field, quote: str = "") -> str:
    """Returns the description of a field, followed by its choices or its range."""
    text = field.doc
    if field.choices:
        text += "; one of " + ", ".join('""' if choice == "" else f"{quote}{choice}{quote}" for choice in field.choices)
    elif field.has_range:
        text += f"; from {field.low:.10g}" + (f" to {field.high:.10g}" if field.high < math.inf else "")
    return text.replace("<", "&lt;") if quote else text


def after_training(c: ConfigDict, workdir: str, scores: str = "") -> str:
    """Returns the text after a training: its files, its scores, and commands to try next.

    `scores` is a sentence on the quality of the model; "" if it was not evaluated.
    """
    chosen = ["--config.sample.labels=[0, 1]", "--config.sample.guidance=2"] if c.model.classes else []

    def command(mode: str, *arguments: str) -> str:
        flags = map(console.shell_quote, [f"--workdir={workdir}", f"--mode={mode}", *arguments])
        return f"  {_COMMAND} {' '.join(flags)}"

    logdir = console.shell_quote(f"--logdir={workdir}")
    tensorboard = f"; or tensorboard {logdir}" if "tensorboard" in c.train.log_to else ""
    made = f"Trained {c.train.steps} steps. In {workdir}: checkpoints, samples (pictures), metrics.jsonl (metrics{tensorboard})."
    if scores:
        middle = "see what fewer solver steps cost in quality"
        grid = f"--config.evaluate.grid=steps={max(1, c.sample.steps // 5)},{c.sample.steps}"
        commands = [command("evaluate", grid)]
    else:
        middle = "make statistics of held-out images, judge the model by them"
        commands = [command("reference"), command("evaluate")]
    why = f"What to try next: draw more, {middle}, and watch the drawing of images:"
    draw = command("sample", "--config.sample.n=100", *chosen)
    return "\n".join([made, *([scores] if scores else []), why, draw, *commands, command("demo")])


def config_location_hint(path: str) -> str:
    """Returns the end of a message on a missing file like `configs/digits.py`: the place of the project's configs."""
    if os.path.normpath(path).partition("/")[0] != "configs":
        return ""
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if os.path.isfile(shipped := os.path.join(checkout, os.path.normpath(path))):
        return f" in {os.getcwd()}. Use --config={shipped}"
    return (
        f" in {os.getcwd()}. The project's configs are not part of an installed package: run the command in a checkout of the "
        "project, or give the path of a file in its folder configs"
    )


def _overview_page() -> str:
    summaries = mode_summaries()
    width = max(map(len, summaries))
    lines = [f"  {mode:{width}}  {summary}" for mode, summary in summaries.items()]
    return "\n".join(
        [
            f"usage: {_COMMAND} --mode=MODE --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]", "",
            "MADFormer in JAX. The modes, of which train is the default:", "", *lines, "",
            f"{_COMMAND} --mode=MODE --help lists the fields that matter to a mode. --config is needed in a new workdir only.",
            "The environment variable MADFORMER_FLAGS holds flags for every command, such as --config.train.steps=100.", "",
            _EXAMPLES,
        ]
    )  # fmt: skip


def _mode_page(mode: str) -> str:
    lines = [
        f"--mode={mode}: {mode_summaries()[mode]}.",
        "",
        "Fields and their defaults, which a config file or the workdir may change:",
    ]
    for section in ("", *(s for s in (mode, *_SECTIONS.get(mode, ())) if s in SECTIONS)):
        doc, fields = SECTIONS[section]
        heads = [
            f"--config.{section}{section and '.'}{name}={_format_value(field.default)}"
            for name, field in fields.items()
        ]
        wide = min(44, max(map(len, heads)))
        lines += ["", f"{section or 'all modes'}{': ' if doc else ''}{doc}"]
        for head, field in zip(heads, fields.values()):
            first, *rest = textwrap.wrap(_describe(field), _WIDTH - wide - 4)
            lines += [f"  {head:{wide}}  {first}", *(" " * (wide + 4) + line for line in rest)]
    return "\n".join(lines)


def _format_value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    print(reference_page(), end="")
