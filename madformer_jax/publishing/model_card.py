"""The model card of an export: README.md for the Hugging Face hub.

`modes.export` calls `render` with the config, the evaluations and the class names of a workdir.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import block_steps, class_labels

_SETTING_COLUMNS = ("solver", "spacing", "steps", "guidance", "n")


def render(
    c: ConfigDict,
    step: int,
    parameters: int,
    evaluations: Sequence[Mapping[str, Any]],
    grid: bool,
    names: Sequence[str] = (),
) -> str:
    """Returns the model card in Markdown.

    Args:
      c: The config of the run.
      step: The training step that is published.
      parameters: Number of parameters of the model.
      evaluations: Results of --mode=evaluate on images of this step.
      grid: Whether the export has a file grid.png of samples.
      names: Names of the classes in order; empty if the data do not name them.
    """
    m, s = c.model, c.sample
    steps = s.steps if s.steps_by_block == block_steps.CONSTANT else s.steps_by_block
    depths = f" (trained with D = {', '.join(map(str, c.train.elastic_depths))})" if c.train.elastic_depth else ""
    kind = "captions" if c.text.vocabulary else f"{m.classes} classes" if m.classes else ""
    condition = f", conditional on {kind}," if kind else ""
    task = "text-to-image" if c.text.vocabulary else "unconditional-image-generation"
    lines = [
        "---", "library_name: madformer_jax", f"pipeline_tag: {task}",
        "tags: [madformer, jax, image-generation]", "---", "",
        "# A MADFormer", "",
        f"Generates images of {c.data.image_size} x {c.data.image_size} pixels{condition} with mixed autoregression and "
        "diffusion ([arXiv 2506.07999](https://arxiv.org/abs/2506.07999)).", "",
        *(["![samples](grid.png)", ""] if grid else []),
        "| | |", "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| layers N, diffusion layers D | {m.depth}, {m.diffusion_depth}{depths} |",
        f"| blocks L | {m.blocks} |",
        f"| width, heads | {m.width}, {m.heads} |",
        *([f"| classes | {_escape_cell(class_labels.summary(range(m.classes), names))} |"] if m.classes and names else []),
        f"| prediction type | {m.prediction_type} |",
        f"| codec | {c.codec.name}" + (f", patches of {c.codec.patch}" if c.codec.name == "pixel" else "") + " |",
        f"| trained on | {c.data.source}, split {c.data.split}: {step:,} steps, batch size {c.train.batch} |",
        f"| default sampling | {s.solver}, {steps} steps, {s.spacing}, guidance {s.guidance:g}, {s.weights} weights |", "",
        "```python", "import madformer_jax", "", 'model = madformer_jax.load("PATH or owner/name")',
        f"images = model.sample({_usage_example(c, names)})", "```", "",
    ]  # fmt: skip
    if evaluations:
        lines += ["## Scores", "", *_score_table(evaluations, names), ""]
    return "\n".join(lines)


def _usage_example(c: ConfigDict, names: Sequence[str]) -> str:
    if c.text.vocabulary:
        return 'prompts=["..."]'
    if not c.model.classes:
        return "4"
    shown = min(2, c.model.classes)
    unique = len(set(names)) == len(names) >= shown
    return f"labels={json.dumps(list(names[:shown]) if unique else list(range(shown)), ensure_ascii=False)}"


def _score_table(evaluations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns a table with a row for each evaluation.

    The JSON files of --mode=evaluate have the full protocols.
    """
    scores = list(dict.fromkeys(name for result in evaluations for name in result["scores"]))
    settings = [result["protocol"]["images"] | {"n": result["protocol"]["n"]} for result in evaluations]
    shown = [*_SETTING_COLUMNS, *(["labels"] if any(x.get("labels") for x in settings) else [])]
    rows = []
    for result, setting in zip(evaluations, settings, strict=True):
        if labels := setting.get("labels"):
            setting["labels"] = class_labels.summary([int(k) for k in labels.split(",")], names)
        cells = [str(setting.get(name, "")) for name in shown]
        for name in scores:
            score = result["scores"].get(name)
            cells.append(f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]" if score else "")
        cells.append(str(result["protocol"]["reference"]))
        rows.append("| " + " | ".join(map(_escape_cell, cells)) + " |")
    head = [*shown, *scores, "reference"]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *sorted(rows)]


def _escape_cell(text: str) -> str:
    """Escapes text for a cell of a Markdown table."""
    return text.replace("|", "\\|")
