"""Requests to the hub: a repository's list of files, the header of a weight file, a download."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from runtime.checkpoint.files import JSON_LIMIT
from runtime.checkpoint.hub_failure import endpoint, explain
from runtime.checkpoint.progress import is_shown
from runtime.errors import CheckpointError, HubError, ModelNotFound

RETRIES = 3  # with the client's own backoff: 1, 2 and 4 seconds, or as the hub asks
_FIRST_BYTES = 1 << 17  # most headers fit


def list_files(repo: str, revision: str, retries: int) -> tuple[str, ...]:
    """The names of a repository's files.

    Args:
        repo, revision: what to list.
        retries: how often to ask again after a failure that may be transient.

    Raises:
        as `hub.find`.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    with explain(repo, revision):
        validate_repo_id(repo)
        try:
            return _ask(f"models/{repo}/revision/{quote(revision, safe='')}", retries)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            if _is_dataset(repo):
                raise ModelNotFound(f"{repo} is a dataset of {endpoint()}, not a model") from None
            raise


def _is_dataset(repo: str) -> bool:
    try:
        _ask(f"datasets/{repo}", 0)
    except Exception:  # only asked for a better error message
        return False
    return True


def _ask(path: str, retries: int) -> tuple[str, ...]:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    response = http_backoff(
        "GET",
        f"{constants.ENDPOINT}/api/{path}",
        headers=build_hf_headers(),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
        follow_redirects=True,
        max_retries=retries,
    )
    hf_raise_for_status(response)
    try:
        return tuple(str(file["rfilename"]) for file in response.json()["siblings"])
    except (ValueError, KeyError, TypeError, RecursionError):
        content_type = response.headers.get("Content-Type", "no content type")
        raise HubError(
            f"{endpoint()} does not answer as a hub: {response.status_code} with {content_type} instead of a list of "
            "files (a login page or a proxy in between?)"
        ) from None


def read_header(repo: str, name: str, revision: str) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, up to the end of its header, and the file's size.

    Raises:
        CheckpointError: not a safetensors file.
        HubError: the hub does not say how large the file is.
    """
    start, size = _first_bytes(repo, name, revision, _FIRST_BYTES)
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(JSON_LIMIT, size - 8):
        raise CheckpointError(f"{name} of {endpoint()}/{repo} is not a safetensors file")
    if len(start) < 8 + length:
        start, size = _first_bytes(repo, name, revision, 8 + length)
    return start[: 8 + length], size


def _first_bytes(repo: str, name: str, revision: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file, and its size. Stops reading there even if the hub ignores the range."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo, name, revision=revision)
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
        max_retries=RETRIES,
        retry_on_exceptions=(),  # it cannot retry a failure while reading the content
    ) as response:
        hf_raise_for_status(response)
        content_range, length = (response.headers.get(f"Content-{name}", "") for name in ("Range", "Length"))
        size = content_range.rpartition("/")[2] or length
        if not size.isdecimal():
            raise HubError(f"{url} does not say how large {name} is")
        for chunk in response.iter_bytes(1 << 16):
            content += chunk
            if len(content) >= count:
                break
    return bytes(content[:count]), int(size)


def download(repo: str, name: str, revision: str, progress: bool | None) -> str:
    """Download a file into huggingface_hub's cache, in the calling thread, so that Ctrl-C stops it at once.

    A complete file is kept; an interrupted one starts over.

    Returns:
        Its path.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return hf_hub_download(repo, name, revision=revision, tqdm_class=None if is_shown(progress) else Hidden)
