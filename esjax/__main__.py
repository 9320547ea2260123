"""`python -m esjax`: the command line."""

from esjax.cli import main

if __name__ == "__main__":
    main()
