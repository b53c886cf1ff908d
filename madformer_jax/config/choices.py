"""Names that several modules share. A new solver, path, attention, network or source is one line here.

`config.table` lists them as values of fields. Add a term of the loss here and in `diffusion.losses`.
The values of the dictionaries are "module:class".
"""

LOSS_TERMS = ("image", "hidden", "clean", "text")  # weights in `config.loss`; each term needs one output of the model
PREDICTION_TYPES = ("eps", "v", "x0")  # `model.prediction_type`
LOSS_WEIGHTINGS = ("output", "v", "min_snr")  # `loss.weighting`
BLOCK_ORDERS = ("raster", "reverse", "center_out", "random")  # `model.block_order`
TIME_SAMPLINGS = ("uniform", "logit_normal")  # `diffusion.time_sampling`

NOISE_PATHS = {  # `diffusion.path` -> class in `madformer_jax.diffusion`
    "ddpm": "schedule:DDPM",
    "flow": "schedule:Flow",
    "cosine": "schedule:Cosine",
}
SOLVERS = {  # `sample.solver` -> class in `madformer_jax.diffusion`
    "ddim": "solvers:DDIM",
    "dpmpp_2m": "solvers:DPMSolverPP2M",
    "euler": "solvers:Euler",
    "heun": "solvers:Heun",
    "ancestral": "solvers:Ancestral",
}
# `model.attention` -> class in `madformer_jax.ops.attention`. "auto" takes the first that supports the case, and
# "blocks" supports every case.
ATTENTION = {
    "cudnn": "cudnn:CudnnAttention",
    "pallas": "pallas:PallasAttention",
    "blocks": "xla_blocks:XlaBlocks",
    "reference": "dense_mask:DenseMask",  # for tests
}
NETWORKS = {  # `evaluate.network` -> class in `madformer_jax.evaluation.networks`
    "inception": "inception:Inception",  # FID, KID, IS
    "attributes": "attribute_classifier:AttributeNetwork",  # FD-attributes, KID-attributes
    "classifier": "classifier:ClassifierNetwork",  # FD-classifier, KID-classifier, recognised
    "alexnet": "alexnet:AlexNetNetwork",  # FD-alexnet, KID-alexnet, LPIPS-diversity
}
SOURCES = {  # `data.source` before the colon -> class in `madformer_jax.data`
    "digits": "digits:Digits",
    "drawings": "drawings.pictures:Drawings",
    "earth": "earth:Earth",
    "patterns": "patterns:Patterns",
    "folder": "folder:Folder",
    "npy": "latent_folder:LatentFolder",
    "webdataset": "tars:Tars",
    "hf": "hugging_face:HuggingFace",
    "tfds": "tfds:Tfds",
    "arrayrecord": "records:Records",
}
