"""Train, resume, score and sample from a checkout: the command `esjax` under another name, and its benchmarks."""

from bench.command import Bench

from esjax.cli import COMMANDS, main

if __name__ == "__main__":
    COMMANDS["bench"] = Bench
    main()
