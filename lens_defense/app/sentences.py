"""What goes wrong in a command becomes one sentence on the error stream, and an exit code."""

import errno
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

_WRONG_INPUT, _DISK_FAILED, _INTERRUPTED = 2, 1, 130


@contextmanager
def errors_in_a_sentence(stopped: str) -> Iterator[None]:
    """Inside, errors of the input, the disk and the memory end the command with a sentence and no traceback.

    Warnings become sentences too. A SIGTERM, as job schedulers send it, ends a command as Ctrl-C does.

    Args:
        stopped: what Ctrl-C says.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            raise _exit_with(stopped, _INTERRUPTED) from None
        except ValueError as error:
            raise _exit_with(str(error), _WRONG_INPUT) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output is gone
                raise
            raise _exit_with(_disk_sentence(error), _DISK_FAILED) from None
        except Exception as error:
            raise _exit_for_library_error(error) from None
        finally:
            signal.signal(signal.SIGTERM, handler)


def _exit_with(sentence: str, code: int) -> typer.Exit:
    typer.secho(f"lens-defense: {sentence}", err=True, fg="red")
    return typer.Exit(code)


def _exit_for_library_error(error: Exception) -> typer.Exit:
    """The end of a command by an error that PyTorch or safetensors raised; others are raised again.

    They are imported here, not above: a command that fails early should not wait for PyTorch.
    """
    from safetensors import SafetensorError

    from lens_defense.models.devices import explain_out_of_memory

    try:
        with explain_out_of_memory("the model and its runs", "take a smaller model, or --device cpu"):
            raise error
    except MemoryError as full:
        return _exit_with(str(full), _WRONG_INPUT)
    except SafetensorError:  # a write failed: what cannot be read is a ValueError by now
        code = re.search(r"os error (\d+)", str(error))
        disk = OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))
        return _exit_with(_disk_sentence(disk), _DISK_FAILED)


def _disk_sentence(error: OSError) -> str:
    from lens_defense.storage import cache_folder

    file = "a file" if error.filename is None else str(error.filename)
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "; make room, or name a folder on another disk"
    elif file.startswith(str(cache_folder())):
        advice = "; let LENS_DEFENSE_CACHE name a folder that can be written"
    return f"{file} could not be read or written: {error.strerror or error}{advice}"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """In the place of Python's own, which names a line of our code."""
    if not issubclass(category, DeprecationWarning):
        typer.secho(f"lens-defense: {message}", err=True, fg="yellow")
