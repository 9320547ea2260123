"""Paths that users give on the command line and in Python."""

import os
import re
from pathlib import Path

from esjax.errors import EsjaxError


def given_path(path: str | Path) -> Path:
    """Make a path absolute, so that it stays valid when the working folder changes.

    `~` and `~NAME` at the beginning are expanded to a home folder, as in a shell. All other characters are kept.

    Raises:
        EsjaxError: The path is empty, is a URL, holds a character that file names cannot have, or begins with `~` while
            no home folder is known.
    """
    given = os.fspath(path)
    if not given:
        raise EsjaxError("a path is empty; give the name of a file or folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        raise EsjaxError(f"{given!r} is a URL, not a path; give a file or folder of this machine")
    expanded = os.path.expanduser(given)  # from the text as given: Path("./~") would drop "./"
    if expanded.split("/", 1)[0] == "~":
        raise EsjaxError(f"no home folder is known for {given!r}; set HOME, or give the whole path")
    if "\0" in expanded:
        raise EsjaxError(f"{given!r} holds a NUL character, which no name of a file can have; leave it out")
    try:
        whole = Path(expanded).absolute()
    except FileNotFoundError as error:
        raise EsjaxError(f"the working folder is gone, so {given!r} leads nowhere; change to another folder") from error
    try:
        os.fsencode(whole)
        str(whole).encode()
    except UnicodeEncodeError as error:
        raise EsjaxError(f"{str(whole)!r} is not UTF-8 text; give it, and the folders above it, such a name") from error
    return whole


def cache_folder() -> Path | None:
    """Return the folder for what can be made again; None if the user has no home folder."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    caches = named if os.path.isabs(named) else os.path.expanduser("~/.cache")
    return Path(caches) / "esjax" if os.path.isabs(caches) else None
