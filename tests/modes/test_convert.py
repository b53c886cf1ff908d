"""--mode=convert on the command line, from file to workdir and back."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.evaluation.networks import inception_weights
from madformer_jax.modes import convert
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import generation
from madformer_jax.weights import release, release_config, state_dicts, vae_weights
from madformer_jax.weights.release_config import preset

SUFFIXES = ("pt", "safetensors", "npz")


def run(*arguments):
    return command_line.main(["madformer_jax", *map(str, arguments)])


@pytest.fixture
def error(capsys):
    """Runs a command line that must fail and returns its one line."""

    def failing(*arguments):
        capsys.readouterr()
        assert run(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return failing


def released(reference, variant="baseline"):
    """Returns the state_dict and the arguments of a reference checkpoint."""
    file = reference(f"madformer_{variant}.npz")
    tensors = {name.removeprefix("param/"): file[name] for name in file.files if name.startswith("param/")}
    return tensors, json.loads(str(file["meta"]))


def write(path, tensors, args):
    if path.suffix == ".pt":
        pytest.importorskip("torch")
    state_dicts.write_state_dict(path, tensors, args)
    return path


def test_converted_checkpoint_reproduces_release_samples(tmp_path, reference):
    """Tests the variant that needs a non-default config. tests/diffusion/test_sampler.py tests all four."""
    variant = "denoising_mlp"
    file = reference(f"madformer_{variant}.npz")
    suffix = "pt" if importlib.util.find_spec("torch") else "npz"
    release = write(tmp_path / f"release.{suffix}", *released(reference, variant))
    workdir = tmp_path / "run"
    assert run("--mode=convert", f"--config.convert.release={release}", f"--workdir={workdir}") == 0

    np.save(tmp_path / "noise.npy", file["sample/init_noise"])
    settings = [f"--config.sample.noise={tmp_path / 'noise.npy'}", "--config.sample.n=2", "--config.sample.steps=8"]
    assert run("--mode=sample", f"--workdir={workdir}", "--config.sample.solver=ddim", *settings) == 0
    (drawn,) = (workdir / "samples").glob("*_noise-noise_n2_*")
    found = next(generation.read_shards(drawn)).latents  # (2, h, w, C)
    side = found.shape[1] // 2
    blocks = found.reshape(2, 2, side, 2, side, -1).transpose(0, 1, 3, 2, 4, 5).reshape(file["sample/ddim8"].shape)
    assert np.linalg.norm(blocks - file["sample/ddim8"]) < 1e-3 * np.linalg.norm(file["sample/ddim8"])


@pytest.mark.parametrize(
    ("variant", "suffix"), [("baseline", "pt"), ("clear_cond", "safetensors"), ("clear_clean", "npz")]
)
def test_round_trip_keeps_every_bit(tmp_path, reference, variant, suffix):
    tensors, args = released(reference, variant)
    release, back = write(tmp_path / f"release.{suffix}", tensors, args), tmp_path / f"back.{suffix}"
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run("--mode=convert", f"--config.convert.release={release}", workdir) == 0
    assert run("--mode=convert", f"--config.convert.to_release={back}", workdir) == 0
    content = state_dicts.read_state_dict(back)
    assert content.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if variant != "clear_clean" or "_list.0." not in name:  # its clean tower is never run
            np.testing.assert_array_equal(content.tensors[name], tensor)
    assert preset(content.args).model == preset(args).model


def test_checkpoint_of_the_release_s_training(tmp_path, reference):
    """It has EMA and raw weights for VAE latents, and no width, depth or channels in its arguments."""
    torch = pytest.importorskip("torch")
    tensors, meta = released(reference)
    names = ("diff_depth", "ar_len", "block_size", "pre_downsample_block_size", "spatial_len")
    args = {name: meta[name] for name in names} | {
        "image_size": 128, "vae_latent_size": 4, "patch_size": 1, "square_block": True, "lambda_hidden_loss": 0.2,
        "model_config_path": "src/configs/model/madformer.json", "clear_clean": False, "clear_cond": False,
        "denoising_mlp": False, "lr": 3e-4, "dataset": "ffhq",
    }  # fmt: skip
    model = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    ema = {name: torch.from_numpy(tensor) + 1 for name, tensor in tensors.items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {
        "model": model,
        "ema": ema,
        "opt": optimizer,
        "lrs": {"last_epoch": 3},
        "args": argparse.Namespace(**args),
    }
    torch.save(content, tmp_path / "0001000.pt")
    found = release_config.infer_config(tensors, state_dicts.read_state_dict(tmp_path / "0001000.pt").args)
    expected = preset(meta)
    expected.model.unet_heads = 8  # the shapes do not say, so as released
    assert found.model == expected.model
    assert (found.codec.name, found.codec.path, found.data.image_size) == ("vae", release_config.RELEASE_VAE, 128)
    assert found.loss.hidden == 0.2

    for chosen, item, value in (("", "ema", 1), ("model", "params", 0)):
        workdir, back = tmp_path / f"run_{item}", tmp_path / f"back_{item}.npz"
        release = f"--config.convert.release={tmp_path / '0001000.pt'}"
        assert run("--mode=convert", release, f"--workdir={workdir}", f"--config.convert.weights={chosen}") == 0
        assert os.listdir(workdir / "checkpoints") == ["0"]
        assert (workdir / "checkpoints" / "0" / item).is_dir()
        assert run("--mode=convert", f"--config.convert.to_release={back}", f"--workdir={workdir}") == 0
        np.testing.assert_array_equal(
            state_dicts.read_state_dict(back).tensors["boi_block"], tensors["boi_block"] + np.float32(value)
        )


def test_a_file_without_arguments_uses_the_config(tmp_path, reference):
    tensors, meta = released(reference)
    release = write(tmp_path / "release.npz", tensors, None)
    (tmp_path / "c.py").write_text(
        "import json\nfrom madformer_jax.weights.release_config import preset\n\n"
        f"def get_config():\n    return preset(json.loads({json.dumps(json.dumps(meta))}))\n"
    )
    flags = [f"--config={tmp_path / 'c.py'}", f"--config.convert.release={release}", f"--workdir={tmp_path / 'run'}"]
    assert command_line.main(["madformer_jax", flags[0], "--mode=convert", *flags[1:]]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["rope"] == "release"
    assert saved["sample"]["weights"] == "raw"
    c, _ = command_line.parse(["main", "--mode=convert", f"--workdir={tmp_path / 'run'}"])
    c.convert.to_release = str(tmp_path / "back.npz")
    figures = convert.run(c, str(tmp_path / "run"))
    assert figures == {"path": c.convert.to_release, "step": 0, "weights": "params", "tensors": len(tensors)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_that_do_not_fit_are_one_line_and_write_nothing(tmp_path, reference, suffix, error):
    tensors, meta = released(reference)
    workdir = tmp_path / "run"
    release = tmp_path / f"release.{suffix}"
    command = "--mode=convert", f"--config.convert.release={release}", f"--workdir={workdir}"
    assert str(release) in error(*command)  # the file does not exist

    wrong = dict(tensors)
    del wrong["blocks.3.self_attn.q_norm_list.1.weight"]
    wrong["blocks.2.mlp_list.0.up_proj.weight"] = wrong["blocks.2.mlp_list.0.up_proj.weight"][:7]
    wrong["vocabulary.weight"] = np.zeros(3, np.float32)
    write(release, wrong, meta)
    line = error(*command)
    for word in (
        str(release), "1 missing (blocks.3.self_attn.q_norm_list.1.weight)", "1 extra (vocabulary.weight)",
        "1 mis-shaped (blocks.2.mlp_list.0.up_proj.weight (7, 64) instead of (128, 64))",
    ):  # fmt: skip
        assert word in line

    write(release, tensors, meta | {"depth": 5})  # another architecture than the arguments say
    assert "blocks.4." in error(*command)
    write(release, tensors, {name: value for name, value in meta.items() if name != "diff_depth"})
    assert "'diff_depth'" in error(*command)
    write(release, {"encoder.conv_in.weight": np.zeros(3, np.float32)}, meta)
    assert "boi_block" in error(*command)
    write(release, tensors, meta)
    with release.open("r+b") as file:
        file.truncate(release.stat().st_size // 2)
    assert str(release) in error(*command)
    assert not workdir.exists()


def test_wrong_flags_are_one_line(tmp_path, reference, error):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "given: none" in error("--mode=convert", workdir)
    assert "given: release, vae" in error(
        "--mode=convert", workdir, "--config.convert.release=a", "--config.convert.vae=b"
    )
    assert "does not exist" in error("--mode=convert", workdir, f"--config.convert.to_release={tmp_path / 'a.npz'}")
    release = write(tmp_path / "release.npz", *released(reference))
    assert run("--mode=convert", workdir, f"--config.convert.release={release}") == 0
    assert "already holds a checkpoint" in error("--mode=convert", workdir, f"--config.convert.release={release}")
    assert "must end in one of" in error(
        "--mode=convert", workdir, f"--config.convert.to_release={tmp_path / 'a.ckpt'}"
    )
    np.save(tmp_path / "noise.npy", np.zeros((3, 4, 64, 4)))
    noise = f"--config.sample.noise={tmp_path / 'noise.npy'}"
    assert "must be (2, 4, 64, 4)" in error("--mode=sample", workdir, noise, "--config.sample.n=2")


def test_full_size_names_and_shapes(reference):
    """The sizes of the release's model follow from its shapes, and every tensor is expected."""
    shapes = {name: tuple(shape) for name, shape in reference("madformer_ffhq1024_state_dict.json").items()}
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}  # takes no memory
    args = {"diff_depth": 14, "ar_len": 16, "block_size": 256, "pre_downsample_block_size": 1024, "image_size": 1024}
    c = release_config.infer_config(tensors, args)
    sizes = schema.validate(c)
    assert (c.model.width, c.model.heads, c.model.depth, c.model.mlp_width) == (1152, 18, 28, 4096)
    assert (sizes.latent, sizes.tokens, c.data.image_size) == (128, 256, 1024)
    assert release.release_shapes(c) == shapes


def test_vae_and_inception_become_folders(tmp_path, reference, error):
    shapes = reference("sd_vae_small_state_dict.json")
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    folder = tmp_path / "diffusers"
    folder.mkdir()
    (folder / "config.json").write_text(str(reference("sd_vae_small.npz")["config"]))
    state_dicts.write_state_dict(folder / "diffusion_pytorch_model.safetensors", state)
    command = "--mode=convert", f"--workdir={tmp_path / 'weights'}"
    assert run(*command, f"--config.convert.vae={folder}") == 0
    back = vae_weights.to_diffusers_vae(vae_weights.load(str(tmp_path / "weights" / "vae"))[1])
    assert all(np.array_equal(back[name], tensor) for name, tensor in state.items())

    shapes = reference("inception_fid_state_dict.json")
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    state_dicts.write_state_dict(tmp_path / "inception.npz", state)
    assert run(*command, f"--config.convert.inception={tmp_path / 'inception.npz'}") == 0
    back = inception_weights.to_torch(inception_weights.load(str(tmp_path / "weights" / "inception")))
    assert all(np.array_equal(back[name], x) for name, x in state.items() if "num_batches" not in name)

    assert "inception.npz" in error(*command, f"--config.convert.release={tmp_path / 'inception.npz'}")


@pytest.mark.parametrize(("given", "file"), [("", "ckpts.pt"), (":raw/0001.npz", "raw/0001.npz")])
def test_a_hub_id_with_a_revision_is_downloaded_and_converted(tmp_path, reference, monkeypatch, given, file):
    path = write(tmp_path / "release.npz", *released(reference))
    requests = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := types.ModuleType("huggingface_hub"))
    hub.hf_hub_download = lambda *args, **settings: requests.append((args, settings)) or str(path)
    monkeypatch.setattr(convert, "from_release", lambda tensors, c, origin: {"boi": tensors["boi_block"][0]})
    c, workdir = schema.base(), str(tmp_path / "run")
    c.convert.release = f"JunhaoC/MADFormer-FFHQ@0a1b2c3{given}"
    assert convert.run(c, workdir)["path"] == workdir
    assert requests == [(("JunhaoC/MADFormer-FFHQ", file), {"revision": "0a1b2c3"})]
    meta = checkpoint.Checkpoints(workdir, read_only=True).meta(0)
    assert meta["converted_from"] == f"JunhaoC/MADFormer-FFHQ@0a1b2c3:{file}"


def test_a_hub_id_without_network_or_revision_says_what_to_fetch(tmp_path, error, monkeypatch):
    def unreachable(*args, **settings):
        raise OSError("no route to host\nand much more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := types.ModuleType("huggingface_hub"))
    hub.hf_hub_download = unreachable
    workdir = f"--workdir={tmp_path / 'run'}"
    line = error("--mode=convert", "--config.convert.release=JunhaoC/MADFormer-FFHQ@0a1b2c3", workdir)
    for words in ("no route to host", "download ckpts.pt of huggingface.co/JunhaoC/MADFormer-FFHQ at revision 0a1b2c3"):
        assert words in line
    assert "needs a revision" in error("--mode=convert", "--config.convert.release=JunhaoC/MADFormer-FFHQ", workdir)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = error("--mode=convert", "--config.convert.release=JunhaoC/MADFormer-FFHQ@0a1b2c3", workdir)
    assert "pip install huggingface_hub" in line
    assert not (tmp_path / "run").exists()


def test_a_npz_file_needs_no_pytorch(tmp_path, reference):
    """In a process of its own. tests/weights/test_files.py tests what the other formats say."""
    state_dicts.write_state_dict(tmp_path / "release.npz", *released(reference))
    script = "import sys; sys.modules['torch'] = None; from madformer_jax.cli.command_line import main; sys.exit(main(sys.argv))"
    flags = [f"--config.convert.release={tmp_path / 'release.npz'}", f"--workdir={tmp_path / 'run'}"]
    root = pathlib.Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", script, "--mode=convert", *flags], check=True, cwd=root)
