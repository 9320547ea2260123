"""The exceptions that stand for what a person can mend."""


class EsjaxError(Exception):
    """Name what is wrong and the way out, in one line; the command line prints it and exits with 2."""


class DiskError(EsjaxError):
    """A file of a run cannot be written: the disk is full, or fails.

    Attributes:
        remedy: What a person does about it before going on.
    """

    def __init__(self, message: str, remedy: str) -> None:
        """Say what cannot be written and why, and what helps."""
        super().__init__(message)
        self.remedy = remedy
