"""The command line: `gatedlens demo`, `attention`, `patch`, `harvest`, ...; each has --help with examples, and --json.

What goes wrong is one line, an interruption says how to go on, and with --json an error is JSON too. The commands themselves
stand in `commands.py`; of what knows torch nothing is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import rich_click as click
from click.exceptions import Exit

from gatedlens.cli.answer import Answer
from gatedlens.cli.commands import COMPLETE, app
from gatedlens.errors import GatedlensError, did_you_mean
from gatedlens.files import to_json


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; what goes wrong is one line on stderr: exit code 2 for errors that gatedlens raises on purpose and
    files that cannot be read or written, 130 after Ctrl-C, 143 after SIGTERM, 1 when nobody reads the output any more
    and when `verify` finds a claim that fails. With --json an error is an object on stdout, too.

    --help, --version and an option that there is not end in SystemExit, as everywhere.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if COMPLETE in os.environ:
        app.main(given, prog_name="gatedlens", complete_var=COMPLETE)
    said = Failures(next((word for word in given if not word.startswith("-")), ""), "--json" in given)
    with _terminable() as received:
        try:
            with app.make_context("gatedlens", given) as context:
                as_json, answer = app.invoke(context)
            _print(answer, as_json)
        except Exit as done:
            raise SystemExit(done.exit_code) from None
        except click.ClickException as error:
            raise SystemExit(said.failed(error, _usage(error), 2)) from None
        except BrokenPipeError:
            _let_go_of_stdout()
            return 1
        except (GatedlensError, ImportError, OSError, MemoryError) as error:
            return said.failed(error, _said(error), 2)
        except KeyboardInterrupt as stop:
            told = str(stop) or "stopped; `evaluate` and `harvest` go on when the same command is given again"
            return said.failed(stop, told, 128 + (received[0] if received else signal.SIGINT))
    return int(answer.failed)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(to_json({**answer.data, **({"files": answer.files} if answer.files else {})}, indent=1))
    else:
        answer.show()
    if sys.stdout is not None:
        sys.stdout.flush()


class Failures:
    """What goes wrong in one command, said."""

    def __init__(self, command: str, as_json: bool):
        self.command, self.as_json = command, as_json

    def failed(self, error: BaseException, said: str, code: int) -> int:
        """Say it; the exit code."""
        name = " ".join(["gatedlens", self.command]).rstrip()
        with suppress(OSError, ValueError):  # nobody may be left to read it
            print(f"{name}: {said.rstrip('.')}.", file=sys.stderr)
            if self.as_json:
                told = {"command": self.command, "error": said, "kind": type(error).__name__, "exit": code}
                print(to_json(told, indent=1), flush=True)
        return code


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM ends a command as Ctrl-C does; which signals came. Handlers belong to the main thread: elsewhere none is set."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _said(error: BaseException) -> str:
    """One line; of an error of the operating system with the file it is about."""
    if isinstance(error, GatedlensError) or not isinstance(error, OSError):
        said = str(error) or type(error).__name__
    else:
        said = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)
    return " ".join(said.split("\n"))


def _usage(error: click.ClickException) -> str:
    """What is wrong in what was typed, and where to look."""
    if isinstance(error, click.NoSuchOption):
        said = f"No such option: {error.option_name}.{did_you_mean(error.option_name, error.possibilities or ())}"
    else:
        said = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = context.command_path if context is not None else "gatedlens"
    said = " ".join(said.split())
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See {where} --help"


def _let_go_of_stdout() -> None:
    """Else Python would try to write the rest when it ends, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
