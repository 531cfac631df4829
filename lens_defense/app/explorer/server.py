"""The explorer as a local page: one model, one person, on 127.0.0.1.

The address holds a token that nobody else knows. The page is public, and holds nothing; what it shows and
what it asks for goes over two addresses that want the token in a header, so that no other page can use them:

    GET  /state      the parts, then each change, a line of JSON each, for as long as the page is open
    POST /do         a command

Only this machine's own names are answered (Host), only the page's own origin may ask (Origin), a command is
at most BODY_BYTES, and a second window is told that there is one.
"""

import asyncio
import json
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lens_defense.app.explorer.page_files import local_script, page_module, page_style
from lens_defense.app.explorer.page_state import EVENT, PageState, hand_over
from lens_defense.app.render import template

BODY_BYTES = 100_000
"""The longest command: a question of some thousand words, or every cell of a map."""
_QUEUED = 2_000
"""Messages that a page may lie behind; one that lies further behind is cut off, and asks for all anew."""
_PING_SECONDS = 0.5
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class PageServer:
    """Serves one explorer to one window."""

    def __init__(self, state: PageState, *, port: int = 0, title: str = "lens_defense") -> None:
        """Take a port; nothing is served before `run`.

        Args:
            state: an Explorer.
            port: of 127.0.0.1; 0 takes a free one.
            title: of the window.

        Raises:
            ValueError: the port is taken.
        """
        self.state, self.title = state, title
        self.token = secrets.token_urlsafe(24)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen()  # who comes before `run` waits
        except OSError as error:
            self._socket.close()
            raise ValueError(f"the port {port} of this machine cannot be used: {error.strerror}") from error
        self.port = int(self._socket.getsockname()[1])
        self._window: asyncio.Queue[str] | None = None
        self._in_turn = asyncio.Lock()
        self._server = uvicorn.Server(
            uvicorn.Config(self.application(), log_level="warning", access_log=False, lifespan="off")
        )
        self._server.config.timeout_graceful_shutdown = 1

    @property
    def address(self) -> str:
        """What the browser opens; the token stands behind the #, which no browser sends anywhere."""
        return f"http://127.0.0.1:{self.port}/#{self.token}"

    def run(self, *, browser: bool = True) -> None:
        """Serve until Ctrl-C."""
        if browser:
            webbrowser.open(self.address)
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.should_exit = True

    def application(self) -> Starlette:
        """The application, without a server: for a test, or another server."""
        files: dict[str, tuple[str, Callable[[], str]]] = {
            "/explorer.js": ("text/javascript", page_module),
            "/explorer.css": ("text/css", page_style),
            "/local.js": ("text/javascript", local_script),
        }
        routes = [
            Route("/", self._page),
            Route("/state", self._state),
            Route("/do", self._do, methods=["POST"]),
        ]
        for path, (kind, read) in files.items():
            routes.append(Route(path, self._file(kind, read)))
        return Starlette(routes=routes)

    def _refusal(self, request: HttpRequest, *, token: bool = True) -> Response | None:
        """Why a request is not answered, if it is not."""
        hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")}
        if request.headers.get("host") not in hosts:
            return _plain("this page is served to this machine alone", 421)
        origin = request.headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            return _plain("another page may not ask here", 403)
        given = request.headers.get("x-token", "")
        if token and not secrets.compare_digest(given.encode(), self.token.encode()):
            return _plain("the token is missing: open the address that the command printed", 403)
        return None

    async def _page(self, request: HttpRequest) -> Response:
        page = template("local_page.html.j2").render(title=self.title)
        return self._refusal(request, token=False) or HTMLResponse(page, headers=_HEADERS)

    def _file(self, kind: str, read: Callable[[], str]) -> Callable[[HttpRequest], Any]:
        async def send(request: HttpRequest) -> Response:
            return self._refusal(request, token=False) or Response(read(), media_type=kind, headers=_HEADERS)

        return send

    async def _state(self, request: HttpRequest) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if self._window is not None:
            return _plain("another window shows this model already; close it, and load this one again", 409)
        self._window = window = asyncio.Queue(_QUEUED)
        return StreamingResponse(self._changes(window), media_type="application/x-ndjson", headers=_HEADERS)

    async def _changes(self, window: "asyncio.Queue[str]") -> AsyncIterator[str]:
        loop, behind = asyncio.get_running_loop(), asyncio.Event()

        def put(line: str) -> None:
            try:
                window.put_nowait(line)
            except asyncio.QueueFull:
                behind.set()

        def follow(name: str, value: Any) -> None:
            loop.call_soon_threadsafe(put, _line(name, value))

        unfollow = self.state.listen(follow)
        follow(f"{EVENT}ready", {})
        try:
            while not (behind.is_set() or self._server.should_exit):
                try:
                    yield await asyncio.wait_for(window.get(), _PING_SECONDS)
                except TimeoutError:
                    yield "\n"  # a window that is gone is noticed when it is written to
        finally:
            unfollow()
            self._window = None

    async def _do(self, request: HttpRequest) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                return _plain(f"a command has at most {BODY_BYTES} bytes", 413)
        try:
            message = json.loads(body)
        except ValueError:
            return _plain("a command is JSON", 400)
        async with self._in_turn:
            await asyncio.to_thread(hand_over, self.state, message)
        return Response(status_code=204, headers=_HEADERS)


def _line(name: str, value: Any) -> str:
    return json.dumps([name, value], separators=(",", ":"), allow_nan=False) + "\n"


def _plain(sentence: str, status: int) -> Response:
    return PlainTextResponse(sentence, status, headers=_HEADERS)
