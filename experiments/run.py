"""Train, resume, score and sample from a checkout: the command `esjax` under another name."""

from esjax.cli import main

if __name__ == "__main__":
    main()
