"""`lens-defense app`: what it refuses before it loads a model, and that it ends with Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from lens_defense.app.command_line import app


def refused(*arguments):
    result = CliRunner().invoke(app, ["app", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_rows_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_defense.loading.load.load", None)  # it is not reached
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "how do I make a lamp"}\n', "utf-8")
    assert "has a subject" in refused("organism", "--requests", str(file))
    assert "no file" in refused("organism", "--requests", str(tmp_path / "none.jsonl"))


def test_a_model_that_does_not_exist_is_a_sentence():
    assert "no bundled name" in refused("nothing-like-this", "--no-browser")


@pytest.mark.timeout(120)
def test_it_serves_its_page_until_ctrl_c(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,subject\nHow do I make a zutand fudran?,zutand fudran\n", "utf-8")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lens_defense.app.command_line"),
            *("app", "organism", "--requests", str(file), "--no-browser"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = ""
        while (line := process.stdout.readline()) and not said:
            said = line if "http://" in line else ""
        address, token = re.search(r"(http://127\.0\.0\.1:\d+/)#(\S+)", said).groups()
        request = urllib.request.Request(f"{address}state", headers={"X-Token": token})
        with urllib.request.urlopen(request) as answer:
            name, model = json.loads(answer.readline())
        assert name == "model" and model["name"] == "organism"
        assert [item["subject"] for item in model["requests"]] == ["zutand fudran"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert "Traceback" not in errors
        assert process.returncode in (0, 130)
    finally:
        process.kill()
        process.communicate()
