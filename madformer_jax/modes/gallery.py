"""--mode=gallery: a page that shows how images are drawn at two settings side by side.

    python -m madformer_jax.main --mode=gallery --workdir=runs/digits --config.gallery.grid="steps=4,20"

Writes workdir/gallery/index.html from the newest checkpoint, or from `sample.step`. The page needs
no server and no Python. `publishing.gallery_page` has its layout.
"""

import os
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import class_labels, elastic_depth
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import sampling_grid
from madformer_jax.publishing import gallery_page
from madformer_jax.publishing.gallery_page import Recording
from madformer_jax.runtime import checkpoint, storage
from madformer_jax.sampling import prompts, trained_model

# Fields of `sample` that both sides of a page share, and what they decide.
_SHARED_FIELDS = {"weights": "weights", "ema": "weights", "prompts": "captions", "label_sampling": "labels"}


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Records `gallery.n` images at every setting of `gallery.grid` and writes the page.

    Returns:
      The path of the page.

    Raises:
      ConfigError: A setting is wrong, the workdir has no checkpoint, the checkpoint does not fit
        the config, or the page would be too large.
    """
    config_lib.validate(c)
    if jax.process_count() > 1:
        raise ConfigError("--mode=gallery is for one process: start it without --distributed and --coordinator.")
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    grid = _grid_configs(c)
    for setting in grid:
        config_lib.validate(setting)
        for name, shown in _SHARED_FIELDS.items():
            if setting.sample[name] != c.sample[name]:
                raise ConfigError(
                    f"config.gallery.grid: one page shows one set of {shown}: choose it by config.sample.{name}."
                )
    sampling_grid.log_warnings(c, grid)
    model = trained_model.load_workdir(c, workdir)
    for setting in grid:
        config_lib.resolve_label_numbers(setting, model.labels)
    recordings = [_record(model, setting, name) for setting, name in zip(grid, _setting_names(grid))]
    m = c.model
    depths = " or ".join(map(str, sorted(set(map(elastic_depth.sampled_depth, grid)))))
    description = (
        f"MADFormer draws an image block after block: N = {m.depth} layers, of which D = {depths} run at every solver "
        f"step, L = {m.blocks} blocks. Both sides start from the same noise. At each position of the slider, both have spent the "
        "same amount of work on an image, or are finished. The work is counted in passes. A pass is the work of running all "
        "layers once on the whole image."
    )
    path = os.path.join(workdir, "gallery", "index.html")
    page = gallery_page.render(
        "How the images come into being", description, _captions(grid[0], model.labels), recordings
    )
    storage.write_text(path, page)
    logging.info("wrote %d images at %d settings: %s", c.gallery.n, len(grid), path)
    return {"page": path}


def _grid_configs(c: ConfigDict) -> list[ConfigDict]:
    """Returns the config of each setting of `gallery.grid`."""
    c = c.copy_and_resolve_references()
    c.evaluate.n = c.gallery.n
    c.evaluate.grid = c.gallery.grid or f"steps={max(1, c.sample.steps // 5)},{c.sample.steps}"
    return sampling_grid.expand_configs(c, "gallery.grid")


def _setting_names(grid: list[ConfigDict]) -> list[str]:
    """Returns a name for each setting from the fields in which they differ."""
    differ = [name for name in sampling_grid.FIELDS if len({str(c.sample[name]) for c in grid}) > 1] or ["steps"]
    return [", ".join(f"{name} {c.sample[name]}" for name in differ) for c in grid]


def _captions(c: ConfigDict, names: tuple[str, ...]) -> list[str]:
    """Returns the prompt, the class or the number of each image."""
    if c.text.vocabulary:
        return prompts.load(c)
    labels = config_lib.sample_labels(c)
    return [class_labels.display_name(k, names) for k in labels] or [f"image {k}" for k in range(c.sample.n)]


def _record(model: trained_model.Model, c: ConfigDict, name: str) -> Recording:
    """Records every solver step of the images, after a run that compiles the programs."""
    for _ in model.stream_config(c, "step"):
        pass
    drawn = list(model.stream_config(c, "step"))
    frames = [gallery_page.Frame(f.block + 1, f.step, f.passes, f.seconds / c.sample.n) for f in drawn]
    return Recording(name, frames, np.stack([gallery_page.downscale(f.images) for f in drawn]))
