"""Push a student to the hub, where the settings ask for it: checked before training, done after saving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, errors

from tailcache.storage.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["check_hub", "push"]

# What does not come from the hub's answer (no connection, no token, offline mode) is an OSError or the client's own.
_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, errors.HfHubHTTPError, vars(errors)["HTTPError"])


def check_hub(name: str, *, private: bool) -> None:
    """Find out before training whether the student can be pushed; makes the repository.

    Args:
      name: NAME or OWNER/NAME.
      private: whether it is private, if it has to be made.

    Raises:
      ConfigError: no token, one that may only read, no such owner, or no connection.
    """
    api = HfApi()
    try:
        token: Any = api.whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise ConfigError(f"hub_model_id: expected a token that may write to {name}, found one that may only read")
        api.create_repo(name, private=private, exist_ok=True)
    except ConfigError:
        raise
    except _FAILURES as error:
        raise ConfigError(
            f"hub_model_id: cannot push to {name}: {_in_short(error)} Log in with `hf auth login`, or set HF_TOKEN to "
            "a token that may write; or drop hub_model_id and push OUT later with `hf upload`"
        ) from error


def push(trainer: Trainer) -> None:
    """Push OUT as it is saved, with a model card; called by every process.

    Raises:
      StorageError: it could not be pushed; says that the student is saved and how to push it.
    """
    name, out = trainer.args.hub_model_id, Path(trainer.args.output_dir or ".")
    try:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    except _FAILURES as error:
        raise StorageError(
            f"hub_model_id: the student is saved in {out}, but could not be pushed to {name}: {_in_short(error)} Push "
            f"it with `hf upload {name} {out}`"
        ) from error


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 240 else f"{text[:240]}…"
    return text if text.endswith((".", "…")) else f"{text}."
