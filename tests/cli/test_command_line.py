import os
import signal
import subprocess
import sys

import pytest
from absl import logging

import madformer_jax.modes.train
from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.modes import evaluate, reference
from madformer_jax.runtime import storage

DIGITS = "--config=configs/digits.py"
FOLDER = ["--config.data.source=folder", "--config.data.test_share=0.5", "--config.evaluate.n=10"]


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def error_of(capsys, *args):
    """Status and the one line on standard error of a command line that must fail."""
    status = command_line.main(["main", *args])
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    return status, lines[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.train.stps=3"], "steps"),
        (["--config.trian.steps=3"], "trian"),
        (["--config.train.steps=many"], "config.train.steps"),
        (["--config.train.steps=3.5"], "config.train.steps"),
        (["--config.train.ema_warmup=perhaps"], "config.train.ema_warmup"),
        (["--config.train=3"], "config.train"),
        (["--config.model.blocks=6"], "config.model.blocks=6 does not tile a 8 x 8 latent"),
        (["--config.model.diffusion_depth=9"], "config.model.diffusion_depth=9"),
        (["--config.sample.labels=12"], "12 is not a class"),
        (["--config.sample.solver=karras"], "config.sample.solver='karras' is unknown"),
        (["--config.data.image_size=1000000000"], "config.data.image_size=1000000000 is out of range"),
        (["--config.data.image_size=-8"], "config.data.image_size=-8 is out of range"),
        (["--mode=trian"], "mode"),
        (["--wrkdir=here"], "wrkdir"),
        (["train"], "'train' is not a flag"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, tmp_path, args, message):
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/run", *args)
    assert status == 2
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", ["--config=configs/nope.py", "--config=madformer_jax/config/schema.py", "--config="])
def test_a_config_file_that_is_none_is_one_line(capsys, tmp_path, config):
    status, line = error_of(capsys, config, f"--workdir={tmp_path}")
    assert status == 2
    assert config.split("=")[1] in line


def test_a_training_that_judges_itself_says_how_good_it_is(monkeypatch, tmp_path):
    c = schema.base()
    seen = []

    def judged(c, workdir):
        evaluate.check(c)
        seen.append((c.evaluate.images, workdir))
        drawn, real = ({"scores": {"FD-x": {"value": value, "low": 0.0, "high": 2.0}}} for value in (1.5, 0.25))
        return {"results": [drawn | {"real": real}]}

    monkeypatch.setattr(reference, "run", lambda c, workdir: seen.append(("reference", workdir)))
    monkeypatch.setattr(evaluate, "run", judged)
    message = command_line._score_summary(c, str(tmp_path))
    assert message.startswith(
        "FD-x of 1000 samples: 1.50 [0.00, 2.00]; of 1000 real training images: 0.25 [0.00, 2.00]"
    )
    (tmp_path / "reference.npz").write_bytes(b"")
    c.evaluate.images, c.evaluate.degrade = "data:test", "blur:1"  # of another evaluation
    command_line._score_summary(c, str(tmp_path))
    steps = ["reference", "", ""]  # what is there is not made anew
    assert [what for what, _ in seen] == steps and {where for _, where in seen} == {str(tmp_path)}
    assert c.evaluate.images == "data:test"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.evaluate.degrade=blur:1"], "config.evaluate.degrade"),
        (["--config.evaluate.grid=solver=karras"], "config.sample.solver='karras' is unknown"),
        (["--config.evaluate.reference=LICENSE"], "LICENSE cannot be read"),
        (["--config.evaluate.network=dino"], "config.evaluate.network='dino' is unknown"),
        (["--config.evaluate.network=inception"], "inception does not exist: make the weights of Inception"),
        (["--config.evaluate.network=attributes"], "needs pictures whose attributes are known"),
        (["--config.evaluate.n=4001"], "only 4000: set a smaller config.evaluate.n"),
        (["--config.evaluate.n=9"], "config.evaluate.n=9 images are too few"),
        (["--config.evaluate.training=missing.npz"], "the reference missing.npz does not exist"),
        (["--config.sample.noise=missing.npy"], "config.sample.noise=missing.npy cannot be read"),
        (FOLDER + ["--config.data.path={tmp}/flat"], "needs labeled images"),
        (FOLDER + ["--config.data.path={tmp}/one"], "two classes or more"),
        (
            FOLDER + ["--config.data.path={tmp}/two", "--config.data.test_share=0"],
            "config.evaluate.split asks for split 'test'",
        ),
        (
            FOLDER + ["--config.data.path={tmp}/two", "--config.data.test_share=1e-9", "--config.evaluate.split=all"],
            "config.evaluate.network asks for split 'test'",
        ),
    ],
)
def test_a_training_that_cannot_be_judged_does_not_begin(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.setattr(madformer_jax.modes.train, "run", lambda *args: pytest.fail("trains"))
    for i in range(40):
        for folder in ("flat", "one/class", f"two/{i % 2}"):
            path = tmp_path / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")  # which nobody reads so early
    args = [arg.format(tmp=tmp_path) for arg in args]
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/run", "--config.train.judge=True", *args)
    assert status == 2 and message in line


@pytest.mark.parametrize("stopped", [False, True])
def test_a_training_that_was_asked_to_stop_in_its_last_step_is_judged_by_the_next_start(
    monkeypatch, capsys, tmp_path, stopped
):
    judged = []
    figures = {"step": 3} | ({"stopped": True} if stopped else {})
    monkeypatch.setattr(madformer_jax.modes.train, "run", lambda *args: figures)
    monkeypatch.setattr(command_line, "_score_summary", lambda c, workdir: judged.append(workdir) or "the scores")
    args = [DIGITS, f"--workdir={tmp_path}/run", "--config.train.judge=True", "--config.train.steps=3"]
    assert command_line.main(["main", *args]) == 0
    assert judged == ([] if stopped else [f"{tmp_path}/run"])
    assert ("the scores" in capsys.readouterr().out) != stopped


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
    assert f"--workdir={tmp_path}/file/run cannot be written: Not a directory." in line


def test_another_platform_than_the_config_expects_is_an_error(capsys, tmp_path):
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}", "--config.platform=tpu")
    assert status == 2
    assert "config.platform='tpu', but JAX runs on 'cpu'" in line
    assert "libtpu_lockfile" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit('done')", "SystemExit: done"),
        ("raise SystemExit", "SystemExit"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(:", "SyntaxError"),
        ("import nowhere", "No module named 'nowhere'"),
        ("c = 3", "has no function get_config()"),
        ("def get_config(): return 3", "returned a int, not a ConfigDict"),
        ("def get_config(variant): return base()", "needs a variant"),
        ("def get_config():\n c = base()\n c.train.steps = 'many'\n return c", "steps"),
        ("def get_config():\n c = base().unlock()\n del c.train.steps\n return c", "config.train.steps is missing"),
        ("def get_config():\n c = base().unlock()\n c.train.more = 1\n return c", "config.train.more is not a field"),
        ("def get_config():\n c = base()\n c.train.stps = 3\n return c", "stps"),
        ("def get_config():\n c = base()\n c.seed = None\n return c", "seed"),
        (
            "from ml_collections import ConfigDict\nget_config = ConfigDict",
            "is missing: a config file starts from config.base()",
        ),
    ],
)
def test_whatever_a_config_file_does_is_one_line_that_names_the_file(capsys, tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(f"from madformer_jax.config.schema import base\n{text}\n")
    status, line = error_of(capsys, f"--config={file}", f"--workdir={tmp_path}/run")
    assert status == 2
    assert f"--config={file}" in line
    assert message in line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("digits.py:D=3", "takes no variant"),
        ("ffhq1024.py:D=99,tiny", "diffusion_depth=99 (D) must be from 1 to config.model.depth=28"),
        ("ffhq1024.py:D=many", "variant 'D=many' is unknown"),
    ],
)
def test_a_wrong_variant_is_named(capsys, tmp_path, config, message):
    status, line = error_of(capsys, f"--config=configs/{config}", f"--workdir={tmp_path}/run")
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no JSON"),
        ("[1, 2]", "holds no config"),
        ('{"model": {"width": "wide"}}', "config.model.width='wide' must be of type int"),
        ('{"model": {"widht": 3}}', "config.model.widht is not a field: did you mean config.model.width?"),
    ],
)
def test_a_broken_config_of_a_workdir_is_named(capsys, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    for workdir in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        status, line = error_of(capsys, "--mode=sample", *workdir)
        assert status == 2
        assert f"{tmp_path}/config.json" in line
        assert message in line


def test_the_config_of_a_workdir_that_is_not_local_is_found(monkeypatch, capsys):
    saved = {"gs://bucket/run/config.json": {"train": {"steps": 7}}}
    monkeypatch.setattr(storage, "read_json", saved.get)
    for workdir in (["--workdir=gs://bucket/run"], ["--workdir", "gs://bucket/run"]):
        config, values = command_line.parse(["main", *workdir, "--config.train.batch=3"])
        assert values.workdir == "gs://bucket/run"
        assert (config.train.steps, config.train.batch) == (7, 3)
    assert "--config is missing" in error_of(capsys, "--workdir=gs://bucket/other")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--process_id=1"], "need --coordinator"),
        (["--topology=v5e:4x4"], "is for --mode=compile"),
        (["--dry_run"], "--dry_run and --measure are for --mode=sweep; the mode is train"),
        (["--measure"], "--dry_run and --measure are for --mode=sweep; the mode is train"),
        (["--processes=2"], "--processes=2 is for --mode=sweep; the mode is train"),
        (["--mode=sweep"], "has no function sweep(): --mode=sweep needs a file as in configs/sweeps"),
        (["--workdir=None"], "--workdir='None' is not a path"),
        (["--config.data.path=none"], "config.data.path='none' is not a path"),
        (["--workdir=a\nb"], "--workdir='a\\nb': '\\n' is not supported in a path"),
        (["--config.data.path=a\udc80b"], "'\\udc80' is not supported in a path"),
    ],
)
def test_flags_that_would_be_ignored_or_misunderstood_are_refused(capsys, tmp_path, args, message):
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}/run", *args)
    assert status == 2
    assert message in line


def test_errors_of_the_system_are_one_line_and_ours_are_not(monkeypatch, capsys, tmp_path):
    def fail(error):
        def run(config, workdir):
            raise error

        monkeypatch.setattr(madformer_jax.modes.train, "run", run)
        return error_of(capsys, DIGITS, f"--workdir={tmp_path}")

    status, line = fail(PermissionError(13, "Permission denied", "/some/file"))
    assert (status, line) == (2, "error: a file cannot be read or written: [Errno 13] Permission denied: '/some/file'")
    status, line = fail(MemoryError("Unable to allocate 111. PiB for an array"))
    assert status == 2
    assert "this machine's memory is too small (Unable to allocate 111. PiB for an array)" in line
    status, line = fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nMore"))
    assert status == 2
    assert "the device's memory is full" in line
    assert fail(KeyboardInterrupt()) == (130, "interrupted")
    with pytest.raises(AttributeError, match="no such thing"):  # a traceback, which a report of a fault needs
        fail(AttributeError("no such thing"))


def test_an_interrupt_at_the_start_is_one_line_and_status_130(tmp_path):
    fifo, config = tmp_path / "fifo", tmp_path / "config.py"
    os.mkfifo(fifo)
    config.write_text(f"open({str(fifo)!r}).read()")  # waits for its end: the process is at its start
    command = [sys.executable, "-m", "madformer_jax", f"--config={config}", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"GLIBC_TUNABLES": ""}  # else it starts itself anew
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with open(fifo, "w"), process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted before anything was begun\n"
    assert process.returncode == 130


def test_a_backend_that_does_not_start_is_one_line(monkeypatch, capsys, tmp_path):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': no TPU\nmore")

    monkeypatch.setattr("jax.default_backend", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    status, line = error_of(capsys, DIGITS, f"--workdir={tmp_path}")
    assert status == 2
    assert "JAX_PLATFORMS='tpu' does not start (Unable to initialize backend 'tpu': no TPU): check" in line


def test_wrong_settings_are_refused_before_jax_is_imported(tmp_path):
    """In a process of its own, as a user runs it."""
    code = (
        "import sys; from madformer_jax.cli import command_line; "
        f"status = command_line.main(['main', '{DIGITS}', '--workdir={tmp_path}', '--config.model.blocks=6']); "
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "does not tile" in done.stderr


def test_modes_get_the_overrides_which_are_logged_first(monkeypatch, tmp_path, capsys):
    seen = {}

    def run(config, workdir):
        seen.update(c=config, workdir=workdir)
        logging.warning("one")
        logging.warning("two")
        return {"loss": 1.0}

    monkeypatch.setattr(madformer_jax.modes.train, "run", run)
    args = [DIGITS, f"--workdir={tmp_path}", "--config.model.unet_channels=(16,)"]
    assert command_line.main(["main", *args, "--config.optimizer.learning_rate=1"]) == 0
    message, one, two = capsys.readouterr().err.strip().split("\n")
    assert (one[9:], two[9:]) == ("one", "two")
    for setting in ("model.unet_channels=(16,)", "optimizer.learning_rate=1.0", "data.image_size=32"):
        assert setting in message
    assert "model.mlp_width=256" in message
    assert "optimizer.clip" not in message
    assert seen["workdir"] == str(tmp_path)
    assert seen["c"].model.unet_channels == (16,)
    assert seen["c"].optimizer.learning_rate == 1.0


@pytest.mark.parametrize("own, steps", [((), 7), (("--config.train.steps=9",), 9)])
def test_flags_of_the_environment_come_before_those_of_the_command(monkeypatch, tmp_path, own, steps):
    seen = []
    monkeypatch.setenv("MADFORMER_FLAGS", "--config.train.steps=7")
    monkeypatch.setattr(madformer_jax.modes.train, "run", lambda c, workdir: seen.append(c.train.steps) or {})
    assert command_line.main(["main", "--config=configs/digits.py", f"--workdir={tmp_path}", *own]) == 0
    assert seen == [steps]


def test_flags_of_the_environment_with_an_open_quote_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MADFORMER_FLAGS", "--config.data.path='a b")
    _, line = error_of(capsys, "--config=configs/digits.py", f"--workdir={tmp_path}")
    assert "MADFORMER_FLAGS" in line and "No closing quotation" in line
