"""The command. One file a verb: parse, one library call, print.

Built on click alone and importing a verb's file only when that verb is named, so that `--help` costs a tenth of a
second: torch is imported when work starts.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from gossamer import __version__
from gossamer.cli.shared import emit, warn
from gossamer.errors import DiskError, GossamerError, ResourceError, UsageError

VERBS = (
    "fetch",
    "plan",
    "quantize",
    "train",
    "eval",
    "generate",
    "serve",
    "merge",
    "compose",
    "resize",
    "extract",
    "convert",
    "push",
    "pull",
    "doctor",
)


class _Verbs(click.Group):
    """The verbs, each in the file of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"gossamer.cli.{cmd_name}").command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gossamer")
def gossamer() -> None:
    """Low-rank adaptation, end to end: one frozen model, any number of thin layers.

    Exit codes: 0 ok, 1 internal, 2 usage, config or data, 3 a file that cannot be trusted, 4 memory or device,
    5 disk, 75 interrupted but resumable, 130 stopped at once.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Every error the library knows is printed without a traceback."""
    arguments = [*sys.argv[1:]] if arguments is None else [*arguments]
    as_json = "--json" in arguments
    try:
        code = gossamer.main(arguments, prog_name="gossamer", standalone_mode=False)
        return code if isinstance(code, int) else 0  # click hands back the code of an early exit
    except GossamerError as error:
        return _failed(error, as_json)
    except click.ClickException as error:
        if as_json:
            emit({"error": {"code": UsageError.code, "what": error.format_message()}})
        else:
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        warn("stopped")
        return 130
    except BrokenPipeError:  # the reader of our output has left, `gossamer eval ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return _failed(
                DiskError("writing failed", where=str(error.filename or ""), got=str(error.strerror)), as_json
            )
        return _unexpected(error, as_json)
    except Exception as error:
        if _out_of_memory(error):
            return _failed(ResourceError("out of memory", got=str(error).partition("\n")[0]), as_json)
        return _unexpected(error, as_json)


def _out_of_memory(error: Exception) -> bool:
    """Python's own, or torch's: by name, because torch may not be imported and says it differently by device."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _failed(error: GossamerError, as_json: bool) -> int:
    if as_json:
        emit({"error": error.parts()})
    else:
        warn(str(error))
    return error.exit_code


def _unexpected(error: Exception, as_json: bool) -> int:
    """A fault of ours: short for the user, whole for whoever asks."""
    if os.environ.get("GOSSAMER_DEBUG"):
        raise error
    parts: dict[str, Any] = {"code": "internal", "what": f"{type(error).__name__}: {error}"}
    if as_json:
        emit({"error": parts})
    else:
        warn(f"internal: {parts['what']}\n  hint:     this is a bug; GOSSAMER_DEBUG=1 shows where")
    return 1
