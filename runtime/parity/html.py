"""The report as one self-contained HTML page: the verdict, the margins, and the texts side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from runtime.parity.criterion import largest_gap
from runtime.parity.records import PromptRecord
from runtime.parity.report import MARKS, Report, base_rate, nearer
from runtime.text.tokenizer import Tokenizer

WIDTH, HEIGHT, FOOT = 900, 220, 36
LOWEST, HIGHEST, BINS_PER_DECADE = -5, 2, 5  # decades of the histogram's margins


class ShownToken(NamedTuple):
    """One token as shown: its text, and a note where it differs."""

    text: str
    note: str


class Bar(NamedTuple):
    """One bar of the histogram, in the drawing's units; `differing` is the share of its height whose tokens differ."""

    x: float
    height: float
    differing: float
    label: str


def page(report: Report, tokenizer: Tokenizer | None) -> str:
    """The page; without a tokenizer, tokens are shown as ids."""
    import jinja2

    def text(token: int) -> str:
        return f"{token} " if tokenizer is None else tokenizer.piece(token)

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        report=report,
        rows=_rows(report),
        rates=base_rate(report),
        nearer=nearer(report.prompts),
        bars=_bars(report.prompts),
        ticks=[(_x(decade), f"1e{decade}") for decade in range(LOWEST, HIGHEST + 1)],
        limit=_x(math.log10(largest_gap(report.prompts) or 10**LOWEST)),
        prompts=[(record, _prompt(record, text), *_answers(record, text)) for record in report.prompts],
        width=WIDTH,
        height=HEIGHT,
        foot=FOOT,
    )


def _rows(report: Report) -> list[tuple[str, str, str, str]]:
    rows = [(MARKS[f.passed], f.part, f.measured, f.bound) for f in report.findings]
    rows += [(MARKS[check.passed], check.name, check.detail, "one set of tokens") for check in report.checks]
    return rows + [(MARKS[f.refused], f"planted: {f.name}", f.detail, "refused") for f in report.faults]


def _answers(
    record: PromptRecord, text: Callable[[int], str]
) -> tuple[list[ShownToken], list[ShownToken], list[ShownToken]]:
    """Our tokens free-running, Hugging Face's, and ours teacher-forced on Hugging Face's."""
    notes = {
        d.step: f"step {d.step}: ours {text(d.ours)!r}, Hugging Face's {text(d.theirs)!r}; fp64 logits "
        f"{d.true_pair[0]:.5f} and {d.true_pair[1]:.5f}, gap {d.gap:.3g}: {d.nearer} is nearer"
        for d in record.divergences
    }
    split = len(record.ours) if record.parts_at is None else record.parts_at
    ours = [
        ShownToken(text(token), notes.get(step, "") if step == split else "after the first divergence" * (step > split))
        for step, token in enumerate(record.ours)
    ]
    theirs = [ShownToken(text(token), notes.get(step, "")) for step, token in enumerate(record.theirs)]
    forced = [ShownToken(text(token), notes.get(step, "")) for step, token in enumerate(record.forced)]
    return ours, theirs, forced


def _prompt(record: PromptRecord, text: Callable[[int], str], most: int = 60) -> str:
    ids = record.prompt_ids
    return ("… " if len(ids) > most else "") + "".join(text(token) for token in ids[-most:])


def _bars(records: Sequence[PromptRecord]) -> list[Bar]:
    """The histogram of fp64 margins over all steps, and in each bin how many steps diverge."""
    count = (HIGHEST - LOWEST) * BINS_PER_DECADE
    steps, differing = [0] * count, [0] * count
    for record in records:
        diverging = {divergence.step for divergence in record.divergences}
        for step, margin in enumerate(record.margins):
            decade = math.log10(margin) if margin > 0 else LOWEST
            index = min(max(int((decade - LOWEST) * BINS_PER_DECADE), 0), count - 1)
            steps[index] += 1
            differing[index] += step in diverging
    scale = (HEIGHT - 20) / max(1, *steps)
    return [
        Bar(
            _x(LOWEST + index / BINS_PER_DECADE),
            steps[index] * scale,
            differing[index] * scale,
            f"margin {10 ** (LOWEST + index / BINS_PER_DECADE):.2g} to "
            f"{10 ** (LOWEST + (index + 1) / BINS_PER_DECADE):.2g}: {steps[index]} steps, {differing[index]} differ",
        )
        for index in range(count)
    ]


def _x(decade: float) -> float:
    return WIDTH * (min(max(decade, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)


_TEMPLATE: Any = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Parity audit: {{ report.environment.model }}, {{ report.environment.dtype }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1d2330 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .25em .7em .25em 0; border-bottom: 1px solid #e3e6ec }
.verdict { padding: .7em 1em; border-radius: 6px; background: #e2f3e6 } .bad { background: #fbe0dd }
.ok { color: #1a7f37 } .REFUSED { color: #b3261e; font-weight: 600 }
.sides { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; background: #f6f7f9;
  padding: .6em; margin: .3em 0 }
mark { background: #ffd54d } .after { color: #8a90a0; background: none }
details { margin: .4em 0 } summary { cursor: pointer } h2 { margin-top: 1.8em; font-size: 1.15em }
svg text { font: 12px system-ui, sans-serif; fill: #555c6b } code { font-size: 12px }
</style>
</head>
<body>
<h1>Parity audit of {{ report.environment.model }}</h1>
<p class="verdict {{ '' if report.passed else 'bad' }}">{{ report.verdict }}</p>

<h2>What was compared</h2>
<table>
{% for name, value in report.environment.items() %}
<tr><th>{{ name }}</th><td><code>{{ value }}</code></td></tr>
{% endfor %}
</table>

<h2>The criterion</h2>
<table>
<tr><th></th><th>question</th><th>measured</th><th>bound</th></tr>
{% for mark, name, measured, bound in rows %}
<tr><td class="{{ mark }}">{{ mark }}</td><td>{{ name }}</td><td>{{ measured }}</td><td>{{ bound }}</td></tr>
{% endfor %}
</table>
<p>{{ nearer }}</p>

{% if rates %}
<h2>Hugging Face against itself</h2>
<table>
<tr><th>against its first run</th><th>prompts that differ</th><th>largest fp64 gap there</th></tr>
{% for name, count, total, gap in rates %}
<tr><td>{{ name }}</td><td>{{ count }} of {{ total }}</td><td>{{ "%.3g" % gap }}</td></tr>
{% endfor %}
</table>
{% endif %}

<h2>Margins</h2>
<p>The margin between the top two tokens in fp64, over all steps; <mark>yellow</mark>: steps where tokens differ. Left
of the line a margin is within twice Hugging Face's own largest error.</p>
<svg viewBox="0 0 {{ width }} {{ height + foot }}" role="img" aria-label="Histogram of margins">
{% for bar in bars %}
<g><title>{{ bar.label }}</title>
<rect x="{{ bar.x + 1 }}" y="{{ height - bar.height }}" width="{{ width / bars|length - 2 }}" height="{{ bar.height }}"
 fill="#7c93c3"/>
<rect x="{{ bar.x + 1 }}" y="{{ height - bar.differing }}" width="{{ width / bars|length - 2 }}"
 height="{{ bar.differing }}" fill="#ffb300"/></g>
{% endfor %}
<line x1="0" x2="{{ width }}" y1="{{ height }}" y2="{{ height }}" stroke="#555c6b"/>
<line x1="{{ limit }}" x2="{{ limit }}" y1="0" y2="{{ height }}" stroke="#b3261e" stroke-dasharray="4 3"/>
{% for x, label in ticks %}
<text x="{{ x }}" y="{{ height + 16 }}" text-anchor="{{ 'start' if loop.first else 'end' if loop.last else 'middle' }}">
{{- label }}</text>
{% endfor %}
<text x="{{ width / 2 }}" y="{{ height + 32 }}" text-anchor="middle">margin in fp64 (logits)</text>
</svg>

<h2>Prompts</h2>
{% for record, prompt, ours, theirs, forced in prompts %}
<details {{ '' if record.exact and not record.divergences else 'open' }}>
<summary>{{ record.name }} ({{ record.prompt_ids|length }} tokens):
{% if record.exact %}{{ record.ours|length }} tokens equal{% else %}differs from step {{ record.parts_at }}{% endif %}
{% if record.divergences %}; {{ record.divergences|length }} steps differ after the same text{% endif %}</summary>
<pre>{{ prompt }}</pre>
<div class="sides">
{% for title, pieces in (
  ("this runtime", ours), ("Hugging Face", theirs), ("this runtime, teacher-forced on Hugging Face's text", forced)) %}
<div>{{ title }}
<pre>{% for piece in pieces %}
{%- if piece.note.startswith("step") %}<mark title="{{ piece.note }}">{{ piece.text }}</mark>
{%- elif piece.note %}<span class="after">{{ piece.text }}</span>{% else %}{{ piece.text }}{% endif %}
{%- endfor %}</pre></div>
{% endfor %}
</div>
{% for d in record.divergences %}
<p>Step {{ d.step }}: fp64 logits {{ "%.5f" % d.true_pair[0] }} (ours) and {{ "%.5f" % d.true_pair[1] }}, gap
{{ "%.3g" % d.gap }}; {{ d.nearer }} is nearer to fp64.</p>
{% endfor %}
</details>
{% endfor %}
</body>
</html>
"""
