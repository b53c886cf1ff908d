"""The import graph below madformer_jax, read from the source: no circle, and nothing in the library knows a mode."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "madformer_jax"


def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere, in functions too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / PACKAGE).rglob("*.py")
    }
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                graph[name] |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    return {name: (found & files.keys()) - packages for name, found in graph.items()}


def test_no_circle():
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_the_library_knows_no_mode_and_of_modes_the_sweep_alone_knows_others():
    for name, found in imports().items():
        modes = {module for module in found if module.startswith(f"{PACKAGE}.modes.")}
        assert not modes or name in (f"{PACKAGE}.main", f"{PACKAGE}.modes.sweep"), f"{name} imports {modes}"


def test_a_long_file_says_why():
    """Over 400 lines, the first lines of a file must give the reason."""
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400 or "lines" in "".join(lines[:8]), f"{path}: {len(lines)} lines"


def test_tensorflow_loads_where_it_is_used():
    """Four seconds of every start, and of every process: only TensorBoard's writer, the profiler and tfds need it."""
    code = "import sys; from madformer_jax.modes import {}; assert 'tensorflow' not in sys.modules"
    names = ", ".join(sorted(path.stem for path in (ROOT / PACKAGE / "modes").glob("[!_]*.py")))
    done = subprocess.run([sys.executable, "-c", code.format(names)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
