"""The expected ends of a run, which a command line prints in one line without a traceback."""


class InputError(ValueError):
    """A config, data set, checkpoint or argument that cannot be used.

    The message is one sentence that names the file, key or id, what was found there and what is
    allowed instead.
    """


class StoppedError(RuntimeError):
    """A training that was told to stop (SIGTERM) and has saved its state to go on from."""


class LostWorkerError(RuntimeError):
    """The end of a process that loads images, at the hands of the system."""

    def __str__(self) -> str:
        return (
            "a process that loads images was ended by the system, as one out of memory does; lower "
            "DATALOADER.NUM_WORKERS or INPUT.MAX_SIZE_TRAIN, or give a container more /dev/shm; "
            "--resume goes on from the last checkpoint"
        )
