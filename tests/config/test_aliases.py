"""Former names of fields work wherever a field is read by name, and hashes do not change with a name."""

import json
import pathlib
import types

import pytest

from madformer_jax import config
from madformer_jax.cli import command_line
from madformer_jax.config import aliases, fields, schema
from madformer_jax.cost import tpu_time
from madformer_jax.errors import ConfigError
from madformer_jax.modes import evaluate, sample
from madformer_jax.reports import axes, results
from madformer_jax.runtime import checkpoint, stored_config
from madformer_jax.sampling import trained_model
from madformer_jax.sweeps import sweep_file, sweep_folder
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
FORMER = {"model.predicts": "x0", "model.neighbours": True, "sample.clip": 1.0}
CURRENT = {"model.prediction_type": "x0", "model.unet_context": True, "sample.clip_x0": 1.0}


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(aliases, "_warned", set())


@pytest.fixture
def c():
    return tiny.get_config("plain")


def check_warnings(caplog):
    """Each former name has one line, which says the current name."""
    lines = [message for message in caplog.messages if "The old name works" in message]
    assert len(lines) == len(FORMER)
    for former, current in zip(FORMER, CURRENT):
        assert sum(f"config.{former} is now config.{current}." in line for line in lines) == 1


def former_config(c):
    """The config as a version that knew the former names would write it."""
    c.update_from_flattened_dict(CURRENT)
    content = json.loads(c.to_json())
    for former, current in zip(FORMER, CURRENT):
        section, _, key = former.partition(".")
        content[section][key] = content[section].pop(current.partition(".")[2])
    return content


def has_current_values(c):
    values = fields.flat(c)
    return {name: values[name] for name in CURRENT} == CURRENT and not FORMER.keys() & values.keys()


def test_every_former_name_is_of_a_field_and_stays_in_its_section():
    known = fields.flat(schema.base())
    for former, current in aliases.RENAMED.items():
        assert former not in known and current in known
        assert former.partition(".")[0] == current.partition(".")[0]
    assert dict(zip(FORMER, CURRENT)) == aliases.RENAMED


@pytest.mark.parametrize("flags", [
    ["--config.model.predicts=x0", "--config.model.neighbours", "--config.sample.clip=1"],
    ["-config.model.predicts=x0", "--config.model.neighbours=True", "--config.sample.clip=0", "--config.sample.clip=1.0"],
])  # fmt: skip
def test_the_command_line_knows_former_names(flags, tmp_path, caplog):
    args = ["main", f"--config={ROOT}/configs/imagenet256.py", f"--workdir={tmp_path}", *flags]
    assert has_current_values(command_line.parse(args)[0])
    check_warnings(caplog)


def test_a_switch_can_be_turned_off_by_its_former_name(tmp_path):
    args = ["main", f"--config={ROOT}/configs/drawings.py", f"--workdir={tmp_path}", "--noconfig.model.neighbours"]
    assert command_line.parse(args)[0].model.unet_context is False


CONFIG_FILE = """
from madformer_jax import config

def get_config():
    c = config.base()
    c.model.predicts = "x0"
    c.model["neighbours"] = c.model.predicts == "x0"
    c = c.copy_and_resolve_references()
    c.update({"sample": {"clip": 0.5}})
    c.sample.update(clip=2 * c.sample.clip)
    assert c.model.prediction_type == c["model"]["predicts"] == c.model.get("predicts") == "x0"
    return c
"""


def test_a_config_file_knows_former_names(tmp_path, caplog):
    (tmp_path / "mine.py").write_text(CONFIG_FILE)
    c, _ = command_line.parse(["main", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}"])
    assert has_current_values(c)
    check_warnings(caplog)
    with pytest.raises(AttributeError):
        c.model.predicts = "v"  # outside config files the current names are the only ones


def test_a_config_file_knows_no_names_that_were_never_there():
    c = config.base()
    with pytest.raises(AttributeError, match="predict"):
        c.model.predictss = "x0"
    with pytest.raises(AttributeError):
        _ = c.optimizer.clip_x0
    assert c.optimizer.clip == 1.0  # of another section


def test_a_stored_config_has_current_names(c, caplog):
    assert has_current_values(stored_config.config_from_saved(former_config(c), "run/config.json"))
    stored_config.config_from_saved(former_config(c), "run/config.json")
    check_warnings(caplog)


def test_a_workdir_goes_on_with_its_stored_config(c, tmp_path, monkeypatch, caplog):
    (tmp_path / "config.json").write_text(json.dumps(former_config(c)))
    monkeypatch.setattr(checkpoint, "exists", lambda workdir: True)
    assert checkpoint.resume_conflicts(c, str(tmp_path)) == []
    c.model.prediction_type, c.model.unet_context = "v", False
    assert checkpoint.resume_conflicts(c, str(tmp_path)) == [
        "config.model.prediction_type was 'x0' and is 'v'",
        "config.model.unet_context was True and is False",
    ]
    assert has_current_values(command_line.parse(["main", f"--workdir={tmp_path}", "--mode=sample"])[0])
    check_warnings(caplog)


def test_a_model_takes_settings_by_their_former_names(c, caplog):
    model = types.SimpleNamespace(config=c, labels=(), _warn=lambda c: None)
    assert trained_model.Model._settings(model, 1, {"clip": 0.5, "steps": 3}).sample.clip_x0 == 0.5
    assert "config.sample.clip is now config.sample.clip_x0." in caplog.text
    with pytest.raises(ConfigError, match="clipp=1: .* Did you mean 'clip_x0'"):
        trained_model.Model._settings(model, 1, {"clipp": 1})


# ---- sweeps and their results


def loaded(definition):
    module = types.ModuleType("mine")
    module.__file__, module.sweep = "mine.py", lambda: definition
    return sweep_file.load_sweep(types.SimpleNamespace(module=module, args=()))


def test_a_sweep_knows_former_names(c, caplog):
    trained = [{name: FORMER[name] for name in FORMER if name.startswith("model.")}, {"seed": 1}]
    sweep = loaded(sweep_file.Sweep("?", trained, {"steps": (1,)}, [{"sample.clip": 1.0}]))
    run, _ = sweep_file.expand_runs(sweep, c)
    assert run.overrides == {name: CURRENT[name] for name in CURRENT if name.startswith("model.")}
    assert run.config.model.prediction_type == "x0" and run.config.model.unet_context
    (evaluation,) = sweep_file.expand_evaluations(sweep)
    assert evaluation.overrides == {"sample.clip_x0": 1.0} and evaluation.overrides in sweep.evaluations
    check_warnings(caplog)
    assert has_current_values(sweep_file.apply_overrides(c, FORMER))


def test_a_run_keeps_its_hash(c):
    assert sweep_file.settings_hash(former_config(c)) == sweep_file.settings_hash(c)
    config_file = command_line._parse_with_file(
        ["main", f"--config={ROOT}/configs/sweeps/prediction.py:drawings", "--workdir=runs/x", "--mode=sweep"]
    )
    config_file[0].evaluate.held_out_n = 0  # as at that time
    runs = sweep_file.expand_runs(sweep_file.load_sweep(config_file[2]), config_file[0])
    assert [run.name for run in runs[:2]] == PREDICTION_RUNS


PREDICTION_RUNS = ["8e98820d319f", "e0ea69a7c717"]  # before the fields were renamed


def write_result(folder, c, **fields_of_evaluation):
    """Writes a result as a version that knew the former names did."""
    stored = aliases.first_names(sweep_file.changed_settings(c))
    cost = {"solver_steps": 2, "nfe": 1.0, "passes": 1.0, "flops": 1.0}
    evaluation = {"overrides": {"sample.clip": 1.0}, "budget": {"kind": "steps", "asked": 2}, "cost": cost}
    result = {
        "name": folder.name, "sweep": "mine", "variant": "", "seed": 0, "config": stored,
        "overrides": {"model.predicts": "x0", "seed": 0}, "training": {"steps": 6}, "evaluations": [evaluation],
    }  # fmt: skip
    evaluation |= {"scores": {"KID": {"value": 1.0}}, "protocol": {"images": {"clip": 1.0, "steps": 2}}}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_a_finished_run_is_found_by_its_stored_config(c, tmp_path, caplog):
    c.update_from_flattened_dict(CURRENT)
    write_result(tmp_path / "runs" / "old", c)
    run = sweep_file.Run(sweep_file.settings_hash(c), {"model.prediction_type": "x0", "seed": 0}, c)
    (run,) = sweep_folder.reuse_folder_names([run], str(tmp_path))
    assert run.name == "old"
    evaluation = sweep_file.Evaluation({"sample.clip_x0": 1.0}, "steps", 2)
    assert sweep_folder.is_done(str(tmp_path), run, [evaluation])
    check_warnings(caplog)


def test_a_report_has_current_names(c, tmp_path):
    c.update_from_flattened_dict(CURRENT)
    write_result(tmp_path / "runs" / "a", c)
    write_result(tmp_path / "runs" / "b", c)
    changed = json.loads((tmp_path / "runs" / "b" / "result.json").read_text())
    changed["overrides"]["model.predicts"] = changed["config"]["model.predicts"] = "v"
    changed["evaluations"][0]["overrides"]["sample.clip"] = 2.0
    changed["evaluations"][0]["protocol"]["images"]["clip"] = 2.0  # varied, so no part of the protocol that runs share
    (tmp_path / "runs" / "b" / "result.json").write_text(json.dumps(changed))
    found = results.load_results(str(tmp_path))
    assert [run["overrides"]["model.prediction_type"] for run in found.runs] == ["v", "x0"]
    assert [axis.field for axis in found.groups[0].axes] == ["model.prediction_type", "sample.clip_x0"]
    assert results.overrides_key({"sample.clip": 1.0}) == results.overrides_key({"sample.clip_x0": 1.0})  # timing.json
    planned = [{"overrides": {"model.predicts": "x0"}}, {"overrides": {"model.prediction_type": "v"}}]
    assert axes.training_axes([], planned) == [axes.Axis("model.prediction_type", ("v", "x0"))]


def test_two_files_of_mode_compile_are_compared_by_current_names():
    before, after = (
        {"topology": "v5e:1", "config": {name: "x0"}} for name in ("model.predicts", "model.prediction_type")
    )
    text = "The settings are equal, and no program has an estimated time or a count of work in both files."
    assert tpu_time.compare(before, after) == text


# ---- protocols


def test_a_sampling_keeps_its_folder():
    drawings = f"--config={ROOT}/configs/drawings.py:side=64"
    c, _ = command_line.parse(["main", drawings, "--workdir=runs/x", "--config.sample.n=50"])
    protocol = sample._protocol(c, 3, "w", "v")
    assert protocol["clip"] == 1.0 and protocol["model"]["predicts"] == "x0" and protocol["model"]["neighbours"]
    assert sample._folder_name(c, protocol) == "step_000003_ema_dpmpp_2m_trailing40_w1.5_seed0_n50_a83e8dc4"


def test_an_evaluation_keeps_its_protocol(c):
    named = aliases.first_names(json.loads(c.sample.to_json()), "sample.")
    assert {"clip"} <= named.keys() & set(evaluate.SAMPLE_PROTOCOL_FIELDS) and "clip_x0" not in named
