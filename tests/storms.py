"""What a stranger, or a host that has gone mad, may send: valid messages that are wrong, and anything else."""

from typing import Any, NamedTuple

from hypothesis import strategies as st
from wire_strategies import Strategy, kinds_of, messages

from esjax.hosts.protocol import wire

BODIES = st.sampled_from(["right", "none", "short", "long"])


class Sent(NamedTuple):
    """A message, and how to choose its body."""

    message: wire.Message
    body: str


def near(*numbers: int) -> Strategy:
    """Make numbers near to some, and far from all."""
    close = sorted({max(0, number + change) for number in numbers for change in (-1, 0, 1)})
    return st.sampled_from(close) | st.sampled_from([0, 2**31 - 1, 2**32 - 1])


def spans() -> Strategy:
    """Make pairs that there are, and others."""
    first = st.sampled_from([0, 1, 2, 4, 8, 12, 28, 31, 32, 2**20, 2**20 + 4, 2**21, 2**31 - 1])
    count = st.sampled_from([1, 2, 4, 8, 24, 32, 33, 2**20, 2**31 - 1])
    return st.lists(st.tuples(first, count), max_size=4)


def requests(sessions: list[int], step: int, incarnation: int) -> Strategy:
    """Make requests, and how to choose their bodies.

    Args:
        sessions: Those that may be named; one that does not exist should be among them.
        step: Step that is being scored.
        incarnation: Of the coordinator.
    """
    fields: dict[str, Strategy] = {
        "session": st.sampled_from(sessions),
        "incarnation": near(incarnation),
        "step": near(step),
        "spans": spans(),
        "name": st.sampled_from(["mad", "mad, too", ""]),
        "run": st.sampled_from(["", "run", "other"]),
        "known_answers": st.sampled_from([[("rademacher", "1234")], []]),
        "custom": st.just([]),
        "kind": st.just("other"),
        "offset": st.sampled_from([0, 1, 40, 2**18, 2**63 - 1]),
        "size": st.sampled_from([0, 40, 2**63 - 1]),
        "digest": st.sampled_from(["", "0", "f3274de4946c52ad"]),
        "block": near(0, 5),
        "dtype": st.sampled_from(["<f4", "<i4", "<f8"]),
    }
    return one_of_each(wire.Request, fields)


def one_of_each(union: Any, fields: dict[str, Strategy], without: tuple[type, ...] = ()) -> Strategy:
    """Make messages of all kinds of a union but for some, and how to choose their bodies."""
    made = [messages(kind, **fields) for kind in kinds_of(union) if kind not in without]
    return st.builds(Sent, st.one_of(made), BODIES)


def body_of(sent: Sent, right: bytes) -> bytes:
    """Choose the body of a message; `right` is the one that it should have."""
    return {"right": right, "none": b"", "short": right[:-1], "long": right + b"\0"}[sent.body]


def volume(thing: object, seen: set[int] | None = None) -> int:
    """Count what a state machine holds: values, and bytes."""
    seen = set() if seen is None else seen
    if id(thing) in seen or callable(thing) or isinstance(thing, type):
        return 0
    seen.add(id(thing))
    if isinstance(thing, bytes | bytearray | str):
        return len(thing)
    if isinstance(thing, dict):
        return sum(volume(item, seen) for pair in thing.items() for item in pair) + len(thing)
    if isinstance(thing, list | tuple | set):
        return sum(volume(item, seen) for item in thing) + len(thing)
    if hasattr(thing, "nbytes"):
        return int(thing.nbytes)
    names = getattr(thing, "__struct_fields__", None) or getattr(thing, "__dict__", {})
    return 1 + sum(volume(getattr(thing, name), seen) for name in list(names))
