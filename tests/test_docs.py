"""README.md and docs/: every command of ours in them parses, with settings that hold, and what it names exists."""

import pathlib
import re
import shlex

import pytest

from madformer_jax.cli import command_line, help
from madformer_jax.config import fields
from madformer_jax.config import schema as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page, marked=True):
    """The words of each command in a page's bash blocks, lines that go on joined; `marked`: also behind `<!-- needs: ... -->`."""
    blocks = r"^( *<!-- needs: [^\n]* -->\n)? *```bash\n(.*?)```"
    for needs, block in re.findall(blocks, page.read_text(), re.DOTALL | re.MULTILINE):
        if needs and not marked:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def of_ours(words):
    """Returns the arguments of a command that runs the program, or None for other commands."""
    for i, word in enumerate(words):
        if word in ("madformer_jax.main", "madformer_jax") and words[i - 1] == "-m":
            return words[i + 1 :]
    if words[0] in ("...", "madformer"):
        return words[1:]
    return words[words.index("--") + 1 :] if words[0].startswith("launch/") and "--" in words else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        args = of_ours(words)
        if args is None:
            first = words[words.index("-m") + 1] if "-m" in words else words[0]
            if first.startswith(("tests.", "madformer_jax.", "launch/")):
                path = first if "/" in first else f"{first.replace('.', '/')}.py"
                assert (ROOT / path).exists(), words
            continue
        if any("NAME" in arg for arg in args):
            continue
        args = [arg for arg in args if not arg.startswith(("--workdir=", "--distributed", "--num_", "--process_"))]
        if not any(arg.startswith("--config=") for arg in args):  # the workdir's
            says = any("prompts" in arg or "captions" in arg for arg in args)
            args.insert(0, "--config=configs/drawings.py:text" if says else "--config=configs/digits.py")
        if any("sample.block_order" in arg for arg in args):  # of a model of random order
            args.insert(1, "--config.model.block_order=random")
        config = command_line.parse(["main", f"--workdir={tmp_path}", *args])[0]
        config_lib.validate(config)


def test_the_reference_is_that_of_the_fields():
    """It is made by `python -m madformer_jax.cli.help > docs/reference.md`."""
    text = help.reference_page()
    assert (ROOT / "docs" / "reference.md").read_text() == text
    assert all(f"| `{name}` |" in text for name in fields.flat(config_lib.base()))


@pytest.mark.parametrize("mark, last", [("main", "madformer_jax.main"), ("test", "pytest")])
def test_a_command_of_the_readme_is_complete_in_itself(mark, last):
    (block,) = re.findall(rf"<!-- {mark} -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text())
    steps = [shlex.split(step) for step in block.split("&&")]
    assert steps[0] == ["python3", "-m", "venv", ".venv"]
    assert steps[1] == [".", ".venv/bin/activate"]
    assert last in steps[-1]
    assert not {"git", "cd"} & {step[0] for step in steps}, "a command starts in the root of a checkout"
