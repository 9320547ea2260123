"""A YAML reader that refuses a name that is set twice in one group; PyYAML would take the last one."""

from typing import Any

import yaml

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the faster one in C, if PyYAML has it


def read_yaml(text: str) -> Any:
    """Read one document of YAML or JSON into dicts, lists, numbers, strings and None.

    Raises:
        ValueError: The text is not valid, or a name is set twice in one mapping. Setting a name again after a merge
            (`<<: *base`) is allowed.
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
    """Check that no mapping at or below a node sets a name twice.

    Args:
        node: A node of the document.
        path: Dotted name of the node with a dot at its end, or "".
        seen: Ids of nodes that were checked already; an alias leads to a node again.

    Raises:
        ValueError: A name is set twice.
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
