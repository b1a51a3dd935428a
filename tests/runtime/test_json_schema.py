"""Each keyword of JSON Schema: enforced, or refused by name."""

from __future__ import annotations

import datetime
import json
import random
import socket
import time
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

from runtime.errors import InvalidArgument
from runtime.sampling.grammar import Grammars
from runtime.sampling.response_format import read_response_format
from runtime.text.tokenizer import Tokenizer

from .test_grammar import BYTES, SPECIALS, STOPS, accepts, begin, draw, tokenizer_of

pytest.importorskip("llguidance", reason="needs the structured extra")

DRAFT_4 = {"$schema": "http://json-schema.org/draft-04/schema#"}
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
OBJECT = {"type": "object"}
OPEN = {"type": "object", "additionalProperties": True}
CLOSED = {"type": "object", "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(BYTES, SPECIALS)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, STOPS)


# A schema, texts of it, and texts of JSON that are not of it.
ENFORCED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "$ref to $defs": ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, ["null"], ["1", "[]"]),
    "$ref to definitions": (
        DRAFT_7 | {"items": {"$ref": "#/definitions/n"}, "type": "array", "definitions": {"n": {"enum": [4, 6]}}},
        ["[]", "[4,6]"],
        ["[5]", "4"],
    ),
    "$ref with escapes": (
        {"prefixItems": [{"$ref": "#/$defs/a~1b%25~0"}], "type": "array", "$defs": {"a/b%~": {"const": "here"}}},
        ['["here"]', '["here",8]'],
        ['["there"]'],
    ),
    "$ref to an $anchor": (
        {"$defs": {"a": {"$anchor": "sea", "maximum": 2, "type": "integer"}}, "$ref": "#sea"},
        ["2", "-40"],
        ["3"],
    ),
    "$ref beside others": (
        {"$defs": {"low": {"type": "integer", "maximum": 5}}, "$ref": "#/$defs/low", "minimum": 4},
        ["4", "5"],
        ["3", "6"],
    ),
    "$ref by $id": (
        {
            "$id": "https://example.com/a",
            "type": "array",
            "items": {"$ref": "b"},
            "$defs": {"b": {"$id": "b", "type": "boolean"}},
        },
        ["[true,false]"],
        ["[1]"],
    ),
    "names of properties that are keywords": (
        OBJECT | {"properties": {"enum": {"type": "integer"}, "$ref": {"type": "string"}, "not": {"const": 1}}},
        ['{"enum":3,"$ref":"a","not":1}'],
        ['{"enum":"3"}', '{"$ref":1}', '{"not":2}'],
    ),
    "type": ({"type": ["boolean", "string"]}, ["true", '"true"'], ["1", "null", "[true]"]),
    "const": ({"const": {"x": [1, None, "é"]}}, ['{"x":[1,null,"é"]}'], ['{"x":[1,null]}', '{"x":[1,null,"e"]}', "{}"]),
    "const that looks like false": ({"const": False}, ["false"], ["0", '""', "null", "[]"]),
    "enum": (
        {"enum": ["red", 12, [True], None]},
        ['"red"', "12", "[true]", "null"],
        ['"re"', "1", "[]", "[1]", "true"],
    ),
    "enum beside type": ({"type": "string", "enum": ["1", 1]}, ['"1"'], ["1"]),
    "minimum, maximum": ({"type": "number", "minimum": -1.5, "maximum": 20}, ["-1.5", "0", "19.99"], ["-1.6", "20.01"]),
    "exclusive bounds": (
        {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 20},
        ["-1.4", "0", "19.99"],
        ["-1.5", "20", "20.0", "21"],
    ),
    # One bound is exclusive, and the other less than 1 beyond it.
    "above 0, to 0.5": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0", "0.6"]),
    "above 7, below 7.5": (
        {"type": "number", "exclusiveMinimum": 7, "exclusiveMaximum": 7.5},
        ["7.1", "7.49"],
        ["7", "7.0", "7.5"],
    ),
    "below -2, from -2.25": (
        {"type": "number", "exclusiveMaximum": -2, "minimum": -2.25},
        ["-2.1", "-2.25"],
        ["-2", "-2.3"],
    ),
    "below 0, from -0.5": ({"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, ["-0.5"], ["0", "-0", "-0.6"]),
    "above 0 and to 0.5 in two": (
        {"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}]},
        ["0.25"],
        ["0", "0.75"],
    ),
    "above 0 and from 0.25": (
        {"type": "number", "exclusiveMinimum": 0, "minimum": 0.25, "maximum": 0.5},
        ["0.25", "0.4"],
        ["0", "0.1"],
    ),
    "exclusive bounds of draft 4": (
        DRAFT_4 | {"type": "number", "minimum": 3, "exclusiveMinimum": True, "maximum": 3.5, "exclusiveMaximum": False},
        ["3.1", "3.5"],
        ["3", "3.6"],
    ),
    "bounds of integers": (
        {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 5},
        ["3", "4"],
        ["2", "5", "3.5"],
    ),
    "the greatest int64": (
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        ["0", "9007199254740993", "9223372036854775806", "9223372036854775807"],
        ["-1", "9223372036854775808", "9223372036854775809", "10000000000000000000"],
    ),
    "the largest bounds": (
        {"type": "integer", "minimum": 2**53 - 3, "exclusiveMaximum": 2**53 - 1},
        ["9007199254740989", "9007199254740990"],
        ["9007199254740988", "9007199254740991"],
    ),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["0", "-14", "700"], ["1", "-15", "701"]),
    "multipleOf, decimal": ({"type": "number", "multipleOf": 0.05}, ["1.35", "2.00"], ["1.36", "0.01"]),
    "two multipleOf": (
        {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]},
        ["12", "24"],
        ["4", "6", "8"],
    ),
    "lengths are characters": (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"雪é"', '"\\n\\"a"'],
        ['"雪"', '"abcd"'],
    ),
    "pattern": ({"type": "string", "pattern": "^x[0-9]{2}"}, ['"x12"', '"x12 and more"'], ['"x1"', '"ax12"']),
    "pattern beside lengths": ({"type": "string", "pattern": "b", "maxLength": 2}, ['"b"', '"ab"'], ['"a"', '"aab"']),
    # A pattern that names characters that strings are written without.
    "pattern without control characters": ({"type": "string", "pattern": r"^[^\x00-\x1f]*$"}, ['"a b"'], ['"a\\tb"']),
    "pattern with a bell or a bar": ({"type": "string", "pattern": r"^a(\x07|\|)b$"}, ['"a|b"'], ['"ab"']),
    "date": (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2000-02-29"', '"1999-12-31"'],
        ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"', '"2024-04-31"', '"2024-4-30"'],
    ),
    "date beside pattern": (
        {"type": "string", "format": "date", "pattern": "^20.*9$"},
        ['"2024-02-29"'],
        ['"2023-02-29"', '"2024-02-28"', '"1996-02-29"'],
    ),
    "date-time": (
        {"format": "date-time", "type": "string"},
        ['"2024-02-29T23:59:59Z"', '"2023-01-31T00:00:00.25-05:30"'],
        ['"2023-02-29T10:00:00Z"', '"2024-02-29T10:00:00"', '"2024-02-29T10:61:00Z"', '"0000-02-01T10:00:00Z"'],
    ),
    "time": ({"format": "time", "type": "string"}, ['"10:20:30Z"'], ['"10:20"', '"25:00:00Z"', '"10:20:61Z"']),
    "format beside null": (
        {"type": ["string", "null"], "format": "ipv4"},
        ["null", '"10.0.0.1"'],
        ['"10.0.0.300"', "1"],
    ),
    "items": ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1, 2]"], ['["1"]', "[1,null]"]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"const": "a"}, {"type": "null"}], "items": {"type": "integer"}},
        ["[]", '["a"]', '["a",null,3]'],
        ['["b"]', '["a",3]', '["a",null,"3"]'],
    ),
    "additionalItems": (
        DRAFT_7 | {"type": "array", "items": [{"type": "string"}], "additionalItems": False},
        ["[]", '["a"]'],
        ['["a","b"]', "[1]"],
    ),
    "additionalItems after a schema to combine with": (
        DRAFT_7 | {"type": "array", "items": [{}], "anyOf": [{"maxItems": 4}], "additionalItems": {"type": "integer"}},
        ['["a",1]'],
        ['["a","b"]', "[1,1,1,1,1]"],
    ),
    "minItems, maxItems": ({"type": "array", "minItems": 1, "maxItems": 2}, ["[1]", "[1,[]]"], ["[]", "[1,2,3]"]),
    "required": (
        CLOSED | {"properties": {"a": {}, "b": {}}, "required": ["b"]},
        ['{"b":1}', '{"a":1,"b":2}'],
        ['{"a":1}'],
    ),
    "a property that is false": (OPEN | {"properties": {"a": False}}, ["{}", '{"b":1}'], ['{"a":1}']),
    "additionalProperties": (
        OBJECT | {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ['{"a":null,"b":1}', '{"b":1}'],
        ['{"a":1}', '{"b":null}'],
    ),
    "names in other spellings": (
        OPEN | {"properties": {"a": {"type": "null"}, "é": False}, "patternProperties": {"^x": {"type": "integer"}}},
        ['{"a":null,"x1":2,"y":"3"}'],
        ['{"\\u0061":1}', '{"\\u00e9":1}', '{"\\u0078":"2"}', '{"x":"2"}'],
    ),
    "patternProperties": (
        CLOSED | {"properties": {"n1": {"minimum": 5}}, "patternProperties": {"^n": {"type": "integer"}}},
        ['{"n1":5}', '{"n2":1,"n3":2}'],
        ['{"n1":4}', '{"n1":5.5}', '{"n2":"a"}', '{"m":1}'],
    ),
    "patternProperties, a schema to combine with, additionalProperties": (
        OBJECT | {"patternProperties": {"^n": {}}, "anyOf": [{"maxProperties": 1}], "additionalProperties": False},
        ["{}", '{"n":1}'],
        ['{"m":1}', '{"n":1,"n2":1}'],
    ),
    "minProperties": (OBJECT | {"minProperties": 1}, ['{"a":1}'], ["{}"]),
    "minProperties beside required": (
        OPEN | {"properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 3},
        ['{"a":1,"b":1,"c":1}'],
        ['{"a":1,"b":1}'],
    ),
    "maxProperties": (OBJECT | {"maxProperties": 1}, ["{}", '{"a":1}'], ['{"a":1,"b":1}']),
    "allOf": ({"allOf": [{"type": "string"}, {"minLength": 1}, {"maxLength": 1}]}, ['"a"'], ['""', '"ab"', "1"]),
    "anyOf": ({"anyOf": [{"const": 1}, {"type": "string", "maxLength": 1}]}, ["1", '"a"'], ["2", '"ab"']),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ['"a"', "1"], ["null", "1.5"]),
    "oneOf of objects": (
        {"oneOf": [CLOSED | {"properties": {"k": {"const": kind}}, "required": ["k"]} for kind in ("cat", "dog")]},
        ['{"k":"cat"}', '{"k":"dog"}'],
        ["{}", '{"k":"cow"}'],
    ),
    "what other drafts have is nothing": (DRAFT_7 | {"type": "array", "prefixItems": [False]}, ["[1]"], ["1"]),
    "annotations": ({"title": "a", "default": 1, "examples": [2], "readOnly": True, "type": "null"}, ["null"], ["1"]),
    "a tree": (
        OBJECT | {"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}, "required": ["a"]},
        ['{"a":[]}', '{"a":[{"a":[]},{"a":[]}]}'],
        ["{}", '{"a":[1]}', '{"a":[{}]}'],
    ),
}


@pytest.mark.parametrize("name", ENFORCED)
def test_what_is_enforced(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    schema, right, wrong = ENFORCED[name]
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    as_asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    for texts, is_right in ((right, True), (wrong, False)):
        for text in texts:
            assert accepts(grammars, tokenizer, as_asked, text) == is_right, text
            if not name.startswith(("date", "time")):  # without another package jsonschema lets those pass
                assert validator.is_valid(json.loads(text)) == is_right, text


# Texts of a schema that are left out (docs/usage.md).
LIMITS: dict[str, tuple[Any, str]] = {
    "others beside listed properties": (OBJECT | {"properties": {"a": {}}}, '{"b":1}'),
    "another order": (CLOSED | {"properties": {"a": {}, "b": {}}}, '{"b":1,"a":1}'),
    "an integer with a point": ({"type": "integer"}, "1.0"),
    "an exponent between bounds": ({"type": "number", "minimum": 0}, "1e2"),
    "fewer digits than multipleOf": ({"type": "number", "multipleOf": 0.25}, "1.5"),
    "letters as escapes": ({"type": "string"}, '"\\u0061"'),
    "control characters": ({"type": "string"}, '"\\u0001"'),
    "a leap second": ({"type": "string", "format": "time"}, '"23:59:60Z"'),
    "a host name that encodes another": ({"type": "string", "format": "hostname"}, '"xn--ls8h.la"'),
    "what stands beside $ref, in draft 7": (
        DRAFT_7 | {"definitions": {"a": {"type": "integer"}}, "allOf": [{"$ref": "#/definitions/a", "maximum": 1}]},
        "2",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_left_out(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    schema, text = LIMITS[name]
    assert not accepts(grammars, tokenizer, schema, text)
    jsonschema.validate(json.loads(text), schema)


NODE = OBJECT | {"properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({keyword: {}}, keyword) for keyword in ("contains", "dependencies", "dependentRequired", "dependentSchemas")),
    *(({keyword: {}}, keyword) for keyword in ("if", "then", "else", "not", "propertyNames")),
    *(({keyword: False}, keyword) for keyword in ("unevaluatedItems", "unevaluatedProperties", "uniqueItems")),
    *(({keyword: 1}, keyword) for keyword in ("maxContains", "minContains")),
    ({"$dynamicRef": "#a"}, "dynamicRef"),
    # Numbers that no double is, or that the library takes for another.
    ({"const": 2**53}, r"numbers of const .* got 9007199254740992$"),
    ({"maximum": 2**63 - 1}, r"numbers of maximum .* got 9223372036854775807$"),
    ({"type": "integer", "minimum": -(2**63)}, r"numbers of minimum .* got -9223372036854775808$"),
    ({"type": "integer", "maximum": 2**64 - 1}, r"numbers of maximum .* got 18446744073709551615$"),
    ({"const": -(2**63)}, "numbers of const"),
    ({"enum": [0, {"a": [2**64]}]}, "numbers of enum .* got 18446744073709551616$"),
    ({"type": "integer", "minimum": -(2**63)}, "numbers of minimum"),
    ({"type": "number", "maximum": 0.1 + 0.2}, r"numbers of maximum .* at most 15 digits .* got 0\.30000000000000004$"),
    ({"type": "integer", "exclusiveMaximum": 1e20}, "numbers of exclusiveMaximum"),
    # Machines with too many states.
    ({"type": "integer", "multipleOf": 10_007}, "multipleOf, .* at most 10,000 units of the last digit, got 10007$"),
    ({"type": "number", "multipleOf": 12.3456}, "got 12.3456$"),
    ({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}, "got 9973 and 9967$"),
    ({"allOf": [{"type": "number", "multipleOf": 1}, {"multipleOf": 1e-7}]}, "got 1 and 1e-07$"),
    ({"allOf": [{"multipleOf": n} for n in range(1, 2000)]}, "got 1 and 2 and 3$"),
    ({"type": "integer", "multipleOf": 0}, "multiple"),
    # What repeats is one property.
    (OBJECT | {"minProperties": 2}, "minProperties must be at most one more than the 0 required properties, got 2$"),
    (OPEN | {"required": ["a", "a"], "minProperties": 3}, "than the 1 required properties, got 3$"),
    # Options that hold at once unless objects are closed.
    ({"oneOf": [OBJECT | {"properties": {"a": {}}, "required": ["a"]}, OBJECT | {"properties": {"b": {}}}]}, "oneOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "options of a oneOf may hold at once, which anyOf allows"),
    # Strings that would lose a character.
    ({"const": "a\x01b"}, r"strings of const must have no control characters .* got 'a\\x01b'$"),
    ({"enum": ["a", ["\x7f"]]}, "strings of enum"),
    (OBJECT | {"patternProperties": {"^\x0b$": {}}}, "patternProperties must name no control characters"),
    (OBJECT | {"patternProperties": {r"^\u001F$": {}}}, "patternProperties must name no control characters"),
    ({"type": "string", "pattern": r"^\a$"}, "Unsatisfiable"),
    # Values that hold others for ever.
    ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, "for ever"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "for ever"),
    ({"type": "array", "prefixItems": [{"anyOf": [NODE, NODE]}], "minItems": 1, "$defs": {"node": NODE}}, "for ever"),
    ({"allOf": [OBJECT | {"required": ["a"], "additionalProperties": {"$ref": "#"}}]}, "for ever"),
    # Contradictions.
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "exclusiveMaximum"),
    ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "no integer"),
    ({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 3}, "multiple of 3"),
    (CLOSED | {"required": ["a"]}, "required property 'a'"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "incompatible"),
    ({"type": "string", "const": 1}, "incompatible"),
    ({"type": []}, "Unsatisfiable"),
    ({"anyOf": [False]}, "false"),
    # Patterns with more than a regular language.
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    ({"type": "string", "pattern": r"\bword\b"}, "lookaround"),
    ({"type": "string", "pattern": "a^b"}, "lookaround"),
    ({"type": "string", "pattern": "a("}, "unclosed"),
    # Not schemas.
    ({"type": "integer", "minimum": "1"}, "minimum"),
    ({"type": "string", "maxLength": -1}, "maxLength"),
    ({"type": "string", "pattern": 1}, "pattern"),
    (OBJECT | {"properties": ["a"], "required": ["a"]}, "properties"),
    (OBJECT | {"properties": {}, "required": [{}]}, "required"),
    (OBJECT | {"properties": {(1, 2): {}}}, "not JSON"),
    ({"items": "string", "type": "array"}, "schema must be"),
    ({"$ref": 1}, "ref must be"),
    ({"$ref": "#/$defs/a/0", "$defs": {"a": []}}, "does not exist"),
    ({"$ref": "#", "type": "null"}, "circular"),
    ({"oneOf": [1, {"$ref": "#/oneOf/7"}], "discriminator": {"propertyName": 2}}, "schema must be"),
    ({"$schema": "https://example.com/of-my-own", "type": "null"}, "example.com"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=[repr(schema)[:60] for schema, _ in REFUSED])
def test_what_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_response_format(schema)
    assert str(caught.value).startswith("response_format must be a JSON schema") and "\n" not in str(caught.value)


def nest(levels: int, inner: dict[str, Any]) -> dict[str, Any]:
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


def chain(length: int) -> dict[str, Any]:
    links = {str(n): {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{n + 1}"}]} for n in range(length)}
    return {"$ref": "#/$defs/0", "$defs": links | {str(length): {"type": "null"}}}


ABSURD: dict[str, tuple[dict[str, Any], str | None]] = {
    "60 deep": (nest(60, {}), None),
    "500 deep": (nest(500, {}), "recursion limit"),
    "990 deep": (nest(990, {}), "recursion"),
    "50,000 deep": (nest(50_000, {}), "recursion"),
    "300 references in a chain": (chain(300), None),
    "5,000 references in a chain": (chain(5_000), "where a .ref is 3 schemas deep, at most 333 may be different"),
    "an enum of 2,000": ({"enum": [f"value {n}" for n in range(2000)]}, None),
    "an enum of 100,000": ({"enum": [f"value {n}" for n in range(100_000)]}, "too big"),
    "an enum of none": ({"enum": []}, "Unsatisfiable"),
    "names that are numbers": ({"type": "object", "properties": {1: {}}, "required": ["1"]}, None),
    "very many items": ({"type": "array", "minItems": 1_000_000_000}, None),
    "very many characters": ({"type": "string", "maxLength": 10**30}, "maxLength"),
    "shared twice 40 times": (
        {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(n): {"type": "array", "prefixItems": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)},
                "40": {"type": "null"},
            },
        },
        None,
    ),
    "multiplied out": (
        {"allOf": [{"anyOf": [{"minimum": 10 * n + m} for m in range(9)]} for n in range(9)]},
        "too large",
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_schemas_are_read_or_refused_soon(name: str) -> None:
    schema, message = ABSURD[name]
    began = time.process_time()
    if message is None:
        assert read_response_format(schema) is not None
    else:
        with pytest.raises(InvalidArgument, match=message) as caught:
            read_response_format(schema)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - began < 10


def test_a_reference_reads_no_file_and_opens_no_connection(tmp_path: Path) -> None:
    file = tmp_path / "null.json"
    file.write_text('{"type": "null"}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for elsewhere in (file.as_uri(), str(file), f"http://127.0.0.1:{port}/a.json"):
            for schema in (
                {"$ref": elsewhere},
                {"type": "array", "items": {"$ref": elsewhere}},
                {"$schema": elsewhere, "type": "null"},
                {"$id": elsewhere, "items": {"$ref": "other.json"}, "type": "array"},
            ):
                with pytest.raises(InvalidArgument, match="does not fetch"):
                    read_response_format(schema)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_schema_is_not_changed() -> None:
    schema = {
        "oneOf": [{"$ref": "#/$defs/a"}, {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {"a": OBJECT | {"properties": {"kind": {"const": "a"}, "at": {"format": "date"}}}},
    }
    before = json.dumps(schema)
    assert read_response_format(schema) is not None
    assert json.dumps(schema) == before


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    born: datetime.date
    weight: float = pydantic.Field(gt=0, le=0.5)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    age: int | None = None


class Owner(pydantic.BaseModel):
    pet: Cat | Dog = pydantic.Field(discriminator="kind")


def test_what_is_drawn_for_a_class_passes_its_checks(grammars: Grammars, tokenizer: Tokenizer) -> None:
    kinds = set()
    for seed in range(24):
        owner = Owner.model_validate_json(draw(begin(grammars, Owner), tokenizer, random.Random(seed), free=2 * seed))
        kinds.add(owner.pet.kind)
    assert kinds == {"cat", "dog"}


def test_a_class_that_holds_itself_for_ever_is_refused() -> None:
    class Link(pydantic.BaseModel):
        after: Link

    class End(pydantic.BaseModel):
        after: End | None

    Link.model_rebuild(_types_namespace={"Link": Link})
    End.model_rebuild(_types_namespace={"End": End})
    with pytest.raises(InvalidArgument, match="for ever"):
        read_response_format(Link)
    assert read_response_format(End) is not None
