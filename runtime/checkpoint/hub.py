"""A model repository on the hub: its small files are downloaded first, its weights once those have been checked."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from runtime.checkpoint.files import read_json
from runtime.checkpoint.folder_contents import describe_names
from runtime.checkpoint.hub_failure import explain
from runtime.checkpoint.hub_requests import RETRIES, download, list_files, read_header
from runtime.errors import AccessDenied, GemmaRuntimeError, HubError, InvalidArgument, ModelNotFound

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w][\w.+=-]*(/[\w][\w.+=-]*)*")
_SMALL_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja",),
)


def parse(name: str) -> tuple[str, str | None] | None:
    """Split "owner/name" or "owner/name@revision" into repository and revision; None for any other name.

    Raises:
        ValueError: the text after the @ cannot be a branch, a tag or a commit.
    """
    repo, at, revision = name.partition("@")
    if not _NAME.fullmatch(repo):
        return None
    return repo, check_revision(revision) if at else None


def check_revision(revision: str) -> str:
    """The revision itself.

    Raises:
        ValueError: it cannot be the name of a branch or a tag, or a commit.
    """
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidArgument(f"a revision must be the name of a branch or a tag, or a commit, got {revision!r}")
    return revision


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository. Its small files are in `folder`; its weights are once they are fetched.

    Args:
        repo: "owner/name".
        folder: in huggingface_hub's cache, named after the commit.
        files: the hub's list, or the cache's if the hub cannot be reached.
        failure: why the hub cannot be reached, None if it can.
    """

    repo: str
    folder: Path
    files: tuple[str, ...]
    failure: GemmaRuntimeError | None = None

    def missing(self) -> list[str]:
        """The weight files that are not in the cache yet.

        Raises:
            ModelNotFound: the repository has no weights; the message says what it has.
            CheckpointError: the index cannot be read.
        """
        if SINGLE in self.files:
            names = [SINGLE]
        elif INDEX in self.files:
            shards = read_json(self.folder / INDEX).get("weight_map")
            # Checkpoint reports shards that the index lists and the repository lacks.
            listed = set(map(str, shards.values())) if isinstance(shards, dict) else set()
            names = sorted(listed if self.failure else listed.intersection(self.files))
        elif self.failure:
            names = [SINGLE]
        else:
            raise ModelNotFound(f"no {SINGLE} or {INDEX} in {self.repo}: {describe_names(self.files)}")
        return [name for name in names if not (self.folder / name).exists()]

    @contextmanager
    def headers(self) -> Iterator[Path]:
        """A folder with the headers of all tensors: `folder`, or while weights are missing a temporary one of sparse
        files, without data. Errors raised inside the context name the repository instead of that folder.

        Raises:
            HubError, AccessDenied: the hub does not give the missing headers.
            CheckpointError: as `missing`; a file is not safetensors.
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
                    header, size = read_header(self.repo, name, self.folder.name)
                    with (folder / name).open("wb") as file:
                        file.write(header)
                        file.truncate(size)
            try:
                yield folder
            except GemmaRuntimeError as error:
                raise type(error)(str(error).replace(f"{root}/", "")) from error

    def fetch(self, progress: bool | None = None) -> Path:
        """Download the missing weights.

        Args:
            progress: whether to draw progress bars; None draws them on a terminal only.

        Returns:
            The folder, complete.

        Raises:
            as `headers`; CacheError: the cache cannot be written.
        """
        for name in self._fetchable():
            with explain(self.repo, self.folder.name):
                download(self.repo, name, self.folder.name, progress)
        return self.folder

    def _fetchable(self) -> list[str]:
        missing = self.missing()
        if missing and self.failure:
            raise type(self.failure)(f"{', '.join(missing)} of {self.repo} is not in the cache, and {self.failure}")
        return missing


def find(repo: str, revision: str | None = None, progress: bool | None = None) -> Snapshot:
    """Look a repository up and download its config, tokenizer and index. If the hub cannot be reached, the cached
    files are used, as huggingface_hub does.

    Args:
        repo: "owner/name".
        revision: a branch, a tag or a commit; None means "main".
        progress: whether to draw progress bars; None draws them on a terminal only.

    Raises:
        ModelNotFound: the hub has no such model or revision, or hides it from this account; or the repository has no
            config.json (the message says what it has).
        AccessDenied: the repository is gated, or the token is not accepted.
        HubError: the hub cannot be reached, or does not answer as a hub.
        CacheError: the cache cannot be written.
    """
    revision = revision or "main"
    try:
        try:
            files = list_files(repo, revision, 0)
        except HubError as failure:  # a complete cached copy need not wait for a hub that is down
            cached = _cached(repo, revision, failure)
            if cached is not None and not cached.missing():
                return cached
            files = list_files(repo, revision, RETRIES)
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
        folder = Path(download(repo, "config.json", revision, progress)).parent  # records the commit
        for name in files:
            small = any(fnmatch(name, pattern) for pattern in _SMALL_FILES) or (name == INDEX and SINGLE not in files)
            if small:
                download(repo, name, folder.name, progress)
    return Snapshot(repo, folder, files)


def _cached(repo: str, revision: str, failure: GemmaRuntimeError) -> Snapshot | None:
    """The cached files of a revision, if at least its config is cached."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return Snapshot(repo, folder, tuple(path.name for path in folder.iterdir()), failure)
