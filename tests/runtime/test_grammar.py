"""Answers that follow a schema, a regular expression or a grammar: every mask is exactly right, whatever is drawn."""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
import tokenizers
import torch

from runtime.errors import GrammarTooComplex, InvalidArgument, InvalidArgumentType, MissingPackage
from runtime.sampling.grammar import Grammars, Matcher
from runtime.sampling.response_format import read_response_format
from runtime.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the structured extra")

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
STOPS = (1, 5)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [
    *(
        "▁",
        "\n",
        "a",
        "b",
        "c",
        "ab",
        "abc",
        "▁a",
        "1",
        "12",
        "0",
        '"',
        '":',
        '":▁',
        "{",
        '{"',
        '"a"',
        "}",
        '"}',
        "[",
        "]",
    ),
    *(",", ",▁", ',▁"', "true", "fal", "false", "null", "é", "雪", "é雪", "(", ")", "((", "))", "()", "+", "<eos"),
]
PADDING = 5  # rows of the embedding table behind the last token


def tokenizer_of(pieces: list[str], specials: list[str]) -> Tokenizer:
    vocab = {piece: token for token, piece in enumerate([*specials, *pieces])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(specials)
    return Tokenizer(backend, len(vocab) + PADDING)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte, some text, and byte tokens that spell the same as text."""
    return tokenizer_of([*BYTES, *TEXTS], SPECIALS)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, STOPS)


def begin(grammars: Grammars, response_format: Any) -> Matcher:
    checked = read_response_format(response_format)
    assert checked is not None
    return grammars.compile(checked).matcher()


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> set[int]:
    logits = torch.zeros(tokenizer.vocab_size)
    matcher.mask(logits)
    assert set(logits.tolist()) <= {0.0, -torch.inf}
    words = torch.from_numpy(matcher.words()).long()  # the same for the head to read
    assert torch.equal((words[:, None] >> torch.arange(32) & 1).flatten()[: len(logits)] > 0, logits == 0)
    return set(torch.nonzero(logits == 0).flatten().tolist())


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Its tokens, the longest first at each place."""
    by_bytes = {tokenizer.bytes_of(token): token for token in range(len(SPECIALS), tokenizer.vocab_size)}
    left, ids = text.encode(), []
    while left:
        length = next(size for size in range(len(left), 0, -1) if left[:size] in by_bytes)
        ids.append(by_bytes[left[:length]])
        left = left[length:]
    return ids


def accepts(grammars: Grammars, tokenizer: Tokenizer, response_format: Any, text: str) -> bool:
    matcher = begin(grammars, response_format)
    for token in spell(tokenizer, text):
        if token not in allowed(matcher, tokenizer):
            return False
        matcher.accept(token)
    return matcher.may_stop


def words(alphabet: str, most: int, is_word: Callable[[str], bool]) -> set[str]:
    every = ("".join(letters) for size in range(most + 1) for letters in itertools.product(alphabet, repeat=size))
    return {word for word in every if is_word(word)}


def is_balanced(word: str) -> bool:
    depth = 0
    for letter in word:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            return False
    return depth == 0


def sums(most: int) -> set[str]:
    """Sums of zeros with parentheses."""
    terms, found = {"0"}, {"0"}
    while True:
        longer = {f"{left}+{right}" for left in found for right in terms} | {f"({inner})" for inner in found}
        longer = {word for word in longer if len(word) <= most} - found
        if not longer:
            return found
        found |= longer
        terms |= {word for word in longer if word[0] == "(" and is_balanced(word[1:-1])}


COMMAS, COLONS = (",", ", "), (":", ": ")
# A format, and its texts as far as `most` bytes, found without the library.
LANGUAGES: dict[str, tuple[Any, set[str], int]] = {
    "alternatives": ({"regex": "a|ab|abcab"}, {"a", "ab", "abcab"}, 9),
    "repetition": ({"regex": "^(ab|c){1,2}$"}, {"ab", "c", "abab", "abc", "cab", "cc"}, 9),
    "endless": ({"regex": "a*b?"}, words("ab", 9, lambda w: "b" not in w[:-1]), 5),
    "characters of several bytes": ({"regex": "(é|雪){1,2}"}, {"é", "雪", "éé", "é雪", "雪é", "雪雪"}, 9),
    "not a letter": ({"regex": "[^\\x00-\\x60b-\U0010ffff]{2}"}, {"aa"}, 9),
    "a token's name is text": ({"regex": "<eos>|<0x41>"}, {"<eos>", "<0x41>"}, 9),
    "slashes and lines": ({"regex": 'a/b\n\\/"'}, {'a/b\n/"'}, 9),
    "parentheses": ({"grammar": 'start: ("(" start ")")*'}, words("()", 12, is_balanced), 4),
    "parentheses in GBNF": ({"grammar": 'root ::= ("(" root ")")*'}, words("()", 12, is_balanced), 4),
    "sums": (
        {"grammar": 'start: term ("+" term)*\nterm: ZERO | "(" start ")"\nZERO: /0/ // a <digit>'},
        sums(13),
        4,
    ),
    "booleans": ({"enum": [True, False, None, "a"]}, {"true", "false", "null", '"a"'}, 9),
    "integers": ({"type": "integer", "minimum": -1, "maximum": 12}, {str(n) for n in range(-1, 13)} | {"-0"}, 9),
    "an object": (
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"const": "c"}}, "required": ["b"]},
        {
            f"{{{first}{before}}}"
            for before in (f'"b"{colon}"c"' for colon in COLONS)
            for first in ("", *(f'"a"{colon}null{comma}' for colon in COLONS for comma in COMMAS))
        },
        99,
    ),
    "an array": (
        {"items": {"const": 1}, "type": "array", "maxItems": 3},
        {"[]", "[1]", *(f"[1{x}1]" for x in COMMAS), *(f"[1{x}1{y}1]" for x in COMMAS for y in COMMAS)},
        99,
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_mask_is_what_brute_force_finds(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    """At each place that tokens lead to: those tokens after which some text goes on, and an end where one is whole."""
    response_format, texts, most = LANGUAGES[name]
    whole = {text.encode() for text in texts}
    beginnings = {text[:size] for text in whole for size in range(len(text) + 1)}
    spelled = {token: tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)}
    ahead, seen = [(b"", begin(grammars, response_format), [])], {b""}
    while ahead:
        text, matcher, ids = ahead.pop()
        right = {
            token
            for token, piece in spelled.items()
            if token >= len(SPECIALS) and piece is not None and text + piece in beginnings
        }
        assert matcher.may_stop == (text in whole)
        assert allowed(matcher, tokenizer) == right | (set(STOPS) if text in whole else set()), text
        assert matcher.is_over == (not right)
        for token in sorted(right):
            after = text + (spelled[token] or b"")
            if after not in seen and len(after) <= most:
                seen.add(after)
                again = begin(grammars, response_format)
                for earlier in [*ids, token]:
                    again.accept(earlier)
                ahead.append((after, again, [*ids, token]))
    assert len(seen) > 2


# Values, and schemas of each kind that JSON Schema's own test suite has and the library says it enforces.
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        7,
        12,
        -1,
        100,
        0.5,
        1.5,
        -2.25,
        "",
        "a",
        "ab",
        "abc",
        "é雪",
        "a b",
        'q"\\\n',
        "1",
    ),
    *([], [1], [1, 2], [1, "a"], ["a", 1], [1, 2, 3], [None], [[1], [2]], [{"a": 1}], [{}]),
    *(
        {},
        {"a": 1},
        {"a": "x"},
        {"b": 1},
        {"a": 1, "b": 2},
        {"a": 1, "b": "x", "c": 3},
        {"a": {"a": {"a": 1}}},
        {"xa": 2},
    ),
    *("2024-02-29", "2024-13-01", "127.0.0.1", "256.0.0.1", "2023-02-30", "550e8400-e29b-41d4-a716-446655440000"),
    *({"a": 1, "kind": "a"}, {"b": "x", "kind": "b"}, {"b": "x", "kind": "a"}, {"b": 1, "kind": "b"}),
]
ANY = {"additionalProperties": True}
SCHEMAS: dict[str, Any] = {
    "anything": {},
    **{
        f"type {name}": {"type": name} for name in ("null", "boolean", "integer", "number", "string", "array", "object")
    },
    "several types": {"type": ["integer", "null", "array"]},
    "enum": {"enum": [1, "a", None, [1], {"a": 1}]},
    "const": {"const": {"a": 1, "b": 2}},
    "minimum, maximum": {"type": "number", "minimum": 0, "maximum": 3},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 12},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "minLength, maxLength": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[a-c]+$"},
    "pattern anywhere": {"type": "string", "pattern": "b"},
    "pattern without type": {"pattern": "^a"},
    "date": {"type": "string", "format": "date"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    "items": {"type": "array", "items": {"type": "integer"}},
    "no items": {"type": "array", "items": False},
    "minItems, maxItems": {"type": "array", "minItems": 1, "maxItems": 2},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    "properties": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}} | ANY,
    "required": {"type": "object", "properties": {"a": True, "b": True}, "required": ["b"]} | ANY,
    "required of any object": {"type": "object", "required": ["a"]},
    "no other properties": {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
    "other properties": {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": False,
    },
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1},
    "anyOf": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 1}, {"const": [1]}]},
    "oneOf": {
        "oneOf": [
            {"properties": {kind: {"type": of}, "kind": {"const": kind}}, "required": ["kind", kind], "type": "object"}
            | ANY
            for kind, of in (("a", "integer"), ("b", "string"))
        ]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 7}]},
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ]
    },
    "$ref": {
        "$defs": {"small": {"type": "integer", "maximum": 3}},
        "type": "array",
        "items": {"$ref": "#/$defs/small"},
    },
    "recursion": {"anyOf": [{"type": "integer"}, {"type": "object", "additionalProperties": {"$ref": "#"}}]},
    "true in a list": {"type": "array", "items": True, "minItems": 3},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_accepts_what_jsonschema_accepts(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    validator = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    verdicts = {}
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=False)
        verdicts[text] = validator.is_valid(value)
        assert accepts(grammars, tokenizer, SCHEMAS[name], text) == verdicts[text], text
    assert any(verdicts.values())


def draw(matcher: Matcher, tokenizer: Tokenizer, chance: random.Random, free: int) -> str:
    """The text of random allowed tokens, which ends soon after `free` of them."""
    ids: list[int] = []
    quote, ending = ({spell(tokenizer, text)[0] for text in texts} for texts in ('"', ("]", "}", ", ", *"012b")))
    while not matcher.is_over:
        possible = allowed(matcher, tokenizer)
        if len(ids) >= free and matcher.may_stop:
            matcher.accept(STOPS[0])
            break
        possible -= set(STOPS)
        if len(ids) >= free:
            possible = possible & quote or possible & ending or possible
        ids.append(chance.choice(sorted(possible)))
        matcher.accept(ids[-1])
        assert len(ids) < 500
    return tokenizer.decode(ids, skip_special_tokens=False)


WALKED = SCHEMAS | {
    "nested": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 'c"']}, "minItems": 2, "maxItems": 4},
            "parts": {
                "type": "array",
                "items": {"type": "object", "properties": {"at": {"type": "number"}, "id": {"format": "uuid"}}},
            },
        },
        "required": ["tags", "parts"],
    },
    "a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value", "children"],
            }
        },
        "$ref": "#/$defs/node",
    },
}


@pytest.mark.parametrize("name", WALKED)
def test_what_is_drawn_under_masks_is_valid(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    validator = jsonschema.Draft202012Validator(
        WALKED[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    texts = {draw(begin(grammars, WALKED[name]), tokenizer, random.Random(seed), free=5 * seed) for seed in range(8)}
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) > 1 or name in ("const", "type null", "no items")


ENDLESS = {
    'start: "a" start': "start",
    'root ::= "a" root': "start",
    'root ::= x\nx ::= y\ny ::= x | "a" y': "start",
    'start: b | "c"\nb: "x" b | "y" c\nc: b "z"': "b",
    'start: "x" | (a)+\na: "x" a': "a",
    'start: a{0,2} "c"\na: "x" a~0..2': None,
    'start: "x" | a~2\na: "x" a': "a",
    'start: "b" ["x" a]  // a: "b"\na: "y" a': "a",
    'start: %json {"type": "integer"} start': "start",
    'start: "a" -> one\n    | b "c"\nb: /[|]/i b\n': "b",
    'start: "a"\nb: "a" b': None,
    'start: a{0,2} "x"\na: "y" a': "a",
    'start: "[" /[(]/ ("a".."z")+ "\\"" | start': None,
    'start: %json {"const": {"b": 1}} | start "}"': None,
    '%import common.INT\n%ignore /a/\nstart: INT ("," start)?': None,
    'start: "a"i start | TEXT\nTEXT: "i"': None,
}


@pytest.mark.newest_only
@pytest.mark.parametrize("grammar", ENDLESS)
def test_a_grammar_that_never_ends_is_refused_by_the_rule(grammar: str) -> None:
    rule = ENDLESS[grammar]
    if rule is None:
        assert read_response_format({"grammar": grammar}) is not None
        return
    with pytest.raises(InvalidArgument, match=f"cannot: its rule {rule} never ends, since it must hold itself"):
        read_response_format({"grammar": grammar})


class Circle(pydantic.BaseModel):
    kind: Literal["circle"]
    radius: float = pydantic.Field(gt=0, le=100)


class Square(pydantic.BaseModel):
    kind: Literal["square"]
    side: int


class Drawing(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6, alias="title")
    shapes: list[Circle | Square] = pydantic.Field(max_length=3)
    around: Drawing | None = None


class Tagged(pydantic.BaseModel):
    shape: Circle | Square = pydantic.Field(discriminator="kind")


@pytest.mark.parametrize("model", [Circle, Drawing, Tagged])
def test_what_is_drawn_for_a_class_is_an_instance(
    grammars: Grammars, tokenizer: Tokenizer, model: type[pydantic.BaseModel]
) -> None:
    for seed in range(8):
        text = draw(begin(grammars, model), tokenizer, random.Random(seed), free=6 * seed)
        assert model.model_validate_json(text).model_dump(by_alias=True, exclude_unset=True) == json.loads(text)


def test_objects_have_the_listed_properties_and_no_others(grammars: Grammars, tokenizer: Tokenizer) -> None:
    listed = {"type": "object", "properties": {"properties": {"type": "object", "properties": {"a": {}}}}}
    assert accepts(grammars, tokenizer, listed, '{"properties": {"a": 1}}')
    assert not accepts(grammars, tokenizer, listed, '{"properties": {"b": 1}}')
    assert not accepts(grammars, tokenizer, listed, '{"a": 1}')
    assert accepts(grammars, tokenizer, {"type": "object"}, '{"a": 1}')
    assert "additionalProperties" not in listed["properties"]["properties"]  # the caller's own is not changed
    required = {"type": "object", "properties": {"a": {}}, "required": ["b"]}
    assert accepts(grammars, tokenizer, required, '{"a": 1, "b": 2}')
    # Closed one by one, they would allow no object at all.
    several = {"$ref": "#/$defs/a", "required": ["b"], "$defs": {"a": {"type": "object", "properties": {"a": {}}}}}
    assert accepts(grammars, tokenizer, several, '{"a": 1, "b": 2}')


def test_blanks_are_few(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for response_format in ({"type": "json_object"}, {"type": "object"}):
        assert accepts(grammars, tokenizer, response_format, '{"a": 1, "b":[1, 2,3]}')
        for text in (
            ' {"a": 1}',
            '{ "a": 1}',
            '{"a" : 1}',
            '{"a":  1}',
            '{"a": 1 }',
            '{"a": 1}\n',
            '{\n"a": 1}',
            '{"a":\n1}',
        ):
            assert not accepts(grammars, tokenizer, response_format, text), text


def test_forms_that_mean_the_same() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    named = {"name": "answer", "description": "an answer", "strict": True, "schema": schema}
    assert read_response_format({"type": "json_schema", "json_schema": named}) == read_response_format(schema)
    assert read_response_format({"type": "json_object"}) == read_response_format({"type": "object"})
    assert read_response_format(Circle) == read_response_format(Circle.model_json_schema())
    assert read_response_format(None) is None and read_response_format({"type": "text"}) is None


class Unwritable(pydantic.BaseModel):
    function: Callable[[], int]


class Unenforced(pydantic.BaseModel):
    distinct: set[int]


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ("json", InvalidArgumentType, "JSON schema.*got 'json'"),
    (Circle(kind="circle", radius=1), InvalidArgumentType, "got Circle"),
    (dict, InvalidArgumentType, "got the class dict"),
    (Unwritable, InvalidArgument, "got Unwritable: .*Callable"),
    (Unenforced, InvalidArgument, "cannot: .*uniqueItems"),
    ({"choice": ["a"]}, InvalidArgument, r"got the keys \['choice'\]"),
    ({"regex": "a", "type": "string"}, InvalidArgument, r"no keys but \['regex'\], got \['type'\]"),
    ({"regex": 3}, InvalidArgumentType, r'\["regex"\] must be a string, got 3'),
    ({"regex": "a("}, InvalidArgument, r"got 'a\(': unclosed group"),
    ({"regex": "(?=a)b"}, InvalidArgument, "look-ahead"),
    ({"regex": r"(a)\1"}, InvalidArgument, "backreferences"),
    ({"regex": r"[^\s\S]"}, InvalidArgument, "no text fulfils it"),
    ({"regex": ""}, InvalidArgument, "no text fulfils it"),
    ({"regex": "a\ud800"}, InvalidArgument, "surrogate pair at 1"),
    ({"grammar": "start: x"}, InvalidArgument, r'1\(8\): unknown name: "x"'),
    ({"grammar": 'start: "a"\nx: ('}, InvalidArgument, r"cannot: 2\(5\)"),
    ({"grammar": 'root ::= "a" b'}, InvalidArgument, "Rule 'b' not found"),
    ({"grammar": "start: " + "(" * 999}, InvalidArgument, "too deeply nested"),
    ({"grammar": "nonsense"}, InvalidArgument, "line 1"),
    ({"grammar": "start: <eos>"}, InvalidArgument, "names a token, <eos>"),
    ({"grammar": 'start: "<a>" <[2]> // <x>'}, InvalidArgument, r"names a token, <\[2\]>"),
    ({"type": "json_object", "schema": {}}, InvalidArgument, r"got \['schema'\]"),
    ({"type": "json_schema"}, InvalidArgument, r"must have the keys \['json_schema'\]"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, InvalidArgument, r"must have the keys \['schema'\]"),
    ({"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}, InvalidArgument, r"got \['x'\]"),
    ({"type": "json_schema", "json_schema": []}, InvalidArgumentType, r"must be a dict, got \[\]"),
    ({"type": "json_schema", "json_schema": {"schema": True}}, InvalidArgumentType, "must be a JSON schema.*got True"),
    ({"type": "markdown"}, InvalidArgument, "Invalid type: markdown"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, InvalidArgument, "minimum"),
    ({"type": "array", "contains": {}}, InvalidArgument, "contains"),
    ({"not": {}}, InvalidArgument, "not"),
    ({"enum": []}, InvalidArgument, "Unsatisfiable"),
    ({"$ref": "#/$defs/a"}, InvalidArgument, r"\$defs/a"),
    ({"$ref": "https://example.com/schema"}, InvalidArgument, "example.com"),
    ({"type": "string", "format": "colour"}, InvalidArgument, "Unknown format: colour"),
    ({"const": {1, 2}}, InvalidArgument, "not JSON: .*set"),
    ({"const": float("nan")}, InvalidArgument, "not JSON"),
    ({"const": "\ud800"}, InvalidArgument, "hex escape"),
    ({"type": "string", "x-guidance": {"lenient": True}}, InvalidArgument, "x-guidance"),
]


@pytest.mark.parametrize(("value", "error", "message"), REFUSED, ids=[repr(value)[:60] for value, *_ in REFUSED])
def test_what_cannot_be_enforced_is_refused_with_the_reason(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read_response_format(value)
    assert str(caught.value).startswith("response_format") and "\n" not in str(caught.value)


def test_a_token_that_is_not_allowed_changes_nothing(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = begin(grammars, {"regex": "ab+"})
    for token in (*STOPS, 0, 2, -1, tokenizer.vocab_size, tokenizer.vocab_size - 1, *spell(tokenizer, "b")):
        with pytest.raises(InvalidArgument, match=f"got {token}$"):
            matcher.accept(token)
    for token in spell(tokenizer, "ab"):
        matcher.accept(token)
    assert matcher.may_stop and not matcher.is_over
    matcher.accept(STOPS[1])
    assert matcher.is_over
    with pytest.raises(InvalidArgument, match="token must be one"):
        matcher.accept(STOPS[1])


def test_without_stop_tokens_an_answer_ends_where_nothing_can_follow(tokenizer: Tokenizer) -> None:
    matcher = begin(Grammars(tokenizer, ()), {"regex": "ab?"})
    matcher.accept(spell(tokenizer, "a")[0])
    assert matcher.may_stop and not matcher.is_over
    assert {tokenizer.bytes_of(token) for token in allowed(matcher, tokenizer)} == {b"b"}
    matcher.accept(spell(tokenizer, "b")[0])
    assert matcher.is_over and not allowed(matcher, tokenizer)


def test_a_grammar_beyond_the_librarys_limits_ends_the_answer(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = begin(grammars, {"regex": "(a{1,1000}){1,1000}"})
    with pytest.raises(GrammarTooComplex, match=r"simpler.*too many expressions"):
        for token in spell(tokenizer, "a" * 300):
            matcher.accept(token)


def test_a_vocabulary_that_cannot_spell_every_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"every byte, got one without 2 of them, among them b'\\x00'"):
        begin(Grammars(tokenizer_of([*BYTES[1:128], *BYTES[129:], "a"], specials=[]), ()), {"regex": "a"})


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unseen(pydantic.BaseModel):
        unseen: int

    monkeypatch.setitem(sys.modules, "llguidance", None)
    for value in ({"const": "unseen"}, {"regex": "unseen"}, {"grammar": 'start: "unseen"'}, Unseen):
        with pytest.raises(MissingPackage, match=r"gemma-runtime\[structured\]"):
            read_response_format(value)
    assert read_response_format({"type": "text"}) is None


def test_threads_share_grammars(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = [{"type": "integer"}, SCHEMAS["recursion"], WALKED["nested"], {"regex": "[a-c]{1,20}"}]

    def answers(grammars: Grammars) -> list[str]:
        return [
            draw(begin(grammars, response_format), tokenizer, random.Random(seed), free=20)
            for seed in range(3)
            for response_format in formats
        ]

    expected = answers(Grammars(tokenizer, STOPS))
    compiled = []
    from runtime.sampling import grammar

    plain = grammar.first_matcher
    monkeypatch.setattr(grammar, "first_matcher", lambda *args, **kw: compiled.append(args[1]) or plain(*args, **kw))
    shared, found = Grammars(tokenizer, STOPS), []
    threads = [threading.Thread(target=lambda: found.append(answers(shared))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert len(compiled) == len(formats) == len(set(compiled))


def test_the_grammars_used_last_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, STOPS, keep=2)
    one, two, three = (read_response_format({"regex": text}) for text in ("a", "b", "c"))
    first, second = grammars.compile(one), grammars.compile(two)
    assert grammars.compile(one) is first
    grammars.compile(three)
    assert grammars.compile(one) is first and grammars.compile(two) is not second


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> tuple[Tokenizer, Grammars]:
    tokenizer = Tokenizer.from_folder(demo_folder, 262144 + 64)
    assert tokenizer is not None
    return tokenizer, Grammars(tokenizer, (1, 106))


def test_gemmas_own_vocabulary(demo: tuple[Tokenizer, Grammars]) -> None:
    """Text as Gemma spells it; special tokens and rows without a token never, whatever the place."""
    tokenizer, grammars = demo
    nothing = {0, 1, 2, 105, 106, 255999, 262143, 262144, tokenizer.vocab_size - 1}
    assert nothing == {token for token in nothing if not tokenizer.text_of(token)[0]}
    before, after = '{"name": "Zoë 雪\\n👩‍👧 \U0001f9a9\U000e0067", "tags":["<', 'eos>", "<div>"], "at": -1.5e3}'
    matcher = begin(grammars, {"type": "object"})
    ids = tokenizer.encode(before)[1:] + tokenizer.encode(after)[1:]  # the text "<eos>", not the token
    assert any(tokenizer.text_of(token)[1] for token in ids)  # bytes in the middle of a character
    for token in ids:
        possible = allowed(matcher, tokenizer)
        assert token in possible and not possible & nothing
        matcher.accept(token)
    assert matcher.may_stop and allowed(matcher, tokenizer) == {1, 106}
    with pytest.raises(InvalidArgument):
        matcher.accept(2)


def test_a_format_between_two_texts(grammars: Grammars, tokenizer: Tokenizer) -> None:
    wanted = read_response_format({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    assert wanted is not None and read_response_format(wanted) is wanted
    for before, after in (("<call>", "</call>"), ('"\n\\', ""), ("", "!"), ("", "")):
        text = f'{before}{{"a": true}}{after}'
        matcher = grammars.compile(wanted.between(before, after)).matcher()
        for token in spell(tokenizer, text):
            assert matcher.allows(token), (before, after)
            matcher.accept(token)
        assert matcher.may_stop and matcher.is_over
