import pytest

from madformer_jax.reports import formatting, results, tables
from madformer_jax.reports.results import Estimate
from tests.reports import made_up


def load(folder, **settings):
    made_up.write(folder, seeds=(0, 1), scores=("KID-classifier",), **settings)
    found = results.load_results(str(folder))
    return found, found.groups[0]


def test_a_grid_is_a_table_for_each_axis_and_compares_within_the_others(tmp_path):
    found, group = load(tmp_path, depths=(1, 8), blocks=(1, 4), steps=(2, 64))
    by_depth, by_blocks = tables.axis_tables(found, group)
    assert by_depth.header[:2] == ("L", "D")
    assert [row[:2] for row in by_depth.rows[:-1]] == [("1", "1"), ("1", "8"), ("4", "1"), ("4", "8")]
    assert by_depth.best == {(1, 2), (3, 2)}  # the larger D, at the larger budget, for each L
    assert [row[:2] for row in by_blocks.rows[:-1]] == [("1", "1"), ("1", "4"), ("8", "1"), ("8", "4")]


def test_ablations_of_a_base_are_one_table(tmp_path):
    off = {
        f"d{d}l4s{s}": {"model.diffusion_depth": 4, f"model.{field}": False}
        for d, field in ((1, "clean_stream"), (2, "ar_condition"))
        for s in (0, 1)
    }
    found, group = load(tmp_path, depths=(1, 2, 4), steps=(2,), extra=off)
    (table,) = tables.axis_tables(found, group)
    assert table.header[:2] == ("clean stream", "AR condition")
    assert [row[:2] for row in table.rows] == [
        ("False", "True"), ("True", "False"), ("True", "True"), ("real images", ""),
    ]  # fmt: skip
    assert [group.label(setting) for setting in group.settings] == ["no clean stream", "no AR condition", "base"]


def test_a_sweep_over_seeds_alone_has_a_table_of_one_setting(tmp_path):
    found, group = load(tmp_path, depths=(1,), steps=(2,))
    (table,) = tables.axis_tables(found, group)
    assert table.header[:2] == ("setting", "KID-classifier ↓")
    assert [row[0] for row in table.rows] == ["base", "real images"]
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_differences_have_the_steps_of_both_settings(tmp_path):
    _, group = load(tmp_path, depths=(1, 8), steps=(2, 64))
    (table,) = tables.difference_tables(group, "KID-classifier")
    ((label, few, many),) = table.rows
    assert label == "D = 8 minus D = 1"
    assert (few.note, many.note) == ("2 and 2 steps", "64 and 64 steps")
    assert few.estimate.values == pytest.approx(
        [made_up.score(8, 2, seed) - made_up.score(1, 2, seed) for seed in (0, 1)]
    )


def test_differences_in_a_grid_name_equal_values_once(tmp_path):
    _, group = load(tmp_path, depths=(1, 8), blocks=(1, 4), steps=(2, 64))
    (table,) = tables.difference_tables(group, "KID-classifier")
    assert [row[0] for row in table.rows] == [
        "D = 8 minus D = 1 (L = 1)", "D = 8 minus D = 1 (L = 4)", "L = 4 minus L = 1 (D = 1)", "L = 4 minus L = 1 (D = 8)",
    ]  # fmt: skip


def test_the_row_of_real_images_says_what_is_not_stored(tmp_path):
    found, group = load(tmp_path, depths=(1, 8), steps=(2,))
    (table,) = tables.axis_tables(found, group)
    assert table.rows[-1][:2] == ("real images", "not stored")
    real = {"scores": {"KID-classifier": {"value": -0.001, "low": -0.005, "high": 0.0025}}}
    made_up.change(tmp_path, lambda run: run["evaluations"][0].update(real=real))
    found = results.load_results(str(tmp_path))
    (table,) = tables.axis_tables(found, found.groups[0])
    assert table.rows[-1][:2] == ("real images", "-0.00100 [-0.00500, 0.00250]")


def test_a_score_that_differs_on_real_images_has_a_row_for_each_and_is_not_compared(tmp_path):
    """The seam score depends on L, so nothing follows from a lower one with another L."""
    load(tmp_path, depths=(1, 8), blocks=(4, 16), steps=(2, 4))
    real = {block: {"scores": {"KID-classifier": {"value": x}}} for block, x in ((4, 1.8), (16, 1.4))}
    made_up.change(
        tmp_path, lambda run: [x.update(real=real[run["overrides"]["model.blocks"]]) for x in run["evaluations"]]
    )
    found = results.load_results(str(tmp_path))
    by_depth, by_blocks = tables.axis_tables(found, found.groups[0])
    for table in (by_depth, by_blocks):
        assert [(row[0], row[2]) for row in table.rows[4:]] == [
            ("real images (L = 4)", "1.80"), ("real images (L = 16)", "1.40"),
        ]  # fmt: skip
    assert len(by_depth.best) == 2 and not by_blocks.best
    (table,) = tables.difference_tables(found.groups[0], "KID-classifier")
    assert [row[0] for row in table.rows] == ["D = 8 minus D = 1 (L = 4)", "D = 8 minus D = 1 (L = 16)"]
    (table,) = tables.crossing_tables(found.groups[0], "KID-classifier")
    assert [row[0] for row in table.rows] == ["D = 1, L = 4 and D = 8, L = 4", "D = 1, L = 16 and D = 8, L = 16"]


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0, "0"), (20.0, "20"), (20.236, "20.2"), (0.012345, "0.0123"), (-0.000123, "-0.000123"), (3e-6, "3.00e-06")],
)
def test_numbers_have_three_digits(x, text):
    assert formatting.format_number(x) == text


def test_a_cell_has_the_mean_its_interval_and_every_value():
    assert formatting.format_cell(Estimate((1.0, 2.0), 1.5, 0.5, 2.5)) == "1.50 [0.500, 2.50] (1, 2)"
    assert formatting.format_cell(Estimate((1.25,), 1.25, None, None)) == "1.25"
    assert formatting.format_cell("a | b\nc") == "a \\| b; c"
