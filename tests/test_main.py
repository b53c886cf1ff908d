import subprocess
import sys

import pytest
from absl import logging

import madformer_jax.modes.train
from madformer_jax import main

DIGITS = "--config=configs/digits.py"


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    sys.modules.pop("config_config", None)  # ml_collections loads every config file into this one module


def error_of(capsys, *args):
    """Status and the one line on standard error of a command line that must fail."""
    status = main.main(["main", *args])
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    return status, lines[0]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--config.train.stps=3"], "stps"),
        (["--config.trian.steps=3"], "trian"),
        (["--config.train.steps=many"], "config.train.steps"),
        (["--config.train.steps=3.5"], "config.train.steps"),
        (["--config.train.ema_warmup=perhaps"], "config.train.ema_warmup"),
        (["--config.train=3"], "config.train"),
        (["--config.model.blocks=6"], "config.model.blocks=6 does not tile a 16 x 16 latent"),
        (["--config.model.diffusion_depth=9"], "config.model.diffusion_depth=9"),
        (["--config.sample.labels=12"], "12 is no class"),
        (["--config.sample.solver=euler"], "config.sample.solver='euler' is unknown"),
        (["--mode=trian"], "mode"),
        (["--wrkdir=here"], "wrkdir"),
        (["train"], "'train' is no flag"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, tmp_path, args, told):
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/run", *args)
    assert status == 2
    assert line.startswith("error: ")
    assert told in line
    assert not (tmp_path / "run").exists()


def test_a_misspelt_field_names_the_right_one(capsys, tmp_path):
    _, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}", "--config.train.stps=3")
    assert "steps" in line


@pytest.mark.parametrize("config", ["--config=configs/nope.py", "--config=madformer_jax/config.py", "--config="])
def test_a_config_file_that_is_none_is_one_line(capsys, tmp_path, config):
    status, line = error_of(capsys, config, f"--workdir={tmp_path}")
    assert status == 2
    assert config.split("=")[1] in line


def test_a_config_file_with_a_misspelt_field_is_one_line(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from madformer_jax import config\ndef get_config():\n c = config.base()\n c.train.stps = 3\n return c\n"
    )
    status, line = error_of(capsys, f"--config={file}", f"--workdir={tmp_path}/run")
    assert status == 2
    assert "stps" in line


def test_missing_workdir_config_and_checkpoint(capsys, tmp_path):
    assert "--workdir is missing" in error_of(capsys, DIGITS)[1]
    assert "--config is missing" in error_of(capsys, f"--workdir={tmp_path}")[1]
    for mode in ("sample", "export"):
        status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/none", f"--mode={mode}")
        assert status == 2
        assert f"{tmp_path}/none" in line
        status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}", f"--mode={mode}")
        assert "no checkpoint" in line


def test_a_workdir_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/file/run", "--config.mesh.data=8")
    assert status == 2
    assert f"{tmp_path}/file/run cannot be written" in line


def test_another_platform_than_the_config_expects_is_an_error(capsys, tmp_path):
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}", "--config.platform=tpu")
    assert status == 2
    assert "config.platform='tpu', but JAX runs on 'cpu'" in line
    assert "libtpu_lockfile" in line


def test_wrong_settings_are_told_before_jax_is_imported(tmp_path):
    """In a process of its own, as a user runs it."""
    code = (
        "import sys; from madformer_jax import main; "
        f"status = main.main(['main', '{DIGITS}', '--workdir={tmp_path}', '--config.model.blocks=6']); "
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "does not tile" in done.stderr


def test_modes_dispatch_with_the_overrides_and_tell_them_above_their_log(monkeypatch, tmp_path, capsys):
    seen = {}

    def run(config, workdir):
        seen.update(c=config, workdir=workdir)
        logging.warning("one")
        logging.warning("two")
        return {"loss": 1.0}

    monkeypatch.setattr(madformer_jax.modes.train, "run", run)
    args = [DIGITS, f"--workdir={tmp_path}", "--config.model.unet_channels=8,16", "--config.compilation_cache=off"]
    assert main.main(["main", *args, "--config.optimizer.learning_rate=1"]) == 0
    told, one, two = capsys.readouterr().err.strip().split("\n")
    assert (one[9:], two[9:]) == ("one", "two")
    for setting in ("model.unet_channels=(8, 16)", "optimizer.learning_rate=1.0", "data.image_size=32"):
        assert setting in told
    assert "model.mlp_width=256" in told
    assert "optimizer.clip" not in told
    assert seen["workdir"] == str(tmp_path)
    assert seen["c"].model.unet_channels == (8, 16)
    assert seen["c"].optimizer.learning_rate == 1.0
