"""Flags --config.FIELD=value of a command line, before ml_collections reads them.

`cli.command_line` calls these functions.
"""

import re
from collections.abc import Sequence

from madformer_jax.config import aliases, fields, schema
from madformer_jax.errors import ConfigError

_FIELD_FLAG = re.compile(r"(--?(?:no)?config\.)([^=]*)")


def use_current_names(argv: Sequence[str]) -> list[str]:
    """Returns a command line whose flags name fields by their current names."""

    def rename(flag: re.Match[str]) -> str:
        return flag[1] + aliases.current_name(flag[2], "the command line")

    return [*argv[:1], *(_FIELD_FLAG.sub(rename, arg, count=1) if _FIELD_FLAG.match(arg) else arg for arg in argv[1:])]


def check(argv: Sequence[str]) -> None:
    """Checks that every --config.FIELD exists, because messages of ml_collections have several lines.

    Raises:
      ConfigError: A field does not exist.
    """
    known = fields.flat(schema.base())
    for arg in argv[1:]:
        flag = _FIELD_FLAG.match(arg)
        if flag and flag[2] not in known:
            is_section = any(name.startswith(f"{flag[2]}.") for name in known)
            hint = "name one of its fields." if is_section else fields.suggestion(flag[2], known)
            raise ConfigError(f"--config.{flag[2]}: there is no such field: {hint}")
