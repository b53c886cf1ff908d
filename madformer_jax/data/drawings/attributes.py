"""Attributes of drawings: visible properties with English names, one table for all styles.

`pictures` computes the attributes of each picture, `captions` puts them into a sentence, and the
attribute classifier is trained on them. Add an attribute to `STYLES`; this changes `TABLE_HASH`, so
that all pictures are drawn again.

dicebear reports the options of every picture ("topVariant": "hornsIn", "bodyColor": "#7dd3fc"). An
attribute is the plain name of a variant, or of the color in which the variant is painted. Variants
that look alike share a name. Value 0 is "none": the picture lacks the thing. The table leaves out
details that are hardly visible at 64 x 64 (nose, brows, shoes, trousers, stars, shapes of hills)
and shifts and rotations.

`TABLE_HASH` covers the names in `STYLES`, `Words` and `Colour`, so these keep their British
spelling.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Attribute = tuple[str, tuple[str, ...]]  # name of the attribute, names of its values

# ---- colors

# Sample colors for each English name, tuned on the palettes of the styles. A color gets the name of
# the nearest sample.
_COLORS = {
    "white": "ffffff e2e8f0 f8f1e5 e8edf0", "light grey": "d4d4d4 ece8e2", "grey": "8c8c8c", "dark grey": "4a4a4a",
    "black": "1c1d24 2c222b 3b2f2f",
    "pale pink": "ffdbe0 f4e4ef f7e3d9", "pink": "ec8ab5 fda4af f0abfc e64980", "magenta": "c22a90 be185d",
    "red": "d43a45", "salmon": "e8836a d99277", "rust": "b8583c c4795c",
    "pale orange": "ffe2c6 f4e8d4", "light orange": "ffb878", "orange": "f28c38 fd9565", "dark orange": "b5561c",
    "pale yellow": "faf0cc", "yellow": "f2c22e", "gold": "c79a34 e0bd6a", "lime": "bef264", "olive": "8f8a3c",
    "pale green": "dcefd0 e3efe9 eff0da", "light green": "b0d69a 84ae85", "green": "62b560 508659",
    "dark green": "2f5d38 0b3533",
    "pale turquoise": "d4f4f0 a3d2ce", "turquoise": "3cc0b0 72b0a4", "dark turquoise": "0f5f60 032c34",
    "pale blue": "d6ebfa e2ecf4", "light blue": "8cc8ee a5ccd8", "blue": "3b82d8 1d4ed8 4c6ef5 4a6fa5",
    "dark blue": "23406e 12263a",
    "pale purple": "e6ddf8 e9e7f4", "light purple": "bba8f0 c083d2", "purple": "8a5fd0 6d28d9 7950f2",
    "dark purple": "4a2468 361b34",
    "beige": "e6d6b8", "light brown": "c4956a", "brown": "8a5a34", "dark brown": "5a3a26",
}  # fmt: skip
_SKINS = {"light": "f5d0b0", "tan": "dda878", "brown": "a5683f", "dark": "6f4220"}
_PALETTES = {"colours": _COLORS, "skins": _SKINS}


def _to_cielab(color: str) -> np.ndarray:
    """Converts an sRGB color "rrggbb" to CIELAB (3,) under D65, where distances are perceptual."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ linear / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@functools.cache
def nearest_color_name(color: str, names: str = "colours") -> str:
    """Returns the English name of a color "#rrggbb".

    Args:
      color: The color.
      names: Palette to choose from: "colours" or "skins".
    """
    lab = _to_cielab(color.removeprefix("#"))
    return min(
        _PALETTES[names],
        key=lambda name: min(np.linalg.norm(_to_cielab(x) - lab) for x in _PALETTES[names][name].split()),
    )


# ---- attributes


class Words(NamedTuple):
    """An attribute that names the variant of an option."""

    option: str
    words: dict[str, str]  # variant -> name


class Colour(NamedTuple):
    """An attribute that names the color of a part."""

    colour: str | None  # option that holds the color; None: only the variants in `others` have a color
    option: str = ""  # option of the part; without the part the attribute is "none". "": the part always exists
    others: Mapping[str, str] = {}  # variant of the part -> option that holds its color instead
    names: str = "colours"  # palette


def _variant_words(option: str, same: str = "", **others: str) -> Words:
    """Builds the names of an option's variants.

    Args:
      option: The option.
      same: Variants that keep dicebear's name, separated by blanks.
      **others: Names of the other variants.
    """
    return Words(option, dict(zip(same.split(), same.split())) | others)


_HAT_COLORS = dict.fromkeys(("cap", "beanie", "animalEars", "bunnyEars"), "hatColor")
_ACCENT_COLORS = dict.fromkeys(("curl", "antenna", "loop", "crest", "pellet", "tuft"), "accentColor")
_OUTFIT_COLORS = dict.fromkeys(("jacket", "coat", "dress", "suit"), "jacketColor") | {"overalls": "pantsColor"}

# style (in the order of the classes) -> attribute -> the options that it is derived from
STYLES: dict[str, dict[str, Words | Colour]] = {
    "clay": {
        "colour": Colour("bodyColor"),
        "background": Colour("backgroundColor"),
        "body": _variant_words(
            "bodyVariant", "pear boulder loaf column gumdrop dollop slug egg blob bell cube",
            stack="snowman", squat="mound", lean="leaning egg",
        ),
        "top": _variant_words(
            "topVariant", "horns nub curl spikes loop peak swirl tuft",
            antenna="antennae", ears="round ears", crest="row of beads", pellet="bead", hornsSmall="small horns",
        ),
        "top colour": Colour(None, "topVariant", _ACCENT_COLORS),
        "pattern": _variant_words(
            "patternVariant", "spiral buttons stitches patch coil freckles",
            prints="dents", pellets="pellets", checker="squares", zig="zigzag",
        ),
        "eyes": _variant_words(
            "eyesVariant", googly="googly eyes", even="round eyes", big="big eyes", tiny="tiny eyes", mono="one eye",
            trio="three eyes", side="sidelong eyes", outward="wandering eyes", inward="crossed eyes", dots="dot eyes",
            happy="happy eyes", wink="winking eye", down="lowered eyes", up="raised eyes", pinprick="pinprick pupils",
        ),
        "mouth": _variant_words(
            "mouthVariant", "smile frown pout smirk laugh",
            teeth="sharp teeth", o="round mouth", line="straight mouth", wavy="wavy mouth", open="open mouth",
            toothy="toothy smile", tongue="tongue", grin="buck teeth", zigzag="zigzag mouth", dot="tiny mouth",
            cat="cat mouth", smileBig="wide smile", uu="curly mouth", openSmall="small open mouth",
            smileTongue="cheeky smile",
        ),
    },
    "critters": {
        "colour": Colour("bodyColor"),
        "background": Colour("backgroundColor"),
        "body": _variant_words(
            "bodyVariant", "dome block tower chimney blob peak bell wedge",
            squat="mound", round="ball", tilt="tilted dome", lean="leaning dome", wedgeInv="bucket", steps="staircase",
        ),
        "top": _variant_words(
            "topVariant", "horns spike antenna antennae spikes fin crown sprout nub bobble",
            hornsIn="curved horns", hornsSmall="small horns", earsRound="round ears", earsPointy="pointed ears",
            earsDroop="long ears",
        ),
        "top colour": Colour("accentColor", "topVariant"),
        "pattern": _variant_words(
            "patternVariant", "dots speckles bar bars spot stripes chevron",
            belly="pale belly", dotRow="row of dots", ring="circle",
        ),
        "eyes": _variant_words(
            "eyesVariant", round="round eyes", dots="dot eyes", bigPupils="wide pupils", sideeye="sidelong eyes",
            inward="crossed eyes", mono="one eye", uneven="uneven eyes", trio="three eyes", threeRow="three eyes in a row",
            four="four eyes", happy="happy eyes", closedLine="closed eyes", wink="winking eye", squint="squinting eyes",
            wide="wide eyes", sleepy="sleepy eyes", angry="angry eyes", monoSleepy="one sleepy eye", close="close-set eyes",
        ),
        "mouth": _variant_words(
            "mouthVariant", "smile laugh smirk frown",
            tinySmile="small smile", grin="open mouth", teeth="buck teeth", ooh="round mouth", line="straight mouth",
            wavy="wavy mouth", catMouth="cat mouth", zigzag="zigzag mouth", sad="pout", slant="slanted mouth",
            dot="tiny mouth", open="gaping mouth", tooth="single tooth", tongue="cheeky smile", blep="tongue",
        ),
        "cheeks": _variant_words("cheeksVariant", "freckles", blush="blush", blushBig="deep blush"),
    },
    "planets": {
        "colour": Colour("planetColor"),
        "background": Colour("backgroundColor"),
        "pattern": _variant_words(
            "surfaceVariant", banded="bands", belted="belts", cratered="craters", swirl="swirls", cap="polar caps",
            spotted="storm", marbled="clouds", cracked="cracks", terra="continents", speckled="speckles",
        ),
        "ring": _variant_words("ringVariant", thin="thin ring", double="double ring", bold="broad ring"),
        "moons": _variant_words("moonsVariant", one="moon", two="two moons", tiny="tiny moon"),
    },
    "landscape": {
        "background": Colour("backgroundColor"),
        "sun": _variant_words("orbVariant", sun="sun", ring="hollow sun", glow="sun with a halo"),
        "sun colour": Colour("orbColor", "orbVariant"),
        "far hills": Colour("hill1Color"),
        "middle hills": Colour("hill2Color"),
        "near hills": Colour("hill3Color"),
        "ground": Colour("hill4Color"),
    },
    "voxel-art": {
        "colour": Colour("shirtColor", "outfitVariant", _OUTFIT_COLORS),
        "background": Colour("backgroundColor"),
        "outfit": _variant_words(
            "outfitVariant", "jacket overalls hoodie coat dress suit",
            plain="shirt", stripes="striped shirt", checker="shirt under a checkered jacket", tie="shirt with a tie",
        ),
        "skin": Colour("skinColor", names="skins"),
        "top": _variant_words(
            "topVariant", "mohawk buns ponytail bob braids cap beanie afro",
            short="short hair", spiky="spiky hair", bowl="bowl cut", sideSwept="swept hair", curly="curly hair",
            shoulderLength="shoulder-length hair", longStraight="long hair", longWavy="wavy hair", partedLong="parted hair",
            twinTails="twin tails", animalEars="animal ears", bunnyEars="bunny ears", halfShaved="half-shaved hair",
        ),
        "top colour": Colour("hairColor", "topVariant", _HAT_COLORS),
        "eyes": _variant_words(
            "eyesVariant", open="round eyes", soft="soft eyes", happy="happy eyes", sleepy="sleepy eyes",
            side="sidelong eyes", closed="closed eyes", wide="wide eyes", star="starry eyes",
        ),
        "mouth": _variant_words(
            "mouthVariant", "smile tongue smirk laugh frown grin",
            bigSmile="toothy smile", flat="straight mouth", ooh="round mouth", wideSmile="wide smile",
        ),
        "glasses": _variant_words(
            "glassesVariant", round="round glasses", square="square glasses", shades="sunglasses", cat="cat-eye glasses",
            visor="visor",
        ),
        "beard": _variant_words("beardVariant", "goatee stubble", full="full beard", mustache="moustache"),
        "cheeks": _variant_words("cheeksVariant", "blush freckles", pixel="blush"),
    },
}  # fmt: skip


def _build_attributes() -> tuple[Attribute, ...]:
    values: dict[str, list[str]] = {}
    for style in STYLES.values():
        for name, origin in style.items():
            values.setdefault(name, ["none"]).extend(
                _PALETTES[origin.names] if isinstance(origin, Colour) else origin.words.values()
            )
    return tuple((name, tuple(dict.fromkeys(words))) for name, words in values.items())


ATTRIBUTES = _build_attributes()
TABLE_HASH = hashlib.sha256(repr((STYLES, _PALETTES)).encode()).hexdigest()  # identifies the table in cache keys


def from_options(style: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Computes the attributes of a drawing from the options that dicebear reports.

    Returns:
      Name and value of each attribute that is not "none".

    Raises:
      KeyError: A variant is not in `STYLES`, because the installed styles have another version.
    """
    words = {}
    for name, origin in STYLES[style].items():
        if isinstance(origin, Words):
            if (variant := options.get(origin.option)) is not None:
                words[name] = origin.words[variant]
            continue
        variant = options.get(origin.option)
        option = origin.colour if variant is None else origin.others.get(variant, origin.colour)
        if option and (variant is not None or not origin.option):
            words[name] = nearest_color_name(options[option][0], origin.names)
    return words


def to_indices(words: Mapping[str, str]) -> np.ndarray:
    """Converts attributes to indices of their values, int32 (A,), in the order of `ATTRIBUTES`."""
    return np.array([values.index(words.get(name, "none")) for name, values in ATTRIBUTES], np.int32)


def from_indices(row: np.ndarray) -> dict[str, str]:
    """Converts indices (A,) to the attributes that are not "none"; inverts `to_indices`."""
    return {name: values[k] for (name, values), k in zip(ATTRIBUTES, row.tolist()) if k}
