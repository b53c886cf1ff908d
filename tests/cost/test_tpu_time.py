"""Tests of the time estimate on step.hlo, a program in libtpu's form with known times."""

import json
import pathlib

import pytest

from madformer_jax.cost import tpu_time

HLO = (pathlib.Path(__file__).parent / "step.hlo").read_text()
PEAK = 197e12


def estimated(**changes):
    return tpu_time.estimate(HLO, **{"device_kind": "TPU v5 lite", "peak": PEAK, "flops": 0.004 * PEAK, **changes})


def test_cycles_are_multiplied_by_trip_counts():
    e = estimated()
    kernel = tpu_time.KERNEL_COSTS["block_attention_backward"]
    attention = 0.5e-3 / kernel.rate + 2 * 4 * 512 * kernel.query / 1.5e9
    assert e.busy == pytest.approx(4 * 1e-3 + 4 * 0.5e-3 + 2e-3 + attention)
    assert e.figures()["share_of_peak"] == pytest.approx(0.004 / e.busy)
    assert e.unknown == ["while.2", "other"]
    assert e.crossing == 4 * 1000


def test_collectives_wait_or_overlap():
    e = estimated()
    assert e.waiting == pytest.approx(2 * 1e9 / 200e9)  # an all-reduce moves its bytes twice
    assert e.overlapping == pytest.approx(4 * 4e8 / 200e9)
    assert e.low == pytest.approx(e.waiting + max(e.busy, e.overlapping))
    assert e.high == pytest.approx(e.waiting + e.overlapping + e.busy)


def test_tables_and_report_attribute_the_time():
    e = estimated()
    kinds, phases = e.table("kind"), e.table("phase")
    assert kinds["AR layers"] == pytest.approx({"products": 4e-3, "collectives": 8e-3})
    assert kinds["diffusion layers"] == pytest.approx({"copies": 2e-3})
    assert kinds["optimizer"] == pytest.approx({"element-wise": 2e-3})  # a conversion is element-wise
    assert kinds["U-Net"].keys() == {"collectives"}
    assert kinds["attention"].keys() == {"products"}
    assert phases["diffusion layers"].keys() == {"recomputed"}
    assert phases["attention"].keys() == phases["U-Net"].keys() == {"backward"}
    assert phases["AR layers"].keys() == {"forward"}
    assert phases["optimizer"].keys() == {"update"}
    sources = {row.name: row.source for row in e.rows}
    assert sources["fusion.1"] == "models/layers.py:30 query/dot_general"  # the caller in the package, not flax
    report = tpu_time.format_estimate(e)
    assert "AR layers, forward, products: models/layers.py:30 query/dot_general" in report
    assert "loops of unknown length (counted once): while.2, other" in report
    assert "to other slices" in report


def test_command_compares_two_reports(tmp_path, capsys):
    program = {"time": estimated().figures(), "bytes": 2**30}
    before = {"fits": True, "topology": "v5e:4x4", "config": {"a.b": 1, "a.c": 2}}
    before |= {"training step": program, "sampler": {"time": None, "bytes": 1}}
    after = json.loads(json.dumps(before))
    after["training step"]["time"]["kinds"]["AR layers"]["products"] = 1e-3
    after["config"]["a.c"] = 3
    paths = [tmp_path / name for name in ("before.json", "after.json", "old.json")]
    for path, figures in zip(paths, (before, after, {"topology": "v5e:4x4"}), strict=True):
        path.write_text(json.dumps(figures))
    assert tpu_time.main([*map(str, paths[:2])]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "a.c: 2 -> 3"
    assert out.splitlines()[2].split() == ["GiB", "per", "device", "1.00", "1.00"]
    assert "sampler" not in out
    assert out.splitlines()[-1].split() == ["AR", "layers,", "products", "0.004", "0.001"]
    for report, kernels in ((before, 4), (after, 3)):
        row = {"kernels": kernels, "bytes": 2e9, "flops": 1e12}
        report["training step"] |= {"time": None, "work": row | {"parts": {"optimizer": row}}}
    assert "  optimizer, kernels                       4.0       3.0" in tpu_time.compare(before, after).splitlines()
    assert tpu_time.main([str(paths[0])]) == 2
    assert tpu_time.main([str(paths[0]), str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert tpu_time.main([str(paths[0]), str(paths[2])]) == 2
    assert "old.json lacks 'config'" in capsys.readouterr().err
    paths[2].write_text('{"topology": "v5e:4x4", "config": []}')
    assert tpu_time.main([str(paths[0]), str(paths[2])]) == 2
    assert "old.json is not a report" in capsys.readouterr().err


def test_unknown_chip_is_rejected():
    assert tpu_time.chip_spec("TPU v1") is None
    with pytest.raises(ValueError, match="TPU v1"):
        estimated(device_kind="TPU v1")
