"""Where the command `meso` starts and ends: arguments, one verb, errors, exit code.

What lives here: the dispatch and the one place where an error becomes words, an error object and an exit code. What must
not: any verb.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mesocosm.kernel.cli import parser
from mesocosm.kernel.cli.verbs import PACKAGE, VERBS
from mesocosm.kernel.core.errors import InternalError, MesoError, describe, from_object

if TYPE_CHECKING:
    from mesocosm.kernel.cli.output import Console

SIGINT_CODE = 130
SIGPIPE_CODE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; answers the exit code of the contract."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        _fill_closed_streams()
    from mesocosm.kernel.cli.output import Console

    # Known before the arguments are understood: an error in them must be an error object too.
    console = Console(as_json="--json" in (words[: words.index("--")] if "--" in words else words))
    try:
        return _run(words, console)
    except MesoError as error:
        return report(error, console)
    except KeyboardInterrupt:
        return SIGINT_CODE
    except BrokenPipeError:
        _forget_stdout()
        return SIGPIPE_CODE
    except Exception as error:
        remote = getattr(error, "error", None)
        if isinstance(remote, dict):  # the client's RemoteError: the error object as the agent sent it
            return report(from_object(remote), console)
        if os.environ.get("MESOCOSM_TRACEBACK") or "agent" in words[:3]:  # an agent's stderr is its log
            sys.excepthook(type(error), error, error.__traceback__)
        return report(_bug(error), console)


def _run(words: list[str], console: Console) -> int:
    import importlib

    try:
        arguments = parser.parse(words)
    except parser.Help as asked:
        if words:
            console.write(asked.text.encode())
            return 0
        console.write_error(asked.text.encode())
        return 2
    verb = VERBS[arguments.verb]
    function = getattr(importlib.import_module(f"{PACKAGE}.{verb.module}"), verb.function)
    code: int = function(arguments, console)
    return code


def report(error: MesoError, console: Console) -> int:
    """Says an error: words on stderr, with --json also its object as a line on stdout; answers its exit code."""
    value = error.as_object()
    if console.as_json:
        with contextlib.suppress(BrokenPipeError, MesoError):  # then stderr and the exit code say it
            console.json({"error": value})
    console.words(describe(value))
    _forget_stdout()
    return error.exit_code


def _bug(error: Exception) -> MesoError:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({os.path.basename(last[0].filename)}:{last[0].lineno})" if last else ""
    return InternalError(f"{type(error).__name__}: {error}{place}", hint="a bug of mesocosm; MESOCOSM_TRACEBACK=1 shows where")


def _fill_closed_streams() -> None:
    """What the caller has closed becomes /dev/null: nothing that we open may take the number of a standard stream."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _forget_stdout() -> None:
    """Nobody reads us any more: the interpreter must not complain about it when it flushes at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
