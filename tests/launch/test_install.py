"""Installation by launch/host.sh, with stand-ins for uv, pip and Python that record their calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RECORD = '#!/bin/sh\necho "${0##*/} $*" >>"$CALLS"\n'


@pytest.fixture
def run(tmp_path):
    """A function: runs a verb of host.sh with the commands of these names in the PATH; returns what was called."""
    shutil.copytree(LAUNCH, tmp_path / "launch")

    def command(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def host(verb, *commands):
        for name in commands:
            command(tmp_path / "bin" / name, RECORD)
        command(tmp_path / "bin" / "curl", "#!/bin/sh\necho 'exit 1'")
        command(tmp_path / ".venv/bin/python", RECORD)
        subprocess.run(
            ["bash", str(tmp_path / "launch" / "host.sh"), verb, "--"],
            env=os.environ | {
                "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "HOME": str(tmp_path)
            },
            check=True, timeout=60,
        )  # fmt: skip
        return (tmp_path / "calls").read_text().splitlines()

    return host


def test_a_host_gets_jax_for_tpu_and_the_hub_from_packages(run):
    venv, install, check = run("install", "uv", "python3")
    assert venv.startswith("uv venv ")
    assert install == "uv pip install --quiet --python .venv/bin/python --editable .[tpu,cloud,hub]"
    assert check.startswith("python -c import jax, madformer_jax;")


def test_a_host_without_uv_gets_it_as_a_package(run):
    with pytest.raises(subprocess.CalledProcessError):  # the stand-in for pip installs nothing
        run("install", "python3")
    assert run("container", "python3")[0] == "python3 -m pip install --quiet --user uv>=0.5,<1"


def test_a_container_installs_the_same_and_then_runs(run):
    install, main = run("container", "python3")
    assert install == "python3 -m pip install --quiet --editable .[tpu,cloud,hub]"
    assert main == "python -u -m madformer_jax.main"
