"""Small files that are written as a whole."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a file: it is on the disk when this returns, and whoever reads it sees the old or the new one."""
    swap = path.with_name(f"{path.name}.swap")
    with swap.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(swap, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
