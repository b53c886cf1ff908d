"""Data: sources, preprocessing, captions and the input pipeline (start with `pipeline`)."""
