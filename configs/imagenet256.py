"""ImageNet at 256 x 256, class-conditional (arXiv 2506.07999, section 4.1), 1.85 B parameters.

    python -m madformer_jax.main --config=configs/imagenet256.py:D=14,L=4 --workdir=gs://bucket/imagenet_d14

Variants, after the colon and separated by commas:

D=7, 14, 21 or 28   diffusion layers of N = 28; the default is 14
L=1, 4, 8 or 16     blocks; 8 means 2 x 4 blocks; the default is 4
text                a model whose caption is the name of the class (docs/text.md): 2.14 B parameters
                    with the 128,256 tokens of Llama 3's tokenizer; give --config.text.tokenizer=FILE
tiny                a few small layers on the embedded digits, which run anywhere in minutes

It trains on VAE latents that --mode=prepare has cached (docs/data.md). It fits a TPU v5e:4x4 or
v5p:2x2x1 and anything larger (docs/scaling.md).
"""

from ml_collections import ConfigDict

from madformer_jax import config
from madformer_jax.weights import release_config

IMAGES, EPOCHS = 1_281_167, 50  # paper: 250 k steps


def get_config(variant: str = "") -> ConfigDict:
    chosen = config.variant(variant, {"D": 14, "L": 4}, ("text", "tiny"))
    c = config.base()  # its width, heads, depth, U-Net and AdamW are the release's for FFHQ
    c.model.diffusion_depth = chosen["D"]
    c.model.blocks = chosen["L"]
    c.model.unet_stride = 1  # one token for each latent position: 256 a block at L = 4; the authors have stride 2
    c.model.classes = 0 if chosen["text"] else 1000
    c.model.dtype = "bfloat16"
    c.loss.image, c.loss.hidden, c.loss.clean = 5.0, 0.1, 0.1  # paper
    if chosen["text"]:
        c.text.vocabulary = 128_256  # paper
        c.text.length, c.text.caption = 16, "class"  # ours: the paper states neither
        c.loss.text = 1.0  # paper
        c.sample.prompts = "data:train"

    c.data.source = "arrayrecord"
    c.data.test_share = 0.0  # as in the paper: trains on all images and compares with them
    c.data.image_size = 256
    c.codec.path = release_config.RELEASE_VAE

    c.train.batch = 256
    c.train.steps = EPOCHS * IMAGES // c.train.batch
    c.train.log_every = 100
    c.train.sample_every = 10_000
    c.train.checkpoint_every = 2_000
    c.train.keep_every = 10_000
    c.sample.n = c.sample.batch = 256
    c.sample.solver, c.sample.steps, c.sample.guidance = "ddim", 100, 1.0  # paper: without guidance
    c.evaluate.network, c.evaluate.split, c.evaluate.n = "inception", "train", 50_000

    c.mesh.data, c.mesh.fsdp = 1, -1  # docs/scaling.md
    c.train.accumulate = 2
    c.model.remat = "attention"
    if chosen["tiny"]:
        config.as_tiny(c)
    return c
