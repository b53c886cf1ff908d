"""FFHQ at 1024 x 1024, unconditional or from captions: the release's recipe (arXiv 2506.07999, section 4.1), 1.30 B parameters.

    python -m madformer_jax.main --config=configs/ffhq1024.py:D=7,L=16 --workdir=gs://bucket/ffhq_d7

What stands behind the colon, any of it: D=7, 14, 21 or 28 diffusion layers of 28 (14 by default); L=1, 4, 8 (2 x 4) or 16 blocks
(16); `release` for the release's odd choices as well (config.as_release); `text` for a model that reads captions (docs/text.md), of
2.14 B parameters with the 128 256 tokens of Llama 3's tokenizer, whose file is --config.text.tokenizer=FILE; `tiny` for a few small
layers on the embedded digits, which runs anywhere in minutes. It trains on VAE latents that --mode=prepare has cached (docs/data.md).

It fits a TPU v5e:4x4 or v5p:2x2x1, and what is larger (docs/scaling.md).
"""

from ml_collections import ConfigDict

from madformer_jax import config
from madformer_jax.weights import release_config

IMAGES, EPOCHS = 70_000, 200


def get_config(variant: str = "") -> ConfigDict:
    chosen = config.variant(variant, {"D": 14, "L": 16}, ("release", "text", "tiny"))
    c = config.base()  # whose width, heads, depth, U-Net, loss weights and AdamW are the release's
    c.model.diffusion_depth = chosen["D"]
    c.model.blocks = chosen["L"]
    c.model.dtype = "bfloat16"
    if chosen["release"]:
        release_config.as_release(c)
    if chosen["text"]:
        c.text.vocabulary = 128_256  # paper
        c.text.length = 64  # ours: the paper says nothing of it
        c.loss.image, c.loss.text = 5.0, 1.0  # paper
        c.sample.prompts = "data:train"

    c.data.source = "arrayrecord"
    c.data.test_share = 0.0  # trained on all images, and compared with them, as the paper does
    c.data.image_size = 1024
    c.data.crop = False  # release: resized, neither cropped nor flipped
    c.codec.path = release_config.RELEASE_VAE  # release

    c.train.batch = 64
    c.train.steps = EPOCHS * IMAGES // c.train.batch
    c.train.log_every = 100
    c.train.sample_every = 10_000
    c.train.checkpoint_every = 2_000
    c.train.keep_every = 10_000  # the paper's FID is a mean over checkpoints that are 10 000 steps apart
    c.sample.n, c.sample.batch = 64, 128  # 8 a chip of v5e:4x4: with 4, convolutions take twice as long; one GPU: 64
    c.sample.solver = "dpmpp_2m" if chosen["release"] else "ddim"  # release's script; paper
    c.sample.steps = 250  # paper
    c.evaluate.network = "inception"  # paper, whose reference set is not named
    c.evaluate.split, c.evaluate.n = "train", 8_000

    c.mesh.data, c.mesh.fsdp = 1, -1  # docs/scaling.md
    # in one microbatch a chip of v5e:4x4 needs 14.6 of its 15.75 GiB, and gathers the parameters once
    c.train.accumulate = 4 if chosen["text"] else 1
    c.model.remat = "attention"
    if chosen["tiny"]:
        config.as_tiny(c)
    return c
