"""Messages of any type, made by hypothesis from what the types allow."""

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from esjax.hosts.protocol import wire

Strategy = st.SearchStrategy[Any]


def kinds_of(union: Any) -> list[type[wire.Message]]:
    """List the messages of `wire.Request`, `wire.Reply` or `wire.Broadcast`."""
    return list(union.__args__)


def messages(kind: type[msgspec.Struct], /, **fields: Strategy) -> Strategy:
    """Make messages of a kind; `fields` say how to make those fields that it has of them, the types the others."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    made = {field.name: fields.get(field.name, values(field.type)) for field in info.fields}
    return st.builds(kind, **made)


def values(kind: inspect.Type) -> Strategy:
    """Make values of a type, small ones mostly."""
    if isinstance(kind, inspect.Metadata):
        return values(kind.type)
    if isinstance(kind, inspect.IntType):
        low = kind.ge if kind.ge is not None else kind.gt + 1 if kind.gt is not None else -(2**63)
        high = kind.le if kind.le is not None else kind.lt - 1 if kind.lt is not None else 2**63 - 1
        return st.integers(low, min(high, low + 10)) | st.integers(low, high) | st.just(high)
    if isinstance(kind, inspect.FloatType):
        return st.floats() if kind.ge is None and kind.le is None else st.floats(kind.ge, kind.le)
    if isinstance(kind, inspect.BoolType):
        return st.booleans()
    if isinstance(kind, inspect.StrType):
        return st.text(max_size=min(kind.max_length or 20, 20))
    if isinstance(kind, inspect.NoneType):
        return st.none()
    if isinstance(kind, inspect.LiteralType):
        return st.sampled_from(kind.values)
    if isinstance(kind, inspect.UnionType):
        return st.one_of(*map(values, kind.types))
    if isinstance(kind, inspect.TupleType):
        return st.tuples(*map(values, kind.item_types))
    if isinstance(kind, inspect.ListType):
        return st.lists(values(kind.item_type), max_size=min(kind.max_length or 4, 4))
    if isinstance(kind, inspect.DictType):
        return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
    assert isinstance(kind, inspect.StructType)
    return messages(kind.cls)
