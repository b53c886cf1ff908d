"""--mode=demo: a web page that draws with two settings or two models side by side at equal cost.

    python -m madformer_jax.main --mode=demo --workdir=runs/digits [--config.demo.other=runs/other] [--config.demo.port=7860]

Serves the newest checkpoint, or `sample.step`, until it is interrupted. Needs gradio. Add controls
to `build_page`.
"""

import contextlib
import errno
import functools
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import block_steps, class_labels, elastic_depth, seeds, table
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.publishing import editor
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import generation, prompts, trained_model

_ALL_CLASSES = "all"  # entry in the list of classes
# Both sides stay next to each other on a phone.
_CSS = """
.drawn img {image-rendering: pixelated}
.pair {flex-wrap: nowrap !important}
.pair > * {min-width: 0 !important}
@media (max-width: 40rem) {.pair {gap: .5rem !important} .pair .block {padding: .4rem !important}
  .drawn .icon-button-wrapper {display: none}}
"""
_COMPILING = "The first pictures with a model, a solver and guidance (on or off) take longer."
_EQUAL_COST = (
    "Both sides draw images block by block from the same seed. **Equal cost** means that both have done about the same amount "
    "of work for an image, whatever their numbers of steps: the side that has done less draws next. When one side is finished, "
    "the other goes on alone. The work is counted in passes. A pass is the work of running all layers once on the whole image."
)


class PaneState(NamedTuple):
    """The state of one side of the page."""

    frame: trained_model.Frame | None  # None before the first frame
    seconds: float  # spent on drawing this side
    compiling: bool = False  # whether its programs have yet to be compiled

    @property
    def passes(self) -> float:
        """Full-model passes of an image so far (`flops.model_passes`)."""
        return self.frame.passes if self.frame else 0.0


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Serves the page until an interrupt.

    Raises:
      ConfigError: gradio is missing, a setting is wrong, the workdir has no checkpoint, or the page
        cannot be served at the address.
    """
    config_lib.validate(c)
    _import_gradio()
    _check_address(c.demo.host, c.demo.port)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    models = {_display_name(workdir): trained_model.load_workdir(c, workdir)}
    if c.demo.other:
        other = trained_model.load(c.demo.other, c.codec.path)
        _check_comparable(models[_display_name(workdir)], other)
        models[_display_name(c.demo.other) + " (other)" * (_display_name(c.demo.other) in models)] = other
    page = serve(build_page(models, c.demo.n), c.demo.host, c.demo.port)
    try:
        logging.info("the page is at %s; Ctrl-C ends it", page.local_url)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return {}


def stream_side_by_side(
    models: Sequence[trained_model.Model], settings: Sequence[Mapping[str, Any]], every: str
) -> Iterator[list[PaneState]]:
    """Draws on all sides and yields their states after each frame.

    The side that has cost the fewest passes draws the next frame. The first states are empty and
    name the sides whose programs are new. Before the second ones, these programs are compiled, so
    that the drawing is timed without compilation.

    Args:
      models: The model of each side.
      settings: The settings of each side, as `Model.stream` takes them.
      every: "block" or "step".

    Raises:
      ConfigError: A setting is wrong, or a value is not finite.
    """
    streams = [model.stream(every=every, **side_settings) for model, side_settings in zip(models, settings)]
    states = [
        PaneState(None, 0.0, not model.stream_is_compiled(**side_settings))
        for model, side_settings in zip(models, settings)
    ]
    yield list(states)
    for model, side_settings in zip(models, settings):
        if not model.stream_is_compiled(**side_settings):  # The second block's first step has run all programs.
            steps = model.stream(every="step", **side_settings)
            next((frame for frame in steps if frame.block), None)
    running = set(range(len(models)))
    while running:
        side = min(running, key=lambda i: states[i].passes)
        began = time.monotonic()
        frame = next(streams[side], None)
        if frame is None:
            running.remove(side)
            continue
        states[side] = PaneState(frame, states[side].seconds + time.monotonic() - began)
        yield list(states)


def build_page(models: Mapping[str, trained_model.Model], n: int) -> Any:
    """Builds the page, a `gradio.Blocks`.

    Args:
      models: The models by the name that the page shows.
      n: Images on each side.
    """
    gr, first = _import_gradio(), next(iter(models.values()))
    names, sample = list(models), first.config.sample
    description = "  \n".join(
        f"**{name}**: N = {m.depth} layers, of which D = {m.diffusion_depth} run at every solver step, L = {m.blocks} blocks"
        for name, m in ((name, model.config.model) for name, model in models.items())
    )
    with gr.Blocks(title="MADFormer", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# One transformer, part autoregressive, part diffusion\n{_EQUAL_COST}{_size_note(models.values())}\n\n{description}"
        )
        with gr.Row():
            condition = _condition_input(gr, first, n)
            seed = gr.Number(seeds.of(first.config, "sample"), label="seed (empty: a new one)", precision=0, minimum=0)
            every = gr.Radio(["block", "step"], value="block", label="show every")
        with gr.Row(elem_classes="pair"):
            draw, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
        controls, splits, pictures, costs = [], [], [], []
        depths = sorted({depth for model in models.values() for depth in elastic_depth.trained_depths(model.config)})
        elastic = any(model.config.train.elastic_depth for model in models.values())
        with gr.Row(elem_classes="pair"):
            for side in range(2):
                with gr.Column(min_width=0):
                    steps = sample.steps if side else max(1, sample.steps // 5)
                    controls += [
                        gr.Dropdown(names, value=names[-1 if side else 0], label="model", visible=len(names) > 1),
                        gr.Dropdown(list(table.FIELDS["sample.solver"].choices), value=sample.solver, label="solver"),
                        gr.Slider(1, max(100, sample.steps), value=steps, step=1, label="solver steps"),
                        gr.Slider(0, max(8, sample.guidance), value=sample.guidance, step=0.1, label="guidance"),
                    ]
                    schedules = list(dict.fromkeys([block_steps.CONSTANT, "linear:1.5x:0.5x", sample.steps_by_block]))
                    splits += [
                        gr.Dropdown(
                            schedules, value=sample.steps_by_block, allow_custom_value=True, label="steps by block"
                        ),
                        gr.Dropdown(
                            [("the model's own", 0), *((str(depth), depth) for depth in depths)],
                            value=sample.diffusion_depth,
                            label="D, diffusion layers",
                            visible=elastic,
                        ),
                    ]
                    options = {"show_label": False, "format": "png", "interactive": False, "elem_classes": "drawn"}
                    label, buttons = "left" if side == 0 else "right", ["download", "fullscreen"]
                    pictures.append(gr.Image(label=label, buttons=buttons, **options))
                    costs.append(gr.Markdown("nothing drawn yet"))

        editable = next((model for model in models.values() if model.config.model.block_order == "random"), None)
        if editable is not None:
            editor.add_editor(gr, editable, condition, functools.partial(_condition_settings, first))

        def on_draw(chosen: Any, seed: float | None, every: str, *values: Any) -> Iterator[list[Any]]:
            sides = [(*values[4 * i : 4 * i + 4], *values[8 + 2 * i : 10 + 2 * i]) for i in (0, 1)]
            heading = ""
            if seed is None:
                seed = secrets.randbelow(editor.SEEDS)
                heading = f"seed **{seed}**; "
            shared = {"n": n, "seed": seed} | _condition_settings(first, chosen)
            fields = ("solver", "steps", "guidance", "steps_by_block", "diffusion_depth")
            settings = [shared | dict(zip(fields, side)) for _, *side in sides]
            chosen_models = [models[name] for name, *_ in sides]
            try:
                for states in stream_side_by_side(chosen_models, settings, every):
                    captions = [heading + _cost_caption(*pair) for pair in zip(chosen_models, states)]
                    yield [_pane_image(state) for state in states] + captions
            except ConfigError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        inputs = [condition, seed, every, *controls, *splits]
        drawing_event = draw.click(on_draw, inputs, [*pictures, *costs], concurrency_limit=1, api_name="draw")
        stop.click(None, cancels=[drawing_event])
    return blocks


def serve(blocks: Any, host: str, port: int) -> Any:
    """Starts a server for a page and returns the page.

    Raises:
      ConfigError: The host is not this machine, or the port is taken.
    """
    gr = _import_gradio()
    _check_address(host, port)
    # Gradio's own fonts would be downloaded.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    host = f"[{host}]" if ":" in host else host  # IPv6, as in a URL
    try:
        with _disable_proxies():  # gradio sends a request to its own server
            blocks.launch(
                server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
                theme=theme, css=_CSS, footer_links=[],
            )  # fmt: skip
    except OSError as error:
        raise ConfigError(_port_error(port, error)) from None
    return blocks


def _check_address(host: str, port: int) -> None:
    """Checks the address by binding it, because gradio tries for minutes before it fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(_port_error(port, error)) from None
        raise ConfigError(
            f"config.demo.host={host!r} is not an address of this machine ({first_line(error)}). Use 127.0.0.1 to serve to this "
            "machine alone, or 0.0.0.0 to serve at all its addresses."
        ) from None


def _port_error(port: int, error: OSError) -> str:
    return f"config.demo.port={port}: {first_line(error)}: choose another port, or 0 for any free one."


@contextlib.contextmanager
def _disable_proxies() -> Iterator[None]:
    """Lets HTTP clients connect without a proxy.

    A proxy does not reach this machine, and httpx fails on kinds of proxies that it does not
    support.
    """
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _import_gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        with _disable_proxies():
            import gradio
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "gradio":
            raise ConfigError("--mode=demo needs a package: pip install 'gradio>=6,<7'.") from None
        raise ConfigError(
            f"--mode=demo: gradio is installed and cannot be imported ({first_line(error)}). Install it anew: "
            "pip install 'gradio>=6,<7'."
        ) from None
    return gradio


def _check_comparable(first: trained_model.Model, second: trained_model.Model) -> None:
    """Checks that two models take the same classes or captions."""
    a, b = first.config, second.config
    if (a.model.classes, first.labels, a.text.vocabulary) != (b.model.classes, second.labels, b.text.vocabulary):
        raise ConfigError(
            "config.demo.other has other classes or captions than the model of --workdir: name a model that was trained on "
            "the same ones."
        )


def _size_note(models: Iterable[trained_model.Model]) -> str:
    """Returns a sentence for models whose passes differ in work; "" if they do not."""
    sizes = {(m.depth, m.width, m.mlp_width) for m in (x.config.model for x in models)}
    note = " These models differ in size, and a pass of the larger one is more work: compare seconds."
    return note if len(sizes) > 1 else ""


def _display_name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path


def _condition_input(gr: Any, model: trained_model.Model, n: int) -> Any:
    """Makes the input of prompts, at first those of the config, or of a class."""
    c = model.config.copy_and_resolve_references()
    if c.text.vocabulary:
        c.sample.n, default = n, []
        with contextlib.suppress(ConfigError):  # This machine may lack the data of the prompts.
            default = list(dict.fromkeys(prompts.load(c)))
        return gr.Textbox("\n".join(default), label="prompts, one per line", lines=2, scale=3)
    names = list(_class_numbers(model))
    return gr.Dropdown([_ALL_CLASSES, *names], value=_ALL_CLASSES, label="class", visible=bool(names))


def _class_numbers(model: trained_model.Model) -> dict[str, int]:
    """Returns the number of each class by its entry in the list: its name, or else its number."""
    names = model.labels or [str(k) for k in range(model.config.model.classes)]
    return {entry: k for k, entry in enumerate(class_labels.distinct_names(names, taken=[_ALL_CLASSES]))}


def _condition_settings(model: trained_model.Model, chosen: Any) -> dict[str, Any]:
    """Returns the settings for a value of `_condition_input`; prompts never name a file."""
    if model.config.text.vocabulary:
        return {"prompts": [line.strip() for line in (chosen or "").split("\n") if line.strip()]}
    if not model.config.model.classes:
        return {}
    return {"labels": "" if chosen in (_ALL_CLASSES, None) else [_class_numbers(model)[chosen]]}


def _pane_image(state: PaneState) -> np.ndarray | None:
    """Returns the enlarged grid of a side, or None before the first frame."""
    return None if state.frame is None else editor.enlarge(generation.tile_grid(state.frame.images))


def _cost_caption(model: trained_model.Model, state: PaneState) -> str:
    """Returns a line with the progress and the cost of a side."""
    frame = state.frame
    if frame is None:
        return f"compiling ... {_COMPILING}" if state.compiling else "starting ..."
    n, blocks = len(frame.images), model.config.model.blocks
    return (
        f"block **{frame.block + 1}** of {blocks}, step {frame.step}; an image so far: **{frame.passes:.2f}** full-model passes, "
        f"**{state.seconds / n:.3f}** seconds"
    )
