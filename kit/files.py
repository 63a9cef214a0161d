"""What every script does with files and with bad input; neither torch nor a model is imported here."""

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what is wrong and what to do."""


def one_line(error: object) -> str:
    return " ".join(str(error).split())


# what the disk or a path is to blame for
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DISK_ERRORS |= {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}


def make_folder(path: Path) -> None:
    """Make a folder for results, unless it is there. Raises InputError if a file stands in its place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} cannot be made: a file stands in the place of a folder") from None


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run(main: Callable[[], None]) -> None:
    """Run a script's main; Ctrl-C ends it with status 130, a reader of its output that has gone (`| head`) with 1.

    Bad input, a disk that is full or not to be written to, and want of memory end it with one line on stderr and 2.
    """
    try:
        try:
            run_to_one_line(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushing at exit would fail once more
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        # the output itself goes to a disk that is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            fail(f"{error.strerror}: while writing the output")
        sys.exit(2)


def run_to_one_line(main: Callable[[], None]) -> None:
    try:
        main()
    except InputError as error:
        sys.exit(fail(one_line(error)))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(fail(f"{error.strerror}: {error.filename or 'while writing'}; what was complete before is kept"))
    except (MemoryError, RuntimeError) as error:
        if "C++ compiler" in str(error):
            sys.exit(fail("torch.compile finds no C++ compiler: install one, g++ or clang++, or leave compile=False"))
        is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not is_memory and "allocate memory" not in str(error):
            raise
        sys.exit(fail(f"out of memory: a smaller batch or model is needed ({one_line(error)[:150]})"))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
