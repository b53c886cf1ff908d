"""Seeds of single sources of randomness: each follows `seed` unless `seeds` has another."""

import numpy as np
import pytest

from madformer_jax.config import schema, seeds
from madformer_jax.data import pipeline
from madformer_jax.modes import train
from madformer_jax.sampling import generation
from tests import tiny


def config(**values):
    c = tiny.get_config("plain")
    c.mesh.data = -1  # any number of devices
    c.update_from_flattened_dict({name.replace("_", "."): value for name, value in values.items()})
    return c


class CreatedError(Exception):
    """Holds the seed of the initial weights."""


def initial_seed(c, workdir, monkeypatch):
    def create(model, tx, seed, *others):
        raise CreatedError(seed)

    monkeypatch.setattr(train.train_step, "create_state", create)
    with pytest.raises(CreatedError) as created:
        train.run(c, str(workdir))
    return created.value.args[0]


def first_rows(c):
    data = pipeline.train_iterator(c, batch=8)
    rows = next(data)["image"]
    data.close()
    return rows


def test_every_source_follows_the_seed_by_default():
    c = config(seed=7)
    assert [seeds.of(c, source) for source in schema.base().seeds] == [7, 7, 7]


def test_each_seed_decides_its_own_source_alone(tmp_path, monkeypatch):
    base = config(seed=1)
    rows = first_rows(base)
    for name, expected in (("init", (5, 1, 1)), ("data", (1, 5, 1)), ("sample", (1, 1, 5))):
        c = config(**{"seed": 1, f"seeds_{name}": 5})
        assert initial_seed(c, tmp_path, monkeypatch) == expected[0]
        assert np.array_equal(first_rows(c), rows) == (expected[1] == 1)
        assert generation.make_inputs(c, None, None).seed == expected[2]
        other = config(**{"seed": 2, f"seeds_{name}": 5})  # `seed` no longer decides this source
        assert seeds.of(other, name) == 5
