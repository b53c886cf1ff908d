"""Plans of the streams, stages and U-Net passes that a model runs in training and in sampling.

`madformer.MADFormer` and `decoding.Decoding` run what the plans contain, and `cost.flops` counts it.
A switch that adds or removes a stream belongs here (MADFormer, sections 3.4 and 4). Other modules
read the switches only for details within a stage.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from madformer_jax.config.shapes import vocabulary_size


class AblationSwitches(NamedTuple):
    """Properties of a model that decide which streams it has.

    Fields have the names of `config.model`, except `text` and `block_only` (`diffusion_attention`).
    """

    blocks: int
    text: bool  # the model is conditional
    clean_stream: bool
    ar_condition: bool
    hidden_from: str
    block_only: bool  # no attention between blocks in the diffusion layers


class TrainingPlan(NamedTuple):
    """Streams of each stage (`transformer.Streams`), and passes of the U-Net over all blocks.

    A stream that enters a stage and does not leave it ends in the stage's last layer, where it still
    gives keys and values to the other streams.
    """

    ar_inputs: tuple[str, ...]  # streams that enter the AR layers
    ar_outputs: tuple[str, ...]  # streams that leave them; `pred` is then the condition
    diffusion_inputs: tuple[str, ...]  # `pred` is here the noisy blocks plus the condition
    diffusion_outputs: tuple[str, ...]
    clean_blocks: int  # number of blocks of the clean stream
    downsampled: tuple[str, ...]  # blocks that the U-Net embeds, of "clean", "noisy"
    upsampled: tuple[str, ...]  # outputs of the U-Net, of "hidden", "image", "clean"


def training_plan(terms: tuple[str, ...], switches: AblationSwitches) -> TrainingPlan:
    """Returns the streams and passes that loss terms need.

    Args:
      terms: Requested terms, of `LOSS_TERMS`. A term whose stream the model lacks is ignored.
      switches: The model's switches.
    """
    s = switches
    image, hidden = "image" in terms, "hidden" in terms
    clean, text = "clean" in terms and s.clean_stream, "text" in terms and s.text
    noisy = image or (hidden and s.hidden_from == "noisy")
    # No other block attends to the last clean block, so it exists for the clean term only.
    clean_blocks = (s.blocks if clean else s.blocks - 1) if s.clean_stream else 0
    exists = {"text": s.text, "clean": clean_blocks > 0, "pred": True}

    def streams(**needed: bool) -> tuple[str, ...]:
        return tuple(name for name, is_needed in needed.items() if is_needed and exists[name])

    diffusion_outputs = streams(text=text, clean=clean, pred=image)
    diffusion_inputs = streams(text=bool(diffusion_outputs), clean=clean or (image and not s.block_only), pred=image)
    condition = (s.ar_condition and (image or hidden)) or (hidden and s.hidden_from == "condition")
    ar_outputs = streams(text="text" in diffusion_inputs, clean="clean" in diffusion_inputs, pred=condition)
    ar_inputs = streams(text=bool(ar_outputs), clean="clean" in ar_outputs or condition, pred=condition)

    # The prediction stream starts from the clean blocks too, p_i = c_(i-1).
    reads_clean = "clean" in ar_inputs or ("pred" in ar_inputs and s.blocks > 1)
    return TrainingPlan(
        ar_inputs=ar_inputs,
        ar_outputs=ar_outputs,
        diffusion_inputs=diffusion_inputs,
        diffusion_outputs=diffusion_outputs,
        clean_blocks=clean_blocks,
        downsampled=("clean",) * (reads_clean or hidden or clean) + ("noisy",) * noisy,
        upsampled=("hidden",) * hidden + ("image",) * image + ("clean",) * clean,
    )


class SamplingPlan(NamedTuple):
    """Stages that sampling runs in addition to the diffusion layers at every solver step."""

    condition: bool  # AR layers on the prediction stream, once per block
    cache_clean_ar: bool  # AR layers of the clean tower, on every finished block but the last
    cache_clean_diffusion: bool  # diffusion layers of the clean tower, likewise


def sampling_plan(switches: AblationSwitches) -> SamplingPlan:
    """Returns the stages whose results the diffusion layers read."""
    s = switches
    cache_clean_diffusion = s.clean_stream and not s.block_only
    return SamplingPlan(
        s.ar_condition, s.clean_stream and (s.ar_condition or cache_clean_diffusion), cache_clean_diffusion
    )


def ablation_switches(c: ConfigDict) -> AblationSwitches:
    """Returns the switches of a config."""
    m = c.model
    return AblationSwitches(
        blocks=m.blocks,
        text=bool(vocabulary_size(c)),
        clean_stream=m.clean_stream,
        ar_condition=m.ar_condition,
        hidden_from=m.hidden_from,
        block_only=m.diffusion_attention == "block",
    )
