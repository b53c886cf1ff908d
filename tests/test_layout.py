"""The layout of madformer_jax, read from its source: which package may import which, and what files it has.

A new package, or a new arrow between two packages, needs a line in `LAYERS`.
"""

import ast
import collections
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "madformer_jax"
MAX_LINES = 400

# Package -> the packages that its modules may import, within functions too. Every package may import `errors`.
# A package stands below those that it imports; "" is the top: __init__, __main__ and main.
LAYERS = {
    "config": "",
    "ops": "",
    "runtime": "config",
    "ops.attention": "config ops runtime",
    "data.drawings": "data runtime",
    "data": "config runtime",
    "models": "config ops ops.attention runtime",
    "cost": "config diffusion models",
    "diffusion": "config models",
    "weights": "config models runtime",
    "sampling": "config cost data diffusion models runtime weights",
    "evaluation.networks": "config weights",
    "evaluation": "config data diffusion evaluation.networks models runtime sampling weights",
    "training": "config cost data diffusion evaluation models runtime sampling",
    "sweeps": "config cost runtime",
    "reports": "config runtime sweeps",
    "publishing": "config data",
    "modes": "config cost data diffusion evaluation evaluation.networks models publishing reports runtime sampling sweeps "
    "training weights",
    "cli": "config evaluation modes runtime",
    "": "cli runtime sampling",
}
# A package and its part in a folder of its own count as one where cycles are looked for.
PARTS = {"data.drawings": "data", "evaluation.networks": "evaluation", "ops.attention": "ops"}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Returns the file of each module."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / PACKAGE).rglob("*.py")
    }


@functools.cache
def imports() -> dict[str, set[str]]:
    """Returns for each module those of ours that it imports anywhere, in functions too."""
    files = modules()
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


def package_of(module: str) -> str:
    """Returns the package of a module, without the name of ours: "ops.attention"."""
    is_package = modules()[module].name == "__init__.py"
    parts = module.split(".")
    return ".".join(parts[1:] if is_package else parts[1:-1])


def package_imports() -> dict[str, dict[str, set[str]]]:
    """Returns package -> imported package -> the modules that import it."""
    arrows: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for name, imported in imports().items():
        for module in imported - {f"{PACKAGE}.errors"}:
            if package_of(module) != package_of(name):
                arrows[package_of(name)][package_of(module)].add(name)
    return arrows


def test_a_package_imports_only_those_below_it():
    packages = {package_of(name) for name in modules()}
    assert packages == LAYERS.keys(), "each package needs a line in LAYERS"
    arrows = package_imports()
    for package, allowed in LAYERS.items():
        for other, names in arrows[package].items():
            assert other in allowed.split(), f"{package or 'the top'} must not import {other or 'the top'}: see {names}"


def test_the_table_allows_no_more_than_what_is_imported():
    arrows = package_imports()
    for package, allowed in LAYERS.items():
        assert set(allowed.split()) == arrows[package].keys(), (
            f"LAYERS[{package!r}] names packages that are not imported"
        )


def test_packages_have_no_cycle():
    graph: dict[str, set[str]] = collections.defaultdict(set)
    for package, allowed in LAYERS.items():
        package = PARTS.get(package, package)
        graph[package] |= {PARTS.get(other, other) for other in allowed.split()} - {package}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"packages import each other in a cycle: {' -> '.join(error.args[1])}")


def test_modules_have_no_cycle():
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a cycle: {' -> '.join(error.args[1])}")


def test_only_the_command_line_and_the_sweep_import_modes():
    for name, imported in imports().items():
        modes = {module for module in imported if module.startswith(f"{PACKAGE}.modes.")}
        allowed = (f"{PACKAGE}.cli.command_line", f"{PACKAGE}.modes.sweep", f"{PACKAGE}.modes.evaluate")
        assert not modes or name in allowed, f"{name} imports {modes}"


def test_a_file_name_occurs_once():
    """A name alone says which file is meant."""
    counts = collections.Counter(path.name for path in modules().values() if path.name != "__init__.py")
    twice = [name for name, count in counts.items() if count > 1]
    assert not twice, f"several files have the names {twice}"


def test_the_top_of_the_package_has_only_its_entry_points():
    files = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "main.py", "errors.py", "py.typed"}
    for folder in (ROOT / PACKAGE).iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert any(path.name != "__init__.py" for path in folder.rglob("*.py")), f"{folder} holds no module"


def test_a_long_file_says_why():
    """Over 400 lines, the first lines of a file must give the reason."""
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= MAX_LINES or "lines" in "".join(lines[:8]), (
            f"{path}: {len(lines)} lines, more than {MAX_LINES}: split the file, or say in its first 8 lines why it has so many"
        )


def test_tensorflow_loads_where_it_is_used():
    """Importing TensorFlow takes four seconds in every process, and only tfds and the files of a gs:// bucket need it."""
    code = "import sys; from madformer_jax.modes import {}; assert 'tensorflow' not in sys.modules"
    names = ", ".join(sorted(path.stem for path in (ROOT / PACKAGE / "modes").glob("[!_]*.py")))
    done = subprocess.run([sys.executable, "-c", code.format(names)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
