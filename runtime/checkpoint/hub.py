"""A model repository of the hub: its small files first, and its weights once those have been checked.

Downloads go into huggingface_hub's cache, one file after another in the calling thread, so that Ctrl-C ends one at
once. A file that is complete stays; one that was interrupted starts over, since huggingface_hub drops the part.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.checkpoint.folder_contents import describe_names
from runtime.checkpoint.hub_failure import endpoint, explain
from runtime.checkpoint.safetensors_folder import read_json
from runtime.errors import AccessDenied, CheckpointError, GemmaRuntimeError, HubError, InvalidArgument, ModelNotFound

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w][\w.+=-]*(/[\w][\w.+=-]*)*")
_SMALL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_RETRIES = 3  # with the client's own backoff: 1, 2 and 4 seconds, or what the hub asks for
_FIRST_BYTES = 1 << 17  # most headers fit
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def parse(name: str) -> tuple[str, str | None] | None:
    """Split "owner/name" or "owner/name@revision" into its two parts; None where the name is neither.

    Raises:
        ValueError: what follows the @ cannot be a branch, a tag or a commit.
    """
    repo, at, revision = name.partition("@")
    if not _NAME.fullmatch(repo):
        return None
    return repo, check_revision(revision) if at else None


def check_revision(revision: str) -> str:
    """The revision itself, where it can be the name of a branch or a tag, or a commit.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidArgument(f"a revision must be the name of a branch or a tag, or a commit, got {revision!r}")
    return revision


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository. Its small files lie in `folder`; its weights are there once they are fetched.

    Args:
        repo: "owner/name".
        folder: in huggingface_hub's cache, named by the commit.
        files: what the hub lists, or what the cache has where the hub cannot be asked.
        failure: why the hub cannot be asked.
    """

    repo: str
    folder: Path
    files: tuple[str, ...]
    failure: GemmaRuntimeError | None = None

    def missing(self) -> list[str]:
        """The weight files that are to be read and are not in the cache.

        Raises:
            ModelNotFound: the repository has none; the message says what it has.
            CheckpointError: an index that cannot be read.
        """
        if SINGLE in self.files:
            wanted = [SINGLE]
        elif INDEX in self.files:
            shards = read_json(self.folder / INDEX).get("weight_map")
            # What the index names and the repository lacks is found by whoever reads the index as a checkpoint's.
            named = set(map(str, shards.values())) if isinstance(shards, dict) else set()
            wanted = sorted(named if self.failure else named.intersection(self.files))
        elif self.failure:
            wanted = [SINGLE]
        else:
            raise ModelNotFound(f"no {SINGLE} or {INDEX} in {self.repo}: {describe_names(self.files)}")
        return [name for name in wanted if not (self.folder / name).exists()]

    @contextmanager
    def headers(self) -> Iterator[Path]:
        """A folder that holds the headers of all tensors: `folder`, or, while weights are missing from it, one where
        holes stand for their data. Errors raised inside are about the repository, and name it.

        Raises:
            HubError, AccessDenied: the hub cannot be asked for what is missing.
            CheckpointError: as `missing`; a file is no safetensors file.
        """
        missing = self._fetchable()
        if not missing:
            yield self.folder
            return
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / self.repo
            folder.mkdir(parents=True)
            for path in self.folder.iterdir():
                (folder / path.name).symlink_to(path.absolute())
            for name in missing:
                with explain(self.repo, self.folder.name):
                    header, size = self._read_header(name)
                    with (folder / name).open("wb") as file:
                        file.write(header)
                        file.truncate(size)
            try:
                yield folder
            except GemmaRuntimeError as error:
                raise type(error)(str(error).replace(f"{root}/", "")) from error

    def fetch(self, progress: bool | None = None) -> Path:
        """Download the weights that are missing.

        Args:
            progress: whether to draw progress bars; None draws them on a terminal only.

        Returns:
            The folder, complete.

        Raises:
            as `headers`; CacheError: the cache cannot be written.
        """
        for name in self._fetchable():
            with explain(self.repo, self.folder.name):
                _download(self.repo, name, self.folder.name, progress)
        return self.folder

    def _fetchable(self) -> list[str]:
        missing = self.missing()
        if missing and self.failure:
            raise type(self.failure)(f"{', '.join(missing)} of {self.repo} is not in the cache, and {self.failure}")
        return missing

    def _read_header(self, name: str) -> tuple[bytes, int]:
        """The first bytes of a safetensors file, its header among them, and its size."""
        start, size = self._first_bytes(name, _FIRST_BYTES)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{name} of {endpoint()}/{self.repo} is not a safetensors file")
        if len(start) < 8 + length:
            start, size = self._first_bytes(name, 8 + length)
        return start[: 8 + length], size

    def _first_bytes(self, name: str, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file, and its size. Reads no more, though the hub may ignore the range."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.repo, name, revision=self.folder.name)
        headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        content = bytearray()
        with http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=timeout,
            follow_redirects=True,
            max_retries=_RETRIES,
            retry_on_exceptions=(),  # it cannot retry what fails while the content is read
        ) as response:
            hf_raise_for_status(response)
            size = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get(
                "Content-Length", ""
            )
            if not size.isdecimal():
                raise HubError(f"{url} does not say how large {name} is")
            for chunk in response.iter_bytes(1 << 16):
                content += chunk
                if len(content) >= count:
                    break
        return bytes(content[:count]), int(size)


def find(repo: str, revision: str | None = None, progress: bool | None = None) -> Snapshot:
    """Look a repository up and download its config, tokenizer and index. Where the hub cannot be asked, what is in
    the cache is taken, as huggingface_hub does.

    Args:
        repo: "owner/name".
        revision: a branch, a tag or a commit; None means "main".
        progress: whether to draw progress bars; None draws them on a terminal only.

    Raises:
        ModelNotFound: the hub has no such model or revision, or does not show it to this account; or the repository has
            no config.json, and the message says what it has.
        AccessDenied: it is gated, or the token is not accepted.
        HubError: the hub cannot be reached, or does not answer as a hub.
        CacheError: the cache cannot be written.
    """
    revision = revision or "main"
    try:
        try:
            files = _list_files(repo, revision, 0)
        except HubError as failure:  # what is whole in the cache need not wait for a hub that is down
            cached = _cached(repo, revision, failure)
            if cached is not None and not cached.missing():
                return cached
            files = _list_files(repo, revision, _RETRIES)
    except (AccessDenied, HubError, ModelNotFound) as failure:
        cached = _cached(repo, revision, failure)
        if cached is not None:
            return cached
        if isinstance(failure, HubError):
            raise HubError(f"{repo} is not in the cache, and {failure}") from failure
        raise
    if "config.json" not in files:
        raise ModelNotFound(f"no config.json in {repo}: {describe_names(files)}")
    with explain(repo, revision):
        folder = Path(_download(repo, "config.json", revision, progress)).parent  # this one notes the commit
        for name in files:
            small = any(fnmatch(name, pattern) for pattern in _SMALL_FILES) or (name == INDEX and SINGLE not in files)
            if small:
                _download(repo, name, folder.name, progress)
    return Snapshot(repo, folder, files)


def _list_files(repo: str, revision: str, retries: int) -> tuple[str, ...]:
    """The names of a repository's files, asked for once, and `retries` times more where that may help."""
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
    except Exception:  # it is asked only to say better why there is no such model
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
        kind = response.headers.get("Content-Type", "no content type")
        raise HubError(
            f"{endpoint()} does not answer as a hub: {response.status_code} with {kind} in place of a list of files "
            "(a login page or a proxy in between?)"
        ) from None


def _cached(repo: str, revision: str, failure: GemmaRuntimeError) -> Snapshot | None:
    """What the cache has of a revision, where it has at least the config."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return Snapshot(repo, folder, tuple(path.name for path in folder.iterdir()), failure)


def _download(repo: str, name: str, revision: str, progress: bool | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    show = sys.stderr.isatty() if progress is None else progress
    return hf_hub_download(repo, name, revision=revision, tqdm_class=None if show else Hidden)
