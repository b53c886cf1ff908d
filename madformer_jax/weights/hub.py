"""Files of Hugging Face hub repositories.

`vae_weights` and `modes/convert.py` download with it. The package `huggingface_hub` is optional.
"""

from collections.abc import Sequence

from etils import epath

from madformer_jax.errors import ConfigError, first_line

_MISSING_FILE = ("EntryNotFoundError", "RemoteEntryNotFoundError")  # names in old and new versions of huggingface_hub


def download(subject: str, hub_id: str, revision: str | None, choices: Sequence[Sequence[str]]) -> list[epath.Path]:
    """Downloads files of a repository to the hub's own cache.

    Args:
      subject: The field and its value, for messages.
      hub_id: Repository, owner/name.
      revision: Revision; None for the newest.
      choices: Lists of files. The first list that the repository has completely is downloaded.

    Returns:
      The paths of these files.

    Raises:
      ConfigError: `huggingface_hub` is not installed, the hub cannot be reached, or no list is complete.
    """
    version = f" at revision {revision}" if revision else ""
    remedy = f"download {' and '.join(choices[0])} of huggingface.co/{hub_id}{version} by other means and give the path"
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"{subject} cannot be downloaded: pip install huggingface_hub, or {remedy}.") from None
    problems = []
    for files in choices:
        try:
            return [epath.Path(huggingface_hub.hf_hub_download(hub_id, file, revision=revision)) for file in files]
        except Exception as error:  # the hub, its HTTP library and the system raise their own types
            problems.append(first_line(error))
            if type(error).__name__ not in _MISSING_FILE:
                break
    raise ConfigError(f"{subject} cannot be downloaded ({problems[-1]}): {remedy}.")
