"""The benchmark model: the architecture of the PyTorch release at a size that two CPU cores can train.

    python -m madformer_jax.main --mode=benchmark --config=configs/bench_mid.py --workdir=runs/bench_mid

It has 20.5 M parameters in float32. It is measured on random latents and has no data set.
"""

from ml_collections import ConfigDict

from madformer_jax.weights.release_config import preset


def get_config() -> ConfigDict:
    c = preset(
        {
            "hidden_size": 256,
            "num_heads": 4,
            "depth": 8,
            "diff_depth": 4,
            "intermediate_size": 1024,
            "unet_block_out_channels": (64, 128),
            "unet_num_layers_per_block": (2, 2),
            "unet_transformer_layers_per_block": (0, 1),
            "unet_resnet_groups": 8,
            "unet_num_heads": 8,
            "unet_time_emb_dim": 128,
            "block_size": 64,  # tokens, after the stride-2 step
            "pre_downsample_block_size": 256,  # 16 x 16 latent positions
            "ar_len": 16,
            "latent_channels": 4,
            "lambda_hidden": 0.1,
        }
    )
    c.model.scan_unroll = 3  # unrolls every layer: a few percent faster on a CPU, at the same compile time
    c.train.batch = 4
    c.sample.n = c.sample.batch = 4
    c.sample.solver = "dpmpp_2m"
    c.sample.steps = 20
    c.benchmark.parts = "train,sample"
    return c
