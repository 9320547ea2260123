"""Train a network to answer sums of two digits, such as 3+4=7, by whether the answer that it writes is right.

    python experiments/addition.py                # about two minutes on two cores
    python experiments/addition.py --hint 0       # right or wrong alone: it learns next to nothing

The network writes its answer, token by token, and is given 1 for a right one: no gradient leads through that. Alone it
says too little. Of a first network both members of a pair get 0, nearly always; then one number is found that answers a
few sums, and no small change of the weights betters that: 7 of 100 are right after a minute. So a small part of the
reward is a hint, the log probability of the right answer, which sets what is nearly right apart from what is far off.
With a tenth of it 98 of 100 are right after 36 s on two cores, and with a hundredth 66 after a minute. (The hint alone
is the usual loss, and learns these sums as fast: where the one right answer is known, there is no need for more.)
"""

import argparse
import tempfile
from pathlib import Path

import esjax

QUESTION, ANSWER = 4, 3
"""Tokens of a+b= and, with STOP, of the longest sum."""

STEPS_TO_TELL = 100
"""Steps between lines."""


def make_text() -> str:
    """Write all sums of two digits, one a line."""
    return "".join(f"{a}+{b}={a + b}\n" for a in range(10) for b in range(10))


def make_reward(hint: float) -> "esjax.models.custom.Reward":
    """Make the reward: 1 for a right answer, and a part of the right answer's log probability.

    Args:
        hint: That part, at least 0.
    """
    import jax
    import jax.numpy as jnp

    from esjax.data.tokens import STOP

    def right_answers(member, tokens, key):  # type: ignore[no-untyped-def]
        """Score the first whole sum of a window."""
        start = jnp.argmax(tokens == STOP) + 1
        question = jax.lax.dynamic_slice(tokens, (start,), (QUESTION,))
        answer = jax.lax.dynamic_slice(tokens, (start + QUESTION,), (ANSWER,))
        stops = (answer == STOP).astype(jnp.int32)
        is_part = jnp.cumsum(stops) - stops == 0  # up to the first STOP; after it, the next sum begins
        asked = member.read(question)
        is_right = jnp.all(member.generate(asked, ANSWER) == jnp.where(is_part, answer, STOP))
        log_probability = -jnp.sum(jnp.where(is_part, member.nats(answer, asked), 0.0))
        return is_right.astype(jnp.float32) + hint * log_probability

    return right_answers


def make_config(text: Path, seconds: float) -> esjax.Config:
    """Choose the settings: eight sums for each pair, and no sum held out, since a table of 100 has no rule to find."""
    return esjax.Config(
        seconds=seconds,
        # Long enough that a window holds a whole sum, wherever it begins.
        data=esjax.DataConfig(text=str(text), documents="line", held_out=0, burn_in=0, window=14, batch_size=8),
        es=esjax.EsConfig(population_size=1024, sigma=0.1),
        model=esjax.RnnConfig(hidden_size=32),
    )


def answers(run: "esjax.Trainer") -> dict[str, str]:
    """Ask every sum: what the network writes, always its most probable token."""
    sums = [f"{a}+{b}=" for a in range(10) for b in range(10)]
    return {asked: run.generate(asked, temperature=0.0, max_tokens=ANSWER)[0].text for asked in sums}


def count_right(answers: dict[str, str]) -> int:
    """Count the right answers."""
    return sum(answer == str(int(asked[0]) + int(asked[2])) for asked, answer in answers.items())


def main() -> None:
    """Train, and show how many of the 100 sums are answered right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--hint", type=float, default=0.1)
    arguments = parser.parse_args()
    esjax.prepare_devices()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "sums.txt"
        text.write_text(make_text())
        run = esjax.train(make_config(text, arguments.seconds), reward=make_reward(arguments.hint))
        print(f"before: {count_right(answers(run))} of 100 are right")
        for info in run:
            if info.step % STEPS_TO_TELL == 0:
                right = count_right(answers(run))
                print(
                    f"{info.seconds:4.0f} s  step {info.step:,}  reward {-info.loss:.3f}  {right} right of 100",
                    flush=True,
                )
    after = answers(run)
    print(f"after {run.step:,} steps: {count_right(after)} of 100 are right")
    for asked in ("3+4=", "0+0=", "9+9=", "7+5="):
        print(f"{asked}{after[asked]}")


if __name__ == "__main__":
    main()
