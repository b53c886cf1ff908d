"""Labels of samples in tars: what the sidecars of an image say, and the numbers of the classes.

A label is a number, or in a .json also the name of a class. Where most labels are names, the sorted names are the classes.
"""

import json
import re
from typing import NamedTuple

import numpy as np

from madformer_jax.data import listing
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

MISSING, UNUSABLE = -1, -2  # in place of a class: there is no label; there is one that is not usable
_FIRST_NAME = -3  # code of the first name; those that follow count down
_MAX_CLASSES = 1_000_000  # more are not classes
_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")  # 1.0 is class 1


class UnusableLabel(NamedTuple):
    """A label that cannot be used."""

    reason: str  # names the file


class ClassName(NamedTuple):
    """A label that is the name of a class."""

    text: str
    file: str


Label = int | ClassName | UnusableLabel | None
_NamedContent = tuple[str, bytes]  # name for messages, content


def read(cls: _NamedContent | None, beside: _NamedContent | None, left_out: listing.Exclusions) -> Label:
    """Reads the label of an image from its .cls and its .json; either may be missing.

    A number in the .cls wins over a name in the .json. Two different numbers are an odd label.
    """
    by_cls = _parse_text(*cls) if cls else None
    by_json = _parse_json(*beside) if beside else None
    if beside and by_json is None:
        left_out.add(".json members without a label", beside[0])
    if by_cls is None or (isinstance(by_cls, UnusableLabel) and isinstance(by_json, int)):
        return by_json
    if cls and beside and isinstance(by_cls, int):
        if isinstance(by_json, int) and by_cls != by_json:
            return UnusableLabel(f"{cls[0]} says class {by_cls}, and {beside[0]} says {by_json}")
        if isinstance(by_json, ClassName | UnusableLabel):
            left_out.add("labels in .json members beside a .cls", beside[0])
    return by_cls


class ClassIndex:
    """Collects the labels of a set in little memory, and numbers the classes."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}  # in the order in which they came
        self._numbers = self._named = 0  # images with such a label
        self._odd = self._odd_name = self._odd_number = ""  # reason of the first one, if that kind is odd

    def add(self, label: Label) -> int:
        """Takes the label of one image, and returns a code that `number` turns into its class."""
        if label is None:
            return MISSING
        if isinstance(label, UnusableLabel):
            self._odd = self._odd or label.reason
            return UNUSABLE
        if isinstance(label, int):
            self._numbers += 1
            self._odd_number = self._odd_number or f"a label is the number {label}, and most are names"
            return label
        self._named += 1
        self._odd_name = self._odd_name or f"{label.file} holds no class number but {label.text!r}"
        return _FIRST_NAME - self._names.setdefault(label.text, len(self._names))

    def number(self, codes: np.ndarray) -> tuple[np.ndarray, list[str], str]:
        """Numbers the classes by name if most labels are names, else as the labels say.

        Returns:
          The class of each image, or `NONE` or `ODD`; the names of the classes, empty if labels are numbers; and the reason
          of an odd label, "" if there is none.
        """
        is_name, is_number = codes <= _FIRST_NAME, codes >= 0
        if self._named <= self._numbers:
            return np.where(is_name, UNUSABLE, codes), [], self._odd or self._odd_name
        names = sorted(self._names)
        rank = np.empty(len(names), codes.dtype)
        rank[[self._names[name] for name in names]] = np.arange(len(names))
        classes = rank[np.where(is_name, _FIRST_NAME - codes, 0)]
        return np.where(is_name, classes, np.where(is_number, UNUSABLE, codes)), names, self._odd or self._odd_number


def _parse_text(name: str, content: bytes) -> int | UnusableLabel:
    try:
        text = storage.decode_text(content, name)
    except ConfigError as error:
        return UnusableLabel(str(error).rstrip("."))
    return _parse_number(name, text)


def _parse_json(name: str, content: bytes) -> Label:
    """Reads the field "label"; None where there is none."""
    try:
        entry = json.loads(storage.decode_text(content, name))
    except ConfigError as error:
        return UnusableLabel(str(error).rstrip("."))
    except (ValueError, RecursionError):
        return UnusableLabel(f"{name} is not JSON")
    label = entry.get("label") if isinstance(entry, dict) else None
    if label is None or label == "":
        return None
    if isinstance(label, bool):
        return int(label)
    number = _parse_number(name, str(label))
    if isinstance(label, str) and isinstance(number, UnusableLabel) and not _NUMBER.fullmatch(label.strip()):
        try:
            label.encode()
        except UnicodeEncodeError:
            return number
        return ClassName(label.strip(), name)
    return number


def _parse_number(name: str, text: str) -> int | UnusableLabel:
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        return UnusableLabel(f"{name} holds no class number")
    value = int(match[1])
    if not 0 <= value < _MAX_CLASSES:
        return UnusableLabel(
            f"{name}: class {value} is out of range: classes count from 0 and are below {_MAX_CLASSES}"
        )
    return value
