"""The commands evaluate, tune and generate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from esjax.cli.shared import ModelOption, Moved, Run, prepare, teller
from esjax.errors import EsjaxError
from esjax.terminal import print_text

if TYPE_CHECKING:
    from esjax.inference.language_model import Written
    from esjax.tuning.sigma import Tried


@dataclass(frozen=True)
class Evaluate:
    """Score a run on whole documents, beside n-gram models fitted to its training documents."""

    run_folder: Run
    """Run folder."""

    text: Annotated[str | None, tyro.conf.arg(name="data.text")] = None
    """Another text: a file, a folder, a glob, builtin:shakespeare or builtin:pydoc. None: the run's text."""

    split: Literal["train", "held_out", "all"] = "held_out"
    """Documents of the text to score."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    model: ModelOption = None
    """New place of the run's custom model, if its file was moved."""

    def run(self, console: Console) -> None:
        """Print the scores."""
        prepare()
        from esjax.inference.loaded_run import load
        from esjax.runs.folder import json_line

        tell = teller(console)
        loaded = load(self.run_folder, tell=tell, model=self.model)
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
    """Compare values of sigma and of the discount for the current weights of a run.

    The measure is the cosine of the estimate with the exact gradient, on windows of the run's text. ± is half of the
    95% interval of a mean. All settings see the same windows, so their differences are more precise. A best setting is
    named only if the 95% intervals of its differences from all others exclude 0.
    """

    run_folder: Run
    """Run folder; it is not changed."""

    sigma: tuple[float, ...] = ()
    """Values of sigma to try. By default 0.025 to 0.8, and a tenth of these for credit by gates."""

    discount: tuple[float, ...] = ()
    """Discounts to try, with es.credit discount. By default 0 to 1."""

    space: Annotated[Literal["full", "low_rank", "activation"] | None, tyro.conf.arg(name="es.space")] = None
    """Space to try in place of the run's."""

    repeats: int | None = None
    """Steps over which each setting is measured; more steps show smaller differences. None: 8."""

    model: ModelOption = None
    """New place of the run's custom model, if its file was moved."""

    text: Moved = None
    """New place of the run's text, which must be unchanged. None: the place in its settings."""

    def run(self, console: Console) -> None:
        """Print the cosine of each setting, and the options of the best one."""
        prepare()
        from esjax.tuning.sigma import DISCOUNTS, REPEATS, tune

        tried = []
        for one in tune(
            self.run_folder,
            sigmas=self.sigma or None,
            discounts=self.discount or DISCOUNTS,
            space=self.space,
            repeats=REPEATS if self.repeats is None else self.repeats,
            text=self.text,
            tell=teller(console),
            model=self.model,
        ):
            tried.append(one)
            discount = "" if one.discount is None else f"  discount {one.discount:<5g}"
            interval = f" ± {one.interval:.4f}" if math.isfinite(one.interval) else ""
            print(f"sigma {one.sigma:<6g}{discount}  cosine {one.cosine:.4f}{interval}", flush=True)
        print(conclusion(tried))


def conclusion(tried: "Sequence[Tried]") -> str:
    """Return a line that names the best setting, or those that do not differ significantly."""
    from esjax.tuning.sigma import not_told_apart

    ahead = not_told_apart(tried)
    if not ahead:
        return "no setting has a cosine with the exact gradient: an estimate is 0 or not finite"
    words = [
        f"--es.sigma {one.sigma:g}{'' if one.discount is None else f' --es.discount {one.discount:g}'}" for one in ahead
    ]
    if len(ahead) > 1:
        current = next(
            (f"; the run's own, {said}, is among them" for one, said in zip(ahead, words, strict=True) if one.current),
            "",
        )
        return f"no difference seen between {', '.join(words)}{current}; more --repeats show smaller differences"
    if len(tried) > 1:
        return f"best: {words[0]}"
    return f"nothing to compare {words[0]} with; name another --sigma"


@dataclass(frozen=True)
class Generate:
    """Generate text by sampling, or with --beams the most probable text."""

    run_folder: Run
    """Run folder."""

    prompt: str = ""
    """Start of the text."""

    beams: int | None = None
    """Search for the most probable texts with this many beams, in place of sampling; finds at most that many."""

    temperature: float = 1.0
    """Divides the logits: below 1 for more probable text, above 1 for more varied text; 0: the most probable token."""

    top_k: int = 0
    """Sample from this many most probable tokens; 0: no limit."""

    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to this (nucleus sampling)."""

    max_tokens: int = 400
    """Most tokens to generate; a text ends earlier if the model ends the document."""

    seed: int = 0
    """Random seed: equal seeds give equal texts."""

    count: int = 1
    """Number of texts."""

    model: ModelOption = None
    """New place of the run's custom model, if its file was moved."""

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
        loaded = load(self.run_folder, tell=tell, model=self.model)
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
            print_text(self.prompt + text.text)
            if len(texts) > 1:
                print("---")

    def _check_search(self, beams: int) -> None:
        if self.count > beams >= 1:
            raise EsjaxError(f"{beams} beams find at most {beams} texts, not {self.count}; raise --beams to the count")
        if (self.temperature, self.top_k, self.top_p) != (Generate.temperature, Generate.top_k, Generate.top_p):
            raise EsjaxError("temperature, top_k and top_p are for sampling; leave them out with --beams")
