"""Teach a character model to use a calculator: by a text first, then by a reward for right answers. No backpropagation.

    python experiments/arithmetic.py              # a few minutes on two cores

The problems are products, such as 47*85=. In the text, most lines answer at once, 47*85=3995; one line in ten calls a
calculator first, 47*85=[47*85]3995. A network of 16,608 weights reads it, trained by noise on activations. It learns to
answer in the style of most lines, and such answers are nearly always wrong: it cannot multiply.

Then it writes after problems by itself. Where it writes "]", the calculator puts the product in, and the network writes
on. The reward is 1 if the characters after the last "=" or "]" are the product, else 0. Noise on the weights makes some
members call the calculator more often than others, and these get more reward.

The problems of the text and those of the reward are others than the held-out ones, which the figures are measured on.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import esjax

LINES = 40_000
"""Lines of the text."""

CALLS = 0.1
"""Fraction of the lines that call the calculator."""

LENGTH = 12
"""Most characters after a problem: a call of 7, a product of 4, and the end."""

STEPS_BETWEEN_POINTS = 5
"""Steps between points of the curve."""


class Point(NamedTuple):
    """A point of the curve: right answers are fractions of problems, and so are calls."""

    member_tokens: int
    held_out: float
    right: float
    calls: float


def calculate(text: str) -> str:
    """Return the product of the two numbers in the last brackets, or nothing if there are no two numbers."""
    a, _, b = text[text.rfind("[") + 1 : -1].partition("*")
    return str(int(a) * int(b)) if a.isdecimal() and b.isdecimal() else ""


def reward(prompts: list[str], completions: list[str], answers: list[str]) -> dict[str, list[float]]:
    """Return whether the final answers are right, and whether the calculator was called, which has no weight."""
    final = [text.rpartition("]")[2] for text in completions]
    return {
        "right": [float(one == answer) for one, answer in zip(final, answers, strict=True)],
        "calls": [float("]" in text) for text in completions],
    }


def make_files(folder: Path) -> tuple[Path, Path]:
    """Write the text and the problems; the text holds no held-out problem.

    Args:
        folder: Where to write.

    Returns:
        The text, and the file of prompts.
    """
    from esjax.rewards.prompts import Prompt, split_prompts

    problems = [Prompt(f"{a}*{b}=", str(a * b)) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    known, _ = split_prompts(problems, esjax.RewardConfig().held_out)
    draw = random.Random(1)
    lines = []
    for problem, product in draw.choices(known, k=LINES):
        call = f"[{problem[:-1]}]" if draw.random() < CALLS else ""
        lines.append(f"{problem}{call}{product}\n")
    text, prompts = folder / "text.txt", folder / "problems.jsonl"
    text.write_text("".join(lines))
    prompts.write_text("".join(json.dumps({"prompt": one.text, "answer": one.answer}) + "\n" for one in problems))
    return text, prompts


def text_config(text: Path, steps: int, seed: int) -> esjax.Config:
    """Make the settings of training on the text, by noise on activations."""
    return esjax.Config(
        seed=seed,
        steps=steps,
        data=esjax.DataConfig(text=str(text), documents="line"),
        es=esjax.EsConfig(space="activation"),
        # The gates see as many characters as lie between a digit and its copy in the call.
        model=esjax.MinGruConfig(hidden_size=48, head_size=64, gate_tokens=8),
    )


def reward_config(start: Path, prompts: Path, steps: int, population: int, seed: int) -> esjax.Config:
    """Make the settings of training by reward, by noise of low rank on the weights that the text taught."""
    return esjax.Config(
        seed=seed,
        steps=steps,
        init=str(start),
        data=esjax.DataConfig(batch_size=4),
        es=esjax.EsConfig(population_size=population, sigma=0.1),
        optim=esjax.OptimConfig(learning_rate=0.03),
        reward=esjax.RewardConfig(prompts=str(prompts), length=LENGTH, weights={"calls": 0.0}),
        evaluate_time=3600.0,  # `show` measures
    )


def show(run: esjax.Trainer, curve: list[Point], began: float) -> None:
    """Measure the run on held-out problems, print a line, and add a point to the curve."""
    measured = run.measure_rewards()
    assert measured is not None
    last = run.last
    means = {} if last is None or last.rewards is None else last.rewards
    right, calls = means.get("right", math.nan), means.get("calls", math.nan)
    curve.append(Point(0 if last is None else last.member_tokens, measured.greedy_reward, right, calls))
    line = (
        f"step {run.step:3}  right, held out: {measured.greedy_reward:.3f}  population: {right:.3f}, calls: {calls:.3f}"
    )
    print(f"{time.perf_counter() - began:4.0f} s  {line}", flush=True)


def draw(curve: list[Point], path: Path) -> None:
    """Draw the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (
        ("held_out", "held-out problems, most probable answers: right"),
        ("right", "training problems, population: right"),
        ("calls", "training problems, population: calls the calculator"),
    ):
        axes.plot(
            [point.member_tokens / 1e6 for point in curve], [getattr(point, name) for point in curve], label=label
        )
    axes.set_xlabel("millions of member-tokens")
    axes.set_ylabel("fraction")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Train twice, print the curve, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"), help="folder to make")
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--population", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name another folder: --out")
    import matplotlib  # noqa: F401 - if it is missing, that is known before training

    esjax.prepare_devices()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True)
    text, prompts = make_files(arguments.out)
    taught = esjax.train(text_config(text, arguments.text_steps, arguments.seed), arguments.out / "text")
    for _ in taught:
        pass
    if taught.stopped:
        raise SystemExit("stopped")
    print(f"{time.perf_counter() - began:4.0f} s  the text is read: {taught.summary()}")
    code = Path(__file__).resolve()
    config = reward_config(arguments.out / "text", prompts, arguments.steps, arguments.population, arguments.seed)
    run = esjax.train(config, arguments.out / "reward", reward=f"{code}:reward", tool=f"{code}:calculate")
    curve: list[Point] = []
    show(run, curve, began)
    for info in run:
        if info.step % STEPS_BETWEEN_POINTS == 0:
            show(run, curve, began)
    draw(curve, arguments.out / "curve.png")


if __name__ == "__main__":
    main()
