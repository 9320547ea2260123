"""A YAML reader for texts that nobody has to trust: it refuses what PyYAML would take, at a high price or silently."""

from typing import Any

import yaml

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the faster one in C, if PyYAML has it

DEEPEST = 50
"""Levels of groups and lists within each other."""

MOST_REPEATED = 10_000
"""Values that aliases may repeat in all: a few lines of aliases of aliases could stand for billions."""


def read_yaml(text: str) -> Any:
    """Read one document of YAML or JSON into dicts, lists, numbers, strings and None.

    Raises:
        ValueError: The text is not valid, a name is set twice in one mapping, or it is nested too deeply or repeats too
            much by aliases. Setting a name again after a merge (`<<: *base`) is allowed.
    """
    loader = Loader(text)
    try:
        _check_depth(text)
        document = loader.get_single_node()
        sizes: dict[int, int] = {}
        if document is not None and _check(document, "", sizes) - len(sizes) > MOST_REPEATED:
            raise ValueError(f"aliases repeat more than {MOST_REPEATED:,} values; write fewer of them")
        return None if document is None else loader.construct_document(document)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Check the depth without recursion, before PyYAML's parser recurs."""
    depth = 0
    for event in yaml.parse(text, Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"values are nested more than {DEEPEST} levels deep")


def _check(node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """Check that no mapping at or below a node sets a name twice; return the number of nodes, repeated ones counted.

    Args:
        node: A node of the document.
        path: Dotted name of the node with a dot at its end, or "".
        sizes: Number of nodes for the id of each node that was checked already: an alias leads to a node again.

    Raises:
        ValueError: A name is set twice, or an alias leads to a node that it is in.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1} holds an alias of itself; leave it out")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_check(part, path, sizes) for part in node.value)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"the group or list of line {line} is used as a name; write a word")
            kind = (key.tag, key.value)
            if kind in lines:
                where = f"lines {lines[kind]} and {line}" if line > lines[kind] else f"line {line}"
                raise ValueError(f"{path}{key.value} is set twice, on {where}; leave one of them out")
            lines[kind] = line
            size += 1 + _check(value, f"{path}{key.value}.", sizes)
    sizes[id(node)] = size
    return size
