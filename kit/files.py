"""What every script does with files and with bad input; neither torch nor a model is imported here."""

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}
DISK_ERRORS |= {errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST}


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what is wrong and what to do."""


def one_line(error: object) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def refusing(what: str, hint: str = "", errors: Any = Exception) -> Iterator[None]:
    """What other libraries raise within it becomes an InputError: what is wrong, their reason, what to do."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except errors as error:
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(f"{what} ({reason})" + (f": {hint}" if hint else "")) from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file opened under a temporary name that takes the place of the old one once it is complete on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: bad input, a full disk and want of memory end it with one line on stderr and status 2."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        message = "" if isinstance(error, BrokenPipeError) else one_line(error)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            message = f"{error.strerror}: {error.filename or 'while writing'}; what was complete before is kept"
        elif "C++ compiler" in message:
            message = "torch.compile finds no C++ compiler: install one, g++ or clang++, or leave compile=False"
        elif type(error).__name__.endswith("MemoryError") or "allocate memory" in message:
            message = f"out of memory: a smaller batch or model is needed ({message[:150]})"
        elif not isinstance(error, InputError | BrokenPipeError):
            raise
        for stream, text in ((sys.stderr, message and f"error: {message}\n"), (sys.stdout, "")):
            try:
                print(text, end="", file=stream, flush=True)
            except OSError:  # at exit Python would stumble over it once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(2 if message else 1)  # 1: a reader of its output has gone (`| head`)
