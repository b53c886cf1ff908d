"""Tests of the work of a GPU program on gpu_step.hlo, written by hand with known kernels, bytes and FLOPs."""

import pathlib

import pytest

from madformer_jax.cost import gpu_work

HLO = (pathlib.Path(__file__).parent / "gpu_step.hlo").read_text()


def test_kernels_bytes_and_flops_of_each_part():
    work = gpu_work.measure(HLO)
    rows = {row.name.split()[-1]: row for row in work.rows}
    assert rows.keys() == {"update", "split", "gemm_fusion", "flash", "conv", "copy"}
    parts = work.parts()
    assert {name: part["kernels"] for name, part in parts.items()} == {
        "layers, norms and sums": 5, "layers, SwiGLU": 1, "layers, products": 1,
        "attention, kernels": 1, "U-Net, products": 1, "optimizer": 1,
    }  # fmt: skip


def test_only_what_a_kernel_touches_counts():
    rows = {row.name.split()[-1]: row for row in gpu_work.measure(HLO).rows}
    assert rows["update"].bytes == 5 * (400 + 4 + 400)  # a slice, the index, and what is written in place
    assert rows["split"].bytes == 800 + 800  # both halves of the operand are read once
    assert rows["copy"].bytes == 2 * 3200
    assert rows["gemm_fusion"].flops == 2 * 32 * 16 * 64
    assert rows["gemm_fusion"].bytes == 2 * (32 * 64 + 64 * 16 + 32 * 16)
    assert rows["flash"].flops == 4 * 2 * 4 * 8 * 8 * 16
    assert rows["conv"].flops == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 4)


def test_attention_counts_queries_and_keys_within_constant_lengths():
    scores = '{"element_type": "BF16", "dimensions": ["2", "4", "8", "6"], "tuple_shapes": []}'
    program = f"""
ENTRY %main (q: bf16[2,8,4,16], k: bf16[2,6,4,16]) -> bf16[2,4,8,16] {{
  %q = bf16[2,8,4,16]{{3,2,1,0}} parameter(0)
  %k = bf16[2,6,4,16]{{3,2,1,0}} parameter(1)
  %two = s32[] constant(2)
  %queries = s32[2]{{0}} broadcast(%two), dimensions={{}}
  %six = s32[] constant(6)
  %keys = s32[2]{{0}} broadcast(%six), dimensions={{}}
  %flash = (bf16[2,4,8,16]{{3,1,2,0}}, f32[2,4,8]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %queries, %keys), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"intermediate_tensor_shape": {scores}}}
}}
"""
    (row,) = [row for row in gpu_work.measure(program).rows if "flash" in row.name]
    assert row.flops == 4 * 2 * 4 * 2 * 6 * 16
    queries, keys = 2 * 2 * 4 * 16, 2 * 6 * 4 * 16
    assert row.bytes == 2 * 2 * queries + 2 * 2 * keys + (4 * 2 * 4 * 8 + 2 * 2 * 4) / 4


def test_the_report_has_a_line_for_each_part():
    work = gpu_work.measure(HLO)
    report = gpu_work.format_work(work)
    assert work.calls("fmha") == 1
    assert work.figures()["kernels"] == 10
    line = next(line for line in report.splitlines() if "layers, SwiGLU" in line)
    assert line.split()[2:] == ["1", "0.0", "0.00", "0.0", "0.0", "0.0", "0.0"]
    assert "upsampler/conv" in report
    assert pytest.approx(work.figures()["bytes"]) == sum(row.bytes for row in work.rows)
