"""Exceptions for problems that the user can solve."""


class EsjaxError(Exception):
    """A problem that the user can solve.

    The message is one line that names the problem and the way out. The command line prints it and exits with 2.
    """


class DiskError(EsjaxError):
    """A file of a run cannot be written: the disk is full or broken.

    Attributes:
        remedy: What to do before resuming the run.
    """

    def __init__(self, message: str, remedy: str) -> None:
        """Set the message (which file cannot be written, and why) and the remedy."""
        super().__init__(message)
        self.remedy = remedy
