"""evaluate, tune and generate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from esjax.cli.shared import CustomModelOption, Moved, Run, prepare, teller
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from esjax.inference.language_model import Written
    from esjax.tuning.sigma import Tried


@dataclass(frozen=True)
class Evaluate:
    """Score a model on whole documents, beside n-gram models fitted to the documents that it was trained on."""

    run_folder: Run
    """Run folder."""

    text: Annotated[str | None, tyro.conf.arg(name="data.text")] = None
    """Another text: a file, a folder, a glob, builtin:shakespeare or builtin:pydoc."""

    split: Literal["train", "held_out", "all"] = "held_out"
    """Which of the text's documents."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    custom: Annotated[CustomModelOption, tyro.conf.arg(name="")] = field(default_factory=CustomModelOption)

    def run(self, console: Console) -> None:
        """Print the scores."""
        prepare()
        from esjax.inference.loaded_run import load
        from esjax.runs.folder import json_line

        tell = teller(console)
        loaded = load(self.run_folder, tell=tell, **self.custom.given())
        for kind in loaded.custom.keys() & {"loss", "reward"}:
            tell(f"trained for the {kind} {loaded.custom[kind]}; below is how well it predicts the text")
        evaluation = loaded.evaluate(self.text, self.split)
        if evaluation.note:
            tell(evaluation.note)
        if self.json:
            numbers = {name: value for name, value in evaluation._asdict().items() if name not in ("baselines", "note")}
            print(json_line({**numbers, **evaluation.baselines}))
            return
        nats, bits = evaluation.nats_per_token, evaluation.bits_per_byte
        print(f"{nats:.4f} nats/token, {bits:.4f} bits/byte, {evaluation.tokens:,} tokens")
        if evaluation.unknown_tokens:
            print(f"{evaluation.unknown_tokens:,} tokens are outside the vocabulary and were scored as unknown")
        for name, value in evaluation.baselines.items():
            print(f"{value:.4f} {name}, fitted to the run's training text")


@dataclass(frozen=True)
class Tune:
    """Compare sizes of the noise, and discounts, for a run's weights as they are.

    What is compared is the cosine of the estimate with the exact gradient, on windows of the run's text. Behind ±
    stands half of the 95% interval of a mean. All settings see the same windows, so their differences are known better
    than that, and a best one is only named where they exclude 0.
    """

    run_folder: Run
    """Run folder; nothing in it is changed."""

    sigma: tuple[float, ...] = ()
    """Sizes of the noise to try. None named: from 0.025 to 0.8."""

    discount: tuple[float, ...] = ()
    """Discounts to try, in space activation. None named: from 0 to 1."""

    space: Annotated[Literal["full", "low_rank", "activation"] | None, tyro.conf.arg(name="es.space")] = None
    """Another space than the run's."""

    repeats: int | None = None
    """Steps that each setting is measured over; more of them tell smaller differences. None: 8."""

    custom: Annotated[CustomModelOption, tyro.conf.arg(name="")] = field(default_factory=CustomModelOption)

    text: Moved = None
    """Where the run's text is now; it must be the same text. None: where it was."""

    def run(self, console: Console) -> None:
        """Print what each setting comes to, and the words to copy if one is best."""
        prepare()
        from esjax.tuning.sigma import DISCOUNTS, REPEATS, SIGMAS, tune

        tried = []
        custom: Any = self.custom.given()
        for one in tune(
            self.run_folder,
            sigmas=self.sigma or SIGMAS,
            discounts=self.discount or DISCOUNTS,
            space=self.space,
            repeats=REPEATS if self.repeats is None else self.repeats,
            text=self.text,
            tell=teller(console),
            **custom,
        ):
            tried.append(one)
            discount = "" if one.discount is None else f"  discount {one.discount:<5g}"
            interval = f" ± {one.interval:.4f}" if math.isfinite(one.interval) else ""
            print(f"sigma {one.sigma:<6g}{discount}  cosine {one.cosine:.4f}{interval}", flush=True)
        print(conclusion(tried))


def conclusion(tried: "Sequence[Tried]") -> str:
    """Say which setting is best, or which are not told apart, and what to do then."""
    from esjax.tuning.sigma import not_told_apart

    ahead = not_told_apart(tried)
    if not ahead:
        return "no setting has a cosine with the exact gradient: an estimate is 0 or not finite"
    words = [
        f"--es.sigma {one.sigma:g}{'' if one.discount is None else f' --es.discount {one.discount:g}'}" for one in ahead
    ]
    if len(ahead) > 1:
        custom = next(
            (f"; the run's own, {said}, is among them" for one, said in zip(ahead, words, strict=True) if one.custom),
            "",
        )
        return f"no difference seen between {', '.join(words)}{custom}; more --repeats tell smaller differences"
    if len(tried) > 1:
        return f"best: {words[0]}"
    return f"nothing to compare {words[0]} with; name another --sigma"


@dataclass(frozen=True)
class Generate:
    """Write text: sampled, or with --beams the most probable."""

    run_folder: Run
    """Run folder."""

    prompt: str = ""
    """Start of the text."""

    beams: int | None = None
    """Width of a beam search, in place of sampling: no temperature, top_k or top_p, and at most so many texts."""

    temperature: float = 1.0
    """Below 1: safer; above 1: bolder; 0: always the most probable token."""

    top_k: int = 0
    """Choose among so many most probable tokens; 0: among all."""

    top_p: float = 1.0
    """Choose among the most probable tokens that reach this probability together."""

    max_tokens: int = 400
    """Most tokens to write; the text ends earlier where the model ends the document."""

    seed: int = 0
    """Names the texts: equal seeds, equal texts."""

    count: int = 1
    """Number of texts."""

    custom: Annotated[CustomModelOption, tyro.conf.arg(name="")] = field(default_factory=CustomModelOption)

    def run(self, console: Console) -> None:
        """Print the texts."""
        if self.count < 1:
            raise EsjaxError(f"count must be at least 1, got {self.count}")
        if self.beams is not None:
            self._check_search(self.beams)
        prepare()
        from esjax.data.vocabulary import is_symbol
        from esjax.inference.loaded_run import load

        if not all(map(is_symbol, self.prompt)):
            raise EsjaxError("the prompt is not UTF-8 text")
        tell = teller(console)
        loaded = load(self.run_folder, tell=tell, **self.custom.given())
        unknown = loaded.vocabulary.unknown(self.prompt)
        if unknown:
            tell(f"not in the model's vocabulary, read as unknown: {' '.join(map(repr, unknown))}")
        texts: list[Written]
        if self.beams is None:
            texts = loaded.generate(
                self.prompt,
                max_tokens=self.max_tokens,
                count=self.count,
                seed=self.seed,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
        else:
            texts = loaded.search(self.prompt, beams=self.beams, max_tokens=self.max_tokens)[: self.count]
        for text in texts:
            if text.log_probability is not None:
                tell(f"[log probability {text.log_probability:.2f}]")
            print(self.prompt + text.text)
            if len(texts) > 1:
                print("---")

    def _check_search(self, beams: int) -> None:
        if self.count > beams >= 1:
            raise EsjaxError(f"{beams} beams find at most {beams} texts, not {self.count}; raise --beams to the count")
        if (self.temperature, self.top_k, self.top_p) != (Generate.temperature, Generate.top_k, Generate.top_p):
            raise EsjaxError("temperature, top_k and top_p are for sampling; leave them out with --beams")
