"""Stand-ins for gcloud, xpk, kubectl, sbatch, srun and scancel that record their calls, and for main.py."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("tpu.sh", "gke_xpk.sh", "slurm.sh", "local.sh", "host.sh")
TPU = ("--name=run1", "--project=proj", "--zone=us-west4-a")
MAIN = ("--config=configs/ffhq1024.py:D=7", "--workdir=gs://bucket/run 1", "--config.note=it's")

# Appends its name and arguments to calls.jsonl; prints the next line of its script of answers, the last one for ever.
# An answer "ERROR text" goes to stderr with exit status 1.
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
for key, answers in json.loads((folder / "answers.json").read_text()).items():
    if key in " ".join([name, *arguments]):
        count = folder / ("count " + key.replace("/", " "))
        i = int(count.read_text()) if count.exists() else 0
        count.write_text(str(i + 1))
        answer = answers[min(i, len(answers) - 1)]
        if answer.startswith("ERROR "):
            sys.exit(answer[6:])
        print(answer)
        break
"""


class Cloud:
    """A PATH whose cloud commands are stand-ins, and what was called on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "scontrol", "scancel", "srun"):
            self.command(name, STAND_IN.format(python=sys.executable, folder=str(folder)))
        self.answers({})

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answers(self, answers: dict[str, list[str]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XPK_", "SLURM_", "MADFORMER_"))}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(home)}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        """Every gcloud call in a word; of ssh calls the host.sh verb."""
        words = []
        for call in self.calls:
            remote = next((a for a in call if a.startswith("--command=")), "")
            found = re.search(r"host\.sh (\w+)", remote)
            words.append(found[1] if found else " ".join(call[3:5]))
        return words


# Stands in for main.py: prints its arguments, exits as --exit says, or saves on SIGTERM or SIGHUP and exits with 0.
# Saving takes --slow seconds.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(float(arguments.get("slow", 0)))
    print("saved", flush=True)
    Path(arguments["ready"] + arguments.get("process_id", "") + ".saved").touch()
    sys.exit(0)
arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGHUP, save)
print("arguments", *sys.argv[1:], "on", os.environ.get("JAX_PLATFORMS"), flush=True)
Path(arguments["ready"] + arguments.get("process_id", "")).touch()
if "exit" in arguments and arguments.get("only", "") in ("", arguments.get("process_id")):
    sys.exit(int(arguments["exit"]))
if "deaf" in arguments:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(600):
    time.sleep(0.1)
"""


def option(call: list[str], name: str) -> str:
    return next(a.split("=", 1)[1] for a in call if a.startswith(name + "="))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
