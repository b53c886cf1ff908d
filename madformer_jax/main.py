"""The one entry point: flags, mode dispatch, one-line errors.

python -m madformer_jax.main --config=configs/digits.py --workdir=runs/digits [--mode=train] [--config.field=value]
"""

import contextlib
import importlib
import json
import logging as python_logging
import os
import sys
from collections.abc import Iterator, Sequence

from madformer_jax.runtime import malloc

if __name__ == "__main__":
    malloc.tune()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # clu imports TensorFlow to write TensorBoard files
# XLA's YNNPACK kernels for CPU are slower than what they replace, gradients of convolutions six times: docs/performance.md
os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type= " + os.environ.get("XLA_FLAGS", "")

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from madformer_jax.errors import ConfigError
from madformer_jax.runtime.storage import user_cache

_MODES = ("train", "sample", "export", "convert", "prepare", "benchmark", "compile")  # each a module of `modes`


def parse(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The config, with its overrides, and the flags of a command line (argv[0] is the program).

    Without --config the workdir's own config.json is taken; a conversion needs neither.

    Raises:
      ConfigError: a flag, a field or a value is wrong, in one line.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.", flag_values=values)
    flags.DEFINE_enum("mode", "train", _MODES, "What to do.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "Join the other processes of the cluster.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", -1, "Processes of the job.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Number of this process.", flag_values=values)
    flags.DEFINE_string("topology", "", "TPU topology for --mode=compile, such as v5e:4x4.", flag_values=values)
    given = next((a for a in argv if a.startswith(("--config=", "-config=")) or a in ("--config", "-config")), "")
    try:
        if given:
            config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values, sys_argv=list(argv))
        else:
            config_flags.DEFINE_config_dict(
                "config", _of_workdir(argv), "Config of the workdir.", flag_values=values, sys_argv=list(argv)
            )
        rest = values(list(argv))
        _ = values.config.seed  # a file that did not load says so only when it is touched
    except ConfigError:
        raise
    except Exception as error:  # a config file is code: it, or its overrides, may raise anything
        raise ConfigError(_one_line(error.__cause__ or error, given or "--config")) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is no flag: flags look like --name=value.")
    if not values.workdir and values.mode != "compile":
        raise ConfigError("--workdir is missing: name the folder of the run, for example --workdir=runs/digits.")
    return values.config, values


def _of_workdir(argv: Sequence[str]) -> ConfigDict:
    from madformer_jax import config as config_lib

    workdir = next((arg.split("=", 1)[1] for arg in argv if arg.lstrip("-").startswith("workdir=")), "")
    path = os.path.join(workdir, "config.json")
    if "--mode=convert" in argv and not os.path.exists(path):
        return config_lib.base()
    if not workdir or not os.path.exists(path):
        raise ConfigError("--config is missing: name a config file, for example --config=configs/digits.py.")
    with open(path) as file:
        saved = json.load(file)
    config = config_lib.base()
    config.update(ConfigDict(saved))
    return config


def _one_line(error: BaseException, flag: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, flags.Error) else f"{flag}: {text}"


def _use_cache(setting: str) -> None:
    import jax

    if setting == "off":
        return
    folder = user_cache("xla") if setting == "auto" else setting
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _check_platform(expected: str) -> None:
    import jax

    if expected and jax.default_backend() != expected:
        raise ConfigError(
            f"config.platform={expected!r}, but JAX runs on {jax.default_backend()!r}: check that the accelerator is free "
            "(a dead process may hold it; on TPU see /tmp/libtpu_lockfile) and that jax is installed for it."
        )


def _log_to_stderr() -> None:
    """Our own log lines and everybody's warnings, on standard error."""
    flags.FLAGS.mark_as_parsed()  # absl's own, which keep their defaults; else it warns that it logs so early
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = (os.path.dirname(os.path.abspath(__file__)), "parameter_overview.py")
    handler.addFilter(
        lambda record: (
            record.levelno >= python_logging.WARNING
            or record.pathname.startswith(ours[0])
            or record.pathname.endswith(ours[1])
        )
    )


@contextlib.contextmanager
def _above_the_log(line: str) -> Iterator[None]:
    """Logs `line` above the first one that comes within: a command that is refused prints its error alone."""
    handler = logging.get_absl_handler()

    def above(record: python_logging.LogRecord) -> bool:
        handler.removeFilter(above)  # the last of the filters: it sees only what will be printed
        logging.info(line)
        return True

    handler.addFilter(above)
    try:
        yield
    finally:
        handler.removeFilter(above)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 0, or 2 after a one-line error."""
    _log_to_stderr()
    try:
        config, values = parse(sys.argv if argv is None else argv)
        from madformer_jax import config as config_lib

        config_lib.validate(config)
        if values.distributed or values.coordinator:
            from madformer_jax.runtime import partitioning

            partitioning.distributed_init(values.coordinator, values.num_processes, values.process_id)
        _use_cache(config.compilation_cache)
        if values.mode != "compile":
            _check_platform(config.platform)
        differences = (f"{name}={value!r}" for name, value in config_lib.differences(config).items())
        module = importlib.import_module(f"madformer_jax.modes.{values.mode}")
        extra = {"topology": values.topology} if values.mode == "compile" else {}
        with _above_the_log("settings other than the defaults: " + (", ".join(differences) or "none")):
            result = module.run(config, values.workdir, **extra)
        return result if isinstance(result, int) else 0  # --mode=compile has a status, the others figures
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
