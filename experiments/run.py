"""Train, resume, score and sample from a checkout: the command `esjax` under another name, and its benchmarks."""

from esjax.__main__ import set_up

if __name__ == "__main__":
    set_up()
    from bench.command import Bench

    from esjax.cli import COMMANDS, main

    COMMANDS["bench"] = Bench
    main()
