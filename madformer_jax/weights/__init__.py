"""Weights of other frameworks: files, conversion and fingerprints."""
