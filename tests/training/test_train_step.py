"""Tests of the training step: meshes, microbatches, optimizer and averages."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from madformer_jax.data import pipeline
from madformer_jax.diffusion import losses
from madformer_jax.errors import ConfigError
from madformer_jax.models.madformer import MADFormer, ModelOutputs
from madformer_jax.modes import train
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import codec
from madformer_jax.training import train_step
from tests import small, tiny


@pytest.fixture
def plain():
    return tiny.get_config("plain")


def batches(c, n):
    data = pipeline.train_iterator(c, batch=c.train.batch)
    result = [next(data) for _ in range(n)]
    data.close()
    return result


# ---- the whole model


def on_mesh(c, sizes, n=4):
    """Returns losses and parameters after n steps on a mesh of the first devices."""
    mesh = partitioning.make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))])
    s = train_step.make_setup(c)
    _, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh)
    params = small.random_params(s.model)
    state = train_step.State(
        np.int32(0), params, params, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.opt)
    )
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)
    losses = []
    with partitioning.scope(mesh):
        out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), None)
        step = jax.jit(train_step.make_step(s, c), out_shardings=out_shardings)
        for batch in batches(c, n):
            state, metrics = step(state, partitioning.global_batch(batch, mesh), {}, np.uint32(c.seed))
            losses.append(float(metrics["loss"]))
    return losses, np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(state.params))])


@pytest.mark.parametrize(
    "variant, mesh",
    [
        pytest.param("", (2, 2, 2), id="all axes", marks=pytest.mark.slow),
        pytest.param("plain", (1, 8, 1), id="one axis"),
    ],
)
def test_mesh_trains_like_a_single_device(variant, mesh):
    """Shards a full model over all axes at once, and a plain one over a single axis."""
    c = tiny.get_config(variant)
    c.model.blocks = min(c.model.blocks, 2)  # compiles faster
    losses, params = on_mesh(c, (1, 1, 1))
    sharded_losses, sharded = on_mesh(c, mesh)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    assert np.linalg.norm(sharded - params) <= 1e-5 * np.linalg.norm(params)


def test_the_loss_of_flow_falls(plain):
    plain.diffusion.path, plain.diffusion.time_sampling, plain.diffusion.shift = "flow", "logit_normal", 2.0
    plain.model.prediction_type, plain.optimizer.learning_rate, plain.train.steps = "v", 3e-3, 60
    losses, _ = on_mesh(plain, (1, 1, 1), n=60)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_state_is_split_over_fsdp_and_tensor():
    s, mesh = train_step.make_setup(tiny.get_config()), partitioning.make_mesh(1, 4, 2)
    _, state = train_step.create_state(s.model, s.tx, 0, mesh, power_ema=True)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert partitioning.device_bytes(state.params) < 0.5 * whole
    for tree in (state.ema, *state.power_ema.values(), state.opt[1][0].mu, state.opt[1][0].nu):
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == jax.tree.map(lambda x: x.sharding.spec, state.params)


def test_optimizer_state_has_the_names_of_older_checkpoints():
    """With another structure, old runs could not be resumed."""
    state = train_step.optimizer(tiny.get_config()).init({"w": jnp.zeros(3)})
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert names == ["[1][0].count", "[1][0].mu['w']", "[1][0].nu['w']", "[1][2].count"]


def test_each_microbatch_draws_its_own_noise(plain):
    """Compares the step in two microbatches with the mean of the losses of every other row."""
    plain.train.accumulate, seed = 2, 7
    s = train_step.make_setup(plain)
    params, (batch,) = small.random_params(s.model), batches(plain, 1)
    z = codec.to_blocks(s.codec.encode({}, batch, None), s.sizes)

    @jax.jit
    def gradient(z, key):
        loss_key = jax.random.split(key, 3)[2]
        of = lambda p: losses.training_loss(s.model, p, z, None, loss_key, losses.LossWeights(**plain.loss))  # noqa: E731
        grads, metrics = jax.grad(of, has_aux=True)(params)
        return grads, metrics["loss"]

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 2)
    parts = [gradient(z[i::2], keys[i]) for i in range(2)]
    grads = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][0], parts[1][0])
    state = train_step.State(jnp.int32(0), params, params, s.tx.init(params))
    step = jax.jit(train_step.make_step(s, plain, "tpu"))  # The loop of a TPU compiles faster.
    _, metrics = step(state, batch, {}, np.uint32(seed))
    np.testing.assert_allclose(metrics["loss"], (parts[0][1] + parts[1][1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)


# ---- captions


class _Bigrams:
    """A fake model whose logits are the row of the previous token."""

    __class__ = MADFormer  # for the checks of types
    config = SimpleNamespace(
        prediction_type="eps", vocabulary=12, null_token=12, block_order="raster", default_order=None
    )

    def apply(self, variables, z, noisy, t, tokens, lengths, *, clean_t, terms, order):
        return ModelOutputs(None, None, None, variables["params"]["table"][tokens])


def bigram_step(c, accumulate, mesh=(1, 1, 1)):
    """Returns text loss, gradient norm and expected loss of a step on captions of 2 to 17 tokens."""
    c.train.accumulate = accumulate
    s = train_step.make_setup(c)._replace(model=_Bigrams())
    rng = np.random.default_rng(3)
    params = {"table": rng.normal(size=(13, 12)).astype(np.float32)}
    batch = {
        "image": np.zeros((16, 32, 32, 1), np.uint8), "label": np.zeros(16, np.int32),
        "tokens": rng.integers(0, 12, (16, 17)).astype(np.int32), "lengths": np.arange(2, 18, dtype=np.int32),
    }  # fmt: skip
    devices = partitioning.make_mesh(*mesh, jax.devices()[: int(np.prod(mesh))])
    state = jax.device_put(
        train_step.State(np.int32(0), params, params, s.tx.init(params)), partitioning.replicated(devices)
    )
    with partitioning.scope(devices):
        step = jax.jit(train_step.make_step(s, c, "tpu"))
        _, metrics = step(state, partitioning.global_batch(batch, devices), {}, np.uint32(0))
    nll = [
        jax.nn.logsumexp(params["table"][a]) - params["table"][a, b]
        for row, n in zip(batch["tokens"], batch["lengths"])
        for a, b in itertools.pairwise(row[:n])
    ]
    assert metrics["loss"] == metrics["loss_text"]
    return float(metrics["loss_text"]), float(metrics["grad_norm"]), np.mean(nll)


@pytest.fixture
def captions(plain):
    """A config with the text loss only."""
    plain.loss.image, plain.loss.hidden, plain.loss.text, plain.train.label_dropout = 0.0, 0.0, 1.0, 0.0
    return plain


def test_the_text_loss_is_a_mean_over_the_tokens_of_the_whole_batch(captions):
    loss, norm, expected = bigram_step(captions, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for accumulate in (2, 4):
        np.testing.assert_allclose(bigram_step(captions, accumulate)[:2], (loss, norm), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_text_loss_is_the_same_on_a_mesh(captions, accumulate):
    np.testing.assert_allclose(
        bigram_step(captions, accumulate, (4, 2, 1)), bigram_step(captions, accumulate), rtol=1e-6
    )


def test_microbatches_count_the_tokens_that_dropout_leaves(captions):
    """A dropped caption is one null token, after which nothing is predicted."""
    captions.train.label_dropout = 1.0
    for accumulate in (1, 2):
        assert bigram_step(captions, accumulate)[:2] == (0.0, 0.0)
    lengths, keys = np.arange(2, 18).reshape(2, 8), jax.random.split(jax.random.key(0), 2)
    masks = [np.asarray(jax.random.bernoulli(jax.random.split(key, 3)[1], 0.5, (8, 1)))[:, 0] for key in keys]
    expected = sum(np.sum((row - 1)[~dropped]) for row, dropped in zip(lengths, masks)) / 2
    assert train_step._mean_text_tokens(jnp.asarray(lengths), keys, 0.5) == expected < np.sum(lengths - 1) / 2


# ---- a model of two parameters


def of_two_parameters(c, loss, monkeypatch):
    """Returns setup and state of a model with two parameters and a loss of (params, z, tokens)."""

    def training_loss(model, params, z, tokens, key, weights, context_noise, lengths, text_tokens, schedule, own):
        value, metrics = loss(params, z, tokens)
        return value, {"loss": value} | metrics | ({} if lengths is None else {"lengths": lengths})

    monkeypatch.setattr(train_step.losses, "training_loss", training_loss)
    s = train_step.make_setup(c)
    params = {"a": jnp.array([0.5, -2.0, 3.0]), "b": jnp.array([[1.0, -1.5]])}
    return s, train_step.State(jnp.int32(0), params, params, s.tx.init(params))


def squares(params, z, tokens):
    # With few values, the order of summation changes less than the tolerance.
    middle = z[:, :, z.shape[2] // 2]
    return sum(jnp.mean(jnp.square(p)) for p in jax.tree.leaves(params)) * jnp.mean(jnp.square(middle)), {}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # unrolled, in a loop
def test_accumulated_gradients_are_those_of_the_whole_batch(plain, platform, monkeypatch):
    s, state = of_two_parameters(plain, squares, monkeypatch)
    (batch,) = batches(plain, 1)
    whole, metrics = jax.jit(train_step.make_step(s, plain))(state, batch, {}, np.uint32(0))
    plain.train.accumulate = 4
    parts, parts_metrics = jax.jit(train_step.make_step(s, plain, platform))(state, batch, {}, np.uint32(0))
    np.testing.assert_allclose(parts_metrics["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts.params, whole.params)


def test_ema_warms_up_towards_its_target(plain, monkeypatch):
    plain.train.ema_decay = 0.15
    s, state = of_two_parameters(plain, squares, monkeypatch)
    step, ema = jax.jit(train_step.make_step(s, plain)), state.ema
    decays = (1 / 10, 0.15, 0.15)  # (1 + step) / (10 + step), at most the target
    for decay, batch in zip(decays, batches(plain, 3)):
        state, _ = step(state, batch, {}, np.uint32(0))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, ema)


def test_dropped_caption_is_one_null_token(monkeypatch):
    c = tiny.get_config()
    c.model.classes, c.text.vocabulary, c.text.length, c.train.label_dropout = 0, 300, 4, 0.5
    s, state = of_two_parameters(c, lambda params, z, tokens: (params["a"].sum(), {"tokens": tokens}), monkeypatch)
    batch = {
        "image": np.zeros((200, 32, 32, 1), np.uint8), "label": np.zeros(200, np.int32),
        "tokens": np.tile(np.arange(4, dtype=np.int32), (200, 1)), "lengths": np.full(200, 3, np.int32),
    }  # fmt: skip
    _, metrics = jax.jit(train_step.make_step(s, c))(state, batch, {}, np.uint32(0))
    dropped = np.asarray(metrics["lengths"]) == 1
    assert 60 < dropped.sum() < 140
    np.testing.assert_array_equal(metrics["tokens"], np.where(dropped[:, None], 300, batch["tokens"]))
    np.testing.assert_array_equal(metrics["lengths"], np.where(dropped, 1, 3))


def test_one_program_serves_every_seed(monkeypatch):
    c = tiny.get_config()
    s, state = of_two_parameters(c, lambda params, z, tokens: (params["a"].sum(), {"tokens": tokens}), monkeypatch)
    batch, programs = {"image": np.zeros((200, 32, 32, 1), np.uint8), "label": np.zeros(200, np.int32)}, []
    for c.seed in (0, 1):
        lowered = jax.jit(train_step.make_step(s, c)).lower(state, batch, {}, np.uint32(c.seed))
        programs.append(lowered.as_text())
    step = lowered.compile()
    zero, one, again = (step(state, batch, {}, np.uint32(seed))[1]["tokens"] for seed in (0, 1, 1))
    assert programs[0] == programs[1]
    np.testing.assert_array_equal(one, again)
    assert (zero != one).any()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_labels_becomes_the_null_token(share, monkeypatch):
    c = tiny.get_config()
    c.train.label_dropout = share

    def seen(params, z, tokens):
        return params["a"].sum(), {"tokens": tokens}

    s, state = of_two_parameters(c, seen, monkeypatch)
    labels = np.arange(2000, dtype=np.int32) % 10
    batch = {"image": np.zeros((2000, 32, 32, 1), np.uint8), "label": labels}
    step, tokens = jax.jit(train_step.make_step(s, c)), []
    for _ in range(2):
        state, metrics = step(state, batch, {}, np.uint32(0))
        tokens.append(np.asarray(metrics["tokens"])[:, 0])
    dropped = np.array(tokens) == 10  # the null token
    np.testing.assert_array_equal(np.where(dropped, labels, tokens), [labels, labels])
    assert abs(dropped.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 4000)
    assert (dropped[0] == dropped[1]).all() == (share in (0, 1))  # Each step drops other labels.


# ---- optimizer


def test_learning_rate_schedules(plain):
    c = plain
    c.train.steps, c.optimizer.learning_rate, c.optimizer.warmup, c.optimizer.decay = 1000, 2.0, 0.01, 0.15
    wsd = train_step.learning_rate(c)
    np.testing.assert_allclose([wsd(0), wsd(4), wsd(9), wsd(500), wsd(850)], [0.2, 1.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([wsd(925), wsd(1000)], [2 * 0.5**3, 2 * 0.5**6], rtol=1e-5)
    c.optimizer.schedule = "cosine"
    cosine = train_step.learning_rate(c)
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(505), cosine(1000)], [0.2, 2.0, 1.0, 0.0], atol=1e-6)
    c.optimizer.schedule = "constant"
    np.testing.assert_allclose(train_step.learning_rate(c)(999), 2.0)


def test_wsd_decays_to_the_end_even_if_the_warm_up_reaches_into_its_decay(plain):
    o, plain.train.steps = plain.optimizer, 100
    o.learning_rate, o.warmup, o.decay, o.schedule = 1.0, 0.5, 0.8, "wsd"
    rate = train_step.learning_rate(plain)
    np.testing.assert_allclose([rate(49), rate(50), rate(75), rate(100)], [1, 1, 0.5**3, 0.5**6], rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm(plain):
    plain.optimizer.clip = 0.5
    tx = train_step.optimizer(plain)
    big = {"a": jnp.full((3,), 100.0), "b": jnp.full((5,), -100.0)}
    scaled = jax.tree.map(lambda g: g * 0.5 / optax.global_norm(big), big)
    params = jax.tree.map(jnp.zeros_like, big)
    got, _ = tx.update(big, tx.init(params), params)
    want, _ = tx.update(scaled, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_weight_decay_is_that_of_adamw(plain):
    """Every parameter changes by -rate * (m / (sqrt(v) + 1e-8) + decay * p)."""
    o = plain.optimizer
    o.clip, o.weight_decay, o.schedule, o.warmup, o.learning_rate = 0.0, 0.3, "constant", 0.0, 0.01
    tx, p = train_step.optimizer(plain), np.array([1.0, -2.0, 0.5])
    params = {"bias": jnp.asarray(p, jnp.float32)}
    state, m, v = tx.init(params), 0.0, 0.0
    for n, g in enumerate(np.array([[0.1, 0.2, 0.0], [-0.3, 0.1, 0.0]]), 1):
        updates, state = tx.update({"bias": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g**2
        step = (m / (1 - o.b1**n)) / (np.sqrt(v / (1 - o.b2**n)) + 1e-8)
        p = p - 0.01 * (step + 0.3 * p)
        np.testing.assert_allclose(params["bias"], p, rtol=1e-6)


@pytest.mark.parametrize("skip", [0, 2, 6])
def test_non_finite_steps_are_skipped_and_logged(plain, skip, tmp_path, one_device, monkeypatch, caplog):
    """Steps 2 to 4 are not finite. With skip = 2, the third of them ends the run."""
    plain.optimizer.skip, plain.train.log_every, plain.optimizer.schedule = skip, 1, "cosine"
    seen = []

    def loss(model, params, z, tokens, key, *_):
        non_finite = jnp.isin(jax.random.key_data(key)[-1], jnp.array(bad, jnp.uint32))
        value = sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) * jnp.where(non_finite, jnp.nan, 1.0)
        return value, {"loss": value}

    def key_of(step):
        key = jax.random.fold_in(jax.random.key(plain.seed), step)
        return int(jax.random.key_data(jax.random.split(key, 3)[2])[-1])

    def create_state(model, tx, seed, mesh, power_ema):
        params, ema = {"w": jnp.arange(3.0)}, {"w": jnp.arange(3.0)}  # donated one by one
        state = train_step.State(jnp.int32(0), params, ema, tx.init(params))
        state = jax.device_put(state, partitioning.replicated(mesh))
        return lambda: state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    bad = [key_of(step) for step in (2, 3, 4)]
    monkeypatch.setattr(losses, "training_loss", loss)
    monkeypatch.setattr(train_step, "create_state", create_state)
    real = checkpoint.Checkpoints.save
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, step, *args: seen.append(step) or real(self, step, *args)
    )
    if skip < 3:
        with pytest.raises(ConfigError, match=f"step {3 if skip == 0 else 5}: training has diverged"):
            train.run(plain, str(tmp_path), grids=False)
    else:
        figures = train.run(plain, str(tmp_path), grids=False)
        assert figures["step"] == 6 and np.isfinite(figures["loss"]) and "skipped" not in figures
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 6]
        assert lines[2]["loss"] == pytest.approx(lines[1]["loss"], rel=0.1)
        # The schedule does not count skipped steps.
        rates = [float(train_step.learning_rate(plain)(step)) for step in (0, 1, 2)]
        assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [line[-12:] for line in messages] == [f"({k} in a row)" for k in range(1, min(skip, 3) + 1)]
    assert all(step <= (4 if skip == 2 else 2) for step in seen) or skip == 6
