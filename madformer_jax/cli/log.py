"""Log of a command: lines of this package and warnings of libraries, on standard error.

`cli.command_line` sets it up.
"""

import contextlib
import logging as python_logging
import os
from collections.abc import Iterator

from absl import flags, logging
from ml_collections import ConfigDict

from madformer_jax.config import schema, validation


def to_stderr() -> None:
    """Logs lines of this package, and warnings of all libraries, to standard error."""
    flags.FLAGS.mark_as_parsed()  # else absl warns about logging before its flags are parsed
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # folder of the package
    handler.addFilter(lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(ours))


@contextlib.contextmanager
def config_first(config: ConfigDict) -> Iterator[None]:
    """Logs the settings of a config above the first log line in the context, so that a refused command prints one line."""
    handler = logging.get_absl_handler()
    settings = ", ".join(f"{name}={value!r}" for name, value in schema.differences(config).items())

    def log_config(record: python_logging.LogRecord) -> bool:
        handler.removeFilter(log_config)  # the last filter, which sees only lines that will be printed
        logging.info("settings other than the defaults: %s", settings or "none")
        for line in validation.warnings(config):
            logging.warning("%s", line)
        return True

    handler.addFilter(log_config)
    try:
        yield
    finally:
        handler.removeFilter(log_config)
