"""Numbers of programs that a sweep compiles."""

import pytest

from madformer_jax.sweeps import programs, sweep_file, sweep_folder
from madformer_jax.sweeps.sweep_file import Sweep, grid
from tests import tiny


@pytest.mark.parametrize(
    ("axes", "budgets", "overrides", "expected"),
    [
        ({"model.width": (16, 24)}, {"steps": (1, 4)}, [{}], (2, 2)),
        ({"model.width": (16, 24)}, {"steps": (4,)}, [{"sample.spacing": "linspace"}, {}], (2, 4)),
        ({"model.width": (16,)}, {"steps": (1, 4)}, [{"sample.spacing": "linspace"}, {}], (1, 1)),
        ({"diffusion.path": ("flow", "cosine")}, {"steps": (1, 4)}, [{}], (2, 1)),
        ({"optimizer.learning_rate": (1e-3, 1e-4)}, {"steps": (4,)}, [{}], (2, 1)),
        ({"model.prediction_type": ("eps", "x0")}, {"steps": (1, 4)}, [{"sample.solver": "heun"}, {}], (2, 4)),
        ({"model.width": (16,)}, {"steps": (1, 4)}, [{"sample.diffusion_depth": 1}, {}], (1, 2)),
        ({"train.elastic_depths": ((1,),), "train.elastic_depth": (True, False)}, {"steps": (4,)}, [{}], (2, 1)),
        ({"model.blocks": (1, 4)}, {"steps": (2, 4)}, [{"sample.steps_by_block": "linear:1.5x:0.5x"}], (2, 3)),
        ({"model.width": (16,)}, {"seconds": (2, 4)}, [{}], (1, 1)),
    ],
)
def test_runs_share_programs_unless_a_static_setting_differs(axes, budgets, overrides, expected):
    definition = Sweep("?", grid(axes, seeds=3), budgets, overrides)
    runs = sweep_file.expand_runs(definition, tiny.get_config("plain"))
    job = sweep_folder.Job("x", "", definition, runs, sweep_file.expand_evaluations(definition), "unused")
    assert programs.count(job) == expected
