"""Files of ours: where they lie."""

import os


def user_cache(kind: str) -> str:
    """Folder in the user's cache for one kind of our files."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "madformer_jax", kind)
