"""The command line: ``bitforbit --help``.

Exit codes: 0 done, 1 verification failed, 2 bad usage or input, 3 a server ended by itself, 130 interrupted (141 if
nobody reads the output).
Results go to standard output (with ``--json`` exactly one object), errors and progress to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

EXIT_DONE = 0
EXIT_VERIFICATION_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SERVER_DIED = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_RESUMABLE = ("compress", "decompress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Errors raised on purpose become one line on standard error."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in args
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII only
    # Imported here, so that what a process pays for depends on the command.
    import typer

    from bitforbit.cli.app import app
    from bitforbit.errors import BitforbitError, ServerError

    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        code = app(args, standalone_mode=False, prog_name="bitforbit")
        sys.stdout.flush()
    except usage_error as e:
        message = e.format_message() if hasattr(e, "format_message") else str(e)
        return _fail("UsageError", f"{message} (see: bitforbit --help)" if message else "", as_json)
    except (BrokenPipeError, SystemExit):  # typer and rich leave by SystemExit if nobody reads the output
        # Keep the interpreter from failing once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except ServerError as e:
        return _fail(type(e).__name__, str(e), as_json, EXIT_SERVER_DIED)
    except (BitforbitError, OSError) as e:
        return _fail(type(e).__name__, str(e) or type(e).__name__, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        hint = "; the same command with --resume continues" if args and args[0] in _RESUMABLE else ""
        return _fail("KeyboardInterrupt", f"interrupted{hint}", as_json, EXIT_INTERRUPTED)
    return code if isinstance(code, int) else EXIT_DONE


def _fail(kind: str, message: str, as_json: bool, code: int = EXIT_BAD_INPUT) -> int:
    line = " ".join(message.split())
    if as_json:
        import json

        print(json.dumps({"error": {"type": kind, "message": line}}))
    elif line:
        from bitforbit.cli.output import printable

        print(f"error: {printable(line)}", file=sys.stderr)
    return code
