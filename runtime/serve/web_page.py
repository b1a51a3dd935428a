"""The page at `/`: the inspector in a browser. Its files are read once, and it talks to this server alone."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from runtime.page import frame

_WEB = Path(__file__).parent / "web"
_FILES = {
    "/": _WEB / "index.html",
    "/style.css": frame.HERE / "style.css",  # shared with the report pages
    **{f"/{file.name}": file for file in sorted(_WEB.iterdir()) if file.suffix in (".css", ".js")},
}
PATHS = tuple(_FILES)  # they hold nothing of the model, and need no key
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_SOURCES = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{kind} {source}" for kind, source in _SOURCES.items()),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # another version may be served next
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_web_page(app: FastAPI) -> None:
    """Adds the page's paths to an application, but not to its schema."""
    for path, file in _FILES.items():
        _add(app, path, file.read_bytes(), _TYPES[file.suffix])


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)
