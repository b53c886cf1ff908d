"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

__version__ = "0.1.0"
