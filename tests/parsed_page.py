"""An HTML page, parsed, with what every page of this project must be."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

VOID = {"meta", "br", "circle", "path", "line", "rect"}  # of those that pages use; SVG's are written with a slash
ALLOWED = VOID | {
    "html", "head", "title", "style", "body", "header", "main", "h1", "h2", "h3", "p", "ul", "li", "div", "span", "i",
    "a", "strong", "bdi", "mark", "pre", "details", "summary", "table", "caption", "thead", "tbody", "tfoot", "tr",
    "th", "td", "svg", "g", "text",
}  # fmt: skip
NASTY = (
    "<script>alert(1)</script>", "</style></pre></details>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}",
    "&amp;&lt;", "a\nb\r\nc\td", "🙂‍🔥", "שלום <b> \u202e gnp.exe", "nul \x00 and half \ud83d", "x" * 3000, "",
)  # fmt: skip


class ParsedPage(HTMLParser):
    """The tags of a page in order, its headings, and its text.

    Raises:
        AssertionError: it is not what every page must be.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        html.encode()
        assert html.lower().startswith("<!doctype html>") and not self._open
        assert "url(" not in html.split("</style>")[0] and "@import" not in html.split("</style>")[0]
        self._check()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, (tag, self._open)

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"h1", "h2", "h3"} & set(self._open):
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data

    def _check(self) -> None:
        assert {tag for tag, _ in self.tags} <= ALLOWED
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        levels = [level for level, _ in self.headings]
        assert levels.count(1) == 1 and levels[0] == 1
        assert all(below <= above + 1 for above, below in pairwise(levels)), levels
        for tag, attributes in self.tags:
            assert not any(name.startswith("on") or name in ("src", "action", "xlink:href") for name in attributes)
            if "href" in attributes:
                assert attributes["href"].removeprefix("#") in ids
            if tag == "th":
                assert attributes.get("scope") in ("col", "row", "rowgroup"), attributes
            if tag == "svg":
                assert attributes.get("aria-hidden") == "true" or (
                    attributes["role"],
                    bool(attributes["aria-label"]),
                ) == (
                    "img",
                    True,
                )
            if attributes.get("class") == "scroll":
                assert attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]

    def all(self, tag: str, name: str | None = None) -> list[dict[str, Any]]:
        """The attributes of each such tag, or of those of a class."""
        found = [attributes for other, attributes in self.tags if other == tag]
        return [each for each in found if name is None or name in each.get("class", "").split()]
