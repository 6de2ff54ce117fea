"""Check that the encoders that a job needs exist, before hours of fetching images for them."""

from __future__ import annotations

from pathlib import Path

from d2i.config import EncodersConfig
from d2i.errors import CheckpointError
from d2i.weights_resolve import resolve_weights

_CONFIG_NAME = "config.json"


def check_present(encoders: EncodersConfig, *, is_here: bool = True) -> None:
    """Check that each encoder exists: shipped, at a path or a URL, or in the hub.

    Args:
        encoders: The settings that name them.
        is_here: True if they are loaded on this machine. A cluster's nodes may have other disks,
            so False checks only those in the hub.

    Raises:
        CheckpointError: If one is missing; it names the setting.
        OSError: If a URL cannot be read.
    """
    for name in ("vae", "clip_image", "clip_text"):
        if value := getattr(encoders, name):
            _check(name, value, is_here=is_here)
    prefix = encoders.text_prefix
    if is_here and prefix and not Path(resolve_weights(prefix)).exists():
        raise _missing("text_prefix", prefix, "no such file")


def is_loadable_offline(value: str) -> bool:
    """Return whether an encoder is shipped, a local path, or in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(resolve_weights(value)).exists():
        return True
    if value.count("/") not in (1, 2):
        return False
    return isinstance(try_to_load_from_cache(*_config_in_hub(value)), str)


def _check(name: str, value: str, *, is_here: bool) -> None:
    where = Path(resolve_weights(value))
    if where.exists():
        return
    if where.is_absolute() or value.startswith((".", "~")) or value.count("/") not in (1, 2):
        if is_here:
            raise _missing(name, value, "no such file or directory")
        return
    if reason := _not_in_hub(value):
        raise _missing(name, value, reason)


def _not_in_hub(value: str) -> str:
    """Return the reason that a repository's configuration cannot be loaded, or '' if it can."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(*_config_in_hub(value))
    except Exception as err:
        # The hub's client raises a dozen classes, and those of its HTTP transport.
        return next(iter(str(err).strip().splitlines()), type(err).__name__)[:200]
    return ""


def _config_in_hub(value: str) -> tuple[str, str]:
    """Return the repository of an encoder in the hub, and the path of its configuration there."""
    owner, repository, *subfolder = value.split("/")
    return f"{owner}/{repository}", "/".join([*subfolder, _CONFIG_NAME])


def _missing(name: str, value: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"encoders.{name} is {value}: {reason}; expected a file, a directory made by "
        f"save_pretrained or a hub repository, before images are fetched; give --set "
        f"encoders.{name}=PATH"
    )
