"""The errors d2i raises, named by who can mend them.

Every message is one line: what happened, what was got, what was expected, what to do next.
The command line prints a `D2IError` without its traceback and exits with its `exit_code`.
"""

from typing import ClassVar


class D2IError(Exception):
    """Base of every error that the user of d2i can mend."""

    exit_code: ClassVar[int] = 2
    """What the command ends with."""


class ConfigError(D2IError, ValueError):
    """A recipe, an option or a `--set` value is wrong."""


class DataError(D2IError):
    """A corpus or a file of it cannot be used."""


class NothingWrittenError(DataError):
    """No instance of a split became a sample: the work failed."""

    exit_code = 1


class ShardError(DataError):
    """A shard, its index or its manifest is not what it says it is."""


class CheckpointError(D2IError):
    """Weights or a checkpoint cannot be loaded, or belong to another run."""


class ClusterError(D2IError):
    """Ray, DeepSpeed or the machine lacks what the job needs."""
