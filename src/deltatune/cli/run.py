"""Run a verb and turn whatever went wrong into a line and an exit status."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.main import get_command

from deltatune.cli.command import Invocation
from deltatune.cli.output import note, one_line
from deltatune.errors import DeltaExpressionError, DeltatuneError, Interrupted, nearest

# What the machine or its owner says no to: no fault of this program, and a traceback would not help.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)

# What transformers imports where it is installed, and what that says of torch and of kernels for GPUs.
TALKATIVE = ("torchao", "torch.utils._pytree")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `deltatune ARGUMENTS` and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["deltatune", *words])
    try:
        with _quiet():
            return _status(words, command)
    except KeyboardInterrupt:
        return _interrupted(command)
    except DeltaExpressionError as error:
        print(f"error: {_pointed(error)}", file=sys.stderr)
        return error.exit_status
    except Interrupted as error:
        note(str(error))
        return error.exit_status
    except DeltatuneError as error:
        note(f"error: {error}")
        return error.exit_status
    except typer.TyperException as error:
        note(f"error: {_usage(error, words)}")
        return error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            note(f"error: {error.filename or 'the system'}: {error.strerror}")
            return 2
        return _fault(error, words)


def _status(words: list[str], command: str) -> int:
    from deltatune.cli.app import app

    status = get_command(app).main(args=words, prog_name="deltatune", standalone_mode=False, obj=Invocation(command))
    return _interrupted(command) if status == 130 else int(status or 0)


def _interrupted(command: str) -> int:
    note(f"interrupted; start again with: {command}")
    return 130


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what libraries say about themselves; our own warnings become notes on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without our characters is no fault
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"deltatune(\.|$)", category=UserWarning)
        warnings.showwarning = _shown
        yield


def _shown(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"note: {message}")


def _pointed(error: DeltaExpressionError) -> str:
    """Two lines: the expression, and under its faulty place a caret with what is wrong."""
    text = error.text.replace("\n", " ")
    return f"{text}\n{' ' * (len('error: ') + error.position)}^ {one_line(error.reason)}"


def _usage(error: typer.TyperException, words: Sequence[str]) -> str:
    """Say a mistake in the words of a command line in one line: got, expected, nearest options, where to look."""
    context: Any = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else shlex.join(["deltatune", *words[:1]])
    help_at = f"`{verb} --help` shows an example"
    option, param = getattr(error, "option_name", None), getattr(error, "param", None)
    if type(error).__name__ == "NoSuchOption" and context is not None:
        names = [name for p in context.command.get_params(context) for name in p.opts if name.startswith("--")]
        return f"unknown option {option!r} of `{verb}`{nearest(str(option), names)}; {help_at}"
    message = error.format_message().rstrip(".")
    if type(error).__name__ == "MissingParameter" and param is not None:
        message = f"`{verb}` needs {param.metavar if param.param_type_name == 'argument' else param.opts[0]}"
    elif param is not None and isinstance(getattr(error, "message", None), str):
        message = error.message.removeprefix("Value error, ").rstrip(".")
        message = f"{param.opts[0]}: got {_value(param.opts, words)!r}; {message[:1].lower()}{message[1:]}"
    return f"{message}; {help_at}"


def _value(names: Sequence[str], words: Sequence[str]) -> str:
    """Return what was given to an option: the word after it, or what follows its equals sign."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in names:
            return after
        if word.partition("=")[0] in names:
            return word.partition("=")[2]
    return ""


def _fault(error: Exception, words: list[str]) -> int:
    if "--traceback" in words[:1]:
        traceback.print_exception(error)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "deltatune" in frame.filename]
    place = f" at {os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else ""
    again = shlex.join(["deltatune", "--traceback", *words])
    note(f"this is a bug in deltatune: {type(error).__name__}: {str(error)[:200]}{place}; see where with: {again}")
    return 1
