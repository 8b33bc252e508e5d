"""The typer application: every verb under its name."""

from __future__ import annotations

from typing import Annotated

import typer

import dcc
from dcc.commands.bench import bench
from dcc.commands.build import build
from dcc.commands.calibrate import calibrate
from dcc.commands.compile import compile_model
from dcc.commands.inspect import inspect
from dcc.commands.listing import passes, samplers, targets
from dcc.commands.run import run
from dcc.commands.search import search
from dcc.commands.verify import verify

application = typer.Typer(
    name="dcc",
    help="A compiler and torch-free runtime for Diffusion Transformers.",
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 the quality bound was missed, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dcc {dcc.__version__}")
        raise typer.Exit


@application.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show Python's traceback with an error (or DCC_TRACEBACK=1).")
    ] = False,
) -> None:
    """A compiler and torch-free runtime for Diffusion Transformers."""
    # `--traceback` is taken from the command line before typer reads it; here it is only documented.


for verb in (build, search, calibrate, run, verify, bench, inspect, targets, passes, samplers):
    application.command()(verb)
application.command("compile")(compile_model)
