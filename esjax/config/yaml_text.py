"""YAML as the settings are written in; a name that stands twice in a group is an error, not the last of the two."""

from typing import Any

import yaml

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where PyYAML was built with it


def read_yaml(text: str) -> Any:
    """Read one document of YAML, which JSON is, too, into dicts, lists, numbers, texts and None.

    Raises:
        ValueError: It is no such document, or a name stands twice in one mapping. A name that a merge (`<<: *base`)
            brings along may be given anew.
    """
    loader = Loader(text)
    try:
        document = loader.get_single_node()
        _check_names(document, "", set())
        return None if document is None else loader.construct_document(document)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _check_names(node: yaml.Node | None, path: str, seen: set[int]) -> None:
    """See that no mapping at or below a node has a name twice.

    Args:
        node: Of the document.
        path: Its dotted name, which ends in a dot, or "".
        seen: Nodes that were looked at: an alias leads to one of them again.
    """
    if node is None or isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check_names(part, path, seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        kind, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if kind in lines:
            where = f"lines {lines[kind]} and {line}" if line > lines[kind] else f"line {line}"
            raise ValueError(f"{path}{key.value} is set twice, on {where}; leave one of them out")
        lines[kind] = line
        _check_names(value, f"{path}{key.value}.", seen)
