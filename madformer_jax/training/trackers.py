"""Experiment trackers that `train.log_to` names: TensorBoard, Trackio and Weights & Biases.

`metric_writer.MetricWriter` makes them and calls them from its thread. To add a tracker, derive from
`Tracker`, add a line to `TRACKERS` and its name to `config.validation`. The package of a tracker is
imported when it opens.
"""

import abc
import hashlib
import importlib.util
import io
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.data import preprocess
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

PROJECT = "madformer_jax"


class Tracker(abc.ABC):
    """Receives the config, scalars and images of a run."""

    title: str  # in log lines
    package: str  # that must be installed

    @abc.abstractmethod
    def __init__(self, c: ConfigDict, workdir: str):
        """Opens the tracker."""

    def write_config(self, step: int, c: ConfigDict) -> None:  # noqa: B027
        """Writes the config, unless the tracker got it when it opened."""

    @abc.abstractmethod
    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by their names."""

    @abc.abstractmethod
    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, c)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is left."""


class TensorBoard(Tracker):
    """Writes TensorBoard's event files to the workdir.

    TensorBoard's own record writer and messages need no TensorFlow, whose import takes four seconds.
    """

    title, package = "TensorBoard", "tensorboard"

    def __init__(self, c: ConfigDict, workdir: str):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path = storage.absolute(workdir) / name
        self._whole = io.BytesIO() if storage.is_remote(workdir) else None  # A bucket appends nothing.
        if self._whole is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._whole or open(self._path, "ab")  # noqa: SIM115
        self._records, self._event = RecordWriter(self._file), Event
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write_config(self, step: int, c: ConfigDict) -> None:
        from tensorboard.plugins.text import summary_v2

        self._write(step, [summary_v2.text_pb("config", f"```json\n{c.to_json(indent=2)}\n```")])

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.plugins.scalar import summary_v2

        self._write(step, [summary_v2.scalar_pb(name, value) for name, value in values.items()])

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.image.metadata import create_summary_metadata
        from tensorboard.util import tensor_util

        # The plugin reads the width, the height and one PNG for each picture.
        png = io.BytesIO()
        preprocess.to_pil(image).save(png, format="png")
        content = [str(image.shape[1]).encode(), str(image.shape[0]).encode(), png.getvalue()]
        value = Summary.Value(
            tag=name, metadata=create_summary_metadata(None, None), tensor=tensor_util.make_tensor_proto(content)
        )
        self._write(step, [Summary(value=[value])])

    def _write(self, step: int, summaries: Iterable[Any]) -> None:
        for summary in summaries:
            event = self._event(wall_time=time.time(), step=step, summary=summary)
            self._records.write(event.SerializeToString())
        if self._whole is not None:
            storage.write_bytes(self._path, self._whole.getvalue())
        else:
            self._file.flush()  # A process that is killed must leave its last report.

    def close(self) -> None:
        self._file.close()


class Trackio(Tracker):
    """Writes to Trackio's database on this machine: ~/.cache/huggingface/trackio, or TRACKIO_DIR."""

    title, package = "Trackio", "trackio"

    def __init__(self, c: ConfigDict, workdir: str):
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(
            PROJECT, run_name(workdir), config=c.to_dict(), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._image(np.broadcast_to(image, (*image.shape[:2], 3)))}, step=step)

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases(Tracker):
    """Writes to workdir/wandb; `wandb sync` uploads it. WANDB_MODE=online uploads while training."""

    title, package = "Weights & Biases", "wandb"

    def __init__(self, c: ConfigDict, workdir: str):
        import wandb

        name = re.sub(r"[/\\#?%:]", "_", run_name(workdir))  # refused in an id
        self._image = wandb.Image
        self._run = wandb.init(
            project=PROJECT, name=name, id=name, config=c.to_dict(), resume="allow",
            dir=None if storage.is_remote(workdir) else workdir, mode=os.environ.get("WANDB_MODE", "offline"),
        )  # fmt: skip

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._image(image.squeeze())}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}


def check_installed(c: ConfigDict) -> None:
    """Checks that the package of each tracker is installed.

    Raises:
      ConfigError: A package is missing.
    """
    for name in names(c):
        if importlib.util.find_spec(package := TRACKERS[name].package) is None:
            raise ConfigError(
                f"config.train.log_to={c.train.log_to!r} needs the package {package}: pip install {package}."
            )


def names(c: ConfigDict) -> list[str]:
    """Returns the names of the trackers of a config, each once."""
    return list(dict.fromkeys(name.strip() for name in c.train.log_to.split(",") if name.strip()))


def run_name(workdir: str) -> str:
    """Returns the name of a run: the folder's name and a hash of its path, so that a resumed run is found again."""
    path = os.fspath(storage.absolute(workdir))
    return f"{os.path.basename(path.rstrip('/'))}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
