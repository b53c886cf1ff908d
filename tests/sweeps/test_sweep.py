"""What a sweep's file says, and who does its runs: trainings and evaluations are stand-ins that cost nothing."""

import json
import os
import pathlib
import runpy
import types

import numpy as np
import pytest

from madformer_jax.cost import flops
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import judge_paths
from madformer_jax.modes import sweep as mode
from madformer_jax.runtime import lock, partitioning, storage
from madformer_jax.sweeps import sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
SETTING = {"sample.guidance_interval": (0, 900)}
TWO = Sweep("Which width?", grid({"model.width": (16, 24)}), {"steps": (1, 4)}, [SETTING], train_budget=("images", 16))


class File:
    """A config file in memory."""

    def __init__(self, definition):
        self.module, self.args = types.ModuleType("widths"), ()
        self.module.__file__ = "configs/sweeps/widths.py"
        self.module.sweep = lambda: definition


class Stage:
    """The modes that a sweep calls, as stand-ins that do what they are told on the way."""

    def __init__(self, monkeypatch):
        self.trained, self.evaluated, self.on_the_way = [], [], lambda what: None
        self.end = {}
        monkeypatch.setattr(mode.train, "run", self.train)
        monkeypatch.setattr(mode.evaluate, "run", self.evaluate)
        monkeypatch.setattr(mode.reference, "run", self.reference)
        monkeypatch.setattr(mode, "_is_trained", lambda c, folder: os.path.exists(f"{folder}/trained"))
        monkeypatch.setattr(mode, "_write_sample_grid", lambda job, run, steps: None)
        monkeypatch.setattr(mode, "_remove_checkpoints", lambda c, folder: None)
        monkeypatch.setattr(mode, "_free_memory", lambda: None)
        monkeypatch.setattr(mode.time, "sleep", lambda seconds: seconds and pytest.fail("waits for nobody"))

    def train(self, c, folder, grids):
        assert not grids
        self.on_the_way("training")
        self.trained.append(c.model.width)
        for step in range(1, c.train.steps + 1):
            storage.append_line(
                f"{folder}/metrics.jsonl", json.dumps({"step": step, "loss": 0.1, "steps_per_second": 2.0})
            )
        storage.write_text(f"{folder}/trained", "")
        return {"step": c.train.steps} | self.end

    def evaluate(self, c, folder):
        self.on_the_way("evaluation")
        self.evaluated.append((c.model.width, c.evaluate.grid))
        assert pathlib.Path(c.evaluate.reference).exists()
        steps = [int(n) for n in c.evaluate.grid.removeprefix("steps=").split(",")]
        cost = {"nfe": 1.0, "passes": 1.75, "flops": 1e6, "seconds": np.random.default_rng().random()}
        scores = {"KID": {"value": c.model.width / 3}}
        return {
            "results": [
                {"scores": scores, "cost": {"solver_steps": n} | cost, "protocol": {"images": {"steps": n}}}
                for n in steps
            ]
        }

    def reference(self, c, folder):
        self.on_the_way("reference")
        storage.write_text(f"{folder}/reference.npz", "")


@pytest.fixture
def stage(monkeypatch):
    return Stage(monkeypatch)


@pytest.fixture
def c():
    c = tiny.get_config("plain")
    c.model.classes = 10
    return c


def results(folder):
    return {path.parent.name: path.read_bytes() for path in pathlib.Path(folder).glob("runs/*/result.json")}


def test_each_run_is_trained_and_judged_once(c, stage, tmp_path):
    done = mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [16, 24]
    assert stage.evaluated == [(16, "steps=1,4"), (24, "steps=1,4")]
    assert sorted(results(tmp_path)) == sorted(done["runs"])
    first = json.loads((tmp_path / "runs" / done["runs"][0] / "result.json").read_text())
    assert (first["sweep"], first["seed"], first["overrides"]) == ("widths", 0, {"model.width": 16, "seed": 0})
    assert first["training"] | {"curve": [], "flops": 0} == {
        "steps": 2, "images": 16, "flops": 0, "final_loss": 0.1, "curve": []
    }  # fmt: skip
    assert [e["budget"] for e in first["evaluations"]] == [{"kind": "steps", "asked": 1}, {"kind": "steps", "asked": 4}]
    assert first["evaluations"][1]["cost"] == {"solver_steps": 4, "nfe": 1.0, "passes": 1.75, "flops": 1e6}
    assert len(json.loads((tmp_path / "runs" / first["name"] / "seconds.json").read_text())["evaluations"]) == 2
    assert not list(tmp_path.glob("claims/*/lock.json"))
    mode.run(c, str(tmp_path), file=File(TWO))
    assert len(stage.trained) == 2


def test_a_sweep_that_is_killed_goes_on_to_the_same_results(c, stage, tmp_path):
    mode.run(c, str(tmp_path / "whole"), file=File(TWO))
    stage.trained.clear()
    for at in ("reference", "training", "evaluation", "evaluation"):

        def killed(what, at=at):
            if what == at:
                raise KeyboardInterrupt

        stage.on_the_way = killed
        with pytest.raises(KeyboardInterrupt):
            mode.run(c, str(tmp_path / "killed"), file=File(TWO))
    stage.on_the_way = lambda what: None
    mode.run(c, str(tmp_path / "killed"), file=File(TWO))
    assert stage.trained == [16, 24]
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_two_processes_share_a_folder(c, stage, tmp_path, monkeypatch):
    """While one trains the first run, the other does the second and then waits for the first."""

    class WaitError(Exception):
        pass

    def wait(seconds):
        if seconds:
            raise WaitError

    def other(what):
        if what == "training":
            stage.on_the_way = lambda what: None
            with monkeypatch.context() as patch:
                patch.setattr(mode.time, "sleep", wait)
                with pytest.raises(WaitError):
                    mode.run(c, str(tmp_path), file=File(TWO))
            assert stage.trained == [24]

    stage.on_the_way = other
    mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [24, 16]
    assert len(results(tmp_path)) == 2


def test_a_training_that_is_asked_to_stop_ends_the_sweep(c, stage, tmp_path):
    """In its last step too."""
    stage.end = {"stopped": True}
    assert "stopped" in mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [16]
    assert not stage.evaluated


def test_a_run_that_fails_leaves_the_others_to_be_done(c, stage, tmp_path, monkeypatch):
    """Unless it fails in one of several processes alone."""

    def diverges(what):
        if what == "training" and not stage.trained:
            stage.trained.append("failed")
            raise ConfigError("the loss is not finite")

    stage.on_the_way = diverges
    with pytest.raises(ConfigError, match="1 of 2 runs failed, .* among them: the loss is not finite"):
        mode.run(c, str(tmp_path / "all"), file=File(TWO))
    assert len(results(tmp_path / "all")) == 1
    stage.trained.clear()
    monkeypatch.setattr(partitioning, "all_failed", lambda: False)  # the others train, and wait for this process
    with pytest.raises(ConfigError, match="^the loss is not finite"):
        mode.run(c, str(tmp_path / "alone"), file=File(TWO))
    assert not results(tmp_path / "alone")


def test_more_budgets_are_judged_without_training_again(c, stage, tmp_path):
    mode.run(c, str(tmp_path), file=File(TWO))
    more = TWO._replace(sample_budgets={"steps": (1, 4), "nfe": (8,)})
    mode.run(c, str(tmp_path), file=File(more))
    assert len(stage.trained) == 2
    assert stage.evaluated[2:] == [(16, "steps=1,4,8"), (24, "steps=1,4,8")]


def test_a_sweep_whose_budgets_were_called_passes_is_done(c, stage, tmp_path):
    """Of a version whose passes left out the clean tower: they are NFE, and no run is trained or judged again."""
    definition = TWO._replace(sample_budgets={"nfe": (8,)})
    mode.run(c, str(tmp_path), file=File(definition))
    for path in tmp_path.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        (evaluation,) = result["evaluations"]
        evaluation["budget"]["kind"] = "passes"
        evaluation["cost"] = {"solver_steps": 8, "passes": evaluation["cost"]["nfe"], "flops": 1e6}
        path.write_text(json.dumps(result))
    stage.trained.clear(), stage.evaluated.clear()
    mode.run(c, str(tmp_path), file=File(definition))
    assert not stage.trained and not stage.evaluated
    (old, _) = sorted(results(tmp_path))
    (evaluation,) = sweep_folder.read_result(tmp_path / "runs" / old / "result.json")["evaluations"]
    assert evaluation["budget"] == {"kind": "nfe", "asked": 8}
    assert evaluation["cost"] == {"solver_steps": 8, "nfe": 1.0, "passes": 8.0, "flops": 1e6}  # one block, D = N
    passes = definition._replace(sample_budgets={"passes": (8,)})  # another budget, in the same folder
    mode.run(c, str(tmp_path), file=File(passes))
    assert not stage.trained and len(stage.evaluated) == 2


@pytest.mark.parametrize("name", ["depth:digits", "depth:drawings", "conditioning:digits", "blocks:drawings"])
def test_the_published_results_are_those_of_their_sweep(name):
    """No run of a finished sweep is trained or judged again, and its costs are what the config says."""
    file, variant = name.split(":")
    functions = runpy.run_path(str(ROOT / f"configs/sweeps/{file}.py"))
    definition, workdir = functions["sweep"](variant), str(ROOT / f"docs/results/{file}_{variant}")
    base, evaluations = functions["get_config"](variant), sweep_file.expand_evaluations(definition)
    runs = sweep_folder.reuse_folder_names(sweep_file.expand_runs(definition, base), workdir)
    assert {run.name for run in runs} == {path.parent.name for path in pathlib.Path(workdir).glob("runs/*/result.json")}
    assert all(sweep_folder.is_done(workdir, run, evaluations) for run in runs)
    plan = storage.read_json(f"{workdir}/sweep.json")
    assert plan["evaluations"] == [evaluation.describe() for evaluation in evaluations]
    for run in runs[:: len(runs) // 3]:
        for evaluation in storage.read_json(f"{sweep_folder.run_folder(workdir, run)}/result.json")["evaluations"]:
            run.config.sample.steps = evaluation["cost"]["solver_steps"]
            assert evaluation["cost"] == flops.image_cost(run.config)


def test_seconds_are_measured_by_the_run_that_needs_them(c, stage, tmp_path, monkeypatch):
    """The run with the default seed is named as its point is, whose seconds these are."""
    c.seed = 0
    monkeypatch.setattr(mode.benchmark, "sampling", lambda c: {"seconds_per_image": 0.1 * c.sample.steps, "batch": 1})
    mode.run(c, str(tmp_path), file=File(TWO._replace(sample_budgets={"seconds": (0.4,)})))
    assert stage.evaluated == [(16, "steps=4"), (24, "steps=4")]


def test_a_given_judge_that_does_not_open_is_told_before_training(c, stage, tmp_path):
    c.evaluate.reference = str(tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="no reference at .*none.npz"):
        mode.run(c, str(tmp_path), file=File(TWO))
    assert not stage.trained


def test_a_reader_of_attributes_is_made_for_the_runs_with_captions_and_found_by_them(c, stage, tmp_path, monkeypatch):
    """The first run has none, and makes the judge."""
    c.model.classes = 0
    c.data.source, c.text.vocabulary, c.text.length, c.text.tokenizer = "drawings", 835, 40, "drawings"
    captions = [("class", "a"), ("caption", "a"), ("caption", "b")]
    runs = [{"text.caption": caption, "sample.prompts": prompts} for caption, prompts in captions]
    made, found = [], []
    monkeypatch.setattr(
        mode.reference, "make_reader", lambda c, path: made.append(path) or storage.write_text(path, "")
    )

    def evaluated(c, folder):
        found.append(os.path.exists(judge_paths.attribute_classifier_path(c, folder)))
        return stage.evaluate(c, folder)

    monkeypatch.setattr(mode.evaluate, "run", evaluated)
    mode.run(c, str(tmp_path), file=File(TWO._replace(runs=runs, evaluations=[{}])))
    assert len(made) == 1 and found == [False, True, True]


def test_an_array_s_process_starts_at_its_own_run(c, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("MADFORMER_INDEX", "3")
    mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [24, 16]


def test_a_dry_run_lists_and_does_nothing(c, stage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mode.run_table.flops, "peak_rate", lambda dtype: 1e9)
    mode.run(c, str(tmp_path / "none"), file=File(TWO), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["open", "open"]
    assert "2 runs" in lines[-1]
    assert not (tmp_path / "none").exists()
    mode.run(c, str(tmp_path), file=File(TWO))
    capsys.readouterr()
    (name, *_) = sorted(results(tmp_path))
    (tmp_path / "runs" / name / "result.json").unlink()
    with lock.acquire(sweep_folder.claim_path(str(tmp_path), name)):
        mode.run(c, str(tmp_path), file=File(TWO), dry_run=True)
    states = {line.split()[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[1:3]}
    assert states.pop(name).startswith("claimed by process")
    assert list(states.values()) == ["done"]


# ---- the definition


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (TWO._replace(runs=[]), "no runs"),
        (TWO._replace(runs=[{"model.widht": 3}]), "config.model.widht is not a field: did you mean config.model.width"),
        (TWO._replace(runs=[{"model.width": "x"}]), "must be of type int"),
        (TWO._replace(runs=[{"model.width": 16}, {"seed": 0}]), "the same run twice"),
        (TWO._replace(runs=[{"model.width": 15}]), "config.model.width=15"),
        (TWO._replace(train_budget=("hours", 1)), "'hours' is no kind"),
        (TWO._replace(sample_budgets={}), "no evaluations"),
        (TWO._replace(sample_budgets={"steps": (4000,)}), "out of reach"),
        (TWO._replace(evaluations=[{"model.width": 16}]), "model.width is none of a sampling's settings"),
        (TWO._replace(evaluations=[{"sample.spacing": "trialing"}]), "config.sample.spacing='trialing' is unknown"),
        (
            TWO._replace(runs=[{"model.classes": 0}]),
            r"config.sample.guidance_interval=\(0, 900\) needs a class-conditional",
        ),
        (None, "returned a NoneType, not a Sweep"),
    ],
)
def test_a_wrong_sweep_is_told_in_one_line_before_anything_is_done(c, stage, tmp_path, definition, message):
    with pytest.raises(ConfigError, match=message) as error:
        mode.run(c, str(tmp_path / "none"), file=File(definition))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data.path": "elsewhere", "data.threads": 8, "data.batches_ahead": 5, "data.max_corrupt": 0.5},
        {"platform": "cpu", "compilation_cache": "auto", "profile": "0:1", "mesh.data": 2, "mesh.fsdp": 4},
        {"model.attention": "reference", "model.remat": "full", "model.scan_unroll": 2},
        {
            "train.checkpoint_every": 3,
            "train.keep": 9,
            "train.keep_every": 3,
            "train.log_every": 1,
            "train.judge": True,
        },
        {
            "sample.batch": 3,
            "sample.shard": 3,
            "sample.grid": 3,
            "sample.film": "webp",
            "sample.n": 7,
            "sample.steps": 9,
        },
        {"demo.port": 1, "gallery.n": 2, "benchmark.steps": 2, "compile.time": False, "prepare.batch": 3},
    ],
)
def test_a_name_does_not_depend_on_the_machine_or_on_what_is_reported(c, changes):
    names = sweep_file.settings_hash(c), sweep_file.judge_hash(c)
    c.update_from_flattened_dict(changes)
    assert (sweep_file.settings_hash(c), sweep_file.judge_hash(c)) == names


def test_judges_keep_the_names_that_they_had():
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
def test_a_name_depends_on_what_decides_results(c, changes):
    name = sweep_file.settings_hash(c)
    c.update_from_flattened_dict(changes)
    assert sweep_file.settings_hash(c) != name


def test_the_last_checkpoints_depend_on_which_are_kept(c):
    c.evaluate.checkpoints = "last:2"
    name = sweep_file.settings_hash(c)
    c.train.keep_every = 2
    assert sweep_file.settings_hash(c) != name


def test_a_run_is_not_trained_again_on_another_mesh(c, stage, tmp_path):
    first = mode.run(c, str(tmp_path), file=File(TWO))
    c.mesh.fsdp, c.model.remat, c.train.checkpoint_every, c.sample.batch, c.demo.port = 2, "full", 5, 2, 1
    assert mode.run(c, str(tmp_path), file=File(TWO)) == first
    assert len(stage.trained) == 2


def test_a_run_that_an_earlier_version_named_is_found_by_its_config(c, stage, tmp_path):
    """Finished runs by their results, and one that was stopped by the config of its checkpoints."""
    mode.run(c, str(tmp_path), file=File(TWO))
    for i, folder in enumerate(sorted((tmp_path / "runs").iterdir())):
        result = json.loads((folder / "result.json").read_text())
        result["config"] |= {"train.checkpoint_every": 2, "sample.batch": 4, "train.gone": 1}
        (folder / "result.json").write_text(json.dumps(result))
        if i:
            (folder / "result.json").unlink()
            overridden = sweep_file.apply_overrides(c, result["overrides"])
            overridden.train.steps = result["training"]["steps"]
            (folder / "config.json").write_text(overridden.to_json())
        folder.rename(folder.with_name(f"old{i}"))
    done = mode.run(c, str(tmp_path), file=File(TWO))
    assert sorted(done["runs"]) == ["old0", "old1"]
    assert len(stage.trained) == 2


def test_seeds_come_one_after_the_other():
    assert grid({"a": (1, 2)}, seeds=2) == [
        {"a": 1, "seed": 0},
        {"a": 2, "seed": 0},
        {"a": 1, "seed": 1},
        {"a": 2, "seed": 1},
    ]


def test_a_curve_is_the_same_wherever_its_lines_were_cut():
    def lines(*ends):
        starts = (0, *ends)
        return [{"step": b, "loss": sum(range(a, b)) / (b - a), "mfu": 1} for a, b in zip(starts, ends)]

    whole = sweep_folder.loss_curve(lines(4, 8, 10), every=4)
    assert [point["step"] for point in whole] == [4, 8, 10]
    assert sweep_folder.loss_curve([*lines(3, 4, 8, 9, 10), {"step": 10, "scored": 3}], every=4) == whole
