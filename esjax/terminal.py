"""Whether an output goes to a terminal."""

import os
from typing import Any

WITHOUT_CURSOR = ("", "dumb", "unknown")
"""Values of TERM for terminals that show the codes of the cursor as text, or may do so."""


def has_cursor(stream: Any) -> bool:
    """Return whether a text stream, or None, goes to a terminal in which the cursor can be moved.

    FORCE_COLOR and the like change nothing here: they are about colors, and a file has no cursor.
    """
    return stream is not None and stream.isatty() and os.environ.get("TERM", "").lower() not in WITHOUT_CURSOR
