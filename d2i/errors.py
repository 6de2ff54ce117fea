"""The errors that d2i raises, named by what the user has to fix.

Every message is one line: what happened, what was found, what was expected, what to do next.
The command line prints a `D2IError` without its traceback and exits with its `exit_code`.
"""

from typing import ClassVar


class D2IError(Exception):
    """Base of every error that the user of d2i can fix."""

    exit_code: ClassVar[int] = 2
    """Exit code of the command."""


class ConfigError(D2IError, ValueError):
    """A recipe, an option or a `--set` value is wrong."""


class DataError(D2IError):
    """A corpus or one of its files cannot be used."""


class NothingWrittenError(DataError):
    """No instance of a split became a sample: the work failed."""

    exit_code = 1


class ShardError(DataError):
    """A shard, its index or its manifest is damaged, or does not match its record."""


class GenerationError(DataError):
    """A system gives no image for a conversation.

    Attributes:
        reason: One word, such as `withheld` (by a pipeline's safety checker) or `not_finite`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        """Return the one line."""
        return f"got no image: {self.reason}; expected one; change the dialog or the seed"


class CheckpointError(D2IError):
    """Weights or a checkpoint cannot be loaded, or belong to another run."""


class ClusterError(D2IError):
    """Ray, DeepSpeed or the machine lacks something that the job needs."""


class HubError(D2IError):
    """The Hugging Face hub cannot be reached, or refuses an upload."""


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


def with_extra(err: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error with the line of `missing_extra` where there is one, else itself."""
    message = missing_extra(err)
    return err if message is None else ModuleNotFoundError(message, name=err.name)
