"""Members of one tar of source `webdataset`: finding its samples without reading the images.

`tars` calls `samples` to build its index. The suffix of a member starts at the last dot of its
name, and its stem is the name before it. An image belongs to the sample of its stem. Two cases
follow webdataset, where the name of a sample ends at the first dot:

  * `0.seg.png` beside `0.jpg` is another stream of sample 0, not an image of its own.
  * `0.cls` is the label of `0.rgb.png` if image `0` does not exist.
"""

import collections
import os
import posixpath
import re
import tarfile
from typing import NamedTuple

from madformer_jax.data import labels, listing
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

_SIDECAR_SUFFIXES = (".cls", ".json", ".txt")
# Matches "seg" and "left.depth", but not "0", " Smith" or "05 at night".
_STREAM_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}


class Sample(NamedTuple):
    """An image of a tar with its label and caption."""

    name: str  # of the image's member
    offset: int  # of the image's bytes in the tar
    size: int  # of the image, in bytes
    label: labels.Label
    caption: str


class _MemberName(NamedTuple):
    """The parts of a member's name."""

    folder: str
    first: str  # up to the first dot
    middle: str  # between the first dot and the suffix
    suffix: str  # with its dot, in lower case
    hidden: bool  # the name or a folder in it is hidden

    @property
    def stem(self) -> tuple[str, str]:
        return self.folder, f"{self.first}.{self.middle}" if self.middle else self.first

    @property
    def sample(self) -> tuple[str, str]:
        """Stem of the member's sample by webdataset's rule."""
        return self.folder, self.first


def samples(path: str, exclusions: listing.Exclusions) -> list[Sample]:
    """Lists the samples of a tar, in the order of their images.

    Args:
      path: The tar.
      exclusions: Receives the members that belong to no sample.

    Raises:
      ConfigError: The tar is damaged, compressed or repeats a member, an image is a link, or a
        caption is not UTF-8.
      OSError: The tar cannot be read.
    """
    images, sidecars = _read_members(path, exclusions)
    for stem in _extra_streams(path, images):
        key, member = images.pop(stem)
        exclusions.add(f"{_stream_suffix(key)} beside an image of the same sample", f"{path}:{member.name}")
    result, used = [], set()
    for stem, (key, member) in images.items():
        owners = [stem] if key.sample in images else [stem, key.sample]
        own_sidecars: dict[str, tuple[str, bytes]] = {}
        for suffix in _SIDECAR_SUFFIXES:
            owner = next((owner for owner in owners if (owner, suffix) in sidecars), None)
            if owner is not None:
                own_sidecars[suffix] = sidecars[owner, suffix]
                used.add((owner, suffix))
        label = labels.read(own_sidecars.get(".cls"), own_sidecars.get(".json"), exclusions)
        caption = ""
        if ".txt" in own_sidecars:
            name, content = own_sidecars[".txt"]
            caption = storage.decode_text(content, name).strip()
        result.append(Sample(member.name, member.offset_data, member.size, label, caption))
    for unused in sorted(sidecars.keys() - used):
        exclusions.add(f"{unused[1]} members without an image", sidecars[unused][0])
    if not result:
        exclusions.add("tars without an image", path)
    return result


_Stem = tuple[str, str]
_Images = dict[_Stem, tuple[_MemberName, tarfile.TarInfo]]
_Sidecars = dict[tuple[_Stem, str], tuple[str, bytes]]  # stem and suffix -> name for messages, content


def _read_members(path: str, exclusions: listing.Exclusions) -> tuple[_Images, _Sidecars]:
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
                    exclusions.add_file(name)
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
    folder, base = posixpath.split(posixpath.normpath(name))  # "./0.png" and "0.cls" belong to one sample
    parts = [segment for segment in (*folder.split("/"), base) if segment != ".."]
    stem, suffix = posixpath.splitext(base)
    first, _, middle = stem.partition(".")
    return _MemberName(folder, first, middle, suffix.lower(), any(map(listing.is_hidden, parts)))


def _stream_suffix(key: _MemberName) -> str:
    return f".{key.middle}{key.suffix}"


def _extra_streams(path: str, images: _Images) -> list[_Stem]:
    """Returns the stems of further streams of samples whose image has a plain name."""
    streams = {stem: key for stem, (key, _) in images.items() if _STREAM_NAME.fullmatch(key.middle)}
    counts = collections.Counter(map(_stream_suffix, streams.values()))
    seen: dict[_Stem, str] = {}
    extra = []
    for stem, key in streams.items():
        if key.sample in images:
            extra.append(stem)
        elif counts[_stream_suffix(key)] > 1:  # a stream recurs in several samples, unlike the middle of "st.john.png"
            if key.sample in seen:
                raise ConfigError(
                    f"{listing.printable(path)}: sample {listing.printable(key.first)!r} has two images, "
                    f"{seen[key.sample]} and {_stream_suffix(key)}: pack one of them, or name it without the middle part."
                )
            seen[key.sample] = _stream_suffix(key)
    return extra


def _describe_fault(path: str, error: Exception) -> str:
    """Returns why a tar cannot be opened, as the end of a sentence that starts with its name."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        return "is empty (0 bytes): download it again."
    kind = next((kind for magic, kind in _COMPRESSION_MAGIC.items() if start.startswith(magic)), None)
    if kind:
        return f"is not a plain tar file but compressed ({kind}), and cannot be read at random: unpack it first."
    return f"is not a plain tar file or is damaged: {error}."
