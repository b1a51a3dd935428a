"""A report as one self-contained HTML page: plots, tables, and the machine."""

from __future__ import annotations

from runtime.bench.plots import figures
from runtime.bench.records import Report
from runtime.bench.table import in_flight_table, kernel_table, machine, notes, row_table


def page(report: Report) -> str:
    """The page; it has no scripts, fonts or external requests."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tables = []
    if report.rows:
        tables.append(row_table(report))
    if report.kernels:
        tables.append(kernel_table(report))
    if report.in_flight:
        tables.append(in_flight_table(report))
    return environment.from_string(_TEMPLATE).render(
        report=report,
        machine=machine(report.environment),
        figures=list(figures(report)),
        tables=tables,
        notes=notes(report),
        json=report.to_json(),
    )


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gemma-runtime bench {{ report.command }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0; }
.quiet { color: #5b6675; font-size: .87rem; }
.warning { color: #9a3412; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #e3e7ec; }
th { background: #f4f6f8; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
summary { cursor: pointer; margin-top: 2rem; }
pre { overflow-x: auto; font-size: .75rem; background: #f4f6f8; padding: .8rem; }
</style>
</head>
<body>
<h1>gemma-runtime bench {{ report.command }}</h1>
<p class="quiet">{{ report.time }}</p>
{% for line in machine %}
<p class="quiet">{{ line }}</p>
{% endfor %}
{% for heading, lines in tables %}
<div class="scroll"><table>
<tr>{% for cell in heading %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in lines %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for note in notes %}
<p class="{{ 'warning' if note.startswith('warning') or 'refused' in note else 'quiet' }}">{{ note }}</p>
{% endfor %}
{% for title, caption, svg in figures %}
<h2>{{ title }}</h2>
<p class="quiet">{{ caption }}</p>
{{ svg | safe }}
{% endfor %}
<details><summary>The report as JSON, raw samples included</summary><pre>{{ json }}</pre></details>
</body>
</html>
"""
