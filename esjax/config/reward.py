"""Settings of rewards in Python, and of the prompts that members write after."""

from __future__ import annotations

import math

import msgspec

from esjax.config.section import Section, check, check_positive, check_range

MOST_HELD_OUT = 256
"""Most held-out prompts that are written after; the first ones."""


class RewardConfig(Section):
    """A reward in Python: a function that scores text which the model writes after prompts. See docs/rewards.md."""

    prompts: str | None = None
    """File of prompts: one a line; if its name ends in .jsonl, one JSON object a line, with "prompt" and, for a reward
    that takes answers, "answer". Or PATH.py:FUNCTION, which takes nothing and returns a list. None: no reward in
    Python."""

    length: int = 32
    """Most tokens of a completion."""

    temperature: float = 1.0
    """Divides the logits before a token is drawn. 0: the most probable token."""

    stop: str = ""
    r"""Characters that end a completion, in Bash $'\n' for the end of a line. They are left out of it. The end of
    a document always ends it."""

    weights: dict[str, float] = msgspec.field(default_factory=dict)
    """Weights of rewards by their names, if the function returns a mapping from names to lists: format 0.2 right 1. The
    reward is their weighted sum; others weigh 1."""

    tool_at: str = "]"
    """Characters after which the tool is called, if there is one: a function (text) -> string, --reward.tool. Its
    answer is inserted there and counts as part of the completion."""

    tool_calls: int = 1
    """Most calls of the tool in a completion."""

    seconds: float = 10.0
    """Time limit of a call of the reward, or of the tool. A call that takes longer is ended, and its pair does not
    count."""

    tolerance: float = 0.0
    """Largest difference between two means of a member's rewards for the same texts, of a reward that is random; spot
    checks of hosts allow it. 0: the reward of a text is always the same."""

    processes: int | None = None
    """Processes that call the reward, on each host, and as many for the tool. None: one for each core. 0: calls run in
    the training process, one after another and without a time limit; for functions that a file does not hold."""

    held_out: float = 0.1
    """Fraction of the prompts that is kept for evaluation, chosen by a hash of their text."""

    samples: int = 4
    """k of pass@k: completions that are drawn for each held-out prompt, beside the greedy one."""

    passing: float = 1.0
    """Least reward of a completion that counts as passed."""

    patience: int | None = None
    """Stop after this many evaluations in a row without a higher greedy reward on held-out prompts. None: go on."""

    digest: str = ""
    """Hash of the prompts; a run records it, so that all hosts draw from the same prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "length", "tool_calls", "seconds", "samples", "patience")
        check_range(self, 0, math.inf, "temperature", "tolerance")
        check_range(self, 0, 1, "held_out")
        check(self.processes is None or self.processes >= 0, f"processes must be at least 0, got {self.processes}")
        check(bool(self.tool_at), "tool_at must hold a character")
        both = sorted({*self.stop} & {*self.tool_at})
        check(not both, f"stop and tool_at both hold {both[0] if both else ''!r}; leave it out of one")
        check(math.isfinite(self.passing), f"passing must be finite, got {self.passing}")
        for name, weight in self.weights.items():
            check(math.isfinite(weight), f"weights must be finite, got {weight} for {name}")
        check(self.prompts is None or bool(self.prompts), "prompts must name a file")
