"""The command `esjax` for a checkout, with the benchmarks as an extra subcommand."""

from esjax.__main__ import set_up

if __name__ == "__main__":
    set_up()
    from bench.command import Bench

    from esjax.cli import COMMANDS, main

    COMMANDS["bench"] = Bench
    main()
