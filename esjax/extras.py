"""Libraries that only some extras of esjax install."""

from collections.abc import Iterator
from contextlib import contextmanager

from esjax.errors import EsjaxError


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Import optional libraries in the body.

    Args:
        what: What needs them, for the error.
        extra: Extra of esjax that installs them.

    Raises:
        EsjaxError: One of them is missing or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise EsjaxError(f"{what} needs a library that is missing ({error}): pip install 'esjax[{extra}]'") from error
