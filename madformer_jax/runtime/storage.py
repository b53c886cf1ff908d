"""Reading and writing files on local disks and in buckets, with errors of one line.

A path is a string or an `epath.Path`, local or in a bucket (gs://, s3://); objects in a bucket can
neither seek nor append while they are written. Every module that writes a file does it with these
functions, so that a file appears whole or not at all.
"""

import contextlib
import errno
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from absl import logging
from etils import epath

from madformer_jax.errors import ConfigError, first_line

Path = str | os.PathLike[str]
T = TypeVar("T")
_BUCKET_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # used by fsspec where TensorFlow is not installed


def user_cache(kind: str) -> str:
    """Returns the folder of the user's cache for one kind of files of this package."""
    return os.path.join(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "madformer_jax", kind)


def is_remote(path: Path) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def expand(path: Path) -> str:
    """Replaces a leading `~` of a user's path by the home folder, as a shell does.

    Call it once, where a user's path enters the program. Elsewhere `~` is an ordinary name.

    Raises:
      ConfigError: The home folder is unknown, or the path is in a bucket and no package opens it.
    """
    name = os.fspath(path)
    package = _BUCKET_PACKAGES.get(name[:2]) if name[2:5] == "://" else None
    if package and not any(map(importlib.util.find_spec, ("tensorflow", package))):  # as epath chooses
        raise ConfigError(f"{name} is in a bucket. Install the packages that open it: pip install -e '.[cloud]'.")
    expanded = os.path.expanduser(name)
    if name.partition("/")[0] == "~" == expanded[:1]:
        raise ConfigError(
            f"{name}: the home folder is unknown. Set the environment variable HOME, or write the path out."
        )
    return expanded


def absolute(path: Path) -> epath.Path:
    """Returns an absolute path. (`epath.Path.absolute` turns gs:// into a local path.)"""
    return epath.Path(path if is_remote(path) else os.path.abspath(os.fspath(path)))


def kvstore(path: Path) -> dict[str, str] | str:
    """Returns TensorStore's specification of a folder, with all special characters escaped."""
    folder = os.fspath(absolute(path))
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder.rstrip('/')}/"}
    scheme, _, name = folder.partition("://")
    return f"{scheme}://{urllib.parse.quote(name)}/"


def check_arrays_path(path: Path, write: bool) -> None:
    """Checks that Orbax and TensorStore find the arrays of a folder at its own address.

    Orbax uses a path that it writes to as a glob pattern and as an unquoted URL. TensorStore reads a backslash as a slash.

    Args:
      path: Folder of a checkpoint, or one of its parents.
      write: Whether arrays are written there. Reading supports more characters.

    Raises:
      ConfigError: Names the characters.
    """
    folder = os.fspath(absolute(path))
    if _is_addressable(folder, write):
        return
    root = "gs://bucket/" if is_remote(folder) else "/"
    wrong = [character for character in dict.fromkeys(folder) if not _is_addressable(root + character, write)]
    reason = "its address, which must be gs://BUCKET/... or s3://BUCKET/..."
    if wrong:
        reason = f"{', '.join(map(repr, wrong))} in its path"
    raise ConfigError(
        f"{folder}: {'checkpoints cannot be written' if write else 'files cannot be addressed'} here, because the storage "
        f"library does not support {reason}. Rename the folder, or use another one."
    )


def _is_addressable(folder: str, write: bool) -> bool:
    import tensorstore  # slow to import

    name = f"{folder.rstrip('/')}/"
    addresses: list[Any] = [kvstore(folder)]
    if write:
        addresses.append(name if is_remote(folder) else f"file://{name}")
    try:
        same = all(name.endswith(tensorstore.KvStore.Spec(address).path) for address in addresses)
    except ValueError:
        return False
    return same and not (write and set("*?[\\") & set(folder))


def list_matching(folder: Path, pattern: str) -> list[epath.Path]:
    """Returns the sorted paths in a folder whose names match a pattern; empty if the folder does not exist.

    `glob` on a path would read characters of the folder's own name as a pattern.
    """
    where = absolute(folder)
    if not where.is_dir():
        return []
    return sorted(where / x.name for x in where.iterdir() if fnmatch.fnmatchcase(x.name, pattern))


# ---- writing and reading


def write(path: Path, put: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that it appears whole or not at all. Its folder is created.

    Errors of the file system are raised as they are; `wrap_errors` turns them into one line.

    Args:
      path: The file, which is replaced if it exists.
      put: Writes the content to a local binary file, which can seek and has a `name`.
    """
    if not is_remote(path):
        local = os.path.abspath(os.fspath(path))
        folder, name = os.path.split(local)
        os.makedirs(folder, exist_ok=True)
        # The name is unique, because other processes may write the same file.
        partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with open(partial, "wb") as file:
                put(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, local)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        _sync_folder(folder)
        return
    with tempfile.NamedTemporaryFile() as file:
        put(file)
        file.flush()
        _upload(file.name, epath.Path(path))


def _upload(local: str, path: epath.Path) -> None:
    """Copies a local file to an object in a bucket.

    Closing a file publishes the object, even after an exception. So the copy is renamed when it is whole.
    """
    size, partial = os.path.getsize(local), path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(local, "rb") as content, partial.open("wb") as target:
            target.write(b"")  # without a write, an empty file makes no object
            shutil.copyfileobj(content, target, 1 << 22)
        if (arrived := partial.stat().length) != size:
            raise OSError(errno.EIO, f"{arrived} of {size} bytes arrived", os.fspath(path))
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):
            partial.unlink(missing_ok=True)
        raise


def read_version(path: Path) -> tuple[bytes | None, bytes]:
    """Returns the content of a small file, or None if it does not exist, and its version for `write_version`."""
    with _store(path) as (store, name):
        result = store.read(name).result()
    return (None if result.state == "missing" else result.value), result.stamp.generation


def write_version(path: Path, content: bytes | None, version: bytes) -> bool:
    """Writes or, for None, removes a file if nobody has written it since `read_version`. Its folder must exist.

    This is atomic on local disks and in gs://. In s3:// two simultaneous writers may both succeed.

    Returns:
      True if the file was written, False if its version has changed.
    """
    with _store(path) as (store, name):
        return store.write(name, content, if_equal=version).result().generation != b""


# TensorStore retries 32 times by default, which takes many minutes for a bucket out of reach. `retry` asks again.
_FEW_RETRIES = {"max_retries": 2, "initial_delay": "0.2s", "max_delay": "1s"}


@contextlib.contextmanager
def _store(path: Path) -> Iterator[tuple[Any, str]]:
    """Opens a file in TensorStore and yields the store of its folder and its name.

    Errors are raised as OSError.
    """
    import tensorstore  # slow to import

    folder, name = os.path.split(os.fspath(absolute(path)))
    try:
        context = tensorstore.Context({"s3_request_retries": _FEW_RETRIES, "gcs_request_retries": _FEW_RETRIES})
        yield tensorstore.KvStore.open(kvstore(folder), context=context).result(), name
    except ValueError as error:
        raise OSError(errno.EIO if is_transient(error) else None, first_line(error).partition(" [")[0]) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes as a file; see `write`."""
    write(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Writes text as a file; see `write`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as a file; see `write`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def append_line(path: Path, text: str) -> None:
    """Appends a line to a text file, which is created if needed. In a bucket the whole object is rewritten."""
    if is_remote(path):
        remote = epath.Path(path)
        write_text(path, (remote.read_text() if remote.exists() else "") + text + "\n")
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        torn = b"\n" if end and file.read(1) != b"\n" else b""  # a killed process may have left half a line
        file.write(torn + text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; None if the file does not exist.

    Raises:
      ConfigError: The file cannot be read, or is not JSON.
    """
    with wrap_errors(f"{path} cannot be read"):
        try:
            text = retry(epath.Path(path).read_text)
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is damaged: it holds no text ({first_line(error)}).") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: it holds no JSON ({first_line(error)}).") from None


def read_json_object(path: Path, *needed: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file, which must have the fields `needed`; None if the file does not exist.

    Raises:
      ConfigError: The file cannot be read, or holds anything else.
    """
    content = read_json(path)
    absent = [name for name in needed if name not in content] if isinstance(content, dict) else []
    if absent or not isinstance(content, dict | None):
        raise ConfigError(f"{path} is damaged: it has no {f'field {absent[0]!r}' if absent else 'JSON object'}.")
    return content


def decode_text(content: bytes, name: str) -> str:
    """Decodes the content of a text file of a user: UTF-8, with or without a byte-order mark, which is removed.

    Args:
      content: Bytes of the whole file, of one member of an archive, or of one record.
      name: What the error names: a path, or `archive:member`.

    Raises:
      ConfigError: The content is not UTF-8.
    """
    try:
        return content.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text ({error}). Convert it to UTF-8.") from None


def read_text(path: Path) -> str:
    """Reads a whole text file. Line ends of any system become line feeds.

    Raises:
      ConfigError: The content is not UTF-8.
      OSError: The file cannot be read; buckets raise errors of other types (see `wrap_errors`).
    """
    text = decode_text(epath.Path(path).read_bytes(), os.fspath(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:  # `hashlib.file_digest` refuses the files of buckets
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(path: str) -> None:
    """Makes the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---- errors

# Modules whose exceptions come from a file system without being OSError, such as those of gs://.
_ERROR_MODULES = ("tensorflow.python.framework.errors", "gcsfs", "google", "aiohttp", "botocore", "fsspec")
_TRANSIENT_ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
# TensorStore names a status in its message, TensorFlow in the type, HTTP by a number.
_TRANSIENT_PATTERN = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED"
    r"|UnavailableError|DeadlineExceededError|AbortedError|ResourceExhaustedError|EIO|ESTALE|EAGAIN|ETIMEDOUT)\b"
)
_TRANSIENT_STATUS_CODES = {408, 429, 500, 502, 503, 504}
_SYSTEM_MESSAGES = (
    "No space left on device", "Disk quota exceeded", "File too large", "Permission denied", "Read-only file system",
    "Input/output error", "Stale file handle",
)  # fmt: skip


def is_error(error: BaseException) -> bool:
    """Returns whether an exception comes from a file system."""
    return isinstance(error, OSError) or any(k.__module__.startswith(_ERROR_MODULES) for k in type(error).__mro__)


def is_transient(error: BaseException) -> bool:
    """Returns whether the operation may succeed if it is repeated."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _TRANSIENT_ERRNOS or isinstance(error, ConnectionError | TimeoutError):
        return True
    if getattr(error, "code", getattr(error, "status", None)) in _TRANSIENT_STATUS_CODES:
        return True
    return bool(_TRANSIENT_PATTERN.search(f"{type(error).__name__} {error}"))


def cause_message(error: BaseException | None) -> str:
    """Returns the most informative line of an exception: the message of the system, if it has one."""
    if error is None:
        return "unknown"
    text = str(error).partition(" See full TensorStore details")[0]
    for words in _SYSTEM_MESSAGES:
        if words in text:
            return words
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (text.strip().split("\n")[0] or type(error).__name__)[:300].rstrip(".")


@contextlib.contextmanager
def wrap_errors(what: str) -> Iterator[None]:
    """Turns errors of any file system into a ConfigError of one line: `what`, then the cause."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or not is_error(error):
            raise
        raise ConfigError(f"{what}: {cause_message(error)}.") from error


def retry(call: Callable[[], T], waits: tuple[float, ...] = (0.2, 1.0, 5.0)) -> T:
    """Calls a function, and again after each of `waits` seconds if a transient error of storage occurs."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            logging.warning("storage: %s; trying again", cause_message(error))
            time.sleep(wait)
    return call()
