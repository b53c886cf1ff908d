import json
import pathlib
import re
import shutil

import pytest

from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.modes import report
from madformer_jax.reports import formatting, results, tables
from tests.reports import made_up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two settings, two budgets, two seeds and a report."""
    folder = tmp_path_factory.mktemp("sweep")
    made_up.write(folder, depths=(1, 8), seeds=(0, 1), steps=(2, 64), scores=("KID-classifier",))
    report.run(schema.base(), str(folder))
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "report").rglob("*.*")) if path.is_file()}


def test_equal_results_give_equal_bytes(folder, tmp_path):
    """The order of folders, their names and the order of keys do not matter."""
    for i, path in enumerate(sorted((folder / "runs").iterdir(), reverse=True)):
        shutil.copytree(path, tmp_path / "runs" / f"copy{i}")
        result = tmp_path / "runs" / f"copy{i}" / "result.json"
        result.write_text(json.dumps(dict(reversed(json.loads(result.read_text()).items()))))
    shutil.copy(folder / "sweep.json", tmp_path)
    assert command_line.main(["main", "--mode=report", f"--workdir={tmp_path}"]) == 0
    ours, others = content(folder), content(tmp_path)
    assert ours.keys() == others.keys()
    assert [name for name in ours if ours[name] != others[name]] == []


def test_the_page_is_self_contained(folder):
    page = (folder / "report" / "index.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"https?:|url\((?!#)|@import|<link|src=\"(?!data:)|href=\"(?!#)", page)
    assert page.count("<svg") == len(list((folder / "report" / "figures").glob("*.svg")))
    for run in (folder / "runs").iterdir():
        assert run.name in page
    for text in (
        *(f"{cost} per image" for cost in ("solver steps", "full-model passes", "GFLOPs", "seconds")),
        "reference",
    ):
        assert text in page, text
    assert "data:image/png;base64," in page
    assert "width=device-width" in page


def test_ids_in_a_page_are_unique_or_equivalent(folder):
    """An id that occurs in several inlined figures must name equal elements."""
    page = (folder / "report" / "index.html").read_text()
    found = {}
    for name, what in re.findall(r'<(?:path|clipPath|g) id="([^"]+)"([^>]*>(?:\s*<rect[^>]*>)?)', page):
        assert found.setdefault(name, what) == what


def test_tables_have_the_papers_form_and_a_command(folder):
    text = (folder / "report" / "tables.md").read_text()
    table = text[text.index("### D, at 64 steps (digits, 256 px, n = 500)") :]
    assert table.split("\n")[2] == "| D | KID-classifier ↓ | solver steps | NFE | passes |"
    assert f"KID-classifier {formatting.format_number(made_up.score(1, 64, 0))}: D = 1 at 64 steps, seed 0:" in table
    assert table[table.index("```bash\n") :].split("\n")[1:4] == [
        "python -m madformer_jax.main --workdir=runs/cell --config=configs/sweeps/depth.py:cpu --config.seed=0 "
        "--config.train.steps=600 --config.model.diffusion_depth=1",
        "python -m madformer_jax.main --workdir=runs/cell --mode=reference",
        "python -m madformer_jax.main --workdir=runs/cell --mode=evaluate --config.sample.steps=64",
    ]


def test_an_error_is_a_line_and_writes_nothing(tmp_path, capsys):
    made_up.write(tmp_path, depths=(1,), seeds=(0,), steps=(2,))
    (tmp_path / "runs" / "d1l4s0" / "grid.png").write_bytes(b"no picture")
    assert command_line.main(["main", "--mode=report", f"--workdir={tmp_path}"]) == 2
    assert "d1l4s0/grid.png cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_results_without_their_samples_have_a_report(tmp_path):
    made_up.write(tmp_path, depths=(1, 8), seeds=(0,), steps=(2,))
    for path in (tmp_path / "runs").glob("*/grid.png"):
        path.unlink()
    assert command_line.main(["main", "--mode=report", f"--workdir={tmp_path}"]) == 0
    assert "data:image/png" not in (tmp_path / "report" / "index.html").read_text()


RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("name", [folder.parent.name for folder in sorted(RESULTS.glob("*/sweep.json"))])
def test_the_committed_scores_are_those_of_the_committed_results(name):
    assert (
        tables.to_csv(results.load_results(str(RESULTS / name))) == (RESULTS / name / "report/results.csv").read_text()
    )


def test_a_committed_report_is_made_again_from_its_results(tmp_path):
    """The bytes of figures depend on the version of matplotlib, so only their names are compared."""
    source = RESULTS / "noise_path_cpu"
    (tmp_path / "runs").symlink_to(source / "runs")
    shutil.copy(source / "sweep.json", tmp_path)
    report.run(schema.base(), str(tmp_path))
    made, committed = content(tmp_path), content(source)
    assert made.keys() == committed.keys()
    assert made["tables.md"] == committed["tables.md"]
