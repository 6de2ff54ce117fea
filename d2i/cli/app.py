"""The `d2i` command: its subcommands, error line and exit codes."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Annotated

import typer
from typer.main import get_command

from d2i import __version__
from d2i.cli.cluster import check
from d2i.cli.corpus import corpus
from d2i.cli.demo import demo
from d2i.cli.doctor import doctor
from d2i.cli.eval import evaluate
from d2i.cli.help import (
    DATA,
    EVALUATION,
    MACHINE,
    START,
    TRAINING,
    Command,
    Group,
    help_text,
    sentence,
)
from d2i.cli.index import index
from d2i.cli.inspect import inspect as inspect_data
from d2i.cli.output import INTERRUPTED
from d2i.cli.preprocess import preprocess
from d2i.cli.push import push
from d2i.cli.recipes import list_recipes, show_recipe
from d2i.cli.repair import repair
from d2i.cli.report import report
from d2i.cli.sample import sample
from d2i.cli.select import select
from d2i.cli.train import train
from d2i.cli.verify import verify
from d2i.cli.weights import (
    export_weights,
    fetch_weights,
    import_weights,
    inspect_weights,
    list_weights,
)
from d2i.errors import D2IError, missing_extra
from d2i.io.terminal import plain, print_plainly

USER_CAN_FIX = D2IError.exit_code

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    START: {"demo": demo},
    DATA: {
        "corpus": corpus,
        "preprocess": preprocess,
        "index": index,
        "verify": verify,
        "repair": repair,
        "inspect": inspect_data,
    },
    TRAINING: {"train": train, "select": select, "push": push},
    EVALUATION: {"sample": sample, "eval": evaluate, "report": report},
    MACHINE: {"doctor": doctor},
}
"""The commands by group, in the order in which an experiment uses them."""
WEIGHTS_COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_weights,
    "fetch": fetch_weights,
    "inspect": inspect_weights,
    "import": import_weights,
    "export": export_weights,
}


def _register(
    group: typer.Typer, commands: dict[str, Callable[..., None]], panel: str | None = None
) -> None:
    """Add commands by name."""
    for name, command in commands.items():
        group.command(
            name,
            cls=Command,
            help=help_text(command),
            short_help=sentence(command),
            rich_help_panel=panel,
        )(command)


def _weights() -> typer.Typer:
    group = typer.Typer(cls=Group, no_args_is_help=True)
    _register(group, WEIGHTS_COMMANDS)
    return group


def _cluster() -> typer.Typer:
    group = typer.Typer(cls=Group, no_args_is_help=True)
    _register(group, {"check": check})

    # Makes it a group, even with a single command.
    @group.callback()
    def _group() -> None: ...

    return group


def _recipes() -> typer.Typer:
    group = typer.Typer(cls=Group, invoke_without_command=True)
    group.callback(help=help_text(list_recipes))(list_recipes)
    _register(group, {"show": show_recipe})
    return group


app = typer.Typer(
    name="d2i",
    cls=Group,
    help="Dialog-to-image generation: prepare conversations, fine-tune a network, score images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: d2i demo. For the full traceback of an error: d2i --debug COMMAND.",
)
for _panel, _commands in COMMANDS.items():
    _register(app, _commands, _panel)
app.add_typer(
    _weights(),
    name="weights",
    help="List, fetch, inspect, import and export weights files.",
    rich_help_panel=TRAINING,
)
app.add_typer(
    _cluster(),
    name="cluster",
    help="Check a Ray cluster before a long job.",
    rich_help_panel=MACHINE,
)
app.add_typer(
    _recipes(),
    name="recipes",
    short_help=sentence(list_recipes),
    rich_help_panel=TRAINING,
)


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
    # Fork warnings and progress bars of libraries do not help the user of a command, and d2i tells
    # nobody what is installed.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
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
    except ModuleNotFoundError as err:
        message = missing_extra(err)
        if debug or message is None:
            raise
        _leave(message)
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
        typer.echo(format_message(), err=True)
    else:
        sys.stderr.write(f"error: {plain(message)} See '{path} --help'.\n")
    sys.exit(USER_CAN_FIX)
