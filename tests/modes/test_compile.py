import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.cost import hlo
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.modes import compile as aot
from madformer_jax.runtime import partitioning
from madformer_jax.training import train_step
from tests import tiny


@pytest.mark.slow
def test_under_fsdp_no_layer_is_gathered_outside_the_scan():
    """The stacked parameters of scanned layers are gathered one layer at a time, inside a loop.

    A stage's last layer and the U-Net are outside of the scan. Their parameters are gathered once.
    """
    c = tiny.get_config("plain")
    c.model.depth, c.model.diffusion_depth = 8, 3  # 4 and 2 layers are scanned
    c.model.width, c.model.mlp_width = 32, 48
    c.mesh.fsdp = 8
    mesh = partitioning.make_mesh(1, 8, 1)
    s = train_step.make_setup(c)
    _, state = train_step.create_state(s.model, s.tx, c.seed, mesh)
    sharding = partitioning.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 32, 32, 1), jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding),
    }
    out_shardings = (jax.tree.map(lambda x: x.sharding, state), partitioning.replicated(mesh))
    with partitioning.scope(mesh):
        step = jax.jit(train_step.make_step(s, c), donate_argnums=0, out_shardings=out_shardings)
        quick = {"xla_backend_optimization_level": 0}  # does not change what is gathered
        text = step.lower(state, batch, {}, np.uint32(0)).compile(compiler_options=quick).as_text()
    gathers = [x for x in hlo.collectives(text) if x.kind == "all-gather"]
    bodies = [state.params[stage]["body"] for stage in ("ar_layers", "diffusion_layers")]
    kernels = [x.shape for x in jax.tree.leaves(bodies) if x.ndim == 3]

    def key(shape):  # ignores the order of the dimensions
        return tuple(sorted(n for n in shape if n > 1))

    inside, outside = ({key(x.shape) for x in gathers if x.loop == loop} for loop in (True, False))
    assert not outside & {key(shape) for shape in kernels}
    layers = {key(shape[1:]) for shape in kernels}
    assert layers <= inside
    assert {x.times for x in gathers if x.loop and key(x.shape) in layers} == {4, 2}


@pytest.mark.slow
def test_exit_status_says_whether_programs_fit_a_topology(capsys, monkeypatch):
    pytest.importorskip("libtpu")
    args = ["main", "--mode=compile", "--topology=v5e:2x2", "--config=tests/tiny.py:plain", "--config.mesh.data=4"]
    args += ["--config.model.attention=blocks"]
    assert command_line.main(args) == 0
    report = capsys.readouterr().out
    assert "4 x TPU v5 lite, mesh data=4 fsdp=1 tensor=1" in report
    assert report.count("GiB of 15.75: fits") == 2
    assert "all-reduce" in report
    assert report.count("time, estimated") == report.count(" of the peak") == 2
    monkeypatch.setattr(aot, "sampling", lambda *_: oversized_program())
    monkeypatch.setattr(aot, "training_step", lambda *_: oversized_program())
    assert command_line.main(args) == 1
    assert "does not fit: 4.25 GiB too much" in capsys.readouterr().out


def oversized_program():
    return aot.ProgramReport(
        1.0, False, {"parameters": 2**30}, {}, 20 * 2**30, round(15.75 * 2**30), aot.flops.Cost(), 0.0, []
    )


@pytest.mark.parametrize(("limit", "quick"), [(2**24, True), (2**21, False), (2**20, False)])
def test_programs_close_to_the_limit_are_compiled_again_as_in_a_run(limit, quick):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((2**18,), jnp.float32, sharding=one)
    program = aot._compile_program(jax.jit(lambda x: 2 * x), (x,), {"x": x}, aot.flops.Cost(), limit)
    assert program.quick_compile == quick
    assert program.memory["inputs"] == program.memory["outputs"] == program.inputs["x"] == 2**20
    assert program.fits == (limit >= 2**21)  # a GPU's compiler does not refuse the program
    text = aot.format_report("step", program, 1)
    assert (" at level O1" in text, "does not fit" in text) == (quick, not program.fits)


def test_usable_memory_follows_from_the_compiler_error():
    pytest.importorskip("libtpu")
    device = aot.topologies.topology_devices("v5e:2x2")[0]
    assert aot.usable_memory(device) == round(15.75 * 2**30)


@pytest.mark.parametrize(
    ("topology", "words"),
    [("", "needs --topology"), ("v5e:3x3", "v5e:3x3"), ("h300", "libtpu cannot compile for --topology=h300")],
)
def test_an_unknown_topology_is_one_line(topology, words):
    if topology:
        pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match=words) as error:
        aot.run(tiny.get_config(), None, topology)
    assert "\n" not in str(error.value)


def test_a_missing_libtpu_names_the_package(monkeypatch):
    monkeypatch.setattr(aot.topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'libtpu>="):
        aot.run(tiny.get_config(), None, "v5e:2x2")


def test_a_batch_of_cached_latents_needs_no_vae():
    c = tiny.get_config()
    c.codec.name, c.data.source, c.data.image_size, c.data.channels = "vae", "arrayrecord", 64, 3
    schema.validate(c)
    mesh = partitioning.make_mesh(8, 1, 1)
    batch, latents = aot._abstract_batch(c, mesh)
    assert latents
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "mean": ((8, 8, 8, 4), jnp.float16),
        "logvar": ((8, 8, 8, 4), jnp.float16),
        "label": ((8,), jnp.int32),
    }
    assert madformer.build(c, "cpu").config.attention.name == "blocks"


def test_gpu_topologies(monkeypatch):
    assert [aot.topologies.platform(name) for name in ("h100", "h200:8", "v5e:4x4")] == ["gpu", "gpu", "tpu"]
    for name in ("h100:0", "h100:9", "h100:x"):
        with pytest.raises(ConfigError, match="h100:2 to h100:8"):
            aot.topologies.topology_devices(name)
    monkeypatch.setattr(aot.topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[cuda13\]'"):
        aot.run(tiny.get_config(), None, "h100")
    assert aot.topologies.gpu_memory_bytes("h100:8") == 0.75 * 84_929_347_584
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert aot.topologies.gpu_memory_bytes("h200") == 0.5 * 150_754_820_096
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(ConfigError, match=r"MEM_FRACTION=90% must be a number"):
        aot.topologies.gpu_memory_bytes("h200")


def test_library_calls_of_a_gpu_program():
    text = """
  %a = (f32[2]{0}, u8[0]{0}) custom-call(%x, %k), custom_call_target="__cudnn$convForward"
  %b = (f32[2]{0}, u8[0]{0}) custom-call(%x, %k), custom_call_target="__cublas$gemm"
  %c = f32[2]{0} fusion(%b), kind=kCustom, backend_config={"fusion_backend_config":{"kind":"__triton"}}
  %d = (f32[2]{0}, u8[0]{0}) custom-call(%x, %k), custom_call_target="__cublas$gemm"
"""
    assert hlo.library_calls(text) == {"__cublas$gemm": 2, "__cudnn$convForward": 1, "__triton": 1}
