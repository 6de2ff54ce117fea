"""Which rank says why a training ends: the first that knows, and none beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from d2i.errors import D2IError
from d2i.train.failures import RankError, in_plain_words, lost_ranks
from d2i.train.ranks import Ranks, ToldError
from d2i.train.request import TrainRequest

_SIGNS_OF_THE_OTHERS = ("connection", "peer", "gloo", "nccl", "socket")


@contextmanager
def ending_in_words(request: TrainRequest, ranks: Ranks) -> Iterator[None]:
    """Turn what ends this rank into what the user is to read; every rank must call this.

    Raises:
        D2IError: As `last_word` gives it.
    """
    hosts = ranks.hosts()
    try:
        yield
    except Exception as err:
        meaning = last_word(err, request, ranks, hosts)
        if meaning is None or meaning is err:
            raise
        raise meaning from err


def last_word(
    error: Exception, request: TrainRequest, ranks: Ranks, hosts: Sequence[str]
) -> D2IError | None:
    """Return what an error that ends this rank means to the user.

    Args:
        error: What was raised.
        request: What was to be done.
        ranks: This rank among the others.
        hosts: The host of each rank.

    Returns:
        A `ToldError` where another rank says why; None where it is a bug, to be raised as it is.
    """
    if isinstance(error, RankError | ToldError):
        return error
    if isinstance(error, D2IError):
        return _of_all_or_one(error, ranks, hosts)
    meaning = in_plain_words(error, request.run_url, request.recipe.train)
    if meaning is not None:
        return meaning if ranks.speaks_first() is not False else ToldError()
    if ranks.world_size > 1 and _is_of_the_others(error):
        return _of_the_others(request.run_url, ranks, hosts)
    return None


def say_last_word(error: D2IError) -> str | None:
    """Return the line that this rank prints, if it is the one to print it.

    What was wrong before the ranks had joined is the same for all of them.
    """
    if isinstance(error, ToldError):
        return None
    is_mine = os.environ.get("RANK", "0") == "0" or isinstance(error, RankError)
    return str(error) if is_mine else None


def _of_all_or_one(error: D2IError, ranks: Ranks, hosts: Sequence[str]) -> D2IError:
    """What all ranks find wrong, the first one says; what this rank alone does, it says itself."""
    if ranks.is_first:
        return error if ranks.speaks_first() is not False else ToldError()
    if ranks.is_told() is False and ranks.speaks_first():
        return RankError(f"rank {ranks.rank} on {hosts[ranks.rank]}: {error}")
    return ToldError()


def _is_of_the_others(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS_OF_THE_OTHERS)


def _of_the_others(run_url: str, ranks: Ranks, hosts: Sequence[str]) -> D2IError:
    gone = ranks.who_is_gone()
    speaks = ranks.speaks_first()
    if speaks is None:
        # Nobody to ask, as the first rank is gone: the lowest one on each host speaks.
        speaks = ranks.rank == min(r for r in range(1, len(hosts)) if hosts[r] == hosts[ranks.rank])
    return lost_ranks(gone, hosts, run_url) if speaks else ToldError()
