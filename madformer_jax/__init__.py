"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""
