"""Deprecated names, kept for one release for sweep files of users. Use `madformer_jax.sweeps`."""
