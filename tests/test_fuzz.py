"""400 command lines that people may type: status 0, or status 2 after one line, and no file lost or half-written.

Most lines of this file are the table of command lines.
A line has the arguments of `python -m madformer_jax.main`; {names} are files and folders of `world`. A line
without --config or --workdir gets that of `tests.tiny` and a folder that does not exist.
"""

import hashlib
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from madformer_jax.cli import command_line
from madformer_jax.evaluation.networks import classifier
from madformer_jax.runtime import storage
from madformer_jax.training import train_step
from tests import tiny

FLAGS = """
    train
    -- train
    -
    --mode=
    --mode
    --mode=trian
    --mode=Train
    --mode=../main
    --mode=train,sample
    --workdir
    --workdir=
    --workdir=None
    --wrkdir={new}
    --config
    --config=
    --config=None
    --config tests/tiny.py:plain --workdir={new} --steps=3
    --nothing
    --nomode
    --workdir={new} --workdir=
    --flagfile=/nowhere/flags
    --distributed=maybe
    --distributed=3
    --num_processes=2
    --process_id=0
    --num_processes=two
    --process_id=1.5
    --coordinator=host:1
    --coordinator=host:1 --num_processes=2
    --coordinator=host:1 --num_processes=2 --process_id=2
    --coordinator=host:1 --num_processes=0 --process_id=0
    --coordinator=host:1 --num_processes=-3 --process_id=-1
    --topology=v5e:4x4
    --mode=compile
    --mode=compile --topology=
    --mode=sample --topology=v5e:4x4
    -config.train.steps
    --config.train.steps
    --config.train.steps 3 4
    --config.train.steps=
    --config.train.steps=many
    --config.train.steps=1.5
    --config.train.steps=1e3
    --config.train.steps=0x
    --config.train.stps=3
    --config.Train.steps=3
    --config.trian.steps=3
    --config.train.steps.more=3
    --config.train=3
    --config.train={{}}
    --config.train={{'steps':3}}
    --config.model.unet_channels[0]=8
    --config.model.unet_channels=
    --config.model.unet_channels=x
    --config.model.unet_channels=(8,
    --config.model.unet_channels=8.5
    --config.model.unet_channels={{}}
    --config.model.unet_attention=1
    --config.model.unet_attention=maybe
    --config.=3
    --config..steps=3
    --config.model.__class__=3
    --config.lock=3
    --noconfig.train.steps
    --noconfig.data.crop=3
    --noconfig.data
    --config.data.crop=perhaps
    --config.optimizer.learning_rate=fast
    --config.optimizer.learning_rate=1,5
"""

FIELDS = """
    --config.seed=-1
    --config.seed=4294967296
    --config.seed=99999999999999999999999
    --config.seed=1.0
    --config.platform=tpu
    --config.platform=gpu
    --config.platform=CPU
    --config.compilation_cache=None
    --config.model.width=0
    --config.model.width=-16
    --config.model.width=18
    --config.model.width=99999999999
    --config.model.heads=0
    --config.model.heads=3
    --config.model.heads=16
    --config.model.depth=0
    --config.model.depth=-1
    --config.model.diffusion_depth=0
    --config.model.diffusion_depth=2
    --config.model.diffusion_depth=-1
    --config.model.mlp_width=0
    --config.model.blocks=0
    --config.model.blocks=3
    --config.model.blocks=-4
    --config.model.blocks=5
    --config.model.blocks=1024
    --config.model.unet_channels=8,16
    --config.model.unet_channels=0
    --config.model.unet_channels=-8
    --config.model.unet_channels=9
    --config.model.unet_channels=()
    --config.model.unet_attention=(False,True)
    --config.model.unet_layers=0
    --config.model.unet_groups=0
    --config.model.unet_groups=3
    --config.model.unet_heads=-4
    --config.model.unet_time_width=0
    --config.model.unet_time_width=7
    --config.model.unet_stride=0
    --config.model.unet_stride=3
    --config.model.unet_kernel=2
    --config.model.rope=spiral
    --config.model.rope=
    --config.model.time_embedding=none
    --config.model.clean_timestep=one
    --config.model.hidden_from=here
    --config.model.param_sets=two
    --config.model.diffusion_attention=full
    --config.model.attention=flash
    --config.model.attention=cudnn
    --config.model.dtype=float16
    --config.model.dtype=float64
    --config.model.remat=all
    --config.model.scan_unroll=0
    --config.model.classes=-1
    --config.model.classes=3 --config.sample.labels=3
    --config.text.length=0
    --config.text.length=77
    --config.text.vocabulary=-1
    --config.model.classes=0 --config.text.vocabulary=300 --config.text.length=77 --config.text.tokenizer=nowhere
    --config.loss.text=1
    --config.loss.image=-1
    --config.loss.image=nan
    --config.loss.image=inf
    --config.loss.image=0 --config.loss.hidden=0
    --config.model.clean_stream=False --config.loss.clean=1
    --config.codec.name=jpeg
    --config.codec.patch=0
    --config.codec.patch=-4
    --config.codec.patch=5
    --config.codec.patch=64
    --config.codec.path=none
    --config.codec.dtype=int8
    --config.codec.scaling_factor=-1
    --config.data.image_size=0
    --config.data.image_size=-32
    --config.data.image_size=30
    --config.data.image_size=32.5
    --config.data.channels=0
    --config.data.channels=-1
    --config.data.workers=-1
    --config.data.source=
    --config.data.source=tfds
    --config.data.source=tfds:
    --config.data.source=imagenet
    --config.data.source=folder
    --config.data.source=folder --config.data.path={nowhere}
    --config.data.source=folder --config.data.path={empty}
    --config.data.source=folder --config.data.path={file}
    --config.data.source=folder --config.data.path=None
    --config.data.source=webdataset --config.data.path={nowhere}
    --config.data.source=webdataset --config.data.path={empty}
    --config.data.source=webdataset --config.data.path={file}
    --config.data.source=arrayrecord
    --config.data.source=arrayrecord --config.data.path={empty}
    --config.data.source=arrayrecord --config.data.path={images}
    --config.data.source=arrayrecord --config.data.path={file}
    --config.data.split=validation
    --config.data.split=
    --config.data.test_share=2
    --config.data.background=purple-ish
    --config.data.max_corrupt=-1
    --config.prepare.kind=words
    --config.prepare.shard=0
    --config.prepare.batch=0
    --config.prepare.max_corrupt=1.1
    --config.train.batch=0
    --config.train.batch=-8
    --config.train.batch=99999999999
    --config.train.steps=0
    --config.train.steps=-5
    --config.train.steps=99999999999
    --config.train.accumulate=0
    --config.train.accumulate=3
    --config.train.ema_decay=1.5
    --config.train.ema_decay=nan
    --config.train.label_dropout=-0.1
    --config.train.log_every=0
    --config.train.sample_every=-1
    --config.train.checkpoint_every=0
    --config.train.keep=0
    --config.train.keep_every=-1
    --config.optimizer.learning_rate=-1
    --config.optimizer.learning_rate=nan
    --config.optimizer.learning_rate=inf
    --config.optimizer.b1=2
    --config.optimizer.b2=-1
    --config.optimizer.weight_decay=-1
    --config.optimizer.clip=-1
    --config.optimizer.schedule=linear
    --config.optimizer.warmup=2
    --config.optimizer.decay=-1
    --config.mesh.data=0
    --config.mesh.data=3
    --config.mesh.data=-2
    --config.mesh.data=-1 --config.mesh.fsdp=-1
    --config.mesh.fsdp=2
    --config.mesh.tensor=2
    --config.mesh.tensor=99999999999
"""

SAMPLING = """
    --mode=sample --workdir={new}
    --mode=sample --workdir={empty}
    --mode=sample --workdir={file}
    --mode=sample --workdir={file}/run
    --mode=sample --workdir={fresh}
    --mode=sample --workdir={torn}
    --mode=sample --workdir={hollow}
    --mode=sample --workdir={images}
    --workdir={run} --mode=sample --config.sample.n=0
    --workdir={run} --mode=sample --config.sample.n=-3
    --workdir={run} --mode=sample --config.sample.n=99999999999
    --workdir={run} --mode=sample --config.sample.batch=0
    --workdir={run} --mode=sample --config.sample.grid=0
    --workdir={run} --mode=sample --config.sample.steps=0
    --workdir={run} --mode=sample --config.sample.steps=1000
    --workdir={run} --mode=sample --config.sample.solver=karras
    --workdir={run} --mode=sample --config.sample.spacing=wide
    --workdir={run} --mode=sample --config.sample.guidance=2
    --workdir={run} --mode=sample --config.sample.guidance=nan
    --workdir={run} --mode=sample --config.sample.guidance=inf
    --workdir={run} --mode=sample --config.sample.guidance=1e9
    --workdir={run} --mode=sample --config.sample.guidance=-1
    --workdir={run} --mode=sample --config.sample.clip_x0=-1
    --workdir={run} --mode=sample --config.sample.clip_x0=nan
    --workdir={run} --mode=sample --config.sample.labels=3
    --workdir={run} --mode=sample --config.sample.labels=cat
    --workdir={run} --mode=sample --config.sample.weights=best
    --workdir={run} --mode=sample --config.sample.noise=None
    --workdir={run} --mode=sample --config.sample.noise={nowhere}
    --workdir={run} --mode=sample --config.sample.noise={empty}
    --workdir={run} --mode=sample --config.sample.noise={file}
    --workdir={run} --mode=sample --config.sample.noise={noise}/shape.npy
    --workdir={run} --mode=sample --config.sample.noise={noise}/complex.npy
    --workdir={run} --mode=sample --config.sample.noise={noise}/text.npy
    --workdir={run} --mode=sample --config.sample.noise={noise}/objects.npy
    --workdir={run} --mode=sample --config.sample.noise={noise}/nan.npy
    --workdir={run} --mode=sample --config.sample.noise={noise}/many.npz
    --workdir={run} --mode=sample --config.sample.noise={noise}/cut.npy
    --workdir={run} --mode=sample --config.sample.step=7
    --workdir={run} --mode=sample --config.sample.step=-2
    --workdir={run} --mode=sample --config.sample.shard=0
    --workdir={run} --mode=sample --config.codec.patch=2
    --workdir={run} --mode=sample --config.model.attention=cudnn
    --workdir={run} --mode=sample --config.codec.name=vae
    --workdir={spoiled} --mode=sample
    --workdir={spoiled} --mode=export
    --workdir={cut} --mode=sample
    --workdir={cut} --mode=export
    --workdir={filed} --mode=sample --config.sample.n=3
    --workdir={run} --mode=sample --config.data.image_size=64
    --workdir={run} --mode=sample --config.model.width=32
    --workdir={run} --mode=sample --config.model.classes=3
    --workdir={run} --mode=sample --config.mesh.data=3
    --workdir={run} --mode=sample --config.mesh.tensor=2
    --workdir={run} --mode=sample --config.seed=-1
    --config=tests/tiny.py --workdir={run} --mode=sample
    --config=configs/ffhq1024.py:tiny --workdir={run} --mode=sample
    --mode=export --workdir={new}
    --mode=export --workdir={empty}
    --mode=export --workdir={fresh}
    --mode=export --workdir={hollow}
    --mode=export --workdir={run} --config.model.blocks=4
    --mode=export --workdir={run} --config.mesh.data=5
"""

OTHERS = """
    --mode=convert
    --mode=convert --workdir={run}
    --mode=convert --config.convert.release={nowhere}
    --mode=convert --config.convert.release={file}
    --mode=convert --config.convert.release={empty}
    --mode=convert --config.convert.release=None
    --mode=convert --config.convert.release={file} --workdir={run}
    --mode=convert --config.convert.release={file} --config.convert.vae={file}
    --mode=convert --config.convert.vae={nowhere}
    --mode=convert --config.convert.vae={empty}
    --mode=convert --config.convert.vae={file}
    --mode=convert --config.convert.inception={nowhere}
    --mode=convert --config.convert.inception={file}
    --mode=convert --config.convert.to_release={new}/x.pt
    --mode=convert --config.convert.to_release={new}/x.pt --workdir={empty}
    --mode=convert --config.convert.to_release={new}.pt --workdir={run}
    --mode=convert --config.convert.to_release={new}.doc --workdir={run}
    --mode=convert --config.convert.release={file} --config.convert.weights=raw
    --mode=prepare --config.prepare.kind=latents
    --mode=prepare --config.prepare.kind=latents --config.codec.name=vae --config.data.channels=3 --workdir={empty}
    --mode=prepare --config.data.source=folder
    --mode=prepare --config.data.source=folder --config.data.path={nowhere}
    --mode=prepare --config.data.source=folder --config.data.path={empty}
    --mode=prepare --config.data.source=webdataset --config.data.path={images}
    --mode=prepare --workdir={file}
    --mode=prepare --workdir={file}/data
    --mode=prepare --workdir={run}
    --mode=prepare --workdir={run}/prepared --config.data.source=arrayrecord --config.data.path={run}
    --mode=prepare --workdir=s3://bucket/data
    --mode=prepare --config.prepare.max_corrupt=nan
    --mode=benchmark --config.benchmark.parts=
    --mode=benchmark --config.benchmark.parts=train,dance
    --mode=benchmark --config.benchmark.steps=0
    --mode=benchmark --config.benchmark.warmup=-1
    --mode=benchmark --config.benchmark.parts=data --config.data.source=folder --config.data.path={nowhere}
    --mode=reference --config.data.source=folder --config.data.path={nowhere}
    --mode=reference --config.evaluate.split=nothing
    --mode=reference --config.evaluate.network=attributes
    --mode=evaluate --workdir={empty}
    --mode=evaluate --workdir={run} --config.evaluate.network=vgg
    --mode=evaluate --workdir={run} --config.evaluate.n=0
    --mode=evaluate --workdir={run} --config.evaluate.reference={file}
    --mode=evaluate --workdir={run} --config.evaluate.network_path={nowhere}
    --mode=evaluate --workdir={run} --config.evaluate.checkpoints=first
    --mode=evaluate --workdir={run} --config.evaluate.grid=steps
    --mode=evaluate --workdir={run} --config.evaluate.images={nowhere}
    --mode=evaluate --workdir={run} --config.evaluate.degrade=noise
    --mode=compile --topology=v5e
    --mode=compile --topology=h100:8
    --mode=compile --topology=v5e:4x4 --config.train.batch=0
    --workdir={file}
    --workdir={file}/run
    --workdir={fresh} --config.model.depth=0
    --workdir={run} --config.model.width=32
    --workdir={run} --config.model.rope=release
    --workdir={run} --config.seed=1
    --workdir={run} --config.optimizer.b2=0.5
    --workdir={run} --config.data.source=folder --config.data.path={images}
    --workdir={run} --config.train.batch=16
    --workdir={hollow}
    --workdir=s3://bucket/run
    --workdir=nofs://bucket/run
    --workdir=s3://bucket/run --mode=sample
    --workdir=http://host/run
    --workdir=gs://bucket/run
    --config.codec.name=vae --config.data.channels=3
    --config.codec.name=vae --config.data.channels=3 --config.codec.path={nowhere}
    --config.codec.name=vae --config.data.channels=3 --config.codec.path={file}
    --config.codec.name=vae --config.data.channels=3 --config.codec.path={empty}
    --config.model.width=262144 --config.model.mlp_width=262144
    --config.profile=often
    --config.profile=5:3
    --config.profile=100:103
    --config.train.keep_every=3
    --config.data.source=folder --config.data.path={broken}
    --config.data.source=folder --config.data.path={images} --config.data.channels=2
    --config.model.classes=3
    --config.model.classes=10 --config.data.source=folder --config.data.path={images}
    --config=configs/digits.py:D=3
    --config=configs/ffhq1024.py:D=99
    --config=configs/ffhq1024.py:D=99,tiny
    --config=configs/ffhq1024.py:D=0
    --config=configs/ffhq1024.py:D=-1
    --config=configs/ffhq1024.py:D=
    --config=configs/ffhq1024.py:D
    --config=configs/ffhq1024.py:tiny=1
    --config=configs/ffhq1024.py:L=3
    --config=configs/ffhq1024.py:,
    --config=configs/imagenet256.py:huge
    --config={nowhere}
    --config={empty}
    --config={file}
    --config=README.md
    --config=madformer_jax/config/schema.py
"""

# What stands in a config file, after `from madformer_jax.config.schema import base`; \\n is a new line.
CONFIGS = r"""
    def get_config(:
    x = 1
    get_config = 3
    1 / 0
    import nowhere
    raise SystemExit(0)
    import sys; sys.exit('bye')
    raise KeyError('a\nb')
    def get_config(): return None
    def get_config(): return {}
    def get_config(a, b): return base()
    def get_config(variant): return base()
    def get_config(): return base().nothing
    def get_config(): return base().model
    def get_config():\n c = base()\n c.train.steps = '3'\n return c
    def get_config():\n c = base()\n c.train.stps = 3\n return c
    def get_config():\n c = base().unlock()\n c.train.stps = 3\n return c
    def get_config():\n c = base().unlock()\n del c.sample\n return c
    def get_config():\n c = base().unlock()\n del c.train.steps\n return c
    def get_config():\n c = base().unlock()\n del c.model.unet_channels\n c.model.unet_channels = 8\n return c
    def get_config():\n c = base()\n c.codec.path = None\n return c
    def get_config():\n c = base()\n c.seed = None\n return c
    def get_config():\n c = base()\n c.data.path = 'a\\0b'\n return c
    import ml_collections\ndef get_config(): return ml_collections.ConfigDict({'model': 3})
"""

# What stands in config.json; the command line has no --config.
SAVED = r"""
    {
    []
    null
    "text"
    {"model": 3}
    {"model": {"width": "wide"}}
    {"model": {"widht": 16}}
    {"train": {"steps": null}}
    {"train": {"steps": 1.5}}
    {"model": {"unet_channels": 8}}
    {"model": {"unet_channels": ["8"]}}
    {"seed": -1}
"""

FINE = """
    --workdir={run} --config.train.steps=1
    --workdir={run} --config.train.steps=1 --config.train.keep=2 --config.train.log_every=7
    --workdir={run} --mode=sample --config.sample.n=3
    --workdir {run} --mode sample --config.sample.n 3 --config.seed 4294967295
    --workdir={run} --mode=export
    --mode=prepare --config.data.source=folder --config.data.path={images} --config.data.split=all --workdir={prepared}
"""


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [pathlib.Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def tree(folder: pathlib.Path) -> dict[str, str]:
    """Path -> hash of its content, of all files below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}


def stamps(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Path -> inode, size and time of the last change, of all files below a folder. Any write changes one of them."""
    status = {str(path): path.stat() for path in files(folder)}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in status.items()}


def rows(table: str) -> list[str]:
    return [line.strip() for line in table.strip().splitlines()]


class World:
    """Files and folders that a command line may name, and what running it says and changes."""

    def __init__(self, root: pathlib.Path, capfd: pytest.CaptureFixture):
        self.root, self.capfd = root, capfd
        names = (
            "new", "nowhere", "file", "empty", "fresh", "torn", "hollow", "images", "broken", "noise", "run", "prepared",
            "spoiled", "cut", "filed",
        )  # fmt: skip
        self.names = {name: str(root / name) for name in names}
        for name in ("empty", "fresh", "torn", "hollow/checkpoints/2", "images", "broken", "noise"):
            (root / name).mkdir(parents=True)
        (root / "file").write_text("not what you think")
        saved = tiny.get_config("plain").to_json()
        for name in ("fresh", "hollow"):
            (root / name / "config.json").write_text(saved)
        (root / "torn/config.json").write_text(saved[:100])
        for i in range(3):
            Image.new("L", (40, 36), 80 * i).save(root / f"images/{i}.png")
            (root / f"broken/{i}.png").write_bytes(b"\x89PNG and no more")
        noise = np.zeros((5, 1, 64, 16), np.float32)
        np.save(root / "noise/shape.npy", noise[:2])
        np.save(root / "noise/complex.npy", noise * 1j)
        np.save(root / "noise/text.npy", noise.astype(str))
        np.save(root / "noise/objects.npy", noise.astype(object))
        np.save(root / "noise/nan.npy", noise * np.nan)
        np.savez(root / "noise/many.npz", noise=noise)
        (root / "noise/cut.npy").write_bytes((root / "noise/nan.npy").read_bytes()[:1000])

    def train(self) -> None:
        """Makes {run}, a workdir after one step, and copies of it that went through something."""
        run = pathlib.Path(self.names["run"])
        assert self.run("--workdir={run} --config.train.steps=1")[0] == 0
        for name in ("spoiled", "cut", "filed"):
            shutil.copytree(run, self.root / name)
        for name in ("spoiled", "cut"):
            largest = max((self.root / name / "checkpoints").rglob("ema/d/*"), key=lambda path: path.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content if name == "spoiled" else content[:-9])
        shutil.rmtree(self.root / "filed/samples")
        (self.root / "filed/samples").write_text("mine")

    def run(self, line: str) -> tuple[int | str, list[str]]:
        """The status, or what was raised, and the lines on standard error that are not the log's."""
        args = shlex.split(line.format(**self.names))
        if not any(re.match("--?config(=|$)", arg) for arg in args):
            args = ["--config=tests/tiny.py:plain", *args]
        if not any(re.match("--?workdir(=|$)", arg) for arg in args):
            args = [f"--workdir={self.names['new']}", *args]
        return self.call(args)

    def call(self, args: list[str]) -> tuple[int | str, list[str]]:
        self.capfd.readouterr()
        try:
            status: int | str = command_line.main(["main", *args])
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        lines = re.split(r"[\r\n]+", self.capfd.readouterr().err)
        log = r"$|\d\d:\d\d:\d\d |[\w ]+: +\d+%\||[|+]|Parameters and|Total: "  # the log, its table, bars of progress
        log += r"|WARNING: All log messages before|[IWE]\d{4} "  # TensorFlow's, which reaches a bucket
        return status, [line for line in lines if not re.match(log, line)]

    def refused(self, line: str, found: tuple[int | str, list[str]], before: dict[str, tuple[int, ...]]) -> list[str]:
        """Returns a list of what is wrong with how a line was refused."""
        status, lines = found
        wrong = [] if status == 2 else [f"{line}: status {status}"]
        wrong += [] if len(lines) == 1 and lines[0].startswith("error: ") else [f"{line}: {lines}"]
        now = stamps(self.root)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return wrong + ([f"{line}: changed {changed}"] if changed else [])


@pytest.fixture
def world(tmp_path, capfd, monkeypatch, request, one_device):
    monkeypatch.chdir(request.config.rootpath)
    return World(tmp_path, capfd)


def accepted(*_: object, **__: object) -> None:
    """In the place of what takes long, so that a line that is let through by mistake costs no minute."""
    raise AssertionError("accepted")


def problems(world: World, lines: list[str]) -> list[str]:
    wrong = []
    for line in lines:
        before = stamps(world.root)
        wrong += world.refused(line, world.run(line), before)
    return wrong


@pytest.mark.parametrize("table", ["FLAGS", "FIELDS"])
def test_what_cannot_be_is_refused_in_one_line(world, monkeypatch, table):
    monkeypatch.setattr(train_step, "create_state", accepted)
    assert problems(world, rows(globals()[table])) == []


def test_whatever_a_config_file_says_is_one_line(world):
    wrong = []
    for i, row in enumerate(rows(CONFIGS)):
        file = world.root / f"config_{i}.py"
        file.write_text("from madformer_jax.config.schema import base\n" + row.replace(r"\n", "\n") + "\n")
        wrong += problems(world, [f"--config={file}"])
    for row in rows(SAVED):
        (world.root / "torn/config.json").write_text(row)
        before = stamps(world.root)
        for mode in ("train", "sample"):
            found = world.call([f"--workdir={world.root}/torn", f"--mode={mode}"])
            wrong += world.refused(f"{mode} {row}", found, before)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.usefixtures("random_state")
def test_a_workdir_survives_what_is_done_to_it(world, monkeypatch):
    monkeypatch.setattr(storage.retry, "__defaults__", ((0.0,),))  # a bucket out of reach is asked once more, at once
    monkeypatch.setattr(classifier, "train", accepted)
    world.train()
    assert problems(world, [*rows(SAMPLING), *rows(OTHERS)]) == []
    before, wrong = tree(world.root), []
    for line in rows(FINE):
        status, lines = world.run(line)
        wrong += [f"{line}: {status} {lines}"] if status != 0 else []
    now = tree(world.root)
    lost = [name for name, content in before.items() if now.get(name) != content]
    assert (wrong, lost) == ([], [])
