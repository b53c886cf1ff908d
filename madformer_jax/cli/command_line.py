"""The one entry point: flags, mode dispatch, and the one place that turns an error into a line and a status.

python -m madformer_jax --config=configs/digits.py --workdir=runs/digits [--mode=train] [--config.field=value]

--help tells of the modes, --mode=NAME --help of the fields that matter to one. Status 0, or 2 after one line on standard
error, or 130 after an interrupt; --mode=compile has 1 for what does not fit. What is no user's or system's fault is a traceback.
"""

import os
import signal
import sys

from madformer_jax.errors import ConfigError, first_line, leave
from madformer_jax.runtime import console, stored_config

# clu imports TensorFlow to write TensorBoard files; errors, jaxlib's among them, are shown
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # which is announced

import contextlib
import glob
import importlib
import inspect
import logging as python_logging
import shlex
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from madformer_jax.cli import field_flags, help
from madformer_jax.config import fields, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.runtime import open_files, storage, xla_flags

# ---- the command line

FLAGS_VARIABLE = "MADFORMER_FLAGS"  # flags for every command, as in XLA_FLAGS


def parse(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The config, with its overrides, and the flags of a command line (argv[0] is the program).

    Without --config the workdir's own config.json is taken; a conversion and a report need neither.

    Raises:
      ConfigError: a flag, a field or a value is wrong, in one line.
    """
    return _parse_with_file(argv)[:2]


class _ConfigFile(NamedTuple):
    """A config file that has been run."""

    module: types.ModuleType
    args: tuple[str, ...]  # of its functions: the variant, if one was given


def _parse_with_file(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues, _ConfigFile | None]:
    """As `parse`, and the config file, where there is one."""
    values = _define_flags()
    try:
        rest = field_flags.use_current_names(values(list(argv), known_only=True))  # only --config.field=value is left
        _check_flags(values)
        config, file = (
            (_load_workdir_config(values), None) if values.config is None else _load_config_file(values.config)
        )
        field_flags.check(rest)
        values.remove_flag_values({"config": None})
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        rest = values(rest)
    except (flags.Error, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is no flag: flags look like --name=value.")
    stored_config.expand_paths(values.config)
    return values.config, values, file


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Tell of the modes, or of one.", short_name="h", flag_values=values)
    flags.DEFINE_string("config", None, "Config file, FILE or FILE:variant.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(help.mode_summaries()), "What to do.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "Join the other processes of the cluster.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", -1, "Processes of the job.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Number of this process.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "--mode=sweep: only list the runs, with what they cost.", flag_values=values)
    flags.DEFINE_bool(
        "measure", False, "--mode=sweep: only measure the seconds of drawing an image.", flag_values=values
    )
    flags.DEFINE_string(
        "topology", "", "What --mode=compile compiles for, such as v5e:4x4 or h100.", flag_values=values
    )
    values.set_gnu_getopt(True)
    return values


def _help_page(argv: Sequence[str]) -> str | None:
    """The page that --help asks for; None without it.

    Raises:
      ConfigError: there is no such mode.
    """
    values = _define_flags()
    try:
        values(list(argv), known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return help.page(values.mode if values["mode"].present else None) if values.help else None


def _check_flags(values: flags.FlagValues) -> None:
    if not values.workdir and values.mode != "compile":
        raise ConfigError(
            "--workdir is missing: name the folder of the run, for example --workdir=runs/digits (--help tells more)."
        )
    if values.workdir:
        validation.check_path("--workdir", values.workdir)
        values["workdir"].value = storage.expand(values.workdir)
    if not values.coordinator and max(values.num_processes, values.process_id) >= 0:
        raise ConfigError("--num_processes and --process_id need --coordinator=host:port.")
    if values.topology and values.mode != "compile":
        raise ConfigError(f"--topology={values.topology} is for --mode=compile; the mode is {values.mode}.")
    if values.mode == "sweep":
        if values.config is None:
            raise ConfigError(
                "--config is missing: name the sweep's file, as in --config=configs/sweeps/depth.py:digits."
            )
    elif values.dry_run or values.measure:
        raise ConfigError(f"--dry_run and --measure are for --mode=sweep; the mode is {values.mode}.")


def _load_workdir_config(values: flags.FlagValues) -> ConfigDict:
    path = os.path.join(values.workdir or "", "config.json")
    saved = storage.read_json(path) if values.workdir else None
    if saved is not None:
        several = values.distributed or values.coordinator  # whose records may differ, and their configs must not
        return stored_config.config_from_saved(saved, path, trusted=False if several else None)
    if values.mode in ("convert", "report"):
        return config_lib.base()
    raise ConfigError("--config is missing: name a config file, for example --config=configs/digits.py.")


def _load_config_file(given: str) -> tuple[ConfigDict, _ConfigFile]:
    """Runs get_config of FILE or FILE:variant."""
    path, colon, variant = config_lib.split_config_flag(storage.expand(given))
    if not os.path.isfile(path):
        raise ConfigError(f"--config={given}: there is no file {path!r}{help.config_location_hint(path)}.")
    module = sys.modules["config_file"] = types.ModuleType("config_file")
    module.__file__ = path
    try:
        with open(path, "rb") as file:
            exec(compile(file.read(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"--config={given}: {path} has no function get_config().")
        args = (variant,) if colon else ()
        try:
            inspect.signature(get_config).bind(*args)
        except TypeError:
            takes = f"takes no variant: --config={path}" if colon else f"needs a variant: --config={path}:VARIANT"
            raise ConfigError(f"--config={given}: it {takes}.") from None
        config = get_config(*args)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a config file is code, which may raise anything, and end the process
        raise ConfigError(f"--config={given}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={given}: get_config() returned a {type(config).__name__}, not a ConfigDict.")
    try:
        fields.check(config, config_lib.base())
    except ConfigError as error:
        raise ConfigError(f"--config={given}: {error}") from None
    plain = config_lib.base()
    plain.update_from_flattened_dict(fields.flat(config))
    return plain, _ConfigFile(module, args)


# ---- the process


def _start_jax(platform: str) -> None:
    """Starts JAX's backend.

    Raises:
      ConfigError: it does not start, or is none of `platform`, where that is not "".
    """
    import jax

    from madformer_jax.runtime import numerics

    numerics.apply_globally()
    held = (
        "check that the accelerator is free (a dead process may hold it; on TPU see /tmp/libtpu_lockfile) and that jax is "
        "installed for it"
    )
    try:
        found = jax.default_backend()
    except Exception as error:  # of JAX, its assertions among them, and of any plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(f"JAX_PLATFORMS={asked!r} does not start ({first_line(error)}): {held}.") from error
    if platform and found != platform:
        raise ConfigError(f"config.platform={platform!r}, but JAX runs on {found!r}: {held}.")


def _set_compilation_cache(setting: str, workdir: str | None) -> None:
    """Sets the folder of compiled programs. For "auto" JAX_COMPILATION_CACHE_DIR comes before the user's cache."""
    import jax

    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folders = {"auto": own or storage.user_cache("xla"), "workdir": os.path.join(workdir or "", "xla")}
    folder = os.fspath(storage.absolute(storage.expand(folders.get(setting, setting))))
    jax.config.update("jax_compilation_cache_dir", folder)


_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_ACCELERATOR_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def _disable_ynnpack(platform: str) -> None:
    """XLA's YNNPACK kernels for CPU are slower than what they replace, gradients of convolutions six times (docs/performance.md).

    Not with an accelerator, where the flag is of no use; and XLA ends a process that gives it a flag it does not know.
    """
    asked = platform or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    on_cpu = asked == "cpu" if asked else not any(map(glob.glob, _ACCELERATOR_DEVICES))
    given = os.environ.get("XLA_FLAGS", "")
    if on_cpu and _YNN_FLAG not in given and (flag := xla_flags.supported(f"--{_YNN_FLAG}=")):
        os.environ["XLA_FLAGS"] = f"{flag} {given}"


def _score_summary(config: ConfigDict, workdir: str) -> str:
    """How good a trained model is, in a sentence, with what real images of the training set score beside it."""
    from etils import epath

    from madformer_jax.evaluation import judge_paths
    from madformer_jax.modes import evaluate, reference

    c = config.copy_and_resolve_references()
    c.evaluate.images, c.evaluate.checkpoints = "", "newest"
    if not epath.Path(judge_paths.reference_path(c, workdir)).exists():
        reference.run(c, workdir)
    found = [evaluate.run(c, workdir)["results"][0]["scores"]]
    c.evaluate.images, c.evaluate.grid = "data:train", ""
    found.append(evaluate.run(c, workdir)["results"][0]["scores"])
    name = next(iter(found[0]))
    drawn, real = (f"{one[name]['value']:.2f} [{one[name]['low']:.2f}, {one[name]['high']:.2f}]" for one in found)
    return (
        f"{name} of {c.evaluate.n} samples: {drawn}; of as many real training images: {real} (0: as the held-out ones)."
    )


# ---- the log


def _log_to_stderr() -> None:
    """Our own log lines and everybody's warnings, on standard error."""
    flags.FLAGS.mark_as_parsed()  # absl's own, which keep their defaults; else it warns that it logs so early
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the package
    handler.addFilter(lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(ours))


@contextlib.contextmanager
def _log_config_first(config: ConfigDict) -> Iterator[None]:
    """Logs what a config is above the first line that comes within: a command that is refused prints its error alone."""
    handler = logging.get_absl_handler()
    settings = ", ".join(f"{name}={value!r}" for name, value in config_lib.differences(config).items())

    def above(record: python_logging.LogRecord) -> bool:
        handler.removeFilter(above)  # the last of the filters: it sees only what will be printed
        logging.info("settings other than the defaults: %s", settings or "none")
        for line in validation.warnings(config):
            logging.warning("%s", line)
        return True

    handler.addFilter(above)
    try:
        yield
    finally:
        handler.removeFilter(above)


# ---- all of it


def run(argv: Sequence[str]) -> int:
    """Runs one command line.

    Returns:
      The exit status.

    Raises:
      ConfigError: what is wrong with it.
    """
    page = _help_page(argv)
    if page:
        console.print_text(page)
        return 0
    open_files.raise_limit()
    config, values, file = _parse_with_file(argv)
    config_lib.validate(config)
    _disable_ynnpack(config.platform)
    if values.distributed or values.coordinator:
        from madformer_jax.runtime import partitioning

        partitioning.distributed_init(values.coordinator, values.num_processes, values.process_id)
    _set_compilation_cache(config.compilation_cache, values.workdir)
    if values.mode not in ("compile", "report"):  # which need no device
        _start_jax(config.platform)
    module = importlib.import_module(f"madformer_jax.modes.{values.mode}")
    extra: dict[str, Any] = {}
    if values.mode == "compile":
        extra = {"topology": values.topology}
    elif values.mode == "sweep":
        extra = {"file": file, "dry_run": values.dry_run, "measure": values.measure}
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there are things to put away
    with _log_config_first(config):
        if values.mode == "train" and config.train.judge:
            from madformer_jax.modes import evaluate

            evaluate.check_before_training(config, values.workdir)
        result = module.run(config, values.workdir, **extra)
    # A training that was asked to stop leaves at once: the next start judges it.
    if values.mode == "train" and result.get("step") == config.train.steps and "stopped" not in result:
        scores = _score_summary(config, values.workdir) if config.train.judge else ""
        import jax

        if jax.process_index() == 0:
            console.print_text(help.after_training(config, values.workdir, scores))
    return 0 if result.get("fits", True) else 1


def _insert_environment_flags(argv: Sequence[str]) -> list[str]:
    """Inserts the flags of the variable MADFORMER_FLAGS before those of a command line, which override them.

    Raises:
      ConfigError: The variable has a quote that is not closed.
    """
    try:
        return [*argv[:1], *shlex.split(os.environ.get(FLAGS_VARIABLE, "")), *argv[1:]]
    except ValueError as error:
        raise ConfigError(f"{FLAGS_VARIABLE}={os.environ[FLAGS_VARIABLE]!r} is not a command line: {error}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status, after one line where it is not 0."""
    _log_to_stderr()
    try:
        return run(_insert_environment_flags(sys.argv if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = _error_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def _error_line(error: Exception) -> str | None:
    """What a user can do something about, in one line; None where it is a fault of ours."""
    if isinstance(error, ConfigError):
        return " ".join(str(error).split())
    if storage.is_error(error):
        return f"a file cannot be read or written: {first_line(error)}"
    if isinstance(error, MemoryError):
        return f"this machine's memory is too small ({first_line(error)}): try a smaller image, model or batch."
    if "RESOURCE_EXHAUSTED" in str(error):  # of XLA, under several names
        return (
            f"the device's memory is full ({first_line(error)}): try a smaller train.batch, sample.batch or model, "
            "train.accumulate, model.remat=full, or more devices along config.mesh.fsdp."
        )
    return None
