"""Files that appear complete or not at all, and texts that keep errors about them short."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its name when the block ends without an error.

    Until then, and after an error or an interruption, what was at `path` before is untouched. A
    symbolic link stays one: the file it points to is replaced.

    Raises:
        OSError: if the file cannot be written, or `path` is there and is no file.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{shown(path)}: there is no folder {shown(folder)}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileExistsError(f"{shown(path)}: is a folder or a device, expected a file")
    temporary = Path(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shown(path: str | os.PathLike[str]) -> str:
    """A path for an error: of a long one, the end."""
    text = os.fspath(path)
    return text if len(text) <= 300 else f"...{text[-300:]}"


def clip(text: object, length: int = 400) -> str:
    """A text for an error: of a long one, the beginning."""
    text = str(text)
    return text if len(text) <= length else f"{text[:length]} ... ({len(text):,} characters)"


def listing(names: Iterable[object], count: int = 4) -> str:
    """The first names, and how many more there are."""
    found = list(names)
    text = ", ".join(clip(repr(name), 70) for name in found[:count])
    return text if len(found) <= count else f"{text} and {len(found) - count:,} more"
