"""Every error that this package raises on purpose: one family, each also an instance of the builtin that fits it."""


class GemmaRuntimeError(Exception):
    """The base of every error below."""


class InvalidArgument(GemmaRuntimeError, ValueError):
    """A caller's value is out of range or does not fit the model; nothing has been changed."""


class InvalidArgumentType(GemmaRuntimeError, TypeError):
    """A caller's value is of the wrong type; nothing has been changed."""


class CheckpointError(GemmaRuntimeError, ValueError):
    """A checkpoint, its config or its tokenizer is not what this runtime can run faithfully."""


class ModelNotFound(GemmaRuntimeError, FileNotFoundError):
    """There is no model of this name, or its folder lacks a file that every model has."""


class HubError(GemmaRuntimeError, ConnectionError):
    """A model could not be downloaded from the hub."""


class AccessDenied(GemmaRuntimeError, PermissionError):
    """The hub knows the model, but does not give it to this account."""


class MissingPackage(GemmaRuntimeError, ModuleNotFoundError):
    """An optional package is needed and not installed."""


class CacheError(GemmaRuntimeError, OSError):
    """The cache of converted models, or the hub's, cannot be written."""


class OutputError(GemmaRuntimeError, OSError):
    """A file that the caller named for output cannot be written."""


class NotEnoughMemory(GemmaRuntimeError, ValueError):
    """The request's memory plan does not fit the device; raised before anything is allocated."""


class NonFiniteError(GemmaRuntimeError, ArithmeticError):
    """The model computed a NaN or an infinity: its values do not fit the dtype that it runs in."""


class GrammarTooComplex(GemmaRuntimeError, RuntimeError):
    """An answer's grammar reached a state beyond the limits of the library that enforces it."""


class QueueFull(GemmaRuntimeError, RuntimeError):
    """As many requests as may wait for a row are waiting already."""


class ModelClosed(GemmaRuntimeError, RuntimeError):
    """The model has been closed: its weights are gone."""


# What may end one answer half way while the others go on.
ENDS_ONE_ANSWER = (NonFiniteError, GrammarTooComplex)


def one_line(error: object) -> str:
    """An error's message in one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
