"""Entry point of every rank, run by `deepspeed train/launch.py`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from d2i.errors import D2IError
from d2i.fault_injection import parse_fault
from d2i.io.child_process import die_with_launcher
from d2i.io.terminal import plain
from d2i.recipes import resolve_recipe
from d2i.run_dir import check_initial_weights
from d2i.train.distributed.slurm import torchrun_environment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def launch(
    recipe: Annotated[str, typer.Option(help="A recipe's name, file, or module:function.")],
    data: Annotated[str, typer.Option(help="Directory made by d2i preprocess.")],
    run: Annotated[str, typer.Option(help="Run directory; the same command resumes it.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: train.num_steps=100.")
    ] = None,
    zero: Annotated[
        Path | None, typer.Option(help="DeepSpeed's zero_optimization settings: train/zero-2.json.")
    ] = None,
    only_measure: Annotated[
        bool, typer.Option("--preflight", help="Measure and write preflight.json without training.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Local directory to cache remote shards in.")
    ] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Size limit of the cache, in 1e9 bytes; none by default."),
    ] = None,
    check_data: Annotated[
        bool,
        typer.Option("--check-data/--no-check-data", help="Compare each array with its checksum."),
    ] = True,
    fault: Annotated[
        str | None, typer.Option(help="For tests: POINT:error|sleep|kill:N.", hidden=True)
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Train one rank. Started by a launcher, once for every rank.

    For example: deepspeed --num_accelerators 2 train/launch.py --recipe demo --data D --run R
    """
    _name_rank(local_rank)
    from d2i.train.distributed.engine import read_zero
    from d2i.train.preflight import preflight
    from d2i.train.rank_main import train
    from d2i.train.request import TrainRequest

    resolved = resolve_recipe(recipe, settings or [])
    if not only_measure:
        check_initial_weights(resolved, run)
    zero_settings = None if zero is None else read_zero(zero)
    request = TrainRequest(resolved, data, run, zero_settings, cache_dir, cache_gb, check_data)
    if only_measure:
        preflight(request)
    else:
        train(request, parse_fault(fault))


def _name_rank(local_rank: int) -> None:
    """Set torch's rank variables if the launcher passes an option or SLURM's variables instead."""
    os.environ.update(torchrun_environment(os.environ))
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


def main() -> None:
    """Run the entry point; an error that the user can fix is one line and exit code 2."""
    die_with_launcher()
    # When a rank is gone, torch's C++ logs a page of stack addresses.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A stop signal may arrive while torch is imported: block it until `StopSignal` handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        app()
    except D2IError as err:
        from d2i.train.failures import report_error

        if line := report_error(err):
            sys.stderr.write(f"error: {plain(line)}\n")
        _end_at_once(2)


def _end_at_once(code: int) -> NoReturn:
    """Exit without shutting down torch's threads one by one.

    A thread that meanwhile notices that another rank is gone would abort this process, and the
    launcher would report that instead.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
