"""--mode=demo: a page to draw with, two settings or two models side by side at equal cost (needs gradio).

    python -m madformer_jax.main --mode=demo --workdir=runs/digits [--config.demo.other=runs/other] [--config.demo.port=7860]

Serves the newest checkpoint, or `sample.step`, until it is interrupted.
"""

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import class_labels, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.runtime import checkpoint
from madformer_jax.sampling import generation, prompts, trained_model

_IMAGE_SIDE = 384  # pixels of the picture of a side, at least: smaller ones are enlarged
_ALL_CLASSES = "all"  # in the list of classes
_SEEDS = 2**32  # of a seed: limits.py
_CSS = ".drawn img {image-rendering: pixelated}"


class PaneState(NamedTuple):
    """A side of the page."""

    frame: trained_model.Frame | None  # None: nothing is drawn yet
    seconds: float  # of drawing, without the other side's

    @property
    def passes(self) -> float:
        """Full-model passes of an image (`flops.model_passes`)."""
        return self.frame.passes if self.frame else 0.0


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Serves the page until an interrupt.

    Raises:
      ConfigError: gradio is missing, a setting is wrong, there is no checkpoint, or the address cannot be served at.
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
    served = serve(build_page(models, c.demo.n), c.demo.host, c.demo.port)
    try:
        logging.info("the page is at %s; Ctrl-C ends it", served.local_url)
        threading.Event().wait()
    finally:
        served.close(verbose=False)
    return {}


def stream_side_by_side(
    models: Sequence[trained_model.Model], settings: Sequence[Mapping[str, Any]], every: str
) -> Iterator[list[PaneState]]:
    """Draws on each side at its settings, the side that has cost fewer passes first, and shows all sides after each frame.

    The first showing is of nothing: what follows it may take a while to compile, and is timed once it has been compiled.

    Args:
      settings: of each side, as `api.Model.stream` takes them.
      every: "block" or "step".

    Raises:
      ConfigError: a setting is wrong, or a value is not finite.
    """
    streams = [model.stream(every=every, **given) for model, given in zip(models, settings)]
    shown = [PaneState(None, 0.0) for _ in models]
    yield list(shown)
    for model, given in zip(models, settings):
        for _ in model.stream(**{**given, "steps": 2}):
            pass
    running = set(range(len(models)))
    while running:
        side = min(running, key=lambda i: shown[i].passes)
        began = time.monotonic()
        frame = next(streams[side], None)
        if frame is None:
            running.remove(side)
            continue
        shown[side] = PaneState(frame, shown[side].seconds + time.monotonic() - began)
        yield list(shown)


def build_page(models: Mapping[str, trained_model.Model], n: int) -> Any:
    """The page, a `gradio.Blocks`: n images a side, of any of the models."""
    gr, first = _import_gradio(), next(iter(models.values()))
    names, sample = list(models), first.config.sample
    about = "  \n".join(
        f"**{name}**: N = {m.depth} layers, of which D = {m.diffusion_depth} run at every solver step, L = {m.blocks} blocks"
        for name, m in ((name, model.config.model) for name, model in models.items())
    )
    with gr.Blocks(title="MADFormer", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# One transformer, part autoregressive, part diffusion\nAn image comes into being block after block. The side that "
            "has cost fewer passes goes on first, so that both have always cost about the same. "
            f"Passes count every layer that runs, the clean tower's among them.\n\n{about}"
        )
        with gr.Row():
            what = _condition_input(gr, first, n)
            seed = gr.Number(first.config.seed, label="seed (empty: a new one each time)", precision=0, minimum=0)
            every = gr.Radio(["block", "step"], value="block", label="show every")
        with gr.Row():
            draw, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
        controls, pictures, figures = [], [], []
        with gr.Row():
            for side in range(2):
                with gr.Column(min_width=280):
                    fewer = sample.steps if side else max(1, sample.steps // 5)
                    controls += [
                        gr.Dropdown(names, value=names[-1 if side else 0], label="model", visible=len(names) > 1),
                        gr.Dropdown(list(validation.CHOICES["sample.solver"]), value=sample.solver, label="solver"),
                        gr.Slider(1, 100, value=fewer, step=1, label="solver steps"),
                        gr.Slider(0, 8, value=sample.guidance, step=0.1, label="guidance"),
                    ]
                    pictures.append(
                        gr.Image(
                            label="left" if side == 0 else "right",
                            format="png",
                            interactive=False,
                            elem_classes="drawn",
                        )
                    )
                    figures.append(gr.Markdown("nothing drawn yet"))

        def drawn(chosen: Any, seed: float | None, every: str, *given: Any) -> Iterator[list[Any]]:
            sides = [given[i : i + 4] for i in (0, 4)]
            heading = ""
            if seed is None:
                seed = secrets.randbelow(_SEEDS)
                heading = f"seed **{seed}**; "
            shared = {"n": n, "seed": seed} | _condition_settings(first, chosen)
            settings = [
                shared | {"solver": solver, "steps": steps, "guidance": scale} for _, solver, steps, scale in sides
            ]
            chosen_models = [models[name] for name, *_ in sides]
            try:
                for shown in stream_side_by_side(chosen_models, settings, every):
                    costs = [heading + _cost_caption(*pair) for pair in zip(chosen_models, shown)]
                    yield [_pane_image(one) for one in shown] + costs
            except ConfigError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        drawing_event = draw.click(
            drawn, [what, seed, every, *controls], [*pictures, *figures], concurrency_limit=1, api_name="draw"
        )
        stop.click(None, cancels=[drawing_event])
    return blocks


def serve(blocks: Any, host: str, port: int) -> Any:
    """Starts to serve a page, and returns it.

    Raises:
      ConfigError: The host is not this machine, or the port is taken.
    """
    gr = _import_gradio()
    _check_address(host, port)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fetched from nowhere
    host = f"[{host}]" if ":" in host else host  # IPv6, as in a URL
    try:
        with _disable_proxies():  # gradio asks its own server whether it has started
            blocks.launch(
                server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
                theme=plain, css=_CSS, footer_links=[],
            )  # fmt: skip
    except OSError as error:
        raise ConfigError(_port_error(port, error)) from None
    return blocks


def _check_address(host: str, port: int) -> None:
    """Binds the address once: gradio tries for minutes before it gives up.

    Raises:
      ConfigError: The host is not this machine, or the port is taken.
    """
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
    return f"config.demo.port={port}: {first_line(error)}: choose another one, or 0 for any that is free."


@contextlib.contextmanager
def _disable_proxies() -> Iterator[None]:
    """Lets HTTP clients connect directly: no proxy reaches this machine, and httpx fails on kinds that it does not support."""
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _import_gradio() -> Any:
    """The package.

    Raises:
      ConfigError: It is missing or cannot be imported.
    """
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


def _check_comparable(one: trained_model.Model, other: trained_model.Model) -> None:
    """Raises ConfigError where two models cannot be told to draw the same."""
    a, b = one.config, other.config
    if (a.model.classes, one.labels, a.text.vocabulary) != (b.model.classes, other.labels, b.text.vocabulary):
        raise ConfigError(
            "config.demo.other: it draws other classes, or reads other captions, than the workdir's model."
        )


def _display_name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path


def _condition_input(gr: Any, model: trained_model.Model, n: int) -> Any:
    """Returns the field that says what to draw: prompts (first those of the config), a class, or nothing."""
    c = model.config.copy_and_resolve_references()
    if c.text.vocabulary:
        c.sample.n, asked = n, []
        with contextlib.suppress(ConfigError):  # they may be of data that are not here
            asked = list(dict.fromkeys(prompts.load(c)))
        return gr.Textbox("\n".join(asked), label="prompts, one a line", lines=2, scale=3)
    names = list(_class_numbers(model))
    return gr.Dropdown([_ALL_CLASSES, *names], value=_ALL_CLASSES, label="class", visible=bool(names))


def _class_numbers(model: trained_model.Model) -> dict[str, int]:
    """Returns the number of each class by its entry in the list: the name, or the number if the data name none."""
    names = model.labels or [str(k) for k in range(model.config.model.classes)]
    return {entry: k for k, entry in enumerate(class_labels.distinct_names(names, taken=[_ALL_CLASSES]))}


def _condition_settings(model: trained_model.Model, chosen: Any) -> dict[str, Any]:
    """Returns the settings that the field of `_what` stands for. Prompts are literal: none names a file or a split."""
    if model.config.text.vocabulary:
        return {"prompts": [line.strip() for line in (chosen or "").split("\n") if line.strip()]}
    if not model.config.model.classes:
        return {}
    return {"labels": "" if chosen in (_ALL_CLASSES, None) else [_class_numbers(model)[chosen]]}


def _pane_image(shown: PaneState) -> np.ndarray | None:
    if shown.frame is None:
        return None
    grid = generation.tile_grid(shown.frame.images)
    times = max(1, _IMAGE_SIDE // len(grid))
    grid = grid.repeat(times, axis=0).repeat(times, axis=1)
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def _cost_caption(model: trained_model.Model, shown: PaneState) -> str:
    """What a side has cost so far."""
    frame = shown.frame
    if frame is None:
        return "compiling ..."
    n, blocks = len(frame.images), model.config.model.blocks
    return (
        f"block **{frame.block + 1}** of {blocks}, step {frame.step}; an image so far: **{frame.passes:.2f}** full-model passes, "
        f"**{shown.seconds / n:.3f}** seconds"
    )
