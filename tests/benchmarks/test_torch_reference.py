"""The PyTorch yardstick computes the numbers of our model from our weights, and as many FLOPs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.cost import flops
from madformer_jax.diffusion import losses, sampler, solvers
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from tests import tiny

torch = pytest.importorskip("torch")

from benchmarks.torch_reference import counting, weights  # noqa: E402
from benchmarks.torch_reference import model as yardstick_model  # noqa: E402
from benchmarks.torch_reference.sampling import Sampler  # noqa: E402
from benchmarks.torch_reference.training import TrainingLoss  # noqa: E402


def config(released: bool):
    """The tiny model, or with the choices of the release: no classes, two stages of the U-Net, all terms."""
    c = tiny.get_config()
    c.codec.patch, c.data.image_size = 2, 16
    c.sample.solver, c.sample.steps = "ddim", 2
    if released:
        c.model.classes, c.sample.guidance = 0, 1.0
        c.model.unet_channels, c.model.unet_attention = (8, 16), (False, True)
        c.model.rope, c.model.time_embedding, c.model.clean_timestep, c.model.hidden_from = (
            "release",
            "raw",
            "noisy",
            "noisy",
        )
        c.loss.clean = 0.5
    schema.validate(c)
    return c


@pytest.fixture(scope="module", params=["class", "release"])
def pair(request):
    """A config, our model with random parameters, and the yardstick with the same ones."""
    c = config(request.param == "release")
    ours = madformer.build(c)
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(ours, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(1.0 if x.ndim < 2 else 0.0, 0.2, x.shape).astype(np.float32), shapes)
    torch.manual_seed(0)
    theirs = yardstick_model.Yardstick(yardstick_model.model_config(c), yardstick_model.Settings())
    theirs.load_state_dict(weights.state_dict(params, c.model.depth, c.model.diffusion_depth))
    return c, ours, params, theirs


def data(c, ours):
    rng = np.random.default_rng(1)
    z, noise = rng.standard_normal((2, 2, *ours.config.sizes.block_shape), np.float32)
    labels = rng.integers(0, 10, 2) if c.model.classes else None
    t = rng.integers(0, 1000, (2, c.model.blocks))
    return [None if x is None else jnp.asarray(x) for x in (z, noise, t, labels)]


def to_torch(*arrays):
    return [None if x is None else torch.tensor(np.asarray(x, np.int64 if x.ndim < 3 else None)) for x in arrays]


def ddim():
    return solvers.make("ddim").coefficients(schedules.DEFAULT, "trailing", 2)


def relative(value, expected) -> float:
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


def test_outputs_loss_and_gradients_are_ours(pair):
    c, ours, params, theirs = pair
    z, noise, t, labels = data(c, ours)
    noisy = schedules.DEFAULT.add_noise(z, noise, t)
    tokens = None if labels is None else labels[:, None]
    lambdas = losses.LossWeights(**c.loss)

    def loss(params):
        outputs = ours.apply({"params": params}, z, noisy, t, tokens, terms=lambdas.terms)
        terms = losses.unweighted_terms(outputs, z, noise, None)
        return sum(getattr(lambdas, name) * x for name, x in terms.items()), outputs

    (total, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = weights.state_dict(grads, c.model.depth, c.model.diffusion_depth)
    largest = max(float(x.norm()) for x in expected.values())
    for kind in ("sdpa", "blocks"):
        theirs.settings = yardstick_model.Settings(attention=kind)
        theirs.zero_grad()
        for name, x in theirs(*to_torch(z, noisy, t, labels)).items():
            assert relative(x.detach(), getattr(outputs, name)) < 1e-3, name
        their_loss = TrainingLoss(theirs, c)(*to_torch(z, t, noise, labels))
        assert float(their_loss.detach()) == pytest.approx(float(total), rel=1e-3)
        their_loss.backward()
        for name, parameter in theirs.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert float((gradient - expected[name]).norm()) < 1e-2 * float(expected[name].norm()) + 1e-6 * largest, (
                name
            )


@pytest.mark.parametrize("pair", ["class"], indirect=True)
def test_flex_attention_gives_the_outputs_of_the_dense_mask(pair):
    c, ours, _, theirs = pair
    z, noise, t, labels = to_torch(*data(c, ours))
    with torch.no_grad():
        theirs.settings = yardstick_model.Settings(attention="sdpa")
        expected = theirs(z, noise, t, labels)
        theirs.settings = yardstick_model.Settings(attention="flex")
        with torch.compiler.set_stance("force_eager"):
            outputs = theirs(z, noise, t, labels)
    for name, x in outputs.items():
        assert relative(x, expected[name].numpy()) < 1e-3, name


@pytest.mark.parametrize("pair", ["class"], indirect=True)
def test_samples_are_ours(pair):
    c, ours, params, theirs = pair
    _, noise, _, labels = data(c, ours)
    tokens = None if labels is None else labels[:, None]
    guidance = c.sample.guidance if labels is not None else 1.0
    settings = {"solver": "ddim", "spacing": "trailing", "steps": 2}
    expected = jax.jit(lambda p, x: sampler.sample(ours, p, x, tokens, guidance=guidance, clip_x0=3.0, **settings))(
        params, noise
    )
    draw = Sampler(theirs, c.model.prediction_type, guidance=guidance, clip_x0=3.0)
    assert relative(draw.sample(*to_torch(noise), ddim(), *to_torch(labels)), np.asarray(expected)) < 1e-3


@pytest.mark.parametrize("pair", ["release"], indirect=True)
def test_flops_are_ours(pair):
    c, ours, _, theirs = pair
    z, noise, t, labels = to_torch(*data(c, ours))
    theirs.settings = yardstick_model.Settings(attention="blocks")
    counted = counting.flops(lambda: TrainingLoss(theirs, c)(z, t, noise, labels).backward())
    assert counted == pytest.approx(flops.training_step(c).total * 2 / c.train.batch, rel=0.02)
    draw = Sampler(theirs, c.model.prediction_type)
    counted = counting.flops(lambda: draw.sample(noise, ddim(), labels))
    assert counted == pytest.approx(flops.sampling(c, 2).total, rel=0.02)


def test_a_switch_that_the_yardstick_lacks_is_named():
    c = config(False)
    c.model.clean_stream = False
    with pytest.raises(ConfigError, match=r"config\.model\.clean_stream=False"):
        yardstick_model.model_config(c)
