"""Files of a model on the hub; if it cannot be reached, those of its cache, without waiting."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from trace_tasks.errors import TraceError


class ModelError(TraceError):
    """The model cannot be loaded; the message says why and what to do."""


@cache
def is_out_of_reach() -> bool:
    """Whether nothing can be fetched, asked once: the hub's client would try for half a minute, file by file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # those of the HTTP library, which depends on the version of the client
        return True
    return False


def hub_file(model: str, name: str, revision: str | None) -> Path:
    """A file of a model on the hub, by whose path the commit is known: snapshots/COMMIT/NAME.

    Raises:
        OSError: if it cannot be had; huggingface_hub's EntryNotFoundError where the model has no such file.
        ValueError: if the name is none.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, name, revision=revision, local_files_only=is_out_of_reach()))


def find_file(model: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a model in a local folder or on the hub; None where it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    if Path(model).is_dir():
        file = Path(model) / name
        return file if file.is_file() else None
    try:
        return hub_file(str(model), name, revision)
    except EntryNotFoundError:  # also without the hub, where the cache lacks it
        return None


def model_folder(base: str, revision: str | None = None) -> Path:
    """The folder of what `resolve_model` returned; a model of the hub is fetched.

    Raises:
        ModelError: if the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    if Path(base).is_dir():
        return Path(base)
    only, out = ["*.json", "*.safetensors"], is_out_of_reach()
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=only, local_files_only=out))
    except (OSError, ValueError) as e:
        raise not_given(base, e) from e


def not_given(base: str, error: Exception) -> ModelError:
    """The error for a model that the hub does not provide."""
    if is_out_of_reach():
        return ModelError(
            f"Cannot find the model {base!r}: it is not a local folder, it is not in the hub's cache, and the hub "
            "cannot be reached (or HF_HUB_OFFLINE is set). Check the name; or give the folder of the model; or "
            "download it on a machine with network access (hf download)."
        )
    return ModelError(
        f"Cannot find the model {base!r}: it is not a local folder, and the hub does not provide it "
        f"({type(error).__name__}). Check the name. If the model is gated, set HF_TOKEN."
    )
