"""Experiment trackers that `train.log_to` names: TensorBoard, Trackio and Weights & Biases.

`metric_writer.MetricWriter` makes them and calls them from its thread. To add a tracker, derive from
`Tracker`, add a line to `TRACKERS` and its name to `config.validation`. The package of a tracker is
imported when it opens, since TensorFlow takes four seconds.
"""

import abc
import hashlib
import importlib.util
import os
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

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
    """Writes TensorBoard's files to the workdir."""

    title, package = "TensorBoard", "clu"

    def __init__(self, c: ConfigDict, workdir: str):
        from clu import metric_writers

        self._board = metric_writers.create_default_writer(workdir)

    def write_config(self, step: int, c: ConfigDict) -> None:
        self._board.write_texts(step, {"config": f"```json\n{c.to_json(indent=2)}\n```"})

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._board.write_scalars(step, values)
        self._board.flush()  # A process that is killed must leave its last report.

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._board.write_images(step, {name: image[None]})
        self._board.flush()

    def close(self) -> None:
        self._board.close()


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

        name = run_name(workdir)
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
    """Returns the names of the trackers of a config."""
    return [name.strip() for name in c.train.log_to.split(",") if name.strip()]


def run_name(workdir: str) -> str:
    """Returns the name of a run: the folder's name and a hash of its path, so that a resumed run is found again."""
    path = os.fspath(storage.absolute(workdir))
    return f"{os.path.basename(path.rstrip('/'))}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
