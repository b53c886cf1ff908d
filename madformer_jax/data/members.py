"""Reads one tar of source `webdataset`: its samples, without the images themselves.

A member's suffix is what follows the last dot of its name; what lies before is its stem. An image belongs to the sample of
its stem. Two cases follow webdataset, where a sample's name ends at the first dot: `0.seg.png` beside `0.jpg` is another
stream of sample 0, not an image of its own; and `0.cls` is the label of `0.rgb.png`, if there is no image `0`.
"""

import collections
import os
import posixpath
import re
import tarfile
from typing import NamedTuple

from madformer_jax.data import labels, listing, text
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_SIDECAR_SUFFIXES = (".cls", ".json", ".txt")
_STREAM_NAME = re.compile(
    r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*"
)  # "seg", "left.depth"; not "0", " Smith", "05 at night"
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}


class Sample(NamedTuple):
    """An image of a tar."""

    name: str  # of its member
    offset: int  # of its bytes
    size: int
    label: labels.Label
    caption: str


class _MemberName(NamedTuple):
    """A member's name, split."""

    folder: str
    first: str  # up to the first dot
    middle: str  # between the first dot and the suffix
    suffix: str  # in lower case
    hidden: bool

    @property
    def stem(self) -> tuple[str, str]:
        return self.folder, f"{self.first}.{self.middle}" if self.middle else self.first

    @property
    def sample(self) -> tuple[str, str]:
        """The stem of the sample that the member belongs to by webdataset's rule."""
        return self.folder, self.first


def samples(path: str, left_out: listing.Exclusions) -> list[Sample]:
    """Walks a tar. Its samples come in the order of their images.

    Raises:
      ConfigError: The tar is damaged, compressed or repeats a member, an image is a link, or a caption is not UTF-8.
      OSError: The tar cannot be read.
    """
    images, sidecars = _read_members(path, left_out)
    for stem in _extra_streams(path, images):
        key, member = images.pop(stem)
        left_out.add(f"{_dotted(key)} beside an image of the same sample", f"{path}:{member.name}")
    found, used = [], set()
    for stem, (key, member) in images.items():
        owners = [stem] if key.sample in images else [stem, key.sample]
        texts: dict[str, tuple[str, bytes]] = {}
        for suffix in _SIDECAR_SUFFIXES:
            owner = next((owner for owner in owners if (owner, suffix) in sidecars), None)
            if owner is not None:
                texts[suffix] = sidecars[owner, suffix]
                used.add((owner, suffix))
        label = labels.read(texts.get(".cls"), texts.get(".json"), left_out)
        caption = ""
        if ".txt" in texts:
            name, content = texts[".txt"]
            caption = text.strip_bom(storage.decode_text(content, name), name).strip()
        found.append(Sample(member.name, member.offset_data, member.size, label, caption))
    for unused in sorted(sidecars.keys() - used):
        left_out.add(f"{unused[1]} members without an image", sidecars[unused][0])
    if not found:
        left_out.add("tars without an image", path)
    return found


_Stem = tuple[str, str]
_Images = dict[_Stem, tuple[_MemberName, tarfile.TarInfo]]
_Sidecars = dict[tuple[_Stem, str], tuple[str, bytes]]  # stem and suffix -> name for messages, content


def _read_members(path: str, left_out: listing.Exclusions) -> tuple[_Images, _Sidecars]:
    images: _Images = {}
    sidecars: _Sidecars = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, key = listing.printable(f"{path}:{member.name}"), _split_name(member.name)
                is_image = key.suffix in listing.IMAGE_SUFFIXES
                if member.isdir() or key.hidden:
                    continue
                if not is_image and key.suffix not in _SIDECAR_SUFFIXES:
                    left_out.add_file(name)
                    continue
                if not member.isreg() or member.issparse():
                    raise ConfigError(f"{name} is a link or not a plain file: pack the files themselves.")
                if key.stem in images if is_image else (key.stem, key.suffix) in sidecars:
                    kind = "image" if is_image else key.suffix
                    raise ConfigError(f"{name}: the tar has another {kind} of this sample: names must differ.")
                if is_image:
                    images[key.stem] = key, member
                else:
                    file = tar.extractfile(member)
                    sidecars[key.stem, key.suffix] = name, file.read() if file else b""
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{listing.printable(path)} {_describe_fault(path, error)}") from None
    size = os.path.getsize(path)
    if size < end or any(member.offset_data + member.size > size for _, member in images.values()):
        raise ConfigError(f"{listing.printable(path)} is cut off: download it again.")
    return images, sidecars


def _split_name(name: str) -> _MemberName:
    folder, base = posixpath.split(posixpath.normpath(name))  # "./0.png" and "0.cls" are of one sample
    parts = [part for part in (*folder.split("/"), base) if part != ".."]
    stem, suffix = posixpath.splitext(base)
    first, _, middle = stem.partition(".")
    return _MemberName(folder, first, middle, suffix.lower(), any(map(listing.is_hidden, parts)))


def _dotted(key: _MemberName) -> str:
    return f".{key.middle}{key.suffix}"


def _extra_streams(path: str, images: _Images) -> list[_Stem]:
    """Finds the images that are further streams of a sample whose image has a plain name.

    Raises:
      ConfigError: All images of a sample are such streams.
    """
    streams = {stem: key for stem, (key, _) in images.items() if _STREAM_NAME.fullmatch(key.middle)}
    counts = collections.Counter(map(_dotted, streams.values()))
    seen: dict[_Stem, str] = {}
    found = []
    for stem, key in streams.items():
        if key.sample in images:
            found.append(stem)
        elif counts[_dotted(key)] > 1:  # of several samples: names such as "st.john.png" and "st.peter.png" are not
            if key.sample in seen:
                raise ConfigError(
                    f"{listing.printable(path)}: sample {listing.printable(key.first)!r} has two images, "
                    f"{seen[key.sample]} and {_dotted(key)}: pack one of them, or name it without the middle part."
                )
            seen[key.sample] = _dotted(key)
    return found


def _describe_fault(path: str, error: Exception) -> str:
    """Says why a tar cannot be opened, to end a sentence that begins with its name."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        return "is empty (0 bytes): download it again."
    kind = next((kind for magic, kind in _COMPRESSION_MAGIC.items() if start.startswith(magic)), None)
    if kind:
        return f"is not a plain tar file but compressed ({kind}), and cannot be read at random: unpack it first."
    return f"is not a plain tar file or is damaged: {error}."
