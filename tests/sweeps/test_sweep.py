"""--mode=sweep: claims, resumption and results of runs, with stand-ins for the slow modes."""

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
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
SETTING = {"sample.guidance_interval": (0, 900)}
TWO = Sweep("Which width?", grid({"model.width": (16, 24)}), {"steps": (1, 4)}, [SETTING], train_budget=("images", 16))


class File:
    """A sweep file in memory."""

    def __init__(self, definition):
        self.module, self.args = types.ModuleType("widths"), ()
        self.module.__file__ = "configs/sweeps/widths.py"
        self.module.sweep = lambda: definition


class Stage:
    """Stand-ins for the modes that a sweep calls. `on_the_way` runs at the start of each."""

    def __init__(self, monkeypatch):
        self.trained, self.evaluated, self.on_the_way = [], [], lambda what: None
        self.end = {}
        bits = {"value": 3.0}
        self.held_out = {"scores": {"bits_per_dimension": bits}, "blocks": [{"block": 1, "bits": bits}]}
        monkeypatch.setattr(mode.train, "run", self.train)
        monkeypatch.setattr(mode.evaluate, "run", self.evaluate)
        monkeypatch.setattr(mode.reference, "run", self.reference)
        monkeypatch.setattr(mode, "_is_trained", lambda c, folder: os.path.exists(f"{folder}/trained"))
        monkeypatch.setattr(mode, "_write_sample_grid", lambda job, run, steps: None)
        monkeypatch.setattr(mode, "_remove_checkpoints", lambda c, folder: None)
        monkeypatch.setattr(mode, "_free_memory", lambda: None)
        monkeypatch.setattr(
            mode.time, "sleep", lambda seconds: seconds and pytest.fail("waits, but no other process works on a run")
        )

    def train(self, c, folder, grids):
        assert not grids
        self.on_the_way("training")
        self.trained.append(c.model.width)
        for step in range(1, c.train.steps + 1):
            line = {"step": step, "loss": 0.1, "steps_per_second": 2.0}
            storage.append_line(f"{folder}/metrics.jsonl", json.dumps(line))
        storage.write_text(f"{folder}/trained", "")
        return {"step": c.train.steps} | self.end

    def evaluate(self, c, folder):
        self.on_the_way("evaluation")
        self.evaluated.append((c.model.width, c.evaluate.grid))
        assert pathlib.Path(c.evaluate.reference).exists()
        steps = [int(n) for n in c.evaluate.grid.removeprefix("steps=").split(",")]
        cost = {"nfe": 1.0, "passes": 1.75, "flops": 1e6, "seconds": np.random.default_rng().random()}
        scores = {"KID": {"value": c.model.width / 3}}
        results = [
            {"scores": scores, "cost": {"solver_steps": n} | cost, "protocol": {"images": {"steps": n}}} for n in steps
        ]
        return {"results": results} | ({"held_out": [self.held_out]} if c.evaluate.held_out_n else {})

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


def test_each_run_is_trained_and_evaluated_once(c, stage, tmp_path):
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


def test_a_killed_sweep_resumes_to_the_same_results(c, stage, tmp_path):
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
    """While one process trains the first run, the other completes the second and then waits."""

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
    """Even if the request comes in its last step."""
    stage.end = {"stopped": True}
    assert "stopped" in mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [16]
    assert not stage.evaluated


def test_other_runs_are_completed_after_one_fails(c, stage, tmp_path, monkeypatch):
    """A failure in only one of several JAX processes ends the sweep instead."""

    def diverges(what):
        if what == "training" and not stage.trained:
            stage.trained.append("failed")
            raise ConfigError("the loss is not finite")

    stage.on_the_way = diverges
    with pytest.raises(ConfigError, match="1 of 2 runs failed, .* among them: the loss is not finite"):
        mode.run(c, str(tmp_path / "all"), file=File(TWO))
    assert len(results(tmp_path / "all")) == 1
    stage.trained.clear()
    monkeypatch.setattr(
        partitioning, "all_failed", lambda: False
    )  # the other processes go on training and wait for this one
    with pytest.raises(ConfigError, match="^the loss is not finite"):
        mode.run(c, str(tmp_path / "alone"), file=File(TWO))
    assert not results(tmp_path / "alone")


def test_added_budgets_need_no_new_training(c, stage, tmp_path):
    mode.run(c, str(tmp_path), file=File(TWO))
    more = TWO._replace(sample_budgets={"steps": (1, 4), "nfe": (8,)})
    mode.run(c, str(tmp_path), file=File(more))
    assert len(stage.trained) == 2
    assert stage.evaluated[2:] == [(16, "steps=1,4,8"), (24, "steps=1,4,8")]


PUBLISHED = [*(f"{x}_cpu" for x in ("ablations", "depth", "elastic", "noise_path", "prediction", "steps_by_block"))]


@pytest.mark.parametrize("sweep", [*PUBLISHED, "blocks_cpu32", "blocks_cpu64"])
def test_the_published_results_match_their_sweep_files(sweep):
    """No run of a published sweep would be repeated, and the stored costs follow from the configs."""
    name, _, variant = sweep.rpartition("_")
    functions = runpy.run_path(str(ROOT / f"configs/sweeps/{name}.py"))
    definition, workdir = functions["sweep"](variant), str(ROOT / f"docs/results/{sweep}")
    base, evaluations = functions["get_config"](variant), sweep_file.expand_evaluations(definition)
    runs = sweep_folder.reuse_folder_names(sweep_file.expand_runs(definition, base), workdir)
    assert {run.name for run in runs} == {path.parent.name for path in pathlib.Path(workdir).glob("runs/*/result.json")}
    assert all(sweep_folder.is_done(workdir, run, evaluations) for run in runs)
    plan = storage.read_json(f"{workdir}/sweep.json")
    assert plan["evaluations"] == [evaluation.describe() for evaluation in evaluations]
    assert plan["protocol"] == json.loads(json.dumps(definition.protocol.describe()))
    for run in runs[:: len(runs) // 3]:
        for evaluation in storage.read_json(f"{sweep_folder.run_folder(workdir, run)}/result.json")["evaluations"]:
            c = sweep_file.apply_overrides(run.config, evaluation["overrides"])
            c.sample.steps = evaluation["cost"]["solver_steps"]
            assert evaluation["cost"] == flops.image_cost(c)


def test_seconds_are_measured_when_a_budget_needs_them(c, stage, tmp_path, monkeypatch):
    """The first run has the default seed, so its name is also that of the timing of all seeds."""
    c.seed = 0
    monkeypatch.setattr(mode.benchmark, "sampling", lambda c: {"seconds_per_image": 0.1 * c.sample.steps, "batch": 1})
    mode.run(c, str(tmp_path), file=File(TWO._replace(sample_budgets={"seconds": (0.4,)})))
    assert stage.evaluated == [(16, "steps=4"), (24, "steps=4")]


def test_a_missing_reference_is_an_error_before_training(c, stage, tmp_path):
    c.evaluate.reference = str(tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="the reference .*none.npz does not exist"):
        mode.run(c, str(tmp_path), file=File(TWO))
    assert not stage.trained


def test_runs_with_captions_get_an_attribute_classifier(c, stage, tmp_path, monkeypatch):
    """The first run has no captions and makes the judge without an attribute classifier."""
    c.model.classes = 0
    c.data.source, c.text.vocabulary, c.text.length, c.text.tokenizer = "drawings", 835, 40, "drawings"
    captions = [("class", "a"), ("caption", "a"), ("caption", "b")]
    runs = [{"text.caption": caption, "sample.prompts": prompts} for caption, prompts in captions]
    made, exists = [], []
    monkeypatch.setattr(
        mode.reference, "make_attribute_classifier", lambda c, path: made.append(path) or storage.write_text(path, "")
    )

    def evaluated(c, folder):
        exists.append(os.path.exists(judge_paths.attribute_classifier_path(c, folder)))
        return stage.evaluate(c, folder)

    monkeypatch.setattr(mode.evaluate, "run", evaluated)
    mode.run(c, str(tmp_path), file=File(TWO._replace(runs=runs, evaluations=[{}])))
    assert len(made) == 1 and exists == [False, True, True]


def test_a_process_of_a_job_array_starts_at_its_index(c, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("MADFORMER_INDEX", "first")
    with pytest.raises(ConfigError, match="MADFORMER_INDEX='first' must be the index of this process"):
        mode.run(c, str(tmp_path), file=File(TWO))
    monkeypatch.setenv("MADFORMER_INDEX", "3")
    mode.run(c, str(tmp_path), file=File(TWO))
    assert stage.trained == [24, 16]


def test_a_dry_run_only_lists_the_runs(c, stage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mode.run_table.flops, "peak_rate", lambda dtype: 1e9)
    mode.run(c, str(tmp_path / "none"), file=File(TWO), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["open", "open"]
    # A width has one training program, and one sampling program for both numbers of steps.
    assert lines[-2] == "programs to compile: 2 of training and 2 of sampling."
    assert "2 runs" in lines[-1]
    assert not (tmp_path / "none").exists()
    mode.run(c, str(tmp_path), file=File(TWO))
    capsys.readouterr()
    (name, *_) = sorted(results(tmp_path))
    (tmp_path / "runs" / name / "result.json").unlink()
    seconds = tmp_path / "runs" / results(tmp_path).popitem()[0] / "seconds.json"
    seconds.write_text(json.dumps({"training": 0.0, "evaluations": [0.1, 0.1]}))  # of a training of one step
    with lock.acquire(sweep_folder.claim_path(str(tmp_path), name)):
        mode.run(c, str(tmp_path), file=File(TWO), dry_run=True)
    states = {line.split()[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[1:3]}
    assert states.pop(name).startswith("in progress at process")
    assert list(states.values()) == ["done"]


def test_a_dry_run_begins_with_the_protocol(c, stage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mode.run_table.flops, "peak_rate", lambda dtype: 1e9)
    claim = Claim("a wide model is better", {"model.width": 24}, {"model.width": 16}, ("steps", 4))
    definition = TWO._replace(protocol=Protocol("KID", "FD", [claim], "the interval lies below 0"))
    mode.run(c, str(tmp_path), file=File(definition), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "question: Which width?", "primary endpoint: KID", "secondary endpoint: FD",
        "claim 1: a wide model is better (model.width = 24 against model.width = 16; best step count within 4 steps)",
    ]  # fmt: skip
    assert "refuted if: the interval lies below 0" in lines


def test_scores_on_held_out_images_are_part_of_the_result(c, stage, tmp_path):
    c.evaluate.held_out_n = 10
    mode.run(c, str(tmp_path), file=File(TWO))
    for content in results(tmp_path).values():
        assert json.loads(content)["held_out"] == stage.held_out["scores"]
        assert json.loads(content)["held_out_blocks"] == stage.held_out["blocks"]


def test_a_held_out_loss_is_part_of_the_result():
    lines = [{"step": 2, "loss": 0.1}, {"step": 2, "validated": 8, "validation_loss_image": 0.3, "validation_n": 1}]
    assert sweep_folder.held_out_losses(lines) == {"held_out": {"loss_image": 0.3}, "held_out_images": 8}
    assert sweep_folder.held_out_losses(lines[:1]) == {}


# ---- the definition


def claiming(*claims):
    return TWO._replace(protocol=Protocol("KID", "FD", claims, ""))


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (TWO._replace(runs=[]), "no runs"),
        (TWO._replace(runs=[{"model.widht": 3}]), "config.model.widht is not a field: did you mean config.model.width"),
        (TWO._replace(runs=[{"model.width": "x"}]), "must be of type int"),
        (TWO._replace(runs=[{"model.width": 16}, {"seed": 0}]), "the same run twice"),
        (TWO._replace(runs=[{"model.width": 15}]), "config.model.width=15"),
        (TWO._replace(train_budget=("hours", 1)), "'hours' is not a kind"),
        (TWO._replace(sample_budgets={}), "no evaluations"),
        (TWO._replace(sample_budgets={"nfe": "64"}), r"'nfe' has '64': give a sequence of numbers above 0"),
        (TWO._replace(train_budget=("images", float("nan"))), r"must be a kind and a number above 0"),
        (
            TWO._replace(train_budget=("images", 100), runs=[{"train.batch": 0}]),
            r"config.train.batch=0 is out of range",
        ),
        (TWO._replace(evaluations=[{"sample.solver": "ddim", "sample.spacing": "leading"}]), "starts at t = 0"),
        (
            TWO._replace(evaluations=[{"sample.steps_by_block": "4"}], sample_budgets={"seconds": (1,)}),
            "fixes the steps",
        ),
        (TWO._replace(sample_budgets={"steps": (4000,)}), "out of reach"),
        (TWO._replace(evaluations=[{"model.width": 16}]), "model.width is not a setting of sampling"),
        (TWO._replace(evaluations=[{"sample.spacing": "trialing"}]), "config.sample.spacing='trialing' is unknown"),
        (TWO._replace(runs=[{"model.classes": 0}]), r"sample.guidance_interval=\(0, 900\) needs a class-conditional"),
        (claiming(), "no claims"),
        (claiming(Claim("x", {}, {})), "needs a sampling budget"),
        (claiming(Claim("x", {"model.width": 24}, {"model.width": 32}, ("steps", 4))), "'x': no run of the sweep has"),
        (claiming(Claim("x", {"model.widht": 24}, {}, ("steps", 4))), "config.model.widht is not a field"),
        (None, "returned a NoneType, not a Sweep"),
    ],
)
def test_a_wrong_sweep_is_one_line_before_any_work(c, stage, tmp_path, definition, message):
    with pytest.raises(ConfigError, match=message) as error:
        mode.run(c, str(tmp_path / "none"), file=File(definition))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


def test_a_run_is_not_trained_again_on_another_mesh(c, stage, tmp_path):
    first = mode.run(c, str(tmp_path), file=File(TWO))
    c.mesh.fsdp, c.model.remat, c.train.checkpoint_every, c.sample.batch, c.demo.port = 2, "full", 5, 2, 1
    assert mode.run(c, str(tmp_path), file=File(TWO)) == first
    assert len(stage.trained) == 2


def test_run_folders_of_earlier_versions_are_found_by_config(c, stage, tmp_path):
    """A finished run is found by its result, a stopped one by the config of its checkpoints."""
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


def test_runs_that_differ_in_seeds_train_together_and_are_evaluated_one_by_one(c, stage, tmp_path, monkeypatch):
    """Groups six runs by width into programs of three runs, of which two fit into `train.lanes`."""

    def run_lanes(configs, folders):
        together.append([(c.model.width, c.seed) for c in configs])
        return [stage.train(c, folder, grids=False) for c, folder in zip(configs, folders)]

    together: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(mode.train, "run_lanes", run_lanes)
    monkeypatch.setattr(
        mode, "_newest_step", lambda job, run: [os.path.exists(f"{sweep_folder.run_folder(job.workdir, run)}/trained")]
    )
    monkeypatch.setattr(mode.jax, "device_count", lambda: 1)
    c.train.lanes = 2
    mode.run(c, str(tmp_path), file=File(TWO._replace(runs=grid({"model.width": (16, 24)}, seeds=3))))
    assert together == [[(16, 0), (16, 1)], [(24, 0), (24, 1)]]
    assert len(results(tmp_path)) == len(stage.evaluated) == 6
    assert not list(tmp_path.glob("claims/*/lock.json"))
