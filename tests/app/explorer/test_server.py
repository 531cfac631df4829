"""The local page's server: only its own window, with the token, is answered."""

import json
import socket
import threading
import time
from http.client import HTTPConnection

import pytest

from lens_defense.app.explorer.server import BODY_BYTES, PageServer

HOSTILE = "<script>alert(1)</script> \"quoted\" 'too' \x1b[31m \u202e $x^2$ <b>\x00"


class State:
    """A state that notes what it is asked."""

    def __init__(self):
        self.parts = {"message": "", "model": {"name": HOSTILE}}
        self.asked = []
        self.listeners = []

    def listen(self, listener):
        self.listeners.append(listener)
        for name, value in self.parts.items():
            listener(name, value)
        return lambda: self.listeners.remove(listener)

    def do(self, command, **values):
        self.asked.append((command, values))

    def done(self, ticket):
        self.change("event:done", {"ticket": ticket})

    def change(self, name, value):
        for listener in [*self.listeners]:
            listener(name, value)


@pytest.fixture
def served():
    state = State()
    server = PageServer(state)
    thread = threading.Thread(target=server.run, kwargs={"browser": False})
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                break
        time.sleep(0.05)
    yield server, state
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


def ask(server, method, path, body=None, *, host=None, origin=None, token=True):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {"Host": host or f"127.0.0.1:{server.port}"}
    if token:
        headers["X-Token"] = server.token if token is True else token
    if origin:
        headers["Origin"] = origin
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        status, text = (
            answer.status,
            "" if path == "/state" and answer.status == 200 else answer.read().decode(),
        )
        return status, text, dict(answer.getheaders())
    finally:
        connection.close()


class Window:
    """An open page: the lines that it is sent."""

    def __init__(self, server):
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"Host": f"127.0.0.1:{server.port}", "X-Token": server.token}
        self.connection.request("GET", "/state", headers=headers)
        self.answer = self.connection.getresponse()

    def line(self):
        while not (line := self.answer.readline().strip()):
            pass
        return json.loads(line)

    def until_ready(self):
        parts = {}
        while (named := self.line())[0] != "event:ready":
            parts[named[0]] = named[1]
        return parts

    def close(self):
        self.answer.close()
        self.connection.close()


def test_a_window_gets_the_parts_then_what_changes_and_its_commands_are_done(served):
    server, state = served
    window = Window(server)
    assert window.until_ready() == state.parts
    state.change("message", "hello")
    assert window.line() == ["message", "hello"]
    status, _, _ = ask(server, "POST", "/do", json.dumps({"command": "choose", "values": {"cells": []}}))
    assert status == 204 and state.asked == [("choose", {"cells": []})]
    ask(server, "POST", "/do", json.dumps({"command": "undo", "values": {}, "ticket": "a 0"}))
    assert window.line() == ["event:done", {"ticket": "a 0"}]
    window.close()


def test_a_second_window_is_refused_until_the_first_is_gone(served):
    server, _ = served
    first = Window(server)
    first.until_ready()
    second = Window(server)
    assert second.answer.status == 409 and b"another window" in second.answer.read()
    second.close()
    first.close()
    deadline = time.monotonic() + 20
    while (third := Window(server)).answer.status == 409 and time.monotonic() < deadline:
        third.close()
        time.sleep(0.2)
    assert third.answer.status == 200
    third.until_ready()
    third.close()


@pytest.mark.parametrize("path", ["/state", "/do"])
def test_nothing_is_told_or_done_without_the_token(served, path):
    server, state = served
    method = "POST" if path == "/do" else "GET"
    command = json.dumps({"command": "undo", "values": {}})
    for token in (False, "wrong", server.token[:-1]):
        status, text, _ = ask(server, method, path, command, token=token)
        assert status == 403 and "token" in text
    assert not state.asked


@pytest.mark.parametrize("path", ["/", "/explorer.js", "/state", "/do"])
def test_other_hosts_and_other_pages_are_refused(served, path):
    server, state = served
    method = "POST" if path == "/do" else "GET"
    assert ask(server, method, path, "{}", host=f"evil.example:{server.port}")[0] == 421
    assert ask(server, method, path, "{}", host="127.0.0.1:1")[0] == 421
    assert ask(server, method, path, "{}", origin="http://evil.example")[0] == 403
    assert ask(server, method, path, "{}", origin="null")[0] == 403
    assert not state.asked


def test_a_command_that_is_too_long_or_no_command_is_refused(served):
    server, state = served
    assert ask(server, "POST", "/do", "x" * (BODY_BYTES + 1))[0] == 413
    assert ask(server, "POST", "/do", "{")[0] == 400
    for body in ("[]", "1", '{"command": 3}', '{"command": "undo", "values": []}', '{"values": {}}'):
        assert ask(server, "POST", "/do", body)[0] == 204  # understood, and nothing to do
    assert not state.asked


@pytest.mark.parametrize(
    "path",
    ["/../server.py", "/..%2f..%2fserver.py", "/page/dom.js", "//etc/passwd", "/explorer.css/../local.js"],
)
def test_only_the_pages_own_files_are_served(served, path):
    server, _ = served
    assert ask(server, "GET", path)[0] in (404, 405)


def test_the_public_page_holds_nothing_and_forbids_foreign_code(served):
    server, _ = served
    status, text, headers = ask(server, "GET", "/", token=False)
    assert status == 200 and server.token not in text and "script" in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_port_that_is_taken_is_said(served):
    server, state = served
    with pytest.raises(ValueError, match=f"port {server.port} .* cannot be used"):
        PageServer(state, port=server.port)
