"""Teach a character model to write molecules, and then drug-like ones, without backpropagation, and beside REINFORCE.

    pip install 'esjax[molecules]' && pip install --no-deps molsets
    python experiments/molecules.py             # about 40 minutes on two cores, by estimate

Molecules are lines of text in SMILES, such as CC(=O)Oc1ccccc1C(=O)O. The text is a part of the training set of MOSES
(Polykovskiy et al. 2020), which has 1.6 million molecules. A GRU reads it, trained by noise on activations. RDKit
checks which texts of the model are molecules (valid), and computes how drug-like these are, from 0 to 1: QED (Bickerton
et al. 2012).

From the same weights, the model then learns to write molecules of high QED: by evolution strategies, which need the
rewards alone, and by REINFORCE, which differentiates the model. Both get the same number of rewards in a step.
"""

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import esjax

Params = Any
"""The weights of the model."""

Write = Callable[[Params, int], list[str]]
"""`(params, count) -> molecules` that the model writes, always with the same random keys."""

Measure = Callable[[Params], tuple[float, float]]
"""`(params) -> (reward, valid)`, see `Point`."""

Reward = Callable[[Sequence[str], Sequence[str]], dict[str, list[float]]]
"""`(prompts, completions) -> rewards` by their names."""

Steps = Iterable[tuple[float, Params]]
"""The mean reward of what was written in a step, and the averaged weights after it, step by step."""

LENGTH = 64
"""Most characters of a molecule that a member writes; the longest of the text has 57."""

WRITTEN = 15_000
"""Texts that are written to be measured, so that 10,000 of them are valid."""

SEED_OF_SEARCH = 1000
"""Seed of the trials of the search."""

COMPLETIONS = 4
"""Molecules that a member writes in a step."""

MEASURED = 1_000
"""Molecules that are written for a point of a curve."""

FROZEN = "start,embedding,recurrent,head_hidden"
"""Weights that keep what the text taught: evolution strategies learn from fewer rewards if they perturb few weights."""

STEPS_BETWEEN_TEXT_POINTS = 2_000
"""Steps on the text between points of its curve."""

STEPS_BETWEEN_POINTS = 10
"""Steps between points of a curve."""

TRIALS: dict[str, list[tuple[float, ...]]] = {
    "evolution": [(rate, sigma) for rate in (0.03, 0.1) for sigma in (0.4, 0.8)],
    "reinforce": [(rate,) for rate in (0.003, 0.01, 0.03, 0.1)],
}
"""What is tried for each method: step sizes, and standard deviations of the noise."""


class Quality(NamedTuple):
    """What molecules are like that a model wrote. All are fractions, or means of numbers from 0 to 1.

    Attributes:
        valid: Texts that RDKit can read.
        unique_1k: Different molecules among the first 1,000 valid ones.
        unique_10k: Different molecules among the first 10,000 valid ones.
        novel: Different molecules that the training set of MOSES does not hold.
        diversity: 1 minus the mean Tanimoto similarity of the first 1,000 valid ones (Morgan fingerprints, radius 2,
            1,024 bits), as MOSES defines it.
        qed: Mean QED of the first 2,000 valid ones.
    """

    valid: float
    unique_1k: float
    unique_10k: float
    novel: float
    diversity: float
    qed: float


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        calls: Calls of the reward so far.
        seconds: Processor seconds so far, measurements left out.
        reward: Mean reward of 1,000 molecules that the averaged weights write; each counts once, its repeats count 0.
        valid: Fraction of these that are molecules.
        written: Mean reward of what was written in the last step; None before the first one.
    """

    calls: int
    seconds: float
    reward: float
    valid: float
    written: float | None


def make_reward() -> Reward:
    """Make the reward of training: QED, but 0 for texts that are no molecule, and for molecules of earlier calls.

    Without this memory a model comes to write few molecules of high QED again and again. Whether texts are molecules,
    and whether these are new, is measured, too; it has no weight.
    """
    written = set[str]()

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        names = {text: name_of(text) for text in completions}  # the two members of a pair often write the same
        new = {text for text, name in names.items() if name and name not in written}
        written.update(names.values())
        scores = {text: qed_of(text) if text in new else 0.0 for text in names}
        return {
            "qed": [scores[text] for text in completions],
            "valid": [float(bool(names[text])) for text in completions],
            "new": [float(text in new) for text in completions],
        }

    return reward


def name_of(text: str) -> str:
    """Return the molecule as RDKit writes it; "" for a text that describes none, such as the empty one."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(text)
    return "" if molecule is None else str(Chem.MolToSmiles(molecule))


def qed_of(molecule: str) -> float:
    """Return the QED of a molecule."""
    from rdkit import Chem
    from rdkit.Chem import QED

    return float(QED.qed(Chem.MolFromSmiles(molecule)))


def read_molecules() -> list[str]:
    """Read the training set of MOSES from the files of the package molsets, whose code is not run."""
    try:
        package = distribution("molsets")
    except PackageNotFoundError as error:
        raise SystemExit("the molecules are in the package molsets: pip install --no-deps molsets") from error
    path = package.locate_file("moses/dataset/data/train.csv.gz")
    with gzip.open(str(path), "rt") as file:
        return parse_table(file)


def parse_table(rows: Iterator[str]) -> list[str]:
    """Return the column SMILES of a table of comma-separated values; SMILES hold no comma."""
    column = next(rows).rstrip("\n").split(",").index("SMILES")
    return [row.rstrip("\n").split(",")[column] for row in rows]


def write_text(molecules: list[str], count: int, path: Path) -> None:
    """Write some of the molecules, drawn at random, one a line."""
    path.write_text("".join(f"{one}\n" for one in random.Random(0).sample(molecules, count)))


def text_config(text: Path, steps: int, seed: int) -> esjax.Config:
    """Make the settings of training on the text, by noise on activations."""
    return esjax.Config(
        seed=seed,
        steps=steps,
        # State is carried: which rings and branches are open was decided before most windows begin.
        data=esjax.DataConfig(text=str(text), documents="line", held_out=0.01, window=64, carry=True),
        es=esjax.EsConfig(space="activation", population_size=64),
        optim=esjax.OptimConfig(decay_steps=1000),
        model=esjax.GruConfig(hidden_size=128, head_size=128),
        evaluate_time=60.0,
    )


def train_on_text(config: esjax.Config, folder: Path) -> None:
    """Train on the text, and write from time to time which fraction of what the model writes are molecules.

    The points are kept in the folder, in text.jsonl.
    """
    run = esjax.train(config, folder / "text")
    with (folder / "text.jsonl").open("w") as file:
        for info in run:
            if info.step % STEPS_BETWEEN_TEXT_POINTS == 0 or info.step == config.steps:
                written = [one.text for one in run.generate(max_tokens=LENGTH, count=MEASURED, seed=1)]
                valid = sum(name_of(text) != "" for text in written) / MEASURED
                print(f"text: step {info.step}, {info.member_tokens:,} member-tokens, valid {valid:.3f}", flush=True)
                point = {"step": info.step, "member_tokens": info.member_tokens, "valid": valid}
                file.write(json.dumps(point) + "\n")
                file.flush()
    if run.stopped:
        raise SystemExit(f"stopped; esjax resume {folder / 'text'} --steps {config.steps} goes on with the text")


def reward_config(folder: Path, population: int, seed: int, rate: float, sigma: float) -> esjax.Config:
    """Make the settings of training by reward, by noise of low rank on the output layer that the text taught."""
    return esjax.Config(
        seed=seed,
        init=str(folder / "text"),
        # The text is not read any more; a line of it will do.
        data=esjax.DataConfig(text=str(folder / "line.txt"), documents="line", held_out=0.0, batch_size=COMPLETIONS),
        es=esjax.EsConfig(population_size=population, sigma=sigma, frozen=FROZEN),
        optim=esjax.OptimConfig(learning_rate=rate),
        # No other process calls the reward, so that processor seconds of this one are those of all.
        reward=esjax.RewardConfig(
            prompts=str(folder / "prompts.jsonl"),
            length=LENGTH,
            weights={"valid": 0.0, "new": 0.0},
            processes=0,
            held_out=0.0,
        ),
        evaluate_time=36_000.0,
    )


def quality_of(written: list[str], known: set[str]) -> Quality:
    """Measure what a model wrote; all is 0 if no text is a molecule.

    Args:
        written: Texts.
        known: The molecules of the training set, as RDKit writes them.
    """
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    names = [name for name in map(name_of, written) if name]
    if not names:
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    molecules = [Chem.MolFromSmiles(name) for name in names[:1000]]
    prints = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024).GetFingerprints(molecules)
    similarities = [sum(DataStructs.BulkTanimotoSimilarity(one, prints)) / len(prints) for one in prints]
    different = set(names)
    return Quality(
        valid=len(names) / len(written),
        unique_1k=len(set(names[:1000])) / len(names[:1000]),
        unique_10k=len(set(names[:10_000])) / len(names[:10_000]),
        novel=len(different - known) / len(different),
        diversity=1 - sum(similarities) / len(similarities),
        qed=sum(map(qed_of, names[:2000])) / len(names[:2000]),
    )


def make_write(start: esjax.LoadedRun) -> Write:
    """Make the function that writes molecules with any weights of the model."""

    def write(params: Params, count: int) -> list[str]:
        written = start.language_model.write(
            params, "", max_tokens=LENGTH, count=count, seed=1, temperature=1.0, top_k=0, top_p=1.0
        )
        return [one.text for one in written]

    return write


def measure_reward(write: Write, params: Params) -> tuple[float, float]:
    """Return the mean reward of what the model writes, 0 for molecules written before, and the valid fraction."""
    names = [name for name in map(name_of, write(params, MEASURED)) if name]
    return sum(map(qed_of, set(names))) / MEASURED, len(names) / MEASURED


def by_evolution(folder: Path, population: int, seed: int, rate: float, sigma: float) -> Steps:
    """Train by evolution strategies without end."""
    run = esjax.train(reward_config(folder, population, seed, rate, sigma), reward=make_reward())
    for info in run:
        assert info.reward is not None
        yield info.reward, run.params
    raise SystemExit("stopped")  # no number of steps is set, so there was a signal


def by_reinforce(folder: Path, population: int, seed: int, rate: float) -> Steps:
    """Train by REINFORCE without end, with as many molecules in a step."""
    from bench.reinforce import reinforce

    start, reward = esjax.load(folder / "text"), make_reward()

    def rewards_of(texts: Sequence[str]) -> list[float]:
        """Call the reward with as many texts at a time as by evolution strategies, those of a pair."""
        size = 2 * COMPLETIONS
        parts = (texts[first : first + size] for first in range(0, len(texts), size))
        return [one for part in parts for one in reward([""] * len(part), part)["qed"]]

    yield from reinforce(
        start.language_model.model,
        start.params,
        start.vocabulary,
        rewards_of,
        esjax.OptimConfig(learning_rate=rate),
        documents=population * COMPLETIONS,
        length=LENGTH,
        seed=seed,
    )


def follow(steps: Steps, start: Params, measure: Measure, calls: int, count: int, out: Path) -> Params:
    """Train for some steps, and write a point of the curve every `STEPS_BETWEEN_POINTS`, one a line.

    Args:
        steps: The steps.
        start: The weights before them.
        measure: Measures weights.
        calls: Calls of the reward in a step.
        count: Number of steps.
        out: File of the points.

    Returns:
        The averaged weights at the point of the highest reward.
    """
    seconds, params, highest, best = 0.0, start, -1.0, start
    iterator = iter(steps)
    with out.open("w") as file:

        def write(calls: int, written: float | None) -> None:
            nonlocal highest, best
            point = Point(calls, seconds, *measure(params), written)
            print(f"{out.stem}: {', '.join(f'{name} {value}' for name, value in point._asdict().items())}", flush=True)
            file.write(json.dumps(point._asdict()) + "\n")
            file.flush()
            if point.reward > highest:
                highest, best = point.reward, params

        write(0, None)
        for step in range(1, count + 1):
            began = time.process_time()
            written, params = next(iterator)
            seconds += time.process_time() - began
            if step % STEPS_BETWEEN_POINTS == 0 or step == count:
                write(step * calls, written)
    return best


METHODS: dict[str, Callable[..., Steps]] = {"evolution": by_evolution, "reinforce": by_reinforce}


def search(method: str, folder: Path, population: int, count: int, measure: Measure) -> tuple[float, ...]:
    """Train for a few steps with each of `TRIALS`, and return the settings of the highest mean reward.

    The rewards are kept in the folder, in search.jsonl.
    """
    found = dict[tuple[float, ...], float]()
    for settings in TRIALS[method]:
        steps = islice(METHODS[method](folder, population, SEED_OF_SEARCH, *settings), count)
        found[settings], _ = measure([params for _, params in steps][-1])
        print(f"{method} with {settings}: reward {found[settings]:.4f}", flush=True)
        with (folder / "search.jsonl").open("a") as file:
            file.write(json.dumps({"method": method, "settings": settings, "reward": found[settings]}) + "\n")
    return max(found, key=lambda settings: found[settings])


def report(name: str, folder: Path, written: list[str], known: set[str]) -> None:
    """Measure what a model wrote, print it, and keep it in the folder."""
    quality = quality_of(written, known)
    (folder / f"{name}.json").write_text(json.dumps(quality._asdict()) + "\n")
    print(name + ": " + ", ".join(f"{key} {value:.4f}" for key, value in quality._asdict().items()), flush=True)


def draw(folder: Path, path: Path) -> None:
    """Draw the curves that the folder holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for method, label in (("evolution", "evolution strategies"), ("reinforce", "REINFORCE")):
        points = [Point(**json.loads(line)) for line in (folder / f"{method}.jsonl").read_text().splitlines()]
        rewards = [point.reward for point in points]
        panels[0].plot([point.calls / 1000 for point in points], rewards, label=label)
        panels[1].plot([point.seconds for point in points], rewards, label=label)
    panels[0].set(xlabel="calls of the reward, thousands", ylabel="mean QED; 0 if invalid or repeated")
    panels[1].set(xlabel="processor seconds")
    for axes in panels:
        axes.grid(alpha=0.25)
    panels[0].legend()
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Train on the text, then by reward in two ways; print and draw what comes of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/molecules"), help="folder; a run on the text that it holds is not redone"
    )
    parser.add_argument("--molecules", type=int, default=1_500_000, help="molecules of the text")
    parser.add_argument("--text-steps", type=int, default=80_000)
    parser.add_argument("--search-steps", type=int, default=10, help="steps of a trial of the search")
    parser.add_argument("--steps", type=int, default=100, help="steps by reward")
    parser.add_argument("--population", type=int, default=128)
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=[*METHODS], help="those to train by")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    import matplotlib  # noqa: F401 - if one of them is missing, that is known before training
    import rdkit  # noqa: F401

    esjax.prepare_devices()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    molecules = read_molecules()
    if not (folder / "text").exists():
        write_text(molecules, arguments.molecules, folder / "molecules.txt")
        config = text_config(folder / "molecules.txt", arguments.text_steps, arguments.seed)
        (folder / "text.json").unlink(missing_ok=True)
        train_on_text(config, folder)
    else:
        print(f"{folder / 'text'} is there, and is not trained again", flush=True)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": ""}) + "\n")
    (folder / "line.txt").write_text(f"{molecules[0]}\n")
    start, known = esjax.load(folder / "text"), set(molecules)
    write = make_write(start)
    measure = partial(measure_reward, write)
    if not (folder / "text.json").exists():
        report("text", folder, write(start.params, WRITTEN), known)
    calls = arguments.population * COMPLETIONS
    for method in arguments.methods:
        settings = search(method, folder, arguments.population, arguments.search_steps, measure)
        steps = METHODS[method](folder, arguments.population, arguments.seed, *settings)
        params = follow(steps, start.params, measure, calls, arguments.steps, folder / f"{method}.jsonl")
        report(method, folder, write(params, WRITTEN), known)
    if all((folder / f"{method}.jsonl").exists() for method in METHODS):
        draw(folder, folder / "curves.png")


if __name__ == "__main__":
    main()
