"""What is wrong with settings, for a person: dotted names, near names, allowed values."""

import difflib
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "bool": "true or false",
    "null": "None",
    "object": "a group of settings",
    "array": "a list",
    "list": "a list",
}
"""msgspec's words for types, in ours."""

LIKENESS = 0.7
"""Of two names for one to be taken for the other, from 0 to 1, see difflib."""


def setting_names(settings: msgspec.Struct) -> list[str]:
    """List all settings by their dotted names, `es.sigma`."""
    names: list[str] = []
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        names += [f"{name}.{inner}" for inner in setting_names(value)] if isinstance(value, msgspec.Struct) else [name]
    return names


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Find the one that a mistyped name may mean: of the same last part, or else spelled much like it."""
    last = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == last]
    return next(iter(same or difflib.get_close_matches(name, names, 1, LIKENESS)), None)


def form_with(name: str, variants: Sequence[msgspec.Struct]) -> str | None:
    """Tell which form of its section has a setting, `rnn` for `model.n_layers`."""
    section = name.rpartition(".")[0]
    return next((_tag(variant, section) for variant in variants if section and name in setting_names(variant)), None)


def explain(error: Exception, variants: Sequence[msgspec.Struct]) -> str:
    """Say in one line what is wrong with settings that msgspec could not read.

    Args:
        error: What it raised: of its own, or by a section's own check.
        variants: Right settings, of each form that they may have.
    """
    found = re.fullmatch(r"(.*?)(?: - at (`key` in )?`\$(.*)`)?", str(error).replace("\n", " "))
    assert found
    text, is_key, place = found[1], found[2], (found[3] or "").strip(".")
    path, inside, _ = place.partition("[")
    here = (path + ": a value" if inside else path) or "the whole"
    known = [name for settings in variants for name in setting_names(settings)]
    choices = _choices(variants, path)
    if is_key:
        return f"a name in {here} must be a text"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        name = f"{path}.{found[1]}".strip(".")
        if form := form_with(name, variants):
            return f"{name} is a setting of the {path} {form}"
        near = nearest(name, known)
        return f"there is no setting {name}; " + (f"did you mean {near}?" if near else "esjax train --help lists them")
    if found := re.fullmatch(r"Object missing required field `(.*)`", text):
        choices = _choices(variants, f"{path}.{found[1]}")
        return f"{here} needs a {found[1]}: {' or '.join(choices)}"
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", text):
        return f"{here} must be {' or '.join(choices) or _in_words(found[1])}, not {_in_words(found[2])}"
    if found := re.fullmatch(r"Invalid (?:enum )?value (.*)", text):
        return f"{path} must be {' or '.join(choices)}, not {found[1]}" if choices else f"{path}: {text}"
    first, _, rest = text.partition(" ")
    if path and f"{path}.{first}" in known and rest.startswith(("must ", "needs ")):
        return f"{path}.{text}"
    return f"{path}: {text}" if path else text


def _in_words(kinds: str) -> str:
    return " or ".join(KINDS.get(kind, kind) for kind in kinds.split(" | "))


def _section(settings: msgspec.Struct, path: str) -> Any:
    return reduce(getattr, path.split("."), settings) if path else settings


def _tag(settings: msgspec.Struct, path: str) -> str:
    return str(_section(settings, path).__struct_config__.tag)


def _choices(variants: Sequence[msgspec.Struct], name: str) -> list[str]:
    """List what a setting may be, if it is one of several words."""
    path, _, last = name.rpartition(".")
    kind = type(_section(variants[0], path))
    if last == kind.__struct_config__.tag_field:
        return [_tag(settings, path) for settings in variants]
    hint = get_type_hints(kind).get(last)
    return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
