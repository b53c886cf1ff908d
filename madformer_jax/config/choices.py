"""Names that several modules share: terms of the loss, prediction types, noise paths, solvers.

`config.table` lists them as values of fields. Add a term of the loss here and in `diffusion.losses`.
"""

LOSS_TERMS = ("image", "hidden", "clean", "text")  # weights in `config.loss`; each term needs one output of the model
PREDICTION_TYPES = ("eps", "v", "x0")  # `model.prediction_type`
LOSS_WEIGHTINGS = ("output", "v", "min_snr")  # `loss.weighting`
BLOCK_ORDERS = ("raster", "reverse", "center_out", "random")  # `model.block_order`
TIME_SAMPLINGS = ("uniform", "logit_normal")  # `diffusion.time_sampling`

# Value of `diffusion.path` or `sample.solver` -> "module:class" in `madformer_jax.diffusion`
NOISE_PATHS = {"ddpm": "schedule:DDPM", "flow": "schedule:Flow", "cosine": "schedule:Cosine"}
SOLVERS = {
    "ddim": "solvers:DDIM",
    "dpmpp_2m": "solvers:DPMSolverPP2M",
    "euler": "solvers:Euler",
    "heun": "solvers:Heun",
    "ancestral": "solvers:Ancestral",
}
