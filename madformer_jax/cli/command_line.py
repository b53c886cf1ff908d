"""Command line: reads flags, runs a mode, and turns errors into one line and an exit status.

    python -m madformer_jax --config=configs/digits.py --workdir=runs/digits [--mode=train] [--config.field=value]

`cli.help` writes the pages of --help. The status is 0; 2 after an error that a user can correct, with one
line on standard error; 130 after an interrupt; or 1 if --mode=compile finds that the job does not fit.
Other errors are bugs and have a traceback. A new mode is a module in `modes`; a new flag belongs in
`_define_flags`.
"""

import os
import signal
import sys

from madformer_jax.errors import ConfigError, first_line, leave
from madformer_jax.runtime import console, malloc, stored_config

# TensorFlow opens gs:// paths for epath; errors are still shown, jaxlib's too
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow prints a notice

import importlib
import inspect
import shlex
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from madformer_jax.cli import field_flags, help, log
from madformer_jax.config import fields, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.runtime import open_files, storage, xla_flags

# ---- the command line

FLAGS_VARIABLE = "MADFORMER_FLAGS"  # flags for every command, as in XLA_FLAGS


def parse(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """Returns the config, with its overrides, and the flags of a command line; argv[0] is the program.

    Without --config, the config is that of the workdir's config.json. --mode=convert and --mode=report need
    neither.

    Raises:
      ConfigError: A flag, a field or a value is wrong.
    """
    return _parse_with_file(argv)[:2]


class _ConfigFile(NamedTuple):
    """Config file that has been executed."""

    module: types.ModuleType
    args: tuple[str, ...]  # arguments of its functions: the variant, if --config has one


def _parse_with_file(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues, _ConfigFile | None]:
    """Returns the results of `parse`, and the config file or None."""
    values = _define_flags()
    try:
        rest = field_flags.use_current_names(values(list(argv), known_only=True))  # only --config.field=value is left
        _check_flags(values)
        has_file = values.config is not None
        config, file = _load_config_file(values.config) if has_file else (_load_workdir_config(values), None)
        field_flags.check(rest)
        values.remove_flag_values({"config": None})
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        rest = values(rest)
    except (flags.Error, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag: flags look like --name=value.")
    stored_config.expand_paths(values.config)
    return values.config, values, file


_EXPLAINED_FLAGS = (
    "distributed", "coordinator", "num_processes", "process_id", "dry_run", "measure", "processes", "topology",
)  # fmt: skip


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show the modes, or the fields of one.", short_name="h", flag_values=values)
    flags.DEFINE_string("config", None, "Config file, FILE or FILE:variant.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(help.mode_summaries()), "What to do.", flag_values=values)
    flags.DEFINE_bool(
        "distributed", False, "Join the other processes of the cluster (docs/launch.md).", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator", "", "host:port of process 0, with --num_processes and --process_id.", flag_values=values
    )
    flags.DEFINE_integer("num_processes", -1, "Processes of the job.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Number of this process.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "--mode=sweep: only list the runs and their costs.", flag_values=values)
    about = "--mode=sweep: only measure the seconds of sampling an image."
    flags.DEFINE_bool("measure", False, about, flag_values=values)
    about = "--mode=sweep: number of processes that share the runs; auto: one for each core of a CPU."
    flags.DEFINE_string("processes", "auto", about, flag_values=values)
    flags.DEFINE_string("topology", "", "Devices of --mode=compile, such as v5e:4x4 or h100.", flag_values=values)
    values.set_gnu_getopt(True)
    return values


def _help_page(argv: Sequence[str]) -> str | None:
    """Returns the page of --help; None if the command line does not have that flag."""
    values = _define_flags()
    try:
        values(list(argv), known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    docs = {name: str(values[name].help) for name in _EXPLAINED_FLAGS}
    return help.page(values.mode if values["mode"].present else None, docs) if values.help else None


def _check_flags(values: flags.FlagValues) -> None:
    if not values.workdir and values.mode != "compile":
        raise ConfigError(
            "--workdir is missing: name the folder of the run, for example --workdir=runs/digits (see --help)."
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
    elif values["processes"].present:
        raise ConfigError(f"--processes={values.processes} is for --mode=sweep; the mode is {values.mode}.")


def _load_workdir_config(values: flags.FlagValues) -> ConfigDict:
    path = os.path.join(values.workdir or "", "config.json")
    saved = storage.read_json(path) if values.workdir else None
    if saved is not None:
        # `trusted=None` reads this machine's own record (`runtime.provenance`), and the processes' may differ.
        several = values.distributed or values.coordinator
        return stored_config.config_from_saved(saved, path, trusted=False if several else None)
    if values.mode in ("convert", "report"):
        return config_lib.base()
    raise ConfigError("--config is missing: name a config file, for example --config=configs/digits.py.")


def _load_config_file(flag: str) -> tuple[ConfigDict, _ConfigFile]:
    """Runs get_config of a value of --config, FILE or FILE:variant."""
    path, colon, variant = config_lib.split_config_flag(storage.expand(flag))
    if not os.path.isfile(path):
        raise ConfigError(f"--config={flag}: {path!r} does not exist{help.config_location_hint(path)}.")
    module = sys.modules["config_file"] = types.ModuleType("config_file")
    module.__file__ = path
    try:
        with open(path, "rb") as file:
            exec(compile(file.read(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"--config={flag}: {path} has no function get_config().")
        args = (variant,) if colon else ()
        try:
            inspect.signature(get_config).bind(*args)
        except TypeError:
            takes = f"takes no variant: --config={path}" if colon else f"needs a variant: --config={path}:VARIANT"
            raise ConfigError(f"--config={flag}: it {takes}.") from None
        config = get_config(*args)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a config file is code that may raise anything or exit
        raise ConfigError(f"--config={flag}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={flag}: get_config() returned a {type(config).__name__}, not a ConfigDict.")
    try:
        fields.check(config, config_lib.base())
    except ConfigError as error:
        raise ConfigError(f"--config={flag}: {error}") from None
    plain = config_lib.base()
    plain.update_from_flattened_dict(fields.flat(config))
    return plain, _ConfigFile(module, args)


# ---- the process


def _start_jax(platform: str) -> None:
    """Starts JAX's backend and checks that it is the expected platform; "" for any."""
    import jax

    from madformer_jax.runtime import numerics

    numerics.apply_globally()
    advice = (
        "check that the accelerator is free (a dead process may hold it; on TPU see /tmp/libtpu_lockfile) and that jax is "
        "installed for it"
    )
    try:
        backend = jax.default_backend()
    except Exception as error:  # JAX and its plugins raise errors of any type
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(f"JAX_PLATFORMS={asked!r} does not start ({first_line(error)}): {advice}.") from error
    if platform and backend != platform:
        raise ConfigError(f"config.platform={platform!r}, but JAX runs on {backend!r}: {advice}.")


def _set_compilation_cache(setting: str, workdir: str | None) -> None:
    """Sets the folder of compiled programs. "auto" is JAX_COMPILATION_CACHE_DIR or else the user's cache."""
    import jax

    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    from_environment = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folders = {"auto": from_environment or storage.user_cache("xla"), "workdir": os.path.join(workdir or "", "xla")}
    folder = os.fspath(storage.absolute(storage.expand(folders.get(setting, setting))))
    jax.config.update("jax_compilation_cache_dir", folder)


def _score_summary(config: ConfigDict, workdir: str) -> str:
    """Returns a sentence with the score of a trained model and that of real training images, or "" without these."""
    from etils import epath

    from madformer_jax.evaluation import judge_paths
    from madformer_jax.modes import evaluate, reference

    c = config.copy_and_resolve_references()
    c.evaluate.images, c.evaluate.degrade, c.evaluate.checkpoints = "", "", "newest"
    if not epath.Path(judge_paths.reference_path(c, workdir)).exists():
        reference.run(c, workdir)
    result = evaluate.run(c, workdir)["results"][0]
    if "real" not in result:
        return ""
    scores = [result["scores"], result["real"]["scores"]]
    name = next(iter(scores[0]))
    drawn, real = (f"{s[name]['value']:.2f} [{s[name]['low']:.2f}, {s[name]['high']:.2f}]" for s in scores)
    return (
        f"{name} of {c.evaluate.n} samples: {drawn}; of {c.evaluate.n} real training images: {real}. 0 would be no difference "
        "from the held-out images."
    )


# ---- running a command


def run(argv: Sequence[str]) -> int:
    """Runs a command line and returns the exit status; argv[0] is the program.

    Raises:
      ConfigError: The command line, a file or a setting is wrong.
    """
    page = _help_page(argv)
    if page:
        console.print_text(page)
        return 0
    open_files.raise_limit()
    config, values, file = _parse_with_file(argv)
    config_lib.validate(config)
    for field in ("image", "keep"):
        if config.sample[field] and values.mode != "sample":
            raise ConfigError(f"config.sample.{field} edits a picture with --mode=sample; the mode is {values.mode}.")
    xla_flags.disable_ynnpack(config.platform)
    if xla_flags.computes_on_cpu(config.platform):
        malloc.keep_all_memory()
    if values.distributed or values.coordinator:
        from madformer_jax.runtime import partitioning

        partitioning.distributed_init(values.coordinator, values.num_processes, values.process_id)
    _set_compilation_cache(config.compilation_cache, values.workdir)
    if values.mode not in ("compile", "report"):  # these need no device
        _start_jax(config.platform)
    module = importlib.import_module(f"madformer_jax.modes.{values.mode}")
    extra: dict[str, Any] = {}
    if values.mode == "compile":
        extra = {"topology": values.topology}
    elif values.mode == "sweep":
        extra = {"file": file, "dry_run": values.dry_run, "measure": values.measure}
        extra |= {"processes": values.processes, "argv": argv}
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, modes clean up after an interrupt
    with log.config_first(config):
        if values.mode == "train" and config.train.judge:
            from madformer_jax.modes import evaluate

            evaluate.check_before_training(config, values.workdir)
        result = module.run(config, values.workdir, **extra)
    # A training that was asked to stop exits at once; the next start evaluates it.
    if values.mode == "train" and result.get("step") == config.train.steps and "stopped" not in result:
        scores = _score_summary(config, values.workdir) if config.train.judge else ""
        import jax

        if jax.process_index() == 0:
            console.print_text(help.after_training(config, values.workdir, scores))
    return 0 if result.get("fits", True) else 1


def _insert_environment_flags(argv: Sequence[str]) -> list[str]:
    """Inserts the flags of the variable MADFORMER_FLAGS before those of a command line, which override them."""
    try:
        return [*argv[:1], *shlex.split(os.environ.get(FLAGS_VARIABLE, "")), *argv[1:]]
    except ValueError as error:
        raise ConfigError(f"{FLAGS_VARIABLE}={os.environ[FLAGS_VARIABLE]!r} is not a command line: {error}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns the exit status."""
    log.to_stderr()
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
    """Returns the message of an error that a user can correct, in one line; None for a bug."""
    if isinstance(error, ConfigError):
        return " ".join(str(error).split())
    if storage.is_error(error):
        return f"a file cannot be read or written: {first_line(error)}"
    if isinstance(error, MemoryError):
        return f"this machine's memory is too small ({first_line(error)}): try a smaller image, model or batch."
    if "RESOURCE_EXHAUSTED" in str(error):  # raised by XLA in errors of several types
        return (
            f"the device's memory is full ({first_line(error)}): try a smaller train.batch, sample.batch or model, "
            "train.accumulate, model.remat=full, or more devices along config.mesh.fsdp."
        )
    return None
