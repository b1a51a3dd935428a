"""What a caller may ask of an answer's text: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidArgument, InvalidArgumentType, one_line
from runtime.sampling.json_schema import KEYWORDS, close_objects, has_one_of, is_endless, reworded
from runtime.sampling.lark_rules import QUOTED, endless_rule
from runtime.sampling.library import allowed_bits, error_of, first_matcher, library
from runtime.sampling.schema_limits import check_limits

_FORMS = (
    'a JSON schema, a pydantic class, {"regex": ...}, {"grammar": ...}, {"type": "json_object"}, '
    '{"type": "json_schema", "json_schema": {"schema": ...}} or None'
)
_SPELLING = {
    # Blanks: at most one after each comma and colon, and no others. Small models like to write them for ever.
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
    # No \u: with it a name has other spellings, which the library would take for other names.
    "json_allowed_escapes": 'nrbtf\\"',
}
_TOKEN_NAME = re.compile(r"<[^>\n]*>")


@dataclass(frozen=True)
class ResponseFormat:
    """The format that an answer's text must have, checked without a model.

    Args:
        lark: the format as a grammar in the library's Lark.
    """

    lark: str

    def between(self, before: str, after: str) -> ResponseFormat:
        """The same between two texts, which answers then begin and end with."""
        start = " ".join(filter(None, (before and json.dumps(before), "inner", after and json.dumps(after))))
        lark = f"start: {start}\n{self.lark.replace('start:', 'inner:', 1)}"
        return _checked("response_format must be a grammar that can be enforced, got one that cannot", lark)


def read_response_format(value: Any) -> ResponseFormat | None:
    """Check what a caller asks of an answer's text; no model is needed.

    Args:
        value: a pydantic class, a JSON schema, {"regex": text}, {"grammar": text} in the library's Lark or in GBNF, or
            what OpenAI's API takes: {"type": "text"}, {"type": "json_object"} and {"type": "json_schema",
            "json_schema": {"schema": ...}}; or a format that was read before. None is any text.

    Returns:
        The format, equal for equal values; None for any text.

    Raises:
        InvalidArgumentType: it is of another type.
        InvalidArgument: it has unknown keys, or cannot be enforced: the message has the reason.
        MissingPackage: the package that enforces it is not installed.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if inspect.isclass(value):
        return _of_class(value)
    if not isinstance(value, Mapping):
        raise InvalidArgumentType(f"response_format must be {_FORMS}, got {_shown(value)}")
    kind = value.get("type")
    if kind == "text":
        _check_keys("response_format", value, {"type"})
        return None
    if kind == "json_object":
        _check_keys("response_format", value, {"type"})
        return _of_schema("response_format", {"type": "object"})
    if kind == "json_schema":
        _check_keys("response_format", value, {"type", "json_schema"}, {"json_schema"})
        name, inner = 'response_format["json_schema"]', value["json_schema"]
        if not isinstance(inner, Mapping):
            raise InvalidArgumentType(f"{name} must be a dict, got {_shown(inner)}")
        _check_keys(name, inner, {"description", "name", "schema", "strict"}, {"schema"})
        return _of_schema(f'{name}["schema"]', inner["schema"])
    for key, read in (("regex", _of_regex), ("grammar", _of_grammar)):
        if key in value:
            _check_keys("response_format", value, {key})
            name = f'response_format["{key}"]'
            return read(name, _text(name, value[key]))
    if value and not value.keys() & KEYWORDS:
        raise InvalidArgument(f"response_format must be {_FORMS}, got the keys {_shown(list(value))}")
    return _of_schema("response_format", value)


def _of_class(value: type) -> ResponseFormat:
    import pydantic

    if not issubclass(value, pydantic.BaseModel):
        raise InvalidArgumentType(f"response_format must be {_FORMS}, got the class {value.__name__}")
    try:
        schema = value.model_json_schema()
    except (pydantic.errors.PydanticUserError, NameError) as error:  # a field has no schema, or an undefined type
        raise InvalidArgument(
            f"response_format must be a class with a JSON schema, got {value.__name__}: {one_line(error)}"
        ) from error
    return _of_schema("response_format", schema)


def _of_schema(name: str, schema: Any) -> ResponseFormat:
    if not isinstance(schema, Mapping):
        raise InvalidArgumentType(f"{name} must be a JSON schema, a dict, got {_shown(schema)}")
    if "x-guidance" in schema:
        raise InvalidArgument(f"{name} must be a JSON schema, got the unknown key 'x-guidance'")
    try:
        copy = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} must be a JSON schema, got what is not JSON: {one_line(error)}") from error
    what = f"{name} must be a JSON schema that can be enforced, got one that cannot"
    try:
        return _enforced(copy, what)
    except RecursionError as error:  # the library bears less than Python, but is asked last
        raise InvalidArgument(f"{what}: {one_line(error)}") from error


def _enforced(schema: dict[str, Any], what: str) -> ResponseFormat:
    check_limits(schema, what)
    if has_one_of(schema):
        _checked(what, _lark(schema))  # as given: closing objects could hide that options overlap
    close_objects(schema)
    checked = _checked(what, _lark(schema))
    if is_endless(schema):
        raise InvalidArgument(f"{what}: no text fulfils it, since values must hold values of the same schema for ever")
    return checked


def _lark(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps(reworded(schema) | {'x-guidance': _SPELLING})}"


def _of_regex(name: str, regex: str) -> ResponseFormat:
    lark = f"start: /{library().regex_to_lark(regex, '')}/"
    return _checked(f"{name} must be a regular expression that can be enforced, got {_shown(regex)}", lark)


def _of_grammar(name: str, grammar: str) -> ResponseFormat:
    what = f"{name} must be a grammar in Lark or GBNF that can be enforced, got one that cannot"
    try:
        lark = library().grammar_from("grammar", grammar)  # translates GBNF
    except ValueError as error:
        raise InvalidArgument(f"{what}: {one_line(error)}") from error
    if found := _TOKEN_NAME.search(QUOTED.sub("", lark)):
        raise InvalidArgument(f"{what}: it names a token, {found.group()}, and answers are text")
    checked = _checked(what, lark, has_places=lark == grammar)
    if rule := endless_rule(lark):
        raise InvalidArgument(f"{what}: its rule {rule} never ends, since it must hold itself for ever")
    return checked


@functools.lru_cache(64)
def _checked(what: str, lark: str, has_places: bool = False) -> ResponseFormat:
    """The format, if the library accepts it and some non-empty text fulfils it."""
    tokenizer = _byte_tokenizer()
    matcher = first_matcher(tokenizer, lark, what, has_places=has_places)
    may_begin = allowed_bits(matcher, tokenizer.vocab_size)[: 256 // 8].any()  # the first tokens are the bytes
    if (reason := error_of(matcher)) and "NoExtension" not in reason:
        raise InvalidArgument(f"{what}: {reason}")
    if not may_begin:
        raise InvalidArgument(f"{what}: no text fulfils it, or only an empty one")
    return ResponseFormat(lark)


@functools.cache
def _byte_tokenizer() -> Any:
    return library().LLTokenizer("byte")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentType(f"{name} must be a string, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{name} must be valid Unicode, got half of a surrogate pair at {error.start}") from None
    return value


def _check_keys(name: str, value: Mapping[Any, Any], known: Collection[str], required: Collection[str] = ()) -> None:
    if unknown := [key for key in value if key not in known]:
        raise InvalidArgument(f"{name} must have no keys but {sorted(known)}, got {_shown(unknown)}")
    if missing := [key for key in required if key not in value]:
        raise InvalidArgument(f"{name} must have the keys {missing}, got {_shown(list(value))}")


def _shown(value: Any) -> str:
    """A value for a message, not too long."""
    shown = one_line(repr(value))
    return shown if len(shown) <= 120 else f"{shown[:120]}..."
