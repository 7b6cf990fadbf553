"""Checkpoints from the Hugging Face hub or its cache, and why one does not come."""

from __future__ import annotations

from pathlib import Path

from zipeval.config.schema import ModelConfig
from zipeval.errors import NotHereError


def snapshot(config: ModelConfig) -> Path:
    """The snapshot in the Hugging Face cache, downloaded first where the hub can be reached.

    Raises:
        NotHereError: if the hub does not give it; says why.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    wanted = {
        "repo_id": config.hub,
        "revision": config.revision,
        "ignore_patterns": ["*.bin", "*.pth", "*.msgpack"],
    }
    try:
        return Path(snapshot_download(**wanted))
    except (HTTPError, HFValidationError, OSError) as error:
        raise NotHereError(_explain(error, config)) from error


def _explain(error: Exception, config: ModelConfig) -> str:
    """Which argument the hub did not take, and what to run next."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"model.hub={config.hub}: not an id. Give ORGANISATION/NAME, or a local copy with model.path=DIR."
    if isinstance(error, errors.RevisionNotFoundError):
        newest = "`zipeval run model.revision=null` with your other settings takes the newest."
        return f"model.revision={config.revision}: {config.hub} has no such commit, branch or tag. {newest}"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{config.hub}"
        return f"model.hub={config.hub}: it is gated. Ask for access at {page}, then run `hf auth login`."
    unauthorised = getattr(getattr(error, "response", None), "status_code", None) == 401
    if isinstance(error, errors.RepositoryNotFoundError) or unauthorised:
        return f"model.hub={config.hub}: no such repository, or a private one. Correct it, or run `hf auth login`."
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    why = (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
        else f"{constants.ENDPOINT} did not give it ({reason})"
    )
    return (
        f"model={config.name}: {config.hub} is not in the Hugging Face cache and {why}. "
        f"Where the hub can be reached, {fetch(config)}, or give a local copy with model.path=DIR."
    )


def fetch(config: ModelConfig) -> str:
    """The command that gets the weights again."""
    revision = f" --revision {config.revision}" if config.revision else ""
    if config.hub:
        return f"run `hf download {config.hub}{revision}`"
    return "copy it again" if config.path else "reinstall zipeval"
