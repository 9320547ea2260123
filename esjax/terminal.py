"""What is on the other end of an output."""

import os
from typing import Any

WITHOUT_CURSOR = ("", "dumb", "unknown")
"""Values of TERM for terminals that show codes for the cursor as text, or may do so."""


def has_cursor(stream: Any) -> bool:
    """Tell whether a text stream, or None, goes to a terminal in which the cursor can be moved.

    What else a variable of the environment says, such as FORCE_COLOR, holds for colors alone: a file has no cursor.
    """
    return stream is not None and stream.isatty() and os.environ.get("TERM", "").lower() not in WITHOUT_CURSOR
