"""Why a request to the hub failed, in one line: the host, its status and its reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from runtime.errors import AccessDenied, CacheError, GemmaRuntimeError, HubError, ModelNotFound, one_line

_MAX_REASON = 300  # characters of the hub's own message


def endpoint() -> str:
    """The hub's address, $HF_ENDPOINT or the public one, without any password in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def explain(repo: str, revision: str) -> Iterator[None]:
    """Turn any exception of the hub's client into an error of this package.

    Args:
        repo: "owner/name".
        revision: of the request.

    Raises:
        ModelNotFound: the hub shows no such model or revision.
        AccessDenied: the hub refuses this account.
        CacheError: the cache cannot be written.
        HubError: anything else.
    """
    try:
        yield
    except GemmaRuntimeError:
        raise
    except Exception as error:  # the HTTP client's exceptions depend on huggingface_hub's version
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str) -> GemmaRuntimeError:
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    page = f"{endpoint()}/{repo}"
    if (response := getattr(error, "response", None)) is not None:
        return _refused(response, getattr(error, "server_message", None), repo, revision)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{page} cannot be asked while HF_HUB_OFFLINE is set")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"no folder {repo} here, and it is not a valid hub id: {_line(error)}")
    if isinstance(error, errors.FileMetadataError):
        return HubError(f"{endpoint()} does not answer as a hub (a login page or a proxy in between?): {_line(error)}")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return CacheError(f"cannot write the hub's cache {constants.HF_HUB_CACHE}: {_line(error)}")
    return HubError(f"{page} cannot be reached: {_line(error)}")


def _refused(response: Any, message: str | None, repo: str, revision: str) -> GemmaRuntimeError:
    """The error for an HTTP error response. The hub gives a reason in X-Error-Code; proxies and mirrors do not."""
    page = f"{endpoint()}/{repo}"
    code = response.headers.get("X-Error-Code", "")
    message = message or response.headers.get("X-Error-Message")
    status = f"{response.status_code} {response.reason_phrase}".strip() + (f", {_line(message)}" if message else "")
    with_token = "authorization" in response.request.headers
    if code == "GatedRepo":
        remedy = "request access there" if with_token else "set HF_TOKEN to a token of an account that has access"
        return AccessDenied(f"{repo} is gated ({status}): accept its licence on {page} and {remedy}")
    if code == "RevisionNotFound":
        return ModelNotFound(f"{page} has no revision {revision} ({status})")
    if response.status_code == 401 and with_token and code != "RepoNotFound":
        return AccessDenied(f"{endpoint()} does not accept the token ({status}): renew HF_TOKEN or log in again")
    if code == "RepoNotFound" or (response.status_code in (401, 404) and code != "EntryNotFound"):
        remedy = "HF_TOKEN may not see it" if with_token else "a private one needs HF_TOKEN"
        return ModelNotFound(f"no folder {repo} here and no such model on the hub ({page}: {status}), or {remedy}")
    if response.status_code == 403:
        return AccessDenied(f"{page} refuses access ({status})")
    return HubError(f"{page} cannot be downloaded: the hub answered {status}")


def _line(reason: object) -> str:
    """One line of a reason, without the token."""
    from huggingface_hub import get_token

    text = one_line(reason)
    if token := get_token():
        text = text.replace(token, "***")
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"
