"""How a file looks without being read, and small JSON files that are replaced in one step."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def stamp_of(file: Path) -> list[int]:
    """What changes when somebody touches a file; the change time cannot be set back.

    Returns:
        Size in bytes, inode, modification and change time in nanoseconds.
    """
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
