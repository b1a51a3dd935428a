"""Answers any number of prompts into a file; a later call resumes where an interrupted one stopped."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runtime.checkpoint.progress import progress_bar
from runtime.engine.engine import Engine
from runtime.engine.options import Options, check_names
from runtime.engine.prompt import Encoded, Prompt
from runtime.engine.request import check_speculation, read_prompt, read_raw_request
from runtime.engine.stream import Stream
from runtime.errors import ENDS_ONE_ANSWER, InvalidArgument, OutputError, one_line
from runtime.model.model import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BEGINNING = b'{"index": '  # of every line
AHEAD = 2  # prompts submitted for each row, so that a row never waits for the next one


def generate_many(
    model: Model,
    prompts: Iterable[Prompt | Encoded],
    out: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> int:
    """Answers prompts into a file of JSON lines, each written once its answer and those before it are complete.

    A line holds "index", the prompt's place from 0 on, and either the fields of its GenerationResult or "error": where
    the prompt cannot be run, which is written at once, and where its answer cannot go on, since its logits overflow or
    its grammar is beyond the library's limits. Prompts whose index is already in the file are not run again, so
    repeating an interrupted call completes it.

    Args:
        model: a loaded model.
        prompts: texts, ids or encodings, each as `runtime.generate` takes one; an iterator is read as rows come free.
        out: the file, created if there is none, else appended to.
        progress: whether to draw a progress bar on stderr; None draws one on a terminal only.
        options: as in `runtime.generate`, for every prompt, except `n`: each gets one answer.

    Returns:
        How many lines were written.

    Raises:
        ValueError, TypeError: the options cannot be run, or the file is not one of `generate_many` or holds another
            prompt's answer.
        OutputError: the file cannot be written.
        ModelClosed: the model has been closed.
    """
    check_names(options, Options.__annotations__)
    check_speculation(model, read_raw_request([0], **options))
    if "\0" in os.fspath(out):
        raise InvalidArgument(f"out: expected the path of a file, got {out!r}")
    engine, path = Engine(model), Path(out)
    total = len(prompts) if isinstance(prompts, Sized) else None
    written, under_way = 0, deque[tuple[int, Stream]]()
    try:
        done = _answered(path)
        with path.open("a", encoding="utf-8") as file, progress_bar("answers", total, progress, unit="answer") as bar:
            try:
                for index, prompt in enumerate(prompts):
                    if index in done:
                        _check_same(model, path, index, prompt, done[index])
                        bar.update()
                        continue
                    try:
                        under_way.append((index, engine.submit(prompt, **options)))
                    except (ValueError, TypeError) as error:
                        written += _write(file, bar, {"index": index, "error": one_line(error)})
                    if len(under_way) > AHEAD * model.runtime.max_batch:
                        written += _write(file, bar, _finished(*under_way.popleft()))
                while under_way:
                    written += _write(file, bar, _finished(*under_way.popleft()))
            finally:
                for _, stream in under_way:
                    stream.close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return written


def _finished(index: int, stream: Stream) -> dict[str, Any]:
    """Waits for an answer. Those after it go on meanwhile."""
    try:
        for _ in stream:
            pass
    except ENDS_ONE_ANSWER as error:
        return {"index": index, "error": one_line(error)}
    return {"index": index, **stream.results[0].to_dict()}


def _write(file: TextIO, bar: Any, record: dict[str, Any]) -> int:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    bar.update()
    return 1


def _answered(path: Path) -> dict[int, Any]:
    """The prompt of each answer that a file holds, by index; an error's is None. A last line that was cut short is
    removed, once all others are known to be answers."""
    if not path.is_file():  # none, or a pipe, which holds nothing of before
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    found: dict[int, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found[int(record["index"])] = record.get("prompt_token_ids")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _no_answer(path, number, line) from None
    if rest:
        if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise _no_answer(path, len(lines) + 1, rest)
        os.truncate(path, path.stat().st_size - len(rest))
    return found


def _no_answer(path: Path, number: int, line: bytes) -> InvalidArgument:
    return InvalidArgument(
        f"out: line {number} of {path} is no answer of generate_many: {line[:60].decode(errors='replace')}"
    )


def _check_same(model: Model, path: Path, index: int, prompt: Any, ids: Any) -> None:
    if ids is not None and read_prompt(model, prompt) != ids:
        raise InvalidArgument(f"out: {path} holds the answer to another prompt under index {index}")
