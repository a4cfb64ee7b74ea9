"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """A path to write to, which then takes the place of ``path``; where writing fails, what was there stays.

    What is no ordinary file (``/dev/stdout``, a pipe) is written to directly. A link stays one, and a file keeps its
    permissions.

    Args:
        errors: what the writer raises where a file cannot be written, beside OSError and RuntimeError (torch.save's).

    Raises:
        OSError: for these, naming ``path``.
    """
    part = path
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder")
        is_special = path.exists() and not path.is_file()
        target = Path(os.path.realpath(path))
        name = f".{target.name[:40]}.{os.getpid()}.{threading.get_ident()}.part"  # shorter than the longest
        part = path if is_special else target.with_name(name)
        yield part
        if part != path:
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)
    except (OSError, RuntimeError) + errors as error:
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        raise OSError(number, f"cannot be written ({reason(error)})", str(path)) from error
    finally:
        if part != path:
            with suppress(OSError):
                part.unlink()


def reason(error: Exception) -> str:
    """Of an error about a file, without its number and the file's name."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.strip().splitlines()[0] if said.strip() else type(error).__name__
