"""The one kind of error that a user can mend."""


class LensError(ValueError):
    """Bad input. The message is one sentence that names the file or key and the remedy; entry points
    print it without a traceback and exit with code 1."""
