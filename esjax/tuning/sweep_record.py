"""sweep.yaml: what a sweep was begun with, so that it goes on with the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from esjax.config.custom_names import Code
from esjax.config.settings import Config, from_yaml, to_plain
from esjax.config.yaml_text import read_yaml
from esjax.errors import EsjaxError
from esjax.runs.durable import write_new_folder
from esjax.runs.folder import check_custom

RECORD = "sweep.yaml"


class Record(NamedTuple):
    """Contents of sweep.yaml.

    Attributes:
        axes: Values by the name of a setting.
        config: Settings that are not axes.
        custom: Names of the custom parts, by kind.
        code: Path, function and hash of custom parts that are code in a file, by kind.
    """

    axes: Mapping[str, Sequence[Any]]
    config: Config
    custom: Mapping[str, str]
    code: Mapping[str, Code]


def keep_record(path: Path, wanted: Record) -> Mapping[str, Sequence[Any]]:
    """Write sweep.yaml, or check that the existing one is the same; return the axes as they are recorded.

    Raises:
        EsjaxError: The folder holds something else, or a sweep with other axes, settings or code.
    """
    axes, config = wanted.axes, wanted.config
    record = {"axes": axes, "settings": to_plain(config)}
    if wanted.custom:
        record |= {"own": dict(wanted.custom), "code": dict(wanted.code)}
    try:
        write_new_folder(path, {RECORD: msgspec.yaml.encode(record).decode()})
    except FileExistsError as error:
        if not (path / RECORD).exists():
            raise EsjaxError(
                f"{str(path)!r} exists already, is no sweep, and is left alone; give another --out"
            ) from error
    except OSError as error:
        raise EsjaxError(f"cannot make the folder {str(path)!r}: {error.strerror}") from error
    before, settings, custom, code = read_record(path)
    if before != axes:
        there = " ".join(f"--axis {name}={','.join(map(str, values))}" for name, values in before.items())
        raise EsjaxError(f"{str(path)!r} is a sweep over {there}; give another --out, or continue that one")
    if settings != config:
        old, new = msgspec.to_builtins(settings), msgspec.to_builtins(config)
        raise EsjaxError(
            f"{str(path)!r} is a sweep with other settings, {_first_difference(old, new)}; give another --out, or "
            "continue that one"
        )
    check_custom(str(path), custom, wanted.custom, "esjax.sweep")
    digests = [{kind: one.digest for kind, one in codes.items()} for codes in (code, wanted.code)]
    if digests[0] != digests[1]:
        raise EsjaxError(f"{str(path)!r} is a sweep with other code; put the old file back, or give another --out")
    return before


def read_record(path: Path) -> Record:
    """Read sweep.yaml.

    Raises:
        EsjaxError: The path is not the folder of a sweep, or the file is damaged.
    """
    source = path / RECORD
    try:
        record = read_yaml(source.read_text(encoding="utf-8"))
        axes = msgspec.convert(record["axes"], dict[str, list[Any]])
        settings = msgspec.yaml.encode(record["settings"]).decode()
        custom = msgspec.convert(record.get("own", {}), dict[str, str])
        code = msgspec.convert(record.get("code", {}), dict[str, Code])
    except OSError as error:
        raise EsjaxError(
            f"{str(path)!r} is not the folder of a sweep: cannot read its {RECORD} ({error.strerror})"
        ) from error
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise EsjaxError(f"{source} is damaged ({error}); restore it from a copy") from error
    return Record(axes, from_yaml(settings, str(source)), custom, code)


def _first_difference(old: Any, new: Any, name: str = "") -> str:
    for key in old:
        if old[key] != new.get(key):
            if isinstance(old[key], dict) and isinstance(new.get(key), dict):
                return _first_difference(old[key], new[key], f"{name}{key}.")
            return f"{name}{key}={old[key]} in place of {new.get(key)}"
    return name
