"""Streams and passes of the block U-Net in training (MADFormer, section 3.4), and the stages that run in sampling (section 4).

The model runs what `plan` and `sampling_plan` say, and `flops` counts it: the terms of the loss and the ablation switches
decide nowhere else.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from madformer_jax.config.shapes import vocabulary_size


class AblationSwitches(NamedTuple):
    """What of a model decides which streams it has; names as in `config.model`."""

    blocks: int
    text: bool  # the model is conditional
    clean_stream: bool
    ar_condition: bool
    hidden_from: str
    block_only: bool  # no attention between blocks in the diffusion layers


class TrainingPlan(NamedTuple):
    """Names of the streams of each stage (of `transformer.Streams`) and of the U-Net's passes over all blocks.

    A stream that enters a stage and does not leave it gives keys and values to the others, and ends in the last layer.
    """

    ar: tuple[str, ...]  # streams into the AR layers
    between: tuple[str, ...]  # out of them; `pred` is the condition now
    diffusion: tuple[str, ...]  # into the diffusion layers; `pred` is the noisy blocks, with the condition added
    out: tuple[str, ...]  # out of them
    clean_blocks: int  # blocks of the clean stream
    down: tuple[str, ...]  # blocks that the U-Net embeds, of "clean", "noisy"
    up: tuple[str, ...]  # what it gives back, of "hidden", "image", "clean"


def training_plan(terms: tuple[str, ...], switches: AblationSwitches) -> TrainingPlan:
    """What the wanted terms of the loss, of `TERMS`, need; a term for which the model has no stream is not there."""
    s = switches
    image, hidden = "image" in terms, "hidden" in terms
    clean, text = "clean" in terms and s.clean_stream, "text" in terms and s.text
    noisy = image or (hidden and s.hidden_from == "noisy")
    # The last clean block is seen by nobody but itself: without an output of its own it need not exist.
    clean_blocks = (s.blocks if clean else s.blocks - 1) if s.clean_stream else 0
    has = {"text": s.text, "clean": clean_blocks > 0, "pred": True}

    def those(**wanted: bool) -> tuple[str, ...]:
        return tuple(name for name, is_wanted in wanted.items() if is_wanted and has[name])

    out = those(text=text, clean=clean, pred=image)
    diffusion = those(text=bool(out), clean=clean or (image and not s.block_only), pred=image)
    condition = (s.ar_condition and (image or hidden)) or (hidden and s.hidden_from == "condition")
    between = those(text="text" in diffusion, clean="clean" in diffusion, pred=condition)
    goes_on = "clean" in between or condition  # else the image's streams need no AR layers
    ar = those(text=bool(between), clean=goes_on, pred=condition)

    read = "clean" in ar or ("pred" in ar and s.blocks > 1)  # p_i = c_(i-1)
    return TrainingPlan(
        ar=ar,
        between=between,
        diffusion=diffusion,
        out=out,
        clean_blocks=clean_blocks,
        down=("clean",) * (read or hidden or clean) + ("noisy",) * noisy,
        up=("hidden",) * hidden + ("image",) * image + ("clean",) * clean,
    )


class SamplingPlan(NamedTuple):
    """Stages that run in sampling beside the diffusion layers, which run at every solver step."""

    condition: bool  # the AR layers on the prediction stream, once a block
    extend_ar: bool  # the clean tower's AR layers on every finished block but the last
    extend_diffusion: bool  # its diffusion layers, likewise


def sampling_plan(switches: AblationSwitches) -> SamplingPlan:
    """Returns the stages whose results the diffusion layers read."""
    s = switches
    extend_diffusion = s.clean_stream and not s.block_only
    return SamplingPlan(s.ar_condition, s.clean_stream and (s.ar_condition or extend_diffusion), extend_diffusion)


def ablation_switches(c: ConfigDict) -> AblationSwitches:
    m = c.model
    return AblationSwitches(
        blocks=m.blocks,
        text=bool(vocabulary_size(c)),
        clean_stream=m.clean_stream,
        ar_condition=m.ar_condition,
        hidden_from=m.hidden_from,
        block_only=m.diffusion_attention == "block",
    )
