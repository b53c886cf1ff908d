import functools
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from madformer_jax.config import schema
from madformer_jax.config.shapes import derive_sizes, vocabulary_size
from madformer_jax.cost import flops, network_flops
from madformer_jax.diffusion import sampler
from madformer_jax.models import madformer, vae
from madformer_jax.sampling import solving

SWITCHES = {
    "four blocks": {"blocks": 4},
    "release options, shared": {
        "rope": "release", "time_embedding": "raw", "clean_timestep": "noisy", "hidden_from": "noisy", "param_sets": "shared",
    },
    "no clean stream, class, guided": {"clean_stream": False, "classes": 10},
    "no condition": {"ar_condition": False, "hidden_from": "noisy"},
    "block only, text, guided": {"diffusion_attention": "block", "text.vocabulary": 10, "text.length": 5, "loss.text": 1.0},
    "clean term, D = 2": {"diffusion_depth": 2, "loss.clean": 0.1},
    "D = N, image term alone": {"depth": 2, "diffusion_depth": 2, "loss.hidden": 0.0},
    "hidden term alone": {"loss.image": 0.0},
    "one block": {"blocks": 1},
    "rectangular blocks": {"blocks": 8},
    "neighbours": {"unet_context": True},
    "1 x 1 convolutions": {"unet_kernel": 1},
}  # fmt: skip


def wide(**changes):
    """Returns a config so wide that element-wise work is below 1 % of the FLOPs.

    Attention is about a tenth. The model is traced but never run.
    """
    c = schema.base()
    c.codec.name, c.codec.patch = "pixel", 1
    c.data.image_size, c.data.channels = 64, 4
    c.model.width, c.model.heads, c.model.mlp_width = 256, 4, 704
    c.model.depth, c.model.diffusion_depth, c.model.blocks = 3, 1, 2
    c.model.unet_channels, c.model.unet_layers, c.model.unet_time_width = (64, 128), 1, 32
    c.model.unet_groups = c.model.unet_heads = 4
    c.train.batch, c.sample.steps = 2, 2
    for name, value in changes.items():
        section, field = name.split(".") if "." in name else ("model", name)
        c[section][field] = value
    c.sample.guidance = 2.0 if vocabulary_size(c) else 1.0
    return c


def xla_flops(function, *args):
    """Returns XLA's FLOPs of a function.

    XLA counts the body of a loop once, so no loop may run twice.
    """
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def abstract(c):
    """Returns the model and abstract parameters, blocks, timesteps and tokens of a batch."""
    model = madformer.build(c)
    params = jax.eval_shape(lambda key: nn.meta.unbox(madformer.init(model, key)), jax.random.key(0))
    z = jax.ShapeDtypeStruct((c.train.batch, *derive_sizes(c).block_shape), jnp.float32)
    t = jax.ShapeDtypeStruct(z.shape[:2], jnp.int32)
    tokens = jax.ShapeDtypeStruct((c.train.batch, c.text.length), jnp.int32) if model.config.vocabulary else None
    return model, params, z, t, tokens


@pytest.mark.parametrize("name", SWITCHES)
def test_training_flops_equal_the_count_of_xla(name):
    c = wide(**SWITCHES[name])
    model, params, z, t, tokens = abstract(c)
    terms = tuple(term for term, weight in c.loss.items() if weight)

    def total(params, z, noisy, t, tokens):
        outputs = model.apply({"params": params}, z, noisy, t, tokens, terms=terms)
        return sum(jnp.sum(x**2) for x in outputs if x is not None)

    args = params, z, z, t, tokens
    assert xla_flops(jax.grad(total), *args) == pytest.approx(flops.training_step(c).total, rel=0.02)
    if name in ("four blocks", "one block"):  # the other cases contain it in the gradient
        assert xla_flops(total, *args) == pytest.approx(c.train.batch * flops.forward_pass(c)[0].total, rel=0.02)


SAMPLING = {
    "four blocks": {"blocks": 4},
    "no clean stream, class, guided": {"clean_stream": False, "classes": 10},
    "no condition, D = 2": {"diffusion_depth": 2, "ar_condition": False},
    "no condition, block only": {"ar_condition": False, "diffusion_attention": "block"},
    "no condition, no clean stream": {"ar_condition": False, "clean_stream": False},
    "block only, text, guided": {"diffusion_attention": "block", "text.vocabulary": 10, "text.length": 5},
    "one block": {"blocks": 1},
    "neighbours": {"unet_context": True},
    "1 x 1 convolutions": {"unet_kernel": 1},
    "Heun": {"sample.solver": "heun", "sample.steps": 3},
    "steps by block": {
        "blocks": 4,
        "sample.solver": "heun",
        "sample.steps": 2,
        "sample.steps_by_block": "linear:1.5x:1",
    },
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_flops_equal_the_count_of_xla(name):
    c = wide(**SAMPLING[name])
    model, params, z, _, tokens = abstract(c)
    sample = functools.partial(
        sampler.sample, model, solver=c.sample.solver, spacing="trailing", steps=solving.solver_steps(c),
        guidance=c.sample.guidance, unroll=True,
    )  # fmt: skip
    assert xla_flops(sample, params, z, tokens) == pytest.approx(flops.sampling(c, c.train.batch).total, rel=0.02)


@pytest.mark.parametrize("convs", [True, False], ids=["with quant convolutions and attention", "without"])
def test_vae_flops_equal_the_count_of_xla(convs):
    model = vae.typical_vae(4, 8) if convs else vae.typical_vae(16, 4)
    model = model.clone(use_quant_conv=convs, use_post_quant_conv=convs, mid_block_add_attention=convs)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    side = 64 // model.reduction
    latent = jax.ShapeDtypeStruct((1, side, side, model.latent_channels), jnp.float32)
    encode, decode = (functools.partial(f, model) for f in (vae.encode, vae.decode))
    assert xla_flops(encode, params, image) == pytest.approx(network_flops.vae_encode(64, model), rel=0.02)
    assert xla_flops(decode, params, latent) == pytest.approx(network_flops.vae_decode(64, model), rel=0.02)


def test_nfe_follows_the_formula_of_the_paper():
    """N - D layers run once and D layers at every step, in passes of the model (section 1)."""
    c = wide(depth=4)
    c.sample.steps = 50
    assert flops.nfe(c) == pytest.approx(3 / 4 + 50 / 4)
    once, twice = (flops.sampling(c, 1).diffusion_layers, flops.sampling(c, 2).diffusion_layers)
    assert twice == 2 * once
    c.sample.steps = 100
    assert flops.sampling(c, 1).ar_layers == flops.sampling(wide(depth=4), 1).ar_layers


@pytest.mark.parametrize(
    ("changes", "condition", "extension"),
    [
        ({}, 3, 4),
        ({"param_sets": "shared"}, 3, 4),
        ({"clean_stream": False}, 3, 0),
        ({"ar_condition": False}, 0, 4),
        ({"ar_condition": False, "clean_stream": False}, 0, 0),
        ({"diffusion_attention": "block"}, 3, 3),
        ({"diffusion_attention": "block", "ar_condition": False}, 0, 0),
        ({"diffusion_depth": 4}, 0, 4),
        ({"diffusion_depth": 4, "diffusion_attention": "block"}, 0, 0),
    ],
)
def test_passes_count_the_layers_of_every_switch(changes, condition, extension):
    """The condition counts in each block and the extension in each but the last.

    Guidance doubles both.
    """
    c = wide(depth=4, **changes)
    c.sample.steps = 5
    for blocks in (1, 4, 16):
        c.model.blocks = blocks
        layers = blocks * (condition + 5 * c.model.diffusion_depth) + (blocks - 1) * extension
        assert flops.model_passes(c) == pytest.approx(layers / (4 * blocks))
        assert flops.model_passes_until(c, blocks - 1, 5) == flops.model_passes(c)
    nfe, passes = flops.nfe(c), flops.model_passes(c)
    c.model.classes, c.sample.guidance, c.sample.guidance_interval = 10, 2.0, (200, 600)
    assert (flops.nfe(c), flops.model_passes(c)) == (2 * nfe, 2 * passes)
    c.sample.guidance = 1.0
    assert (flops.nfe(c), flops.model_passes(c)) == (nfe, passes)


def test_cost_follows_the_evaluations_of_the_solver():
    """Heun evaluates twice in each step but the last."""
    c = wide(depth=4, blocks=4)  # D = 1
    c.sample.steps = 7
    seven = {name: x for name, x in flops.image_cost(c).items() if name != "solver_steps"}
    c.sample.solver, c.sample.steps = "heun", 4
    heun = flops.image_cost(c)
    assert heun.pop("solver_steps") == 4 and heun == seven
    layers = [flops.model_passes_until(c, 0, step) * 16 for step in (1, 2, 3, 4)]
    assert layers == [5, 7, 9, 10]  # condition 3, evaluation 1


def test_passes_include_the_extension_between_two_blocks():
    c = wide(depth=4, blocks=4)  # D = 1
    c.sample.steps = 2
    layers = [flops.model_passes_until(c, block, step) * 16 for block in range(4) for step in (1, 2)]
    assert layers == [4, 5, 13, 14, 22, 23, 31, 32]  # condition 3, step 1, extension 4


def test_peak_rate_is_that_of_the_data_sheet():
    def peak_of(kind, dtype):
        return flops.peak_rate(dtype, types.SimpleNamespace(device_kind=kind))

    assert peak_of("TPU v5 lite", "bfloat16") == 197e12
    assert peak_of("TPU v5", "bfloat16") == 459e12
    assert peak_of("TPU v4", "float32") == 275e12
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_of("NVIDIA GB200", "bfloat16") > peak_of("NVIDIA B200", "bfloat16")


@pytest.mark.parametrize("kind", ["NVIDIA RTX A1000 Laptop GPU", "NVIDIA L40"])
def test_a_device_whose_name_begins_like_another_is_measured(kind, monkeypatch):
    monkeypatch.setattr(flops, "matmul_rate", lambda dtype: 1.0)
    assert flops.peak_rate("bfloat16", types.SimpleNamespace(device_kind=kind)) == 1.0


def test_peak_rate_of_a_cpu_is_measured():
    measured = flops.peak_rate("float32")
    assert measured == flops.matmul_rate("float32") > 1e8  # measured once
    cost = flops.Cost(unet=measured)
    assert flops.mfu(cost, 2.0, devices=2) == pytest.approx(0.25)
