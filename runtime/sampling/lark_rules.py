"""Finds rules of a Lark grammar whose texts never end, since they must hold themselves for ever; the library accepts
them.

    start: "a" start            never ends
    start: "a" start | "b"      ends
    start: "a" again | "b"      ends, but not after an "a"
    again: "a" again

Terminals always end, since none may hold a rule. Only rules are parsed here, and only as far as this check needs; what
is not understood is assumed to end, so that no usable grammar is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Strings, regular expressions and comments.
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[imslux]*|(?://|#)[^\n]*')
_HEAD = re.compile(r"^[ \t]*[?!]*([a-zA-Z_][\w-]*)(?:\[[^\]]*\])?(?:\.\d+)?\s*:", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*%\w+[^\n]*", re.MULTILINE)
_SYMBOL = re.compile(r"[a-zA-Z_][\w-]*|->\s*\w+|\{[\d,\s]*\}|~\s*\d+(?:\s*\.\.\s*\d+)?|\.\.|[()\[\]|?*+]|\S")
_NONE = re.compile(r"[?*]|\{\s*0?\s*,|\{\s*0\s*\}|~\s*0")  # quantifiers that allow nothing there
_ANYTHING = "TERMINAL"  # its name is in capitals, as those of terminals are

Options = list[list["str | Options"]]  # every part of one has to end: rules by name, or options in parentheses


class _NotUnderstood(Exception):
    pass


def endless_rule(lark: str) -> str | None:
    """A rule that a text can reach and that never ends; None if there is none.

    Args:
        lark: what the library accepts.
    """
    try:
        rules = dict(_rules(_without_objects(QUOTED.sub(_in_place_of, lark))))
    except (_NotUnderstood, RecursionError):
        return None
    ending: set[str] = set()

    def ends(options: Options) -> bool:
        return any(
            all(ends(part) if isinstance(part, list) else part not in rules or part in ending for part in option)
            for option in options
        )

    while more := {name for name, options in rules.items() if name not in ending and ends(options)}:
        ending |= more
    reached = ["start"]
    for name in reached:  # grows meanwhile
        if name in rules:
            if name not in ending:
                return name
            reached += [part for part in _names(rules[name]) if part not in reached]
    return None


def _names(options: Options) -> Iterator[str]:
    for option in options:
        for part in option:
            yield from [part] if isinstance(part, str) else _names(part)


def _in_place_of(quoted: re.Match[str]) -> str:
    return "" if quoted[0].startswith(("//", "#")) else f" {_ANYTHING} "


def _without_objects(text: str) -> str:
    """The same with a terminal for each %json and %regex, and no other line that begins with %."""
    while found := re.search(r"%(json|regex|llguidance)\s*\{", text):
        depth, end = 1, found.end()
        while depth:
            if end == len(text):
                raise _NotUnderstood
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: found.start()] + f" {_ANYTHING if found[1] != 'llguidance' else ''} " + text[end:]
    return _DIRECTIVE.sub("", text)


def _rules(text: str) -> Iterator[tuple[str, Options]]:
    """The rules by name. Definitions of terminals are left out."""
    heads = [*_HEAD.finditer(text)]
    if heads and text[: heads[0].start()].strip():
        raise _NotUnderstood
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        if not head[1].isupper():
            symbols = _SYMBOL.findall(text[head.end() : following.start() if following else None])
            yield head[1], _options(iter(symbols), "")


def _options(symbols: Iterator[str], close: str) -> Options:
    """What comes up to a closing parenthesis, or to the end."""
    options: Options = [[]]
    for symbol in symbols:
        if symbol == close:
            return options
        last = options[-1]
        if symbol == "|":
            options.append([])
        elif symbol == "(":
            last.append(_options(symbols, ")"))
        elif symbol == "[":
            last.append([*_options(symbols, "]"), []])
        elif re.match(r"[a-zA-Z_]", symbol):
            last.append(symbol)
        elif re.match(r"[?*+{]|~\s*\d", symbol) and last:
            if _NONE.match(symbol):
                last[-1] = [[last[-1]], []]
        elif symbol != ".." and not symbol.startswith("->"):
            raise _NotUnderstood
    if close:
        raise _NotUnderstood
    return options
