"""The expected ends of a run, which a command line prints in one line without a traceback."""


class InputError(ValueError):
    """A config, data set, checkpoint or argument that cannot be used.

    The message is one sentence that names the file, key or id, what was found there and what is
    allowed instead.
    """


class StoppedError(RuntimeError):
    """A training that was told to stop (SIGTERM) and has saved its state to go on from."""
