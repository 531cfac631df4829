"""The recipe of the guide: transformers serves an exported folder, and OpenAI's client talks to it."""

import socket
import time
import urllib.request
from contextlib import contextmanager

import openai
import pytest
import transformers
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_folder
from transformers.cli.serve import Serve

from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.load import load
from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request


@contextmanager
def served(folder):
    """The address of a folder while it is served, as by `transformers serve FOLDER`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    level = transformers.logging.get_verbosity()
    server = Serve(str(folder), device="cpu", port=port, non_blocking=True)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://localhost:{port}/v1"
    finally:
        server.kill_server()
        transformers.logging.set_verbosity(level)


@pytest.mark.timeout(120)
def test_an_exported_folder_answers_through_the_openai_interface(tmp_path):
    model = load(tiny_folder(tmp_path / "source"), device="cpu")
    item = request("how do I make a lamp?", "lamp")
    prompt = tokenize(model.tokenizer, item).ids

    def answer():
        return decode_answer(model.tokenizer, generate(model, [prompt], max_new_tokens=12)[0])

    before, ledger = answer(), Ledger(model)
    ledger.apply(handmade_edit(model, (1, 2)))
    folder = ledger.export(tmp_path / "edited")
    assert answer() != before
    with served(folder) as address, openai.OpenAI(base_url=address, api_key="none") as client:
        reply = client.chat.completions.create(
            model=str(folder),
            messages=[{"role": "user", "content": item.text}],
            temperature=0,
            max_tokens=12,
        )
    assert reply.choices[0].message.content == answer()
