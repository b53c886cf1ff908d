"""The editor on the page of --mode=demo: click blocks of a picture and draw them again.

`modes.demo.build_page` adds it for a model of random order. The blocks that are not chosen are kept
(`sampling.editing`).
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config.block_orders import parse_block_numbers
from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.errors import ConfigError

_IMAGE_SIDE = 384  # pixels; smaller pictures are enlarged towards it
SEEDS = 2**32  # number of valid seeds (`config.table`)
_MARK = np.array([220, 40, 40], np.uint8)  # color of the blocks to draw again
_HELP = (
    "Draw a picture. Click the blocks that you do not like; they turn red. **Draw again** keeps the other blocks and draws "
    "the red ones anew."
)


class Model(Protocol):
    """The members of `sampling.trained_model.Model` that the editor uses."""

    config: ConfigDict

    def stream(self, n: int | None = None, **settings: Any) -> Iterator[Any]:
        """Yields frames, whose `images` are uint8 (n, H, W, c)."""


def add_editor(gr: Any, model: Model, condition: Any, condition_settings: Callable[[Any], Mapping[str, Any]]) -> None:
    """Adds the editor to the page that is being built.

    Args:
      gr: The module gradio.
      model: A model of random order.
      condition: The page's input of a class or prompts.
      condition_settings: Converts its value to settings of `Model.sample`.
    """
    sizes, picture = derive_sizes(model.config), gr.State(None)
    with gr.Accordion("Edit a picture", open=False):
        gr.Markdown(_HELP)
        with gr.Row():
            draw, draw_again = gr.Button("Draw a picture"), gr.Button("Draw again", variant="primary")
            chosen = gr.Textbox(label="blocks to draw again", placeholder="click the picture, or write 0,3")
        shown = gr.Image(
            label="picture", show_label=False, buttons=["download"], format="png", interactive=False,
            elem_classes="drawn",
        )  # fmt: skip

    def stream(settings: Mapping[str, Any]) -> Iterator[list[Any]]:
        try:
            for frame in model.stream(1, seed=secrets.randbelow(SEEDS), **settings):
                yield [frame.images[0], enlarge(frame.images[0]), ""]
        except ConfigError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    def on_draw(value: Any) -> Iterator[list[Any]]:
        yield from stream(first_condition(condition_settings(value)))

    def on_again(image: np.ndarray | None, text: str, value: Any) -> Iterator[list[Any]]:
        if image is None or not text.strip():
            raise gr.Error("Draw a picture and click the blocks to draw again.", print_exception=False)
        try:
            keep = kept_blocks(text, sizes)
        except ConfigError as error:
            raise gr.Error(str(error), print_exception=False) from None
        edit = {"image": image, "mask": keep} if keep else {}  # without kept blocks it is a new picture
        yield from stream(first_condition(condition_settings(value)) | edit)

    def on_click(image: np.ndarray | None, text: str, event: gr.SelectData) -> list[Any]:
        if image is None:
            return [None, ""]
        text = toggle(text, block_at(event.index, image, sizes))
        return [mark(image, text, sizes), text]

    outputs = [picture, shown, chosen]
    draw.click(on_draw, [condition], outputs, concurrency_limit=1, api_name="draw_picture")
    draw_again.click(on_again, [picture, chosen, condition], outputs, concurrency_limit=1, api_name="draw_again")
    # Gradio recognizes the event argument by its evaluated annotation.
    on_click.__annotations__["event"] = gr.SelectData
    shown.select(on_click, [picture, chosen], [shown, chosen], api_name=False)


def first_condition(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with the first of several prompts, since an edit has one image."""
    return {name: value[:1] if name == "prompts" else value for name, value in settings.items()}


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarges an image uint8 (H, W, c) for the page; gray becomes (H, W)."""
    scale = max(1, _IMAGE_SIDE // len(image))
    large = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return large[..., 0] if large.shape[-1] == 1 else large


def block_at(index: Sequence[float], image: np.ndarray, sizes: Sizes) -> int:
    """Returns the block at the pixel (x, y) of the enlarged image."""
    x, y = index
    scale = max(1, _IMAGE_SIDE // len(image))
    height, width = scale * image.shape[0] / sizes.grid, scale * image.shape[1] / sizes.columns
    row, column = min(int(y / height), sizes.grid - 1), min(int(x / width), sizes.columns - 1)
    return row * sizes.columns + column


def toggle(text: str, block: int) -> str:
    """Adds a block to a list such as "0,3", or removes it."""
    chosen = {int(x) for x in text.split(",") if x.strip().isdecimal()} ^ {block}
    return ",".join(map(str, sorted(chosen)))


def kept_blocks(text: str, sizes: Sizes) -> list[int]:
    """Returns the blocks that are not in a list such as "0,3".

    Raises:
      ConfigError: The list is wrong.
    """
    chosen = parse_block_numbers(f"blocks to draw again={text!r}", text, sizes.blocks)
    return [block for block in range(sizes.blocks) if block not in chosen]


def mark(image: np.ndarray, text: str, sizes: Sizes) -> np.ndarray:
    """Returns the enlarged image, with the blocks of a list such as "0,3" in red."""
    marked = np.repeat(image, 3 // image.shape[-1], axis=-1)
    height, width = image.shape[0] // sizes.grid, image.shape[1] // sizes.columns
    for block in (int(x) for x in text.split(",") if x):
        row, column = divmod(block, sizes.columns)
        area = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
        marked[area] = marked[area] // 2 + _MARK // 2
    return enlarge(marked)
