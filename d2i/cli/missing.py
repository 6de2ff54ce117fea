"""The error line of a command that needs what the extra `all` installs."""

from __future__ import annotations

EXTRA_MODULES = frozenset(
    {
        "deepspeed",
        "diffusers",
        "dns",
        "ftfy",
        "huggingface_hub",
        "img2dataset",
        "open_clip",
        "ray",
        "regex",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch",
        "torch_fidelity",
        "torchvision",
        "transformers",
        "wandb",
        "webdataset",
        "yaml",
    }
)
"""The top-level modules that d2i imports and the extra `all` installs."""


def missing_extra(err: ModuleNotFoundError) -> str | None:
    """Return the line for a module of an extra that is not installed; None for any other one."""
    module = (err.name or "").partition(".")[0]
    if module not in EXTRA_MODULES:
        return None
    return (
        f"this needs {module}, which is not installed; expected the packages of all commands, not "
        'those of d2i alone; run pip install "d2i[all]"'
    )
