"""Find models in the Hugging Face cache by their ids, without the network."""

from __future__ import annotations

import re

_ID = re.compile(r"(?=.{1,96}$)\w(?:[\w.-]*\w)?(?:/\w(?:[\w.-]*\w)?)?", re.ASCII)


def is_id(text: str) -> bool:
    """Return whether the text has the form of a Hugging Face id, "org/name" or "name"."""
    return bool(_ID.fullmatch(text)) and ".." not in text and not text.endswith(".safetensors")


def snapshot_of(repo_id: str, revision: str | None) -> str:
    """Return the folder of a model in the Hugging Face cache. Default of `revision`: "main".

    Raises FileNotFoundError, which says what to do, if the cache does not have the model or
    huggingface_hub is not installed.
    """
    neither = f"no file or directory {repo_id!r}"
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{neither}; to take it for a Hugging Face id, install huggingface_hub"
        ) from None
    try:
        return snapshot_download(repo_id, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:  # among others LocalEntryNotFoundError
        at = "" if revision is None else f" at revision {revision!r}"
        option = "" if revision is None else f" --revision {revision}"
        raise FileNotFoundError(
            f"{neither}, and no such model{at} in the Hugging Face cache "
            f"({constants.HF_HUB_CACHE}); `hf download {repo_id}{option}` fetches it"
        ) from error
