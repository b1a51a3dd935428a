"""A chat template that does not end, or makes something giant, is refused in seconds and in bounded memory."""

from __future__ import annotations

import resource
import time

import pytest

from runtime.errors import InvalidArgument
from runtime.text import template_limits
from runtime.text.chat_template import render

USER = {"role": "user", "content": "ab"}
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(999) %%}{%% set ns.x = %s %%}{%% endfor %%}"
NEST = "{%% set ns = namespace(x=[1]) %%}{%% for i in range(60) %%}{%% set ns.x = [ns.x, ns.x] %%}{%% endfor %%}%s"
ENDLESS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops that only skip": "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}"
    "{% endfor %}",
    "macros without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "macros that branch": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "recursive loops": "{% for x in [0] recursive %}{{ loop([0]) }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times, turned round": "{{ 10**10 * 'a' }}",
    "list times": "{{ [0] * 10**10 }}",
    "power": "{{ 10 ** (10**10) }}",
    "factorial": GROW % ("2", "ns.x * ns.x"),
    "doubling by +": GROW % ("'a'", "ns.x + ns.x"),
    "doubling by ~": GROW % ("'a'", "ns.x ~ ns.x"),
    "doubling by blocks": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling by join": GROW % ("'ab'", "[ns.x, ns.x] | join"),
    "doubling by method": GROW % ("'ab'", "ns.x.join([ns.x, ns.x])"),
    "doubling by format": GROW % ("'ab'", "'%s%s' % (ns.x, ns.x)"),
    "doubling by str.format": GROW % ("'ab'", "'{0}{0}'.format(ns.x)"),
    "doubling lists": GROW % ("[0]", "ns.x + ns.x"),
    "nested lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [('a' * 9999) ~ i] %}{% endfor %}",
    "slices kept": "{% set s = 'a' * 10**7 %}{% set ns = namespace(x=[]) %}{% for i in range(999) %}"
    "{% set ns.x = ns.x + [s[1:]] %}{% endfor %}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "replace of nothing": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "replace by filter": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "join by filter": "{{ range(99999) | join('b' * 10**6) }}",
    "width": "{{ '%010000000000d' % 1 }}",
    "width by argument": "{{ '%*d' % (10**10, 1) }}",
    "width by format": "{{ '{:>10000000000}'.format(1) }}",
    "width by format's argument": "{{ '{:>{}}'.format(1, 10**10) }}",
    "width by filter": "{{ '%010000000000d' | format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center in the source": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "tabs": "{{ '\t'.expandtabs(10**10) }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10**10) }}",
    "batch": "{{ 'ab' | batch(10**10, 'x') | list }}",
    "by map": "{{ ['a'] | map('center', 10**10) | list }}",
    "format's pattern": "{{ '%(a)s' * 10**5 % {'a': 'b' * 10**6} }}",
    "format's pattern, of text": "{{ ('{0}' * 10**5).format('b' * 10**6) }}",
    "format's pattern, by filter": "{{ ('%(a)s' * 10**5) | format(a='b' * 10**6) }}",
    "indent by text": "{{ ('a\n' * 10**5) | indent('b' * 10**6) }}",
    "wordwrap": "{{ ('a ' * 10**5) | wordwrap(1, wrapstring='b' * 10**6) }}",
    "a sum of lists": "{{ ([[0] * 10**6] * 10**5) | sum(start=[]) }}",
    "lists in lists": NEST % "{{ ns.x }}",
    "lists in lists, by ~": NEST % "{% set s = ns.x ~ 1 %}",
    "lists in lists, as JSON": NEST % "{{ ns.x | tojson }}",
    "lists in lists, by filter": NEST % "{% set s = ns.x | string %}",
    "lists in lists, by map": NEST % "{% set s = [ns.x] | map('string') | list %}",
    "lists in lists, joined": NEST % "{{ ns.x | join }}",
    "lists in lists, by format": NEST % "{% set s = '%s' % ns.x %}",
    "much output": "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "lipsum": "{{ lipsum(10**7) }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a long template": "a" * 10**7,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_has_limits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(InvalidArgument, match="the chat template refuses") as caught:
        render(ENDLESS[kind], [USER], {})
    assert "\n" not in str(caught.value)
    assert time.thread_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20  # KiB
    render("{{ messages[0].content }}", [USER], {})
