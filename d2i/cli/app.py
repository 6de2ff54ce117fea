"""The `d2i` command: its subcommands, error line and exit codes."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
import warnings
from typing import Annotated

import typer
from typer.main import get_command

from d2i import __version__
from d2i.cli import cluster, corpus, data, environment, models, runs, shards, study, weights
from d2i.cli.console import INTERRUPTED
from d2i.errors import D2IError
from d2i.io.terminal import plain, print_plainly

USER_CAN_FIX = D2IError.exit_code

app = typer.Typer(
    name="d2i",
    help="Dialog-to-image generation: prepare conversations, fine-tune a network, score images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: d2i demo. For the full traceback of an error: d2i --debug COMMAND.",
)
for part in (study, corpus, data, shards, models, runs, weights, cluster, environment):
    part.add_commands(app)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _frame(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's full traceback.")] = False,
) -> None:
    del version  # handled by its callback, before any command
    del debug  # read by `main`, which sees errors


def main() -> None:
    """Run the command: exit code 0 success, 1 the work failed, 2 the user can fix it."""
    # Fork warnings and progress bars of libraries do not help the user of a command.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    print_plainly()
    _check_interpreter()
    _name_account()
    command = get_command(app)
    debug = "--debug" in sys.argv[1:]
    if not debug and not sys.warnoptions:
        # Future changes of a library concern d2i's developers, not its users; workers inherit this.
        warnings.simplefilter("ignore", FutureWarning)
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = command.main(args=arguments, prog_name="d2i", standalone_mode=False)
    except D2IError as err:
        if debug:
            raise
        _leave(str(err), err.exit_code)
    except OSError as err:
        if debug or not _is_storage_error(err):
            raise
        _leave(_file_problem(err))
    except Exception as err:
        _leave_if_usage(err)
        raise
    if code == INTERRUPTED:
        sys.stderr.write("\ninterrupted; run the same command again to resume\n")
    sys.exit(code if isinstance(code, int) else 0)


def _check_interpreter() -> None:
    """Refuse a Python that strips docstrings, which libraries that d2i uses need."""
    if sys.flags.optimize > 1:
        _leave(
            f"Python runs at optimization level {sys.flags.optimize}, which strips the docstrings "
            "that libraries of d2i need; expected level 0 or 1; unset PYTHONOPTIMIZE, or omit -OO"
        )


def _name_account() -> None:
    """Set a name and a home for a user without a passwd entry, as libraries look them up.

    Containers run under any user id: Kubernetes' runAsUser, docker's --user.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        from d2i.io import storage

        os.environ.setdefault("LOGNAME", f"user-{os.getuid()}")
        if not os.environ.get("HOME"):
            os.environ["HOME"] = str(storage.private_cache_directory())


def _is_storage_error(err: OSError) -> bool:
    """Return whether an error is about the user's paths or disk, not a network or a pipe."""
    from d2i.io import storage

    return err.filename is not None or storage.is_disk_full(err)


def _file_problem(err: OSError) -> str:
    # Only temporary files have no name here: all others had theirs added.
    where = err.filename or f"the temporary directory {tempfile.gettempdir()} (TMPDIR)"
    return (
        f"{where}: {err.strerror or err}; expected a readable and writable path; check the "
        "path, its permissions and the free disk space"
    )


def _leave(message: str, code: int = USER_CAN_FIX) -> None:
    sys.stderr.write("error: " + plain(" ".join(message.split())) + "\n")
    sys.exit(code)


def _leave_if_usage(err: Exception) -> None:
    """Print one line for a wrong option or argument, as the parser words it."""
    format_message = getattr(err, "format_message", None)
    if type(err).__name__ == "Abort":
        sys.exit(INTERRUPTED)
    if format_message is None:
        return
    context = getattr(err, "ctx", None)
    path = context.command_path if context else "d2i"
    message = " ".join(format_message().split())
    if type(err).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(format_message() + "\n")
    else:
        sys.stderr.write(f"error: {plain(message)} See '{path} --help'.\n")
    sys.exit(USER_CAN_FIX)
