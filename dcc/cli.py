"""`dcc`: runs one command line and turns whatever ends it into one message and one exit code.

Exit codes: 0 done, 1 error, 2 usage, 3 the quality bound was missed, 130 interrupted. This module imports the
standard library alone, so that an interrupt while the commands are being imported is caught here too.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dcc.errors import DccError, UsageError

TRACEBACK_FLAG = "--traceback"
INTERRUPTED = 130
TERMINATED = 143
BUG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `arguments` (default: the process's own) has run; returns the exit code."""
    given, traces = _without_traceback_flag(list(sys.argv[1:] if arguments is None else arguments))
    try:
        with _termination_unwinds(), _interrupts() as was_interrupted, warnings.catch_warnings():
            if "-v" not in given and "--verbose" not in given:
                # Warnings of torch and its exporter about their own internals; `-v` shows them.
                warnings.simplefilter("ignore")
            code = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`head`, `less`) has left; the interpreter must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except DccError as error:
        if not was_interrupted() and not _interrupted(error):
            _say(_with_next(error, given), traces)
            return error.exit_code
        code = INTERRUPTED
    except SystemExit as leaving:  # rich leaves this way when its pipe is closed
        code = leaving.code if isinstance(leaving.code, int) else BUG
    except Exception as error:  # noqa: BLE001 - the one place that may: nobody above could explain it
        if not was_interrupted() and not _interrupted(error):
            _say(_bug_text(error), traces)
            return BUG
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that no half-written file is left."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether the user has interrupted; from then on libraries log nothing.

    torch catches an interrupt inside its dispatch, turns it into another error without a link to the first, and
    logs that with its traceback.
    """
    received: list[int] = []

    def swallowed(unraisable: Any) -> None:
        # It came while an object was deleted or a callback ran: Python would print it, and go on.
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            # Once more, after this function, whose own exceptions would be ignored as well.
            threading.Timer(0.01, _thread.interrupt_main).start()

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = swallowed
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False  # only the main thread may set handlers; a program around dcc may have its own
        return
    level, hook = logging.root.manager.disable, sys.unraisablehook
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.disable(level)
        sys.unraisablehook = hook


def _interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt stands behind the error: libraries turn it into errors of their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _with_next(error: DccError, arguments: Sequence[str]) -> str:
    """The whole message; a request that is wrong and has no better advice is sent to the verb's help."""
    if "next" in error.details or not isinstance(error, UsageError):
        return str(error)
    verb = next((item for item in arguments if not item.startswith("-")), "")
    return f"{error}\n  next  dcc {verb} --help"


def _run(arguments: list[str]) -> int:
    try:
        import typer

        from dcc.commands.application import application
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise DccError(f"the command line needs {error.name}", next="pip install 'dcc[cli]'") from error
    command = typer.main.get_command(application)
    # typer carries its own copy of click from 0.20 on; its public BadParameter leads to the right base class.
    refusal: type[BaseException] = typer.BadParameter.__mro__[2]
    try:
        result = command.main(args=arguments, prog_name="dcc", standalone_mode=False)
    except refusal as error:
        return _refused(error)
    except typer.Abort:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _refused(error: BaseException) -> int:
    """A command line that typer cannot read: said in the shape of every other message, exit code 2."""
    context = getattr(error, "ctx", None)
    path = "dcc" if context is None else context.command_path
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    # Help without arguments is not a mistake in anything that was typed.
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message or f"{path} --help", file=sys.stderr)
    else:
        print(f"usage: {message}\n  next  {path} --help", file=sys.stderr)
    return 2


def _bug_text(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return (
        f"dcc: unexpected {type(error).__name__}: {first}\n"
        f"  next  this is a bug in dcc; run again with {TRACEBACK_FLAG} (or DCC_TRACEBACK=1) and report what it prints"
    )


def _say(text: str, traces: bool) -> None:
    if traces:
        traceback.print_exc()
    print(text, file=sys.stderr)


def _without_traceback_flag(arguments: list[str]) -> tuple[list[str], bool]:
    """The flag is taken wherever it stands: it is typed after a failure, at the end of the line."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [item for item in arguments[:end] if item != TRACEBACK_FLAG] + arguments[end:]
    asked = len(kept) < len(arguments) or os.environ.get("DCC_TRACEBACK", "") not in ("", "0")
    return kept, asked


if __name__ == "__main__":
    sys.exit(main())
