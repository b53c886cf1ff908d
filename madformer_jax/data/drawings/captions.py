"""A plain English sentence for a drawing, made of its attributes and nothing else."""

from collections.abc import Mapping

PHRASINGS = 3

_MENTION_ORDER = (
    "top",
    "pattern",
    "ring",
    "moons",
    "sun",
    "glasses",
    "cheeks",
    "eyes",
    "mouth",
)  # in the order they are named
_ADJECTIVES = {
    "small", "curved", "round", "pointed", "long", "short", "spiky", "swept", "curly", "wavy", "parted", "shoulder-length",
    "half-shaved", "hollow",
}  # fmt: skip
_UNCOUNTABLE = ("hair", "blush", "antennae")


def caption(style: str, words: Mapping[str, str], phrasing: int) -> str:
    """The sentence.

    Args:
      style: the drawing's class.
      words: its attributes without those that are "none".
      phrasing: which of `PHRASINGS` ways to say it.
    """
    seen = [name for name in _MENTION_ORDER if name in words and name not in unmentioned(words)]
    parts = [_attribute_phrase(name, words) for name in seen]
    listed = ", ".join(parts[:-2] + [" and ".join(parts[-2:])])
    have = f" with {listed}" if listed else ""
    what, where = _subject(style, words), _setting(style, words)
    match phrasing % PHRASINGS:
        case 0:
            return f"{what}{have}, {where}"
        case 1:
            return f"{where}, {what}{have}"
        case _:
            return f"{what} {where}{',' if have else ''}{have}"


def unmentioned(words: Mapping[str, str]) -> set[str]:
    """The attributes that the sentence does not name, since nobody sees them at 64 x 64: eyes behind sunglasses, and beards and
    blush on the small face of a blocky person.
    """
    unseen = {"beard", "cheeks"} if "outfit" in words else set()
    return (unseen | ({"eyes"} if words.get("glasses") == "sunglasses" else set())) & words.keys()


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
    colour = words["background"]
    if style == "planets":
        return f"in {_with_article(colour + ' sky')}"
    return f"under {_with_article(colour + ' sky')}" if style == "landscape" else f"on {colour}"


def _attribute_phrase(name: str, words: Mapping[str, str]) -> str:
    """An attribute in its colour, which stands behind an adjective: "short brown hair", but "brown bunny ears"."""
    first, _, rest = words[name].partition(" ")
    colour = words.get(f"{name} colour", "")
    order = [first, colour, rest] if first in _ADJECTIVES else [colour, first, rest]
    return _with_article(" ".join(filter(None, order)))


def _with_article(noun: str) -> str:
    """A noun with its article, where it takes one."""
    head = noun.split(" with ")[0].split(" under ")[0].split(" in ")[0].split(" of ")[0]
    if (head.endswith("s") and not head.endswith("ss")) or head.endswith(_UNCOUNTABLE) or head.endswith("teeth"):
        return noun
    if head.startswith("one "):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
