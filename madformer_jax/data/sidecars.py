"""Captions of a folder of images: `captions.jsonl`, `captions.txt`, or a .txt file per image.

`folder.Folder` calls `read_captions`. Add further list formats to `CAPTION_LISTS` and
`_read_caption_list`.
"""

import json
import os
from collections.abc import Iterator, Sequence

from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

CAPTION_LISTS = ("captions.jsonl", "captions.txt")
CAPTION_SUFFIXES = (".txt", ".jsonl")


def read_captions(path: str, keys: Sequence[str]) -> list[str]:
    """Reads the caption of each image of a folder; "" for an image without a caption.

    Args:
      path: The folder.
      keys: Paths of the images, relative to the folder.

    Raises:
      ConfigError: The folder has several kinds of captions, or a list is damaged, repeats an image
        or names an image that does not exist.
      OSError: A file cannot be read.
    """
    lists = [os.path.join(path, name) for name in CAPTION_LISTS if os.path.isfile(os.path.join(path, name))]
    text_files = {
        key: file for key in keys if os.path.isfile(os.path.join(path, file := f"{os.path.splitext(key)[0]}.txt"))
    }
    if len(lists) + bool(text_files) > 1:
        kinds = [*map(os.path.basename, lists), *(["a .txt file beside an image"] if text_files else [])]
        raise ConfigError(f"{path} has captions in {' and in '.join(kinds)}: keep one of them.")
    if text_files:
        files = [os.path.join(path, text_files[key]) if key in text_files else "" for key in keys]
        return [storage.read_text(file).strip() if file else "" for file in files]
    if not lists:
        return [""] * len(keys)
    known, captions = set(keys), dict[str, str]()
    for position, name, caption in _read_caption_list(lists[0]):
        if name not in known or name in captions:
            problem = "twice" if name in captions else "and no such image exists"
            raise ConfigError(f"{position} names {name!r}, {problem}: names are paths below {path!r}.")
        captions[name] = caption
    return [captions.get(key, "") for key in keys]


def _read_caption_list(path: str) -> Iterator[tuple[str, str, str]]:
    """Yields the position of each line for messages, the name of the image, and its caption."""
    # `splitlines` would also split captions at U+2028 and similar characters.
    for number, line in enumerate(storage.read_text(path).split("\n"), 1):
        position = f"{path} line {number}"
        if not line.strip():
            continue
        if path.endswith(".txt"):
            name, tab, caption = line.partition("\t")
            if not tab:
                raise ConfigError(f"{position} has no tab: a line is an image's path, a tab, and its caption.")
        else:
            try:
                entry = json.loads(line)
                name, caption = entry["file_name"], entry["text"]
                is_valid = isinstance(name, str) and isinstance(caption, str)
            except (ValueError, TypeError, KeyError):
                is_valid = False
            if not is_valid:
                raise ConfigError(f'{position} is not of the form {{"file_name": "a/0.png", "text": "a caption"}}.')
        yield position, name.strip(), text.strip_bom(caption.strip(), position).strip()
