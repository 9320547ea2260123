"""Error messages for wrong settings: with dotted names, similar names and allowed values."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
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
"""Names of msgspec's types in messages."""

LIKENESS = 0.7
"""Similarity from which a name is suggested for another, from 0 to 1, see difflib."""


def setting_names(settings: msgspec.Struct) -> list[str]:
    """List the dotted names of all settings, such as `es.sigma`."""
    names: list[str] = []
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        names += [f"{name}.{inner}" for inner in setting_names(value)] if isinstance(value, msgspec.Struct) else [name]
    return names


def wrong_name(
    name: str,
    known: Sequence[str],
    variants: Sequence[msgspec.Struct],
    kind: str = "setting",
    spell: Callable[[str], str] = str,
    command: str = "train",
) -> str:
    """Make the error message for an unknown name, with the most similar known name.

    Args:
        name: The unknown name.
        known: Dotted names that are allowed here.
        variants: Valid settings of every form, such as one for each model; some have settings that others lack.
        kind: What a name stands for, in the message: "setting" or "option".
        spell: Turns a dotted name into the form that the user writes, such as `--es.sigma`.
        command: The command whose help lists the known names.
    """
    if any(other.startswith(f"{name}.") for other in known):
        return f"{spell(name)} is a group of settings; name one of them"
    there = [*known, *(other for settings in variants for other in setting_names(settings))]
    near = name if name in there else _nearest(name, there)
    if near and near not in known:
        section = near.rpartition(".")[0]
        form = next(_tag(settings, section) for settings in variants if near in setting_names(settings))
        return f"{spell(near)} is a setting of the {section} {form}; choose that {section}, or leave it out"
    hint = f"did you mean {spell(near)}?" if near else f"esjax {command} --help lists them"
    return f"there is no {kind} {spell(name)}; {hint}"


def _nearest(name: str, names: Sequence[str]) -> str | None:
    """Find the known name that is most similar to a mistyped one, or None.

    It compares in turn: equal last parts (`sigma`), similar whole names (`es.sgma`), similar last parts (`windw`), and
    similar first words of the last parts (`populaton`).
    """
    last = _last_part(name)
    for mine, part, likeness in (
        (last, _last_part, 1.0),
        (name, str, LIKENESS),
        (last, _last_part, LIKENESS),
        (last, _first_word, LIKENESS),
    ):
        parts = {part(known): known for known in reversed(names)}  # the first of equal ones wins
        for found in difflib.get_close_matches(mine, parts, 1, likeness):
            return parts[found]
    return None


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _first_word(name: str) -> str:
    return _last_part(name).partition("_")[0]


def explain(
    error: Exception, variants: Sequence[msgspec.Struct], given: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """Turn an error of msgspec into one line.

    Args:
        error: An error of msgspec, or of a check of `Section`.
        variants: Valid settings of every form, see `wrong_name`.
        given: Values by dotted name, as the user wrote them; the message shows them.
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
        group, _, last = name.rpartition(".")
        if "." in found[1] and name in known:
            return f"{name} is no name by itself; write {last} in the group {group}"
        return wrong_name(name, [other for other in known if other != name], variants)
    if found := re.fullmatch(r"Object missing required field `(.*)`", text):
        choices = _choices(variants, f"{path}.{found[1]}")
        return f"{here} needs a {found[1]}: {' or '.join(choices)}"
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", text):
        written = given.get(path)
        is_shown = isinstance(written, int | float) or (isinstance(written, str) and found[2] == "str")
        shown = repr(written) if is_shown else _in_words(found[2])
        return f"{here} must be {' or '.join(choices) or _in_words(found[1])}, not {shown}"
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
    """List the allowed values of a setting that is a choice of several words; else []."""
    path, _, last = name.rpartition(".")
    kind = type(_section(variants[0], path))
    if last == kind.__struct_config__.tag_field:
        return [_tag(settings, path) for settings in variants]
    hint = get_type_hints(kind).get(last)
    return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
