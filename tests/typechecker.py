"""The run-time type checker of the tests: beartype, with an int where a float is asked for, as PEP 484 has it."""

from typing import Any

from beartype import BeartypeConf, beartype

CONF = BeartypeConf(is_pep484_tower=True)


def check(checked: Any) -> Any:
    """Check calls of a function, or of a class's methods.

    A function within a function is left alone: a checker would be made whenever the outer one is called, which takes a
    tenth of the time of tracing, and what reaches it has been checked outside.
    """
    return checked if "<locals>" in checked.__qualname__ else beartype(conf=CONF)(checked)
