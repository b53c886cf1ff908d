"""Class labels of the command line and of Python: the class that is named is the one that is drawn."""

import re

import numpy as np
import pytest

from madformer_jax.config import class_labels, schema
from madformer_jax.errors import ConfigError
from tests import tiny

MONTHS = [str(k) for k in (1, 10, 11, 12, *range(2, 10))]  # folders 1 .. 12, as they sort
BIRDS = ["cock", "tench, Tinca tinca", "crane", "goldfish, Carassius auratus", "crane"]


def numbers(text, names):
    """The classes that a value of `sample.labels` stands for, resolved twice: the second time changes nothing."""
    c = tiny.get_config()
    c.model.classes, c.sample.labels = len(names) or 12, text
    schema.validate(c)
    schema.resolve_label_numbers(c, names)
    resolved = c.sample.labels
    schema.resolve_label_numbers(c, names)
    assert c.sample.labels == resolved
    c.sample.n = len(class_labels.parse(resolved, c.model.classes))
    return schema.sample_labels(c)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("12", MONTHS, [3]),  # a name, and the number of no class
        ('["2"]', MONTHS, [4]),
        ("[2]", MONTHS, [2]),
        ('["10", 10, "1"]', MONTHS, [1, 10, 0]),
        ("0", MONTHS, [0]),  # a number, and the name of no class
        (" 3 , 0", ["a", "b", "c", "d"], [3, 0]),
        ("4,7", [str(k) for k in range(10)], [4, 7]),  # names and numbers agree
        ("04", ["04", "05"], [0]),
        ("12", ["012", "b"], [0]),
        ("tench, Tinca tinca", BIRDS, [1]),
        ('["tench, Tinca tinca", "cock"]', BIRDS, [1, 0]),
        ('["goldfish, Carassius auratus", 4]', BIRDS, [3, 4]),
        ("cock,0", BIRDS, [0, 0]),
        ("[tag] cat,dog", ["dog", "[tag] cat"], [1, 0]),
        ("caf\u00e9", ["cafe\u0301"], [0]),
        ("caf\u00e9", ["cafe\u0301", "caf\u00e9"], [1]),
        (' "quoted" ', ['"quoted"'], [0]),
        ("7,2", [], [7, 2]),
    ],
)
def test_a_name_wins_over_a_number(text, names, expected):
    assert numbers(text, names) == expected


@pytest.mark.parametrize(
    ("text", "names", "words", "writings"),
    [
        (
            "2",
            MONTHS,
            "'2' is ambiguous. It names the class '2' (number 4) and is the number of the class '11'",
            [4, 2],
        ),
        ("10", MONTHS, "It names the class '10' (number 1) and is the number of the class '8'", [1, 10]),
        ("2,12", MONTHS, "'2' is ambiguous", [4, 2]),
        ("2", ["01", "02", "03"], "It names the class '02' (number 1) and is the number of the class '03'", [1, 2]),
        ("crane", BIRDS, "'crane' is the name of the classes 2, 4", [2, 4]),
        ("a,b", ["b", "a,b", "a"], "is the name of one class and a list of 2 classes", [1, 2]),
    ],
)
def test_an_ambiguous_label_is_refused_with_both_readings(text, names, words, writings):
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        numbers(text, names)
    assert "\n" not in str(error.value)
    written = re.findall(r"'(\[.*?\])'", str(error.value))
    assert [numbers(one, names)[0] for one in written] == writings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("13", "13 is not a class. Class numbers run from 0 to 4"),
        ("-1", "-1 is not a class"),
        ("9" * 5000, "9' is neither a class number"),
        ("1,,3", "class numbers or names"),
        (" ", "class numbers or names"),
        ("tinca", "'tinca' is neither .*'tench, Tinca tinca'.*written as in '\\[\"tench, Tinca tinca\"\\]'"),
        ("tench, Tinca tinca,cock", "'tench' is neither"),
        ("[12]", "12 is not a class"),
        ("[]", "holds no label"),
        ("[1.5]", "1.5 must be a class name"),
        ("[true]", "True must be a class name"),
        ('[["cock"]]', "must be a class name"),
        ("[cock", r"'\[cock' is neither"),
        ("cokc", r"'cokc' is neither .*\(names are 'cock', "),
    ],
)
def test_a_wrong_label_is_refused_in_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as error:
        numbers(text, BIRDS)
    assert "\n" not in str(error.value)


def test_a_name_needs_data_with_names():
    with pytest.raises(ConfigError, match=r"'cat' is neither .*\(this data set names none\)"):
        numbers("cat", ())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "[3]"),
        (np.int64(3), "[3]"),
        (np.array(3), "[3]"),
        (range(2), "[0, 1]"),
        (np.array([2, 0]), "[2, 0]"),
        (("a, b", np.str_("c"), np.int32(1)), '["a, b", "c", 1]'),
        ("cat,7", "cat,7"),
    ],
)
def test_labels_of_python(value, expected):
    assert class_labels.from_python(value) == expected


@pytest.mark.parametrize(
    "value", [1.0, True, [True], [1.5], [None], None, {1, 2}, {"a": 1}, b"cat", np.zeros((2, 2), int), np.array("cat")]
)
def test_what_cannot_be_a_label_is_refused(value):
    with pytest.raises(ConfigError, match=r"labels.* must be a class number") as error:
        class_labels.from_python(value)
    assert "\n" not in str(error.value)


def test_entries_of_a_list_are_distinct():
    assert class_labels.distinct_names(["all", "crane", "1", "crane"], taken=["all"]) == [
        "all (#0)", "crane (#1)", "1", "crane (#3)"
    ]  # fmt: skip
    assert class_labels.summary([4, 1, 1], BIRDS) == "crane, tench, Tinca tinca"
    assert class_labels.summary([0, 1], ()) == "class 0, class 1"
