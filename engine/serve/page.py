"""The page at `/`, and the policy under which a browser runs only what is in it."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

_PAGE = Path(__file__).parent / "page.html"


def page_answer() -> HTMLResponse:
    """Returns the page, which a browser asks for again each time."""
    html = _PAGE.read_text(encoding="utf-8")
    return HTMLResponse(
        html,
        headers={
            "Cache-Control": "no-cache",
            "Content-Security-Policy": content_security_policy(html),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def content_security_policy(html: str) -> str:
    """Returns a policy that allows a page its own `<script>` and `<style>`, and its own server.

    Everything else is refused: other hosts, frames around it, and scripts that get into it.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(html: str, element: str) -> str:
    bodies = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
