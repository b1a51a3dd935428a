"""The two errors with a name of their own; every other mistake raises the builtin that fits it."""


class CheckpointError(ValueError):
    """A checkpoint, its config or its tokenizer is not what this runtime can run faithfully."""


class NotEnoughMemory(ValueError):
    """The request's memory plan does not fit the device; raised before anything is allocated."""
