"""A JupyterLab and a headless Chromium, each with folders of its own; without a Chromium, not run."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 90


@pytest.fixture
def browser(tmp_path):
    """A window of 1400 x 1500 pixels."""
    with a_window(tmp_path) as driver:
        yield driver


@contextmanager
def a_window(folder):
    """A browser's window whose profile lies in a folder."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium and driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-quic", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder / 'chromium'}")
    options.add_argument("--window-size=1400,1500")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab."""

    url: str
    folder: Path
    runtime: Path

    def write(self, name: str, *cells: str) -> str:
        """A notebook of these cells; the address that opens it."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(notebook, self.folder / name)
        return f"{self.url}/lab/tree/{name}?reset"

    def kernel(self) -> BlockingKernelClient:
        """A second client of the one kernel that the browser started."""
        kernels = within(lambda: json.loads(get(f"{self.url}/api/kernels")))
        client = BlockingKernelClient()
        client.load_connection_file(self.runtime / f"kernel-{kernels[0]['id']}.json")
        client.start_channels()
        return client


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port of this machine, without a token: it sees its own folder alone."""
    tmp_path = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, runtime = tmp_path / "work", tmp_path / "runtime"
    folder.mkdir()
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    quiet = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # a notice would lie over the page
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ServerApp.port_retries=0",
            ),
            *(f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}"),
            *("--IdentityProvider.token=", "--ServerApp.allow_remote_access=False"),
            *("--LabApp.news_url=", "--expose-app-in-browser"),
        ],
        env={**os.environ, **folders},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    lab = Lab(f"http://127.0.0.1:{port}", folder, runtime)
    try:
        within(lambda: get(f"{lab.url}/api/status"))
        yield lab
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def get(url):
    """The body of an answer."""
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def within(poll, seconds=SECONDS):
    """What a function returns, as soon as it returns something true."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if value := poll():
                return value
        except Exception as error:
            last = error
        time.sleep(0.3)
    raise TimeoutError(f"not within {seconds} s") from last


def ask(client, expression):
    """The value of an expression in the kernel, as JSON; it waits for what the kernel is doing."""
    expressions = {"value": f"__import__('json').dumps({expression})"}
    message_id = client.execute("", user_expressions=expressions, store_history=False)
    reply = client.get_shell_msg(timeout=SECONDS)
    while reply["parent_header"].get("msg_id") != message_id:
        reply = client.get_shell_msg(timeout=SECONDS)
    value = reply["content"]["user_expressions"]["value"]
    assert value["status"] == "ok", value
    return json.loads(ast.literal_eval(value["data"]["text/plain"]))
