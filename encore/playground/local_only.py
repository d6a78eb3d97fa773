"""What guards a page that is served to this machine alone, around any ASGI application."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost")
# Nothing is loaded from elsewhere or sent there, whatever the text in the page says. gradio's scripts are in its page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
REFUSED = b"encore: this page is for http://127.0.0.1 and http://localhost on this machine\n"


class LocalOnly:
    """Answers only who calls the page by a name of this machine, and whose own page has such a name.

    Else a stranger's site, whose name a server of names can turn into 127.0.0.1, could use it from the browser.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif _is_local(scope["headers"]):
            await self.app(scope, receive, _with_policy(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(REFUSED))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSED})


def _is_local(headers: list[tuple[bytes, bytes]]) -> bool:
    """The Host, and the Origin where there is one; each counts, should there be several."""
    hosts = [b"http://" + value for name, value in headers if name == b"host"]
    origins = [value for name, value in headers if name == b"origin"]
    return bool(hosts) and all(_hostname(address) in HOSTS for address in hosts + origins)


def _hostname(address: bytes) -> str | None:
    try:
        return urlsplit(address.decode("latin-1")).hostname
    except ValueError:
        return None


def _with_policy(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def send_with_policy(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
        await send(message)

    return send_with_policy
