"""Frozen parameters: neither perturbed nor trained."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import jax

from esjax.core.leaves import leaf_path
from esjax.errors import EsjaxError
from esjax.models.model import Params


def trained_of(frozen: str, params: Params) -> Callable[[str], bool]:
    """Return the function of a path that says whether the parameter there is trained.

    Args:
        frozen: Paths separated by commas, see the setting es.frozen.
        params: The parameters.

    Raises:
        EsjaxError: A path matches no parameter, or all are frozen.
    """

    def matches(path: str, pattern: str) -> bool:
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")

    named, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [leaf_path(path) for path, _ in named]
    patterns = [pattern.strip() for pattern in frozen.split(",") if pattern.strip()]
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise EsjaxError(f"es.frozen names {pattern!r}; the model has {', '.join(paths)}")
    trained = {path for path in paths if not any(matches(path, pattern) for pattern in patterns)}
    if not trained:
        raise EsjaxError(f"es.frozen {frozen!r} leaves no parameter to train; name fewer")
    return lambda path: path in trained
