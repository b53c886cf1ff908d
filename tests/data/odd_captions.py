"""Unusual caption files and tokenizers: byte-order marks, invalid Unicode, padding, gaps."""

import codecs
import json
from pathlib import Path
from typing import Any

import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

CAPTIONS = (
    "a red circle",
    "a blue square",
    "a green triangle",
    "a red circle on white",
    "a green triangle on white with two moons",
)
BOM = codecs.BOM_UTF8
LONE = "\ud83d"  # half of a surrogate pair


def write_captions(folder: Path, kind: str) -> None:
    """Writes a folder of five images with captions.

    Args:
      folder: Folder to create.
      kind: "jsonl", "txt" or "beside", for the three forms of captions. Suffix "_bom" puts a
        byte-order mark before each file, and "_mark" before each caption. Suffix "_surrogate" puts
        half of a surrogate pair into the fourth caption, and "_latin" a byte that is not UTF-8.
    """
    folder.mkdir(parents=True)
    form, _, oddity = kind.partition("_")
    captions = list(CAPTIONS)
    if oddity == "mark":
        captions = [f"\ufeff{caption}" for caption in captions]
    if oddity == "surrogate":
        captions[3] = f"a red circle {LONE} on white"
    if oddity == "latin":
        captions[3] = "a red círculo on white"
    encoding = "latin-1" if oddity == "latin" else "utf-8"
    start = BOM if oddity == "bom" else b""
    for i, caption in enumerate(captions):
        Image.new("RGB", (32, 32), (50 * i, 0, 0)).save(folder / f"{i}.png")
        if form == "beside":
            (folder / f"{i}.txt").write_bytes(start + caption.encode(encoding))
    if form == "jsonl":
        escape = encoding == "utf-8"
        rows = [
            json.dumps({"file_name": f"{i}.png", "text": t}, ensure_ascii=escape) + "\n" for i, t in enumerate(captions)
        ]
        (folder / "captions.jsonl").write_bytes(start + "".join(rows).encode(encoding))
    if form == "txt":
        rows = [f"{i}.png\t{caption}\r\n" for i, caption in enumerate(captions)]
        (folder / "captions.txt").write_bytes(start + "".join(rows).encode(encoding))


def write_tokenizer(path: Path, kind: str) -> None:
    """Writes a tokenizer.json that knows the words of the captions.

    Args:
      path: File to write.
      kind: "plain"; "pad_longest" or "pad_12" with padding; "trunc_4" with truncation; "gap", whose
        words have ids from 54 on; or "bom", with a byte-order mark.
    """
    vocabulary = {"<s>": 0, "</s>": 1, "[PAD]": 2, "[UNK]": 3}
    for word in dict.fromkeys(" ".join(CAPTIONS).split()):
        vocabulary[word] = len(vocabulary) + 50 * (kind == "gap")
    tokenizer: Any = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind.startswith("pad"):
        tokenizer.enable_padding(pad_id=2, pad_token="[PAD]", length=12 if kind == "pad_12" else None)
    if kind == "trunc_4":
        tokenizer.enable_truncation(max_length=4)
    path.write_bytes((BOM if kind == "bom" else b"") + tokenizer.to_str().encode())
