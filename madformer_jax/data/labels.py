"""Labels of the samples in tars: reading them from sidecar files, and numbering the classes.

`members` reads the label of each image, `tars` numbers the classes of the set. `tars` and
`hugging_face` leave out images without a label by `labeled_rows`. A label is a number,
or in a .json also the name of a class. If most labels of a set are names, its classes are the
sorted names.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from madformer_jax.data import listing
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

MISSING, UNUSABLE = -1, -2  # codes in place of a class
_FIRST_NAME = -3  # code of the first class name; further names have -4, -5, ...
MAX_CLASSES = 1_000_000  # larger numbers are taken for something else than classes
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


def read(cls_file: _NamedContent | None, json_file: _NamedContent | None, exclusions: listing.Exclusions) -> Label:
    """Reads the label of an image from its .cls and its .json file.

    A number in the .cls wins over a name in the .json. Two different numbers are an unusable label.

    Args:
      cls_file: The .cls file; None if it does not exist.
      json_file: The .json file; None if it does not exist.
      exclusions: Receives the .json files whose label is missing or not used.
    """
    by_cls = _parse_text(*cls_file) if cls_file else None
    by_json = _parse_json(*json_file) if json_file else None
    if json_file and by_json is None:
        exclusions.add(".json members without a label", json_file[0])
    if by_cls is None or (isinstance(by_cls, UnusableLabel) and isinstance(by_json, int)):
        return by_json
    if cls_file and json_file and isinstance(by_cls, int):
        if isinstance(by_json, int) and by_cls != by_json:
            return UnusableLabel(f"{cls_file[0]} says class {by_cls}, and {json_file[0]} says {by_json}")
        if isinstance(by_json, ClassName | UnusableLabel):
            exclusions.add("labels in .json members beside a .cls", json_file[0])
    return by_cls


class ClassIndex:
    """Labels of a set as integer codes, which are turned into classes once all labels are known."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}  # class name -> position of its first occurrence
        self._number_count = self._name_count = 0  # images whose label is a number, or a name
        # Reasons of the first label of each kind, should that kind turn out to be unusable.
        self._unusable = self._unusable_name = self._unusable_number = ""

    def add(self, label: Label) -> int:
        """Adds the label of one image, and returns its code for `assign_classes`."""
        if label is None:
            return MISSING
        if isinstance(label, UnusableLabel):
            self._unusable = self._unusable or label.reason
            return UNUSABLE
        if isinstance(label, int):
            self._number_count += 1
            self._unusable_number = self._unusable_number or f"a label is the number {label}, and most are names"
            return label
        self._name_count += 1
        self._unusable_name = self._unusable_name or f"{label.file} holds no class number but {label.text!r}"
        return _FIRST_NAME - self._names.setdefault(label.text, len(self._names))

    def assign_classes(self, codes: np.ndarray) -> tuple[np.ndarray, list[str], str]:
        """Turns codes into classes: by sorted name if most labels are names, else by their numbers.

        Args:
          codes: Codes returned by `add`.

        Returns:
          The class of each image, or `MISSING` or `UNUSABLE`; the names of the classes, empty if
          labels are numbers; and why the first unusable label is unusable, "" if all are usable.
        """
        is_name, is_number = codes <= _FIRST_NAME, codes >= 0
        if self._name_count <= self._number_count:
            return np.where(is_name, UNUSABLE, codes), [], self._unusable or self._unusable_name
        names = sorted(self._names)
        rank = np.empty(len(names), codes.dtype)
        rank[[self._names[name] for name in names]] = np.arange(len(names))
        classes = rank[np.where(is_name, _FIRST_NAME - codes, 0)]
        classes = np.where(is_name, classes, np.where(is_number, UNUSABLE, codes))
        return classes, names, self._unusable or self._unusable_number


def labeled_rows(classes: np.ndarray, max_unlabeled: float, reason: Callable[[int], str]) -> np.ndarray | None:
    """Returns the numbers of the images with a class, or None if none is left out.

    If no image has a class, the set is unlabeled and all are used. What is left out is logged.

    Args:
      classes: Class of each image (n,), or `MISSING` or `UNUSABLE`.
      max_unlabeled: Largest share of images that may be left out, `data.max_corrupt`.
      reason: Returns why an image has no class, given the number of the first such image.

    Raises:
      ConfigError: More than `max_unlabeled` of the images have no usable label.
    """
    unlabeled, unusable_count = np.flatnonzero(classes < 0), int((classes == UNUSABLE).sum())
    any_labeled = len(unlabeled) < len(classes)
    if not (unusable_count or 0 < len(unlabeled) < len(classes)):
        return None
    count = len(unlabeled) if any_labeled else unusable_count
    problem = f"{reason(int(unlabeled[0]))}: {count} of {len(classes)} images have no usable label"
    if count > max_unlabeled * len(classes):
        raise ConfigError(
            f"{problem}, more than config.data.max_corrupt={max_unlabeled}. Repair the labels, or remove them all."
        )
    listing.warn_once(f"{problem}; {'they are left out' if any_labeled else 'the labels are ignored'}")
    return np.flatnonzero(classes >= 0) if any_labeled else None


def _parse_text(name: str, content: bytes) -> int | UnusableLabel:
    try:
        return _parse_number(name, storage.decode_text(content, name))
    except ConfigError as error:
        return UnusableLabel(str(error).rstrip("."))


def _parse_json(name: str, content: bytes) -> Label:
    """Reads the field "label"; returns None if the file has no such field."""
    try:
        entry = json.loads(storage.decode_text(content, name))
    except ConfigError as error:
        return UnusableLabel(str(error).rstrip("."))
    except (ValueError, RecursionError):
        return UnusableLabel(f"{name} is not JSON")
    label = entry.get("label") if isinstance(entry, dict) else None
    if label is None or (isinstance(label, str) and not label.strip()):
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
    if not 0 <= value < MAX_CLASSES:
        return UnusableLabel(f"{name}: class {value} is out of range: classes count from 0 and are below {MAX_CLASSES}")
    return value
