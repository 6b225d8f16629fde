"""The one error a person sees when what they gave cannot be used."""


class InputError(ValueError):
    """A config, data set, checkpoint or argument that cannot be used.

    The message is one sentence that names the file, key or id, what was found there and what is
    allowed instead. Command lines print it without a traceback.
    """
