"""Rewards for tests of training."""


def share_of_a(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the share of "a" among the letters of each completion."""
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    """Fail, always."""
    raise ValueError("never")


def raises_on_b(prompts: list[str], completions: list[str]) -> list[float]:
    """Fail where a completion begins with b."""
    if any(completion.startswith("b") for completion in completions):
        raise ValueError("b")
    return share_of_a(prompts, completions)
