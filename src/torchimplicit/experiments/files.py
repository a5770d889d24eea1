"""Writing files so that a reader finds the old content or the new, never half of either."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Put `content` (bytes, or a function that writes them) at `path` through a flushed temporary file.

    With `keep`, what was at `path` stays reachable under that name; `path` itself exists at every moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _second_name(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _second_name(path: Path, keep: Path) -> None:
    temporary = keep.with_name(f".{keep.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copy2(path, temporary)
    os.replace(temporary, keep)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
