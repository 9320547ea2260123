"""What is wrong with settings, for a person: dotted names, near names, allowed values."""

import difflib
import re
from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "bool": "true or false",
    "null": "None",
    "object": "a group of settings",
    "array": "a list",
}
"""msgspec's words for types, in ours."""


def setting_names(settings: msgspec.Struct) -> list[str]:
    """List all settings by their dotted names, `es.sigma`."""
    names: list[str] = []
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        names += [f"{name}.{inner}" for inner in setting_names(value)] if isinstance(value, msgspec.Struct) else [name]
    return names


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Find the setting that a mistyped name may mean."""
    last = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == last]
    return next(iter(same or difflib.get_close_matches(name, names, 1, 0.5)), None)


def explain(error: Exception, variants: Sequence[msgspec.Struct]) -> str:
    """Say in one line what is wrong with settings that msgspec could not read.

    Args:
        error: What it raised: of its own, or by a section's own check.
        variants: Right settings, of each form that they may have.
    """
    text, _, path = str(error).replace("\n", " ").partition(" - at `$")
    path = path.strip(".`")
    known = [name for settings in variants for name in setting_names(settings)]
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        name = f"{path}.{found[1]}".strip(".")
        near = nearest(name, known)
        return f"there is no setting {name}; " + (f"did you mean {near}?" if near else "esjax train --help lists them")
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", text):
        return f"{path or 'the whole'} must be {_in_words(found[1])}, not {_in_words(found[2])}"
    if found := re.fullmatch(r"Invalid (?:enum )?value (.*)", text):
        choices = _choices(variants, path.split("."))
        return f"{path} must be {' or '.join(choices)}, not {found[1]}" if choices else f"{path}: {text}"
    first, _, rest = text.partition(" ")
    if path and f"{path}.{first}" in known and rest.startswith(("must ", "needs ")):
        return f"{path}.{text}"
    return f"{path}: {text}" if path else text


def _in_words(kinds: str) -> str:
    return " or ".join(KINDS.get(kind, kind) for kind in kinds.split(" | "))


def _choices(variants: Sequence[msgspec.Struct], parts: Sequence[str]) -> list[str]:
    """List what a setting may be, if it is one of several words."""
    *sections, last = parts
    holders = [reduce(getattr, sections, settings) for settings in variants]
    kind = type(holders[0])
    if last == kind.__struct_config__.tag_field:
        return [str(holder.__struct_config__.tag) for holder in holders]
    hint = get_type_hints(kind).get(last)
    return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
