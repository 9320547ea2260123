# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A reward in plain Python
#
# A small network first reads a text, and learns to write like it. Then a reward judges what it writes: Python's own
# parser says whether an expression is valid. Nothing of this has a gradient, and the reward is not jitted.
#
# Install with `pip install -e '.[notebook]'` in a checkout. It takes about a minute on two cores.

# %%
# %matplotlib inline
import esjax

esjax.prepare_devices()  # one device per core; before anything else uses JAX

import ast
import random
import tempfile
from pathlib import Path

# %% tags=["parameters"]
TEXT_STEPS = 120
STEPS = 100
POPULATION = 512

# %% [markdown]
# ## The text
#
# Each line of the text is an expression, but most of them lack a bracket, or have a sign at the wrong place. So the
# network learns what expressions look like, and also to make mistakes.

# %%
draw = random.Random(0)


def expression(depth: int = 2) -> str:
    if not depth or draw.random() < 0.3:
        return str(draw.randrange(10))
    inner = f"{expression(depth - 1)}{draw.choice('+-*')}{expression(depth - 1)}"
    return f"({inner})" if draw.random() < 0.6 else inner


def spoil(line: str) -> str:
    at = draw.randrange(len(line))
    return line[:at] + draw.choice(["", "(", ")", "*"]) + line[at:].replace(")", "", 1)


def valid(line: str) -> bool:
    try:
        ast.parse(line, mode="eval")
    except SyntaxError:
        return False
    return True


lines = [line if draw.random() < 0.2 else spoil(line) for line in (expression() for _ in range(4000))]
print(*lines[:8], f"valid: {sum(map(valid, lines)) / len(lines):.0%}", sep="\n")
folder = Path(tempfile.mkdtemp(prefix="esjax-expressions-"))
(folder / "text.txt").write_text("\n".join(lines))

# %% [markdown]
# The network reads the text by noise on activations, which is the fastest way without a reward.

# %%
start = esjax.train(
    esjax.Config(
        steps=TEXT_STEPS,
        data=esjax.DataConfig(text=str(folder / "text.txt"), documents="line"),
        es=esjax.EsConfig(space="activation"),
        model=esjax.MinGruConfig(hidden_size=24, head_size=24, gate_tokens=3),
        evaluate_time=60.0,
    ),
    folder / "start",
)
for _ in start:
    pass
print(*(written.text for written in start.generate(count=8, max_tokens=20)), sep="\n")

# %% [markdown]
# ## The reward
#
# The network gets the beginning of an expression, in which a bracket is open, and writes on. The reward takes lists of
# prompts and completions. It returns two rewards, each with a name: whether the whole is valid, and how many operators
# it has, up to four. The second one has a small weight: it counts against the shortest way out, which is to close all
# brackets at once.


# %%
def reward(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return {
        "valid": [float(valid(text)) for text in whole],
        "operators": [min(sum(text.count(sign) for sign in "+-*"), 4) / 4 for text in whole],
    }


beginnings = {line[: draw.randrange(1, 6)] for line in lines if valid(line)}
prompts = sorted(begin for begin in beginnings if begin.count("(") > begin.count(")"))
(folder / "prompts.txt").write_text("\n".join(prompts))
print(len(prompts), "prompts:", *prompts[::40])

# %% [markdown]
# `init` starts from the weights of the first run. A tenth of the prompts is held out, and measured with the most
# probable completion (`greedy_reward`) and with four random ones, of which one must pass (`pass_at_k`).
#
# `processes=0` calls the reward in this process, so that it may be a function of a notebook. Rewards that take long,
# or run what the network wrote, belong into a file: `reward="rewards.py:reward"` calls them in processes with a time
# limit.

# %%
config = esjax.Config(
    steps=STEPS,
    init=str(folder / "start"),
    data=esjax.DataConfig(batch_size=2),
    es=esjax.EsConfig(population_size=POPULATION, sigma=0.1),
    optim=esjax.OptimConfig(learning_rate=0.05),
    reward=esjax.RewardConfig(
        prompts=str(folder / "prompts.txt"), length=12, weights={"operators": 0.3}, passing=1.0, processes=0
    ),
    evaluate_time=4.0,
)
run = esjax.train(config, reward=reward)
infos = list(run)
first, last = infos[0], infos[-1]
for info in (first, last):
    print(f"step {info.step:3}: valid {info.rewards['valid']:.2f}, operators {info.rewards['operators']:.2f}")

# %% [markdown]
# The panels are the measures of the run. The network forgets a part of its text: the held-out loss rises above its
# first value, since lines with mistakes become less probable.

# %%
run.plot(smoothing=5)

# %%
for prompt in ("(3", "2*((", "7-"):
    print(*(prompt + written.text for written in run.generate(prompt, count=4, max_tokens=16)), sep="   ")

# %% [markdown]
# A run folder, `esjax.train(..., out="runs/expressions")`, keeps weights and metrics; `optim.anchor` pulls the
# weights back to those of the start. Tools that the network calls while it writes, and runs over hosts, are in
# `docs/rewards.md`.
