"""Captions of a folder of images: in `captions.jsonl`, in `captions.txt`, or a .txt file beside each image."""

import json
import os
from collections.abc import Iterator, Sequence

from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

CAPTION_LISTS = ("captions.jsonl", "captions.txt")
CAPTION_SUFFIXES = (".txt", ".jsonl")


def read_captions(path: str, keys: Sequence[str]) -> list[str]:
    """The caption of each image of a folder, "" where there is none.

    Args:
      keys: the images' paths below the folder.

    Raises:
      ConfigError: there are several kinds of captions, or a list is damaged or names an image twice or one that is not there.
      OSError: a file cannot be read.
    """
    lists = [os.path.join(path, name) for name in CAPTION_LISTS if os.path.isfile(os.path.join(path, name))]
    beside = {
        key: file for key in keys if os.path.isfile(os.path.join(path, file := f"{os.path.splitext(key)[0]}.txt"))
    }
    if len(lists) + bool(beside) > 1:
        kinds = [*map(os.path.basename, lists), *(["a .txt file beside an image"] if beside else [])]
        raise ConfigError(f"config.data.path={path!r} has captions in {' and in '.join(kinds)}: keep one of them.")
    if beside:
        return [_read_caption_file(os.path.join(path, beside[key])) if key in beside else "" for key in keys]
    if not lists:
        return [""] * len(keys)
    known, found = set(keys), dict[str, str]()
    for where, name, caption in _read_caption_list(lists[0]):
        if name not in known or name in found:
            what = "twice" if name in found else "and no such image is there"
            raise ConfigError(f"{where} names {name!r}, {what}: names are paths below {path!r}.")
        found[name] = caption
    return [found.get(key, "") for key in keys]


def _read_caption_list(path: str) -> Iterator[tuple[str, str, str]]:
    """Where it stands, the image and its caption, of each line of a list."""
    # splitlines would cut captions at U+2028 and its like
    for number, line in enumerate(storage.read_text(path).split("\n"), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        if path.endswith(".txt"):
            name, tab, caption = line.partition("\t")
            if not tab:
                raise ConfigError(f"{where} has no tab: a line is an image's path, a tab, and its caption.")
        else:
            try:
                entry = json.loads(line)
                name, caption = entry["file_name"], entry["text"]
                fits = isinstance(name, str) and isinstance(caption, str)
            except (ValueError, TypeError, KeyError):
                fits = False
            if not fits:
                raise ConfigError(f'{where} is not of the form {{"file_name": "a/0.png", "text": "a caption"}}.')
        yield where, name.strip(), text.strip_bom(caption.strip(), where).strip()


def _read_caption_file(path: str) -> str:
    return text.strip_bom(storage.read_text(path), path).strip()
