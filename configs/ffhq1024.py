"""FFHQ at 1024 x 1024, unconditional or from captions: the recipe of the release, 1.30 B parameters.

    python -m madformer_jax.main --config=configs/ffhq1024.py:D=7,L=16 --workdir=gs://bucket/ffhq_d7

Source: arXiv 2506.07999, section 4.1. Variants, after the colon and separated by commas:

D=7, 14, 21 or 28   diffusion layers of N = 28; the default is 14
L=1, 4, 8 or 16     blocks; 8 means 2 x 4 blocks; the default is 16
release             also the choices of the release that differ from our defaults (docs/weights.md)
text                a model that reads captions (docs/text.md): 2.14 B parameters with the 128,256
                    tokens of Llama 3's tokenizer; give its file as --config.text.tokenizer=FILE
tiny                a few small layers on the embedded digits, which run anywhere in minutes

It trains on VAE latents that --mode=prepare has cached (docs/data.md). It fits a TPU v5e:4x4 or
v5p:2x2x1 and anything larger (docs/scaling.md).
"""

from ml_collections import ConfigDict

from madformer_jax import config
from madformer_jax.weights import release_config

IMAGES, EPOCHS = 70_000, 200


def get_config(variant: str = "") -> ConfigDict:
    chosen = config.variant(variant, {"D": 14, "L": 16}, ("release", "text", "tiny"))
    c = config.base()  # its width, heads, depth, U-Net, loss weights and AdamW are the release's
    c.model.diffusion_depth = chosen["D"]
    c.model.blocks = chosen["L"]
    c.model.dtype = "bfloat16"
    if chosen["release"]:
        release_config.as_release(c)
    if chosen["text"]:
        c.text.vocabulary = 128_256  # paper
        c.text.length = 64  # ours: the paper does not state it
        c.loss.image, c.loss.text = 5.0, 1.0  # paper
        c.sample.prompts = "data:train"

    c.data.source = "arrayrecord"
    c.data.test_share = 0.0  # as in the paper: trains on all images and compares with them
    c.data.image_size = 1024
    c.data.crop = False  # release: resizes without crop or flip
    c.codec.path = release_config.RELEASE_VAE  # release

    c.train.batch = 64
    c.train.steps = EPOCHS * IMAGES // c.train.batch
    c.train.log_every = 100
    c.train.sample_every = 10_000
    c.train.checkpoint_every = 2_000
    c.train.keep_every = 10_000  # the paper's FID is a mean over checkpoints 10,000 steps apart
    c.sample.n, c.sample.batch = 64, 128  # 8 a chip of v5e:4x4, as 4 double the time of convolutions; use 64 on one GPU
    c.sample.solver = "dpmpp_2m" if chosen["release"] else "ddim"  # release's script; paper otherwise
    c.sample.steps = 250  # paper
    c.evaluate.network = "inception"  # paper, which does not name its reference set
    c.evaluate.split, c.evaluate.n = "train", 8_000

    c.mesh.data, c.mesh.fsdp = 1, -1  # docs/scaling.md
    # One microbatch takes 14.6 of the 15.75 GiB of a v5e chip and gathers the parameters only once.
    c.train.accumulate = 4 if chosen["text"] else 1
    c.model.remat = "attention"
    if chosen["tiny"]:
        config.as_tiny(c)
    return c
