"""Every command of README.md and docs/ runs, in the order of the pages and in one folder, with models and counts made small.

Left out are blocks behind a line `<!-- needs: ... -->` (a cloud, files to download), and what is not ours: `.ci/run` installs.
A sweep's trainings are stand-ins, as in tests/sweeps/test_sweep.py.
"""

import functools
import inspect
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.cli import command_line
from madformer_jax.evaluation.networks import attribute_classifier, classifier
from madformer_jax.modes import demo, sweep
from madformer_jax.sampling import generation
from madformer_jax.sweeps import sweep_folder
from madformer_jax.training import train_step
from tests.sweeps.test_sweep import Stage
from tests.test_docs import PAGES, ROOT, commands, of_ours

_MODEL = {
    "model.width": 16,
    "model.heads": 2,
    "model.mlp_width": 24,
    "model.depth": 1,
    "model.diffusion_depth": 1,
    "model.blocks": 1,
    "model.unet_channels": (8,),
    "model.unet_layers": 1,
    "model.unet_attention": (False,),
    "model.unet_groups": 4,
    "model.unet_time_width": 8,
    "model.attention": "reference",  # the smallest program
    "data.drawings": 400,
}
_COUNTS = {
    "train.batch": 8,
    "train.steps": 2,
    "train.checkpoint_every": 1,
    "train.keep": 2,
    "train.evaluate_n": 10,
    "sample.n": 10,
    "sample.batch": 10,
    "evaluate.n": 10,
    "gallery.n": 1,
    "benchmark.steps": 1,
    "benchmark.warmup": 1,
}
_STEPS = {"sample.steps": 2}  # of commands that name no number of steps
# These trainings run a step that learns nothing. The other trainings run real steps of digits, drawings, captions and
# the path `flow`, and most tests that train predict eps, the default.
_WITHOUT_LEARNING = ("runs/two", "runs/finetuned", "runs/cell")
_FIRST = ("README.md", "index.md")  # which make what the others go on from


def _small(args):
    """Our arguments with small counts, and with a small model where they make one."""
    given = {arg.partition("=")[0].removeprefix("--config.") for arg in args} - {
        "model.unet_channels",
        "model.unet_attention",
    }
    makes = any(arg.startswith("--config=") for arg in args) and "--mode=sweep" not in args
    extra = {name: value for name, value in (_MODEL if makes else {}).items() if name not in given}
    extra |= {name: value for name, value in _STEPS.items() if name not in given and "--mode=sweep" not in args}
    single = ["--processes=1"] if "--mode=sweep" in args else []  # stand-ins exist in this process only
    return [*args, *single, *(f"--config.{name}={value}" for name, value in (_COUNTS | extra).items())]


def _short_grid(arg):
    """Returns a grid with two values of its first setting and the last one of each other, since each costs a compilation."""
    first, *others = (setting.split(",") for setting in arg.split(";"))
    return ";".join(
        [",".join(first[:2]), *(f"{values[0].partition('=')[0]}={values[-1].rpartition('=')[2]}" for values in others)]
    )


@pytest.fixture
def folder(tmp_path, monkeypatch, one_device, random_state):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for network in (classifier, attribute_classifier):
        monkeypatch.setattr(network, "train", functools.partial(network.train, steps=2))
        monkeypatch.setattr(network, "BATCH", 16)
    monkeypatch.setattr(classifier, "WIDTHS", (8, 8))
    monkeypatch.setattr(attribute_classifier, "LAYERS", ((8, 4), (8, 2)))
    # A new function: `jax.jit` keeps the programs of a function, and other tests need the real widths.
    init = inspect.unwrap(classifier.init)
    small_init = jax.jit(lambda key, classes, channels: init(key, classes, channels), static_argnums=(1, 2))
    monkeypatch.setattr(classifier, "init", small_init)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(folder, monkeypatch):
    done = []
    for page in sorted(PAGES, key=lambda page: (page.name not in _FIRST, PAGES.index(page))):
        for words in commands(page, marked=False):
            args = of_ours(words)
            if args is None:
                assert words[0] in ("git", "cd", "python3", ".", "pip", "export") or "pytest" in words, (
                    page.name,
                    words,
                )
                continue
            if not any(arg.startswith("--workdir=") for arg in args):  # "...": of the command above it
                args = ["--workdir=runs/digits", *args]
                if not any(arg.startswith("--mode=") for arg in args):
                    args.append("--mode=sample")
            args = [arg.replace("profile=100:103", "profile=0:1").replace("last:5", "last:2") for arg in args]
            args = [_short_grid(arg) if arg.startswith("--config.evaluate.grid=") else arg for arg in args]
            args = [arg.replace("=DIR", f"={_shards(folder)}") if arg.endswith("images=DIR") else arg for arg in args]
            if args in done:
                continue
            with monkeypatch.context() as patch:
                if "--mode=sweep" in args:
                    Stage(patch)
                    patch.setattr(sweep, "_write_sample_grid", _draw_grid)
                    patch.setattr(
                        sweep.benchmark, "sampling", lambda c: {"seconds_per_image": 0.1 * c.sample.steps, "batch": 1}
                    )
                if any(arg.removeprefix("--workdir=") in _WITHOUT_LEARNING for arg in args):
                    patch.setattr(train_step, "make_step", _make_idle_step)
                if "--mode=demo" in args:
                    _without_a_server(patch)
                    if "--config.demo.other=runs/other" in args:
                        shutil.copytree("runs/digits", "runs/other")
                print(page.name, args)
                judge = [] if page.name in _FIRST else ["--config.train.judge=False"]  # other commands evaluate
                assert command_line.run(["main", *_small(args), *judge]) == 0, (page.name, args)
            done.append(args)
    assert len(done) > 20


def _make_idle_step(setup, c, platform=None):
    def step(state, batch, codec_params, seed):
        metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), jnp.ones(()))
        return state._replace(step=state.step + 1), metrics

    return step


def _draw_grid(job, run, steps):
    images = np.zeros((len(steps), sweep.GRID_COLUMNS, 32, 32, 1), np.uint8)
    generation.write_png(f"{sweep_folder.run_folder(job.workdir, run)}/grid.png", generation.tile_rows(images))


def _shards(folder):
    return next((folder / "runs" / "digits" / "samples").glob("*/*.npz")).parent


def _without_a_server(patch):
    patch.setattr(demo, "_import_gradio", lambda: None)
    patch.setattr(demo, "build_page", lambda models, n: models)
    patch.setattr(
        demo, "serve", lambda page, host, port: types.SimpleNamespace(local_url="", close=lambda verbose: None)
    )
    patch.setattr(demo, "threading", types.SimpleNamespace(Event=lambda: types.SimpleNamespace(wait=lambda: None)))
