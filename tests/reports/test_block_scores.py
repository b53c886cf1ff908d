"""Figures and table of the scores by block, from made-up results."""

import pytest

from madformer_jax.config import schema
from madformer_jax.modes import report
from madformer_jax.reports import block_scores, report_sections, results
from madformer_jax.reports.intervals import estimate
from tests.reports import made_up
from tests.reports.test_figures import texts


def value(block, context, depth, seed):
    """Returns a score that grows with the block after own blocks only, faster for a small D."""
    growth = {"true": 0.0, "other": 0.001, "own": 0.004 / depth}[context]
    return 0.03 + growth * (block - 1) + 0.0005 * ((seed * 7 + block * 3) % 5)


def rows(blocks, depth, seed):
    def score(x):
        return {"value": x, "low": x - 0.01, "high": x + 0.01, "n": 100}

    def row(block):
        loss = {context: value(block, context, depth, seed) for context in ("true", "other", "own")}
        bias = loss["own"] - loss["other"]
        distance = {context: score(0.2 * loss[context] - 0.005) for context in ("true", "own")}
        return {
            "block": block, "bits": score(3.0), "loss": {name: score(x) for name, x in loss.items()},
            "exposure_bias": score(bias), "kernel_distance": distance,
        }  # fmt: skip

    return [row(block) for block in range(1, blocks + 1)]


def write(folder, blocks=4, **settings):
    """Writes a sweep whose runs have scores by block."""
    made_up.write(folder, steps=(2, 8), scores=("KID-classifier",), **settings)
    made_up.change(
        folder, lambda x: x.update(held_out_blocks=rows(blocks, x["overrides"]["model.diffusion_depth"], x["seed"]))
    )


def test_the_report_has_a_line_for_each_setting_and_context_and_their_means(tmp_path):
    write(tmp_path, depths=(1, 8), seeds=(0, 1, 2))
    loaded = results.load_results(str(tmp_path))
    (group,) = loaded.groups
    loss, bias, distance = block_scores.panels(loaded, group)
    assert [p.name for p in (loss, bias, distance)] == [
        f"blocks-{x}" for x in ("loss", "exposure_bias", "kernel_distance")
    ]
    for panel in (loss, bias, distance):
        assert sorted(text for text in texts(panel) if text.startswith("D = ")) == ["D = 1", "D = 8"]
    dashed = [panel.svg.count(b"stroke-dasharray: 5.18") for panel in (loss, bias, distance)]
    assert dashed == [2, 0, 2]  # own blocks of the two settings
    table = block_scores.table(loaded, group)
    assert [row[:2] for row in table.rows] == [(f"D = {d}", str(block)) for d in (1, 8) for block in (1, 2, 3, 4)]
    row = dict(zip(table.header, table.rows[3]))
    for context, name in (("true", "loss, true"), ("other", "loss, other image"), ("own", "loss, own")):
        assert row[name] == estimate([value(4, context, 1, seed) for seed in (0, 1, 2)])
    assert row["exposure bias"].mean == pytest.approx(3 * (0.004 - 0.001))
    assert row["KID, own"].mean == pytest.approx(0.2 * row["loss, own"].mean - 0.005)
    titles = [section.title for section in report_sections.build_sections(loaded)]
    assert "Block by block" in titles and "Scores by block" in titles


def test_one_setting_labels_the_contexts_and_one_block_has_no_figure(tmp_path):
    write(tmp_path / "one", depths=(8,), seeds=(0,))
    loaded = results.load_results(str(tmp_path / "one"))
    loss = block_scores.panels(loaded, loaded.groups[0])[0]
    assert {"true", "own"} <= set(texts(loss))
    write(tmp_path / "single", blocks=1, depths=(8,), seeds=(0,))
    loaded = results.load_results(str(tmp_path / "single"))
    assert not block_scores.panels(loaded, loaded.groups[0]) and block_scores.table(loaded, loaded.groups[0]) is None


def test_scores_by_block_belong_to_the_first_sampling_settings(tmp_path):
    write(tmp_path, depths=(1, 8), seeds=(0,), sampled=({}, {"sample.guidance": 3.0}))
    loaded = results.load_results(str(tmp_path))
    assert len(loaded.groups[0].settings) == 4 and len(block_scores.block_rows(loaded, loaded.groups[0])) == 2
    report.run(schema.base(), str(tmp_path))
    assert (tmp_path / "report" / "figures").joinpath("blocks-loss-guidance1.0.svg").exists()
    assert "| D = 8, guidance = 1.0 | 4 |" in (tmp_path / "report" / "tables.md").read_text()
