"""What a person hears of void pairs and void steps: once, and again after they have stayed away for a while."""

from collections.abc import Mapping

from esjax.exchange import Conclusion

QUIET = 100
"""Steps without trouble of a kind after which it is reported anew."""


class Notices:
    """What was reported so far."""

    def __init__(self, custom: Mapping[str, str]) -> None:
        """Begin with nothing; `custom` are the names of the run's custom parts, by kind."""
        self._blamed = "".join(
            f" (the run's own {kind}, {name})" for kind, name in custom.items() if kind in ("loss", "reward")
        )
        self._noticed: dict[tuple[bool, bool], int] = {}

    def line(self, step: int, pairs: int, concluded: Conclusion) -> str:
        """Say what keeps a step from its update, or pairs from counting; "" if that was said a short time before.

        Args:
            step: Number of the step.
            pairs: Pairs that were scored.
            concluded: What came of them.
        """
        trouble, void_pairs = concluded.trouble, concluded.void_pairs
        if not trouble and not void_pairs:
            return ""
        kind = (bool(trouble), bool(void_pairs))
        before = self._noticed.get(kind)
        self._noticed[kind] = step
        if before is not None and step - before <= QUIET:
            return ""
        what = trouble or f"{void_pairs} of {pairs} pairs have a loss that is not finite"
        return f"step {step}: {what}{self._blamed}; {'no update' if trouble else 'they do not count'}"
