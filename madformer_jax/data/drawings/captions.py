"""Captions of drawings: plain English sentences built from the attributes alone.

`pictures` builds the caption of each picture, and `unmentioned` says which attributes it omits. Add
a phrasing to `caption` and raise `PHRASINGS`.
"""

from collections.abc import Mapping

PHRASINGS = 3

_MENTION_ORDER = ("top", "pattern", "ring", "moons", "sun", "glasses", "cheeks", "eyes", "mouth")
_ADJECTIVES = {
    "small", "curved", "round", "pointed", "long", "short", "spiky", "swept", "curly", "wavy", "parted", "shoulder-length",
    "half-shaved", "hollow",
}  # fmt: skip
_UNCOUNTABLE = ("hair", "blush", "antennae")


def caption(style: str, words: Mapping[str, str], phrasing: int) -> str:
    """Builds the caption of a drawing.

    Args:
      style: Class of the drawing.
      words: Its attributes without those that are "none".
      phrasing: Selects one of `PHRASINGS` sentence patterns, modulo `PHRASINGS`.
    """
    mentioned = [name for name in _MENTION_ORDER if name in words and name not in unmentioned(words)]
    phrases = [_attribute_phrase(name, words) for name in mentioned]
    enumeration = ", ".join(phrases[:-2] + [" and ".join(phrases[-2:])])
    details = f" with {enumeration}" if enumeration else ""
    subject, setting = _subject(style, words), _setting(style, words)
    match phrasing % PHRASINGS:
        case 0:
            return f"{subject}{details}, {setting}"
        case 1:
            return f"{setting}, {subject}{details}"
        case _:
            return f"{subject} {setting}{',' if details else ''}{details}"


def unmentioned(words: Mapping[str, str]) -> set[str]:
    """Returns the attributes that a caption omits because they are not visible at 64 x 64.

    These are eyes behind sunglasses, and beards and blush on the small face of a blocky person.
    """
    invisible = {"beard", "cheeks"} if "outfit" in words else set()
    return (invisible | ({"eyes"} if words.get("glasses") == "sunglasses" else set())) & words.keys()


def _subject(style: str, words: Mapping[str, str]) -> str:
    if style == "landscape":
        hills = f"{words['far hills']}, {words['middle hills']} and {words['near hills']} hills"
        return f"{hills} behind {words['ground']} ground"
    if style == "voxel-art":
        return f"a blocky person with {words['skin']} skin in {_with_article(words['colour'] + ' ' + words['outfit'])}"
    if style == "planets":
        return _with_article(words["colour"] + " planet")
    kind = {"clay": "clay monster", "critters": "critter"}[style]
    return f"{_with_article(words['colour'] + ' ' + kind)} shaped like {_with_article(words['body'])}"


def _setting(style: str, words: Mapping[str, str]) -> str:
    color = words["background"]
    if style == "planets":
        return f"in {_with_article(color + ' sky')}"
    return f"under {_with_article(color + ' sky')}" if style == "landscape" else f"on {color}"


def _attribute_phrase(name: str, words: Mapping[str, str]) -> str:
    """Builds the phrase of an attribute with its color.

    The color follows an adjective and precedes a noun: "short brown hair", but "brown bunny ears".
    """
    first, _, rest = words[name].partition(" ")
    color = words.get(f"{name} colour", "")
    order = [first, color, rest] if first in _ADJECTIVES else [color, first, rest]
    return _with_article(" ".join(filter(None, order)))


def _with_article(noun: str) -> str:
    """Puts the indefinite article before a noun phrase, unless it takes none."""
    head = noun.split(" with ")[0].split(" under ")[0].split(" in ")[0].split(" of ")[0]
    if (head.endswith("s") and not head.endswith("ss")) or head.endswith(_UNCOUNTABLE) or head.endswith("teeth"):
        return noun
    if head.startswith("one "):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
