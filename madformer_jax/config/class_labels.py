"""Class labels as users write them: `config.sample.labels`, `Model.sample(labels=...)`, the demo.

An integer is always a class number. A text is a class name first and a class number second.
`sample.labels` holds labels separated by commas, or a JSON list: '["2", 7]' draws the class named 2,
then class number 7. `Model.sample` writes the JSON form, and `sample.labels` has it once names are
resolved.
"""

import difflib
import json
import operator
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from madformer_jax.config import fields
from madformer_jax.errors import ConfigError

_NUMBER = re.compile(r"[+-]?[0-9]{1,4000}")  # Python refuses to convert longer ones
_FIELD = "config.sample.labels"
_MAX_SHOWN = 8  # labels in a message, at most


def parse(text: str, classes: int, names: Sequence[str] = ()) -> list[int]:
    """Returns the class numbers that a value of `sample.labels` stands for; an empty value stands for all classes.

    Args:
      text: The value.
      classes: Number of classes of the model.
      names: Names of the classes in order; empty if the data name none.

    Raises:
      ConfigError: A label is not a class, or it is ambiguous.
    """
    if not text:
        return list(range(classes))
    listed = check(text, classes)
    if listed is not None:
        return [_number_from_item(item, classes, names) for item in listed]
    items = [item.strip() for item in text.split(",")]
    whole = _numbers_by_name(text, names)
    if not whole or len(items) == 1:
        return [_number_from_text(i, items, classes, names) for i in range(len(items))]
    if all(_numbers_by_name(item, names) or _NUMBER.fullmatch(item) for item in items):
        raise ConfigError(
            f"{_FIELD}={text!r} is the name of one class and a list of {len(items)} classes. "
            f"Write '{_to_json([text])}' for the name or '{_to_json(items)}' for the list."
        )
    return [_number_from_item(text, classes, names)]


def check(text: str, classes: int) -> list[Any] | None:
    """Checks labels as far as possible before the class names are known.

    Returns:
      The items of a JSON list; None if the value is not one.

    Raises:
      ConfigError: The list is empty, or holds something that cannot be a label.
    """
    listed = fields.json_list(text)
    if listed == []:
        raise ConfigError(f"{_FIELD}={text!r} holds no label. Name a class, or leave it empty for all classes.")
    for item in listed or ():
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ConfigError(f"{_FIELD}: {item!r} must be a class name (text) or a class number (integer).")
        if isinstance(item, int):
            _check_range(item, classes)
    return listed


def from_python(value: Any) -> str:
    """Returns labels of a Python caller as a value of `sample.labels`.

    Args:
      value: One class number, a sequence of class numbers and names, or a text as on the command line.

    Raises:
      ConfigError: The value is none of these.
    """
    if isinstance(value, str):
        return value
    items = [value] if _is_integer(value) else fields.python_items(value)
    if items is None:
        raise ConfigError(
            f"labels={reprlib.repr(value)} must be a class number, or a list of class numbers and class names."
        )
    return _to_json([_python_item(item) for item in items])


def from_numbers(numbers: Iterable[int]) -> str:
    """Returns class numbers as a value of `sample.labels` that means the same with and without class names."""
    return _to_json(numbers)


def format_numbers(text: str) -> str:
    """Returns resolved labels as protocols store them: class numbers separated by commas."""
    listed = fields.json_list(text)
    return text if listed is None else ",".join(map(str, listed))


def display_name(number: int, names: Sequence[str]) -> str:
    """Returns the name of a class, or "class 3" if the data have no class names."""
    return names[number] if number < len(names) else f"class {number}"


def summary(numbers: Sequence[int], names: Sequence[str]) -> str:
    """Returns the names of the first few distinct classes for a line of the log."""
    distinct = [display_name(k, names) for k in dict.fromkeys(numbers)]
    return ", ".join(distinct[:_MAX_SHOWN]) + ", ..." * (len(distinct) > _MAX_SHOWN)


def distinct_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Returns names that differ from each other and from `taken`, by adding class numbers to repeated names."""
    repeated = {text for text in names if names.count(text) > 1} | set(taken)
    return [f"{text} (#{k})" if text in repeated else text for k, text in enumerate(names)]


def _number_from_text(i: int, items: Sequence[str], classes: int, names: Sequence[str]) -> int:
    """Returns the class number of one label of the command line.

    Raises:
      ConfigError: It is not a class, or it is the name of one class and the number of another.
    """
    item = items[i]
    if not item:
        raise ConfigError(f"{_FIELD}: a label is empty. Give class numbers or names separated by commas.")
    number = _number_from_item(item, classes, names)
    other = int(item) if _NUMBER.fullmatch(item) else number
    if other == number or not 0 <= other < classes:
        return number
    short = len(items) <= _MAX_SHOWN
    before, behind = (items[:i], items[i + 1 :]) if short else ((), ())
    by_name, by_number = _to_json([*before, item, *behind]), _to_json([*before, other, *behind])
    raise ConfigError(
        f"{_FIELD}: {item!r} is ambiguous. It names the class {names[number]!r} (number {number}) and is the number of the class "
        f"{display_name(other, names)!r}. Write '{by_name}' for the name or '{by_number}' for the number."
    )


def _number_from_item(item: int | str, classes: int, names: Sequence[str]) -> int:
    """Returns the class number of an integer, or of a text: the name of a class or, if it names none, a number.

    Raises:
      ConfigError: It is not a class, or several classes have the name.
    """
    if isinstance(item, int):
        return _check_range(item, classes)
    matches = _numbers_by_name(item, names)
    if len(matches) > 1:
        writings = " or ".join(f"'{_to_json([k])}'" for k in matches)
        raise ConfigError(
            f"{_FIELD}: {item!r} is the name of the classes {', '.join(map(str, matches))}. Write {writings}."
        )
    if matches or _NUMBER.fullmatch(item.strip()):
        return _check_range(matches[0] if matches else int(item), classes)
    close = difflib.get_close_matches(item, names, 3, 0.5) or [text for text in names if item in text][:3] or names[:3]
    known = f"names are {', '.join(map(repr, close))}, ..." if names else "this data set names none"
    commas = next((text for text in close if "," in text), None)
    hint = f" A name with a comma is written as in '{_to_json([commas])}'." if commas else ""
    raise ConfigError(f"{_FIELD}: {item!r} is neither a class number nor a class name ({known}).{hint}")


def _numbers_by_name(text: str, names: Sequence[str]) -> list[int]:
    """Returns the numbers of the classes that a text names.

    An exact match comes first. Otherwise Unicode forms, outer spaces and leading zeros do not count: "2" names "02".
    """
    exact = [k for k, known in enumerate(names) if known == text]
    return exact or [k for k, known in enumerate(names) if _normalize_name(known) == _normalize_name(text)]


def _normalize_name(text: str) -> str:
    text = unicodedata.normalize("NFC", text).strip()
    return str(int(text)) if _NUMBER.fullmatch(text) else text


def _check_range(number: int, classes: int) -> int:
    if not 0 <= number < classes:
        raise ConfigError(f"{_FIELD}: {number} is not a class. Class numbers run from 0 to {classes - 1}.")
    return number


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _python_item(item: Any) -> int | str:
    if isinstance(item, str):
        return str(item)
    if isinstance(item, bool) or not _is_integer(item):
        raise ConfigError(f"labels: {reprlib.repr(item)} must be a class number (an integer) or a class name (a text).")
    return operator.index(item)


def _to_json(items: Iterable[int | str]) -> str:
    return json.dumps(list(items), ensure_ascii=False)
