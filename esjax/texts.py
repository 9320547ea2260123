"""Texts of other people and errors of other code, shown so that they cannot pass for something else."""

PROSE = "\n\t\xa0\u3000\u200c\u200d"
"""Characters of ordinary texts that are not printable by themselves: line breaks, tabs, spaces, joiners of letters."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of what an error says, of at most so many characters; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def legible(text: str, keep: str = "") -> str:
    r"""Escape the characters of a text that are not printable, as Python does: a line feed becomes `\n`.

    Among them are the control characters of terminals, line breaks, those that change the direction of the text, and
    bytes of file names that are not UTF-8. Markup is not touched: what shows the text must take it literally.

    Args:
        text: Any text.
        keep: Characters to leave as they are, such as `PROSE`.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
