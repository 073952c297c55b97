"""The chat page and the files that it loads, all of them from this server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_STATIC = Path(__file__).with_name("static")
PAGE = _STATIC / "chat.html"
_KINDS = {".js": "text/javascript", ".css": "text/css"}
ASSETS = {
    f"/static/{file.name}": file
    for file in (
        _STATIC / "chat.css",
        _STATIC / "chat.js",
        _STATIC / "vendor" / "marked.umd.js",
        _STATIC / "vendor" / "purify.min.js",
    )
}
"""The page's files by the path they are asked for with."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: this server's own files run, nothing inline, nothing else.

Answers of the API cannot be loaded as a script: they are JSON, and sent with `nosniff`.
"""


def router() -> APIRouter:
    """Routes for the page and its files, read once."""
    routes = APIRouter()
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
    page_headers = headers | {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"}

    @routes.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    for path, file in ASSETS.items():
        routes.add_api_route(path, _serving(file, headers), methods=["GET"])
    return routes


def _serving(file: Path, headers: dict[str, str]) -> Callable[[], Awaitable[Response]]:
    content, kind = file.read_bytes(), _KINDS[file.suffix]

    async def asset() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return asset
