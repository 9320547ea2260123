"""Prompts: read from a file or made by a function, split, and encoded for members to read."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from esjax.config.custom_names import Code, is_code
from esjax.data.text_files import read_text
from esjax.data.tokens import STOP
from esjax.data.vocabulary import FIRST, Vocabulary
from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.python_files import call_without_arguments, load_function

SHOWN = 5
"""Unknown characters that an error message names."""


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: What a member reads before it writes; may be empty.
        answer: What a reward compares with: any JSON value. None: there is none.
    """

    text: str
    answer: Any = None


class PromptTokens(NamedTuple):
    """Encoded prompts, one a row.

    Attributes:
        tokens: Ids, int32 [prompts, longest]; STOP fills the rest of a row.
        lengths: Number of tokens of each prompt, int32 [prompts].
    """

    tokens: Int32[ndarray, "prompts longest"]
    lengths: Int32[ndarray, " prompts"]


def check_for_hosts(source: str | None) -> None:
    """Check that hosts may read the prompts that a coordinator names: they run no file that they were not given.

    Raises:
        EsjaxError: The prompts are a function in a file.
    """
    if source is not None and is_code(source):
        raise EsjaxError(
            f"the prompts {source!r} are a function in a file, and hosts run no file that a coordinator names; write "
            "the prompts to a .jsonl file"
        )


def read_prompts(source: str) -> list[Prompt]:
    """Read the prompts that the setting reward.prompts names.

    Args:
        source: A file of lines, a file of JSON lines (.jsonl), or PATH.py:FUNCTION. Blank lines are left out.

    Raises:
        EsjaxError: The source cannot be read, a line or a value is not a prompt, or there is no prompt.
    """
    if is_code(source):
        prompts = _from_function(source)
    else:
        path = given_path(source)
        lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
        if path.suffix == ".jsonl":
            prompts = [_from_json(f"{str(path)!r}, line {number}", line) for number, line in lines]
        else:
            prompts = [Prompt(line) for _, line in lines]
    if not prompts:
        raise EsjaxError(f"{source!r} holds no prompt; put one in each line")
    for prompt in prompts:
        try:
            prompt.text.encode()
        except UnicodeEncodeError as error:
            raise EsjaxError(
                f"the prompt {prompt.text!r} of {source!r} holds half a character (a lone surrogate); leave it out"
            ) from error
    return prompts


def _from_json(where: str, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EsjaxError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise EsjaxError(f'{where} is no prompt; write it as {{"prompt": "TEXT", "answer": ...}}')
    return Prompt(value["prompt"], value.get("answer"))


def _from_function(source: str) -> list[Prompt]:
    named, _, name = source.rpartition(":")
    path = given_path(named)
    if not path.is_file():
        raise EsjaxError(f"there is no file {str(path)!r}; reward.prompts takes FILE or PATH.py:FUNCTION")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EsjaxError(f"cannot read {str(path)!r}: {error.strerror}") from error
    code = Code.of(str(path), name, content)
    prompts, values = (
        [],
        call_without_arguments(code, load_function(code, content), "prompts", "strings or (string, answer)"),
    )
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise EsjaxError(f"{source} returns a {type(values).__name__}; return a list of strings or (string, answer)")
    for value in values:
        text, answer = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        if not isinstance(text, str):
            raise EsjaxError(f"{source} returns {value!r} among its prompts; return strings, or (string, answer)")
        try:
            json.dumps(answer)
        except (TypeError, ValueError, RecursionError) as error:
            raise EsjaxError(
                f"{source} returns the answer {repr(answer)[:60]}, which JSON does not hold: the prompts of a run are "
                "known by a hash; return strings, numbers, lists, or mappings from strings"
            ) from error
        prompts.append(Prompt(text, answer))
    return prompts


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Return a hash of the prompts, in order, with their answers."""
    text = json.dumps([*prompts])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_prompts(prompts: Sequence[Prompt], held_out: float) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training and held-out ones by a hash of their text: equal ones are in the same split.

    Args:
        prompts: The prompts.
        held_out: Fraction to hold out, in [0, 1).

    Raises:
        EsjaxError: No prompt is left to train on.
    """
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        digest = hashlib.blake2b(prompt.text.encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "little") < held_out * 2**64].append(prompt)
    if not parts[0]:
        raise EsjaxError(f"all {len(prompts)} prompts are held out; lower reward.held_out or add prompts")
    return parts


def encode_prompts(prompts: Sequence[Prompt], vocabulary: Vocabulary) -> PromptTokens:
    """Encode prompts and pad them to the length of the longest one.

    Raises:
        EsjaxError: A prompt holds characters outside the vocabulary.
    """
    for prompt in prompts:
        if unknown := vocabulary.unknown(prompt.text):
            shown = ", ".join(map(repr, unknown[:SHOWN]))
            raise EsjaxError(
                f"the prompt {prompt.text[:60]!r} holds {shown}, which the vocabulary does not; leave out such "
                "prompts, or take a text that holds these characters, or data.vocabulary byte"
            )
    rows = [vocabulary.encode(prompt.text) for prompt in prompts]
    tokens = np.full((len(rows), max(map(len, rows))), STOP, np.int32)
    for row, encoded in zip(tokens, rows, strict=True):
        row[: len(encoded)] = encoded
    return PromptTokens(tokens, np.array([len(row) for row in rows], np.int32))


def tokens_of(characters: str, setting: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the tokens that hold a character of a setting of rewards, at their end for `tool_at`.

    Raises:
        EsjaxError: No token holds a character.
    """
    if not characters:
        return ()
    texts = [vocabulary.decode([token]) for token in range(FIRST, vocabulary.size)]
    if setting == "tool_at":
        texts = [text[-1:] for text in texts]
    for character in characters:
        if not any(character in text for text in texts):
            raise EsjaxError(
                f"reward.{setting} holds {character!r}, which is no token of the vocabulary; leave it out, or "
                "name another"
            )
    return tuple(FIRST + number for number, text in enumerate(texts) if {*characters} & {*text})
