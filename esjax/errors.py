"""The one exception that stands for a mistake a person can mend."""


class EsjaxError(Exception):
    """Name what is wrong and the way out, in one line; the command line prints it and exits with 2."""
