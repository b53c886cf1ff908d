"""The definition of a sweep: names of runs and judges, grids, and loss curves of a folder."""

import pathlib
import runpy

import pytest

from madformer_jax.sweeps import budget, sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import grid
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def c():
    c = tiny.get_config("plain")
    c.model.classes = 10
    return c


@pytest.mark.parametrize(
    "changes",
    [
        {"data.path": "elsewhere", "data.threads": 8, "data.batches_ahead": 5, "data.max_corrupt": 0.5},
        {"platform": "cpu", "compilation_cache": "auto", "profile": "0:1", "mesh.data": 2, "mesh.fsdp": 4},
        {"model.attention": "reference", "model.remat": "full", "model.scan_unroll": 2},
        {"train.checkpoint_every": 3, "train.keep": 9, "train.keep_every": 3, "train.log_every": 1},
        {"train.judge": True, "sample.batch": 3, "sample.shard": 3, "sample.grid": 3},
        {"sample.film": "webp", "sample.n": 7, "sample.steps": 9},
        {"demo.port": 1, "gallery.n": 2, "benchmark.steps": 2, "compile.time": False, "prepare.batch": 3},
    ],
)
def test_names_do_not_depend_on_the_machine_or_the_report(c, changes):
    names = sweep_file.settings_hash(c), sweep_file.judge_hash(c)
    c.update_from_flattened_dict(changes)
    assert (sweep_file.settings_hash(c), sweep_file.judge_hash(c)) == names


def test_the_judge_of_the_published_results_keeps_its_name():
    config = runpy.run_path(str(ROOT / "configs" / "sweeps" / "ablations.py"))["get_config"]("cpu")
    (folder,) = (ROOT / "docs" / "results" / "ablations_cpu" / "judges").iterdir()
    assert folder.name == sweep_file.judge_hash(config)


def test_judges_keep_their_names():
    """A new name would make a sweep that is continued train its judge again."""
    config = runpy.run_path(str(ROOT / "configs" / "sweeps" / "depth.py"))
    names = [sweep_file.judge_hash(config["get_config"](variant)) for variant in ("digits", "drawings")]
    assert names == ["5e94a9a66b69", "7c9c695d60c2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model.dtype": "bfloat16"},
        {"text.tokenizer": "a.json"},
        {"train.init_from": "a"},
        {"evaluate.n": 9},
    ],
)
def test_names_depend_on_what_decides_results(c, changes):
    name = sweep_file.settings_hash(c)
    c.update_from_flattened_dict(changes)
    assert sweep_file.settings_hash(c) != name


def test_names_depend_on_kept_checkpoints_if_the_last_are_evaluated(c):
    c.evaluate.checkpoints = "last:2"
    name = sweep_file.settings_hash(c)
    c.train.keep_every = 2
    assert sweep_file.settings_hash(c) != name


def test_a_grid_lists_all_combinations_of_a_seed_first():
    assert grid({"a": (1, 2)}, seeds=2) == [{"a": a, "seed": seed} for seed in (0, 1) for a in (1, 2)]


def test_a_loss_curve_does_not_depend_on_interruptions():
    def lines(*ends):
        starts = (0, *ends)
        return [{"step": b, "loss": sum(range(a, b)) / (b - a), "mfu": 1} for a, b in zip(starts, ends)]

    whole = sweep_folder.loss_curve(lines(4, 8, 10), every=4)
    assert [point["step"] for point in whole] == [4, 8, 10]
    assert sweep_folder.loss_curve([*lines(3, 4, 8, 9, 10), {"step": 10, "scored": 3}], every=4) == whole


def test_a_switch_that_saves_flops_has_an_arm_of_equal_flops():
    functions = runpy.run_path(str(ROOT / "configs/sweeps/ablations.py"))
    base, definition = functions["get_config"]("cpu"), functions["sweep"]("cpu")
    assert len(definition.runs) == 45
    (steps,) = {run["train.steps"] for run in definition.runs if "train.steps" in run}
    equal = sweep_file.apply_overrides(base, functions["NO_AR_CONDITION"] | {"train.steps": steps})
    assert budget.training_flops(equal) == pytest.approx(budget.training_flops(base), rel=1e-3)
    assert steps / base.train.steps == pytest.approx(1.49, abs=0.01)
