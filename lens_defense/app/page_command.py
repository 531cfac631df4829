"""What `lens-defense app` does: load a model, and serve its page until Ctrl-C."""

from collections.abc import Callable, Sequence

import torch

from lens_defense.app.explorer.explorer import Explorer
from lens_defense.app.explorer.server import PageServer
from lens_defense.loading.load import load
from lens_defense.prompts.request import Request
from lens_defense.shown_text import shown


def serve_page(
    name: str,
    requests: Sequence[Request] | None,
    *,
    port: int,
    browser: bool,
    device: str | None,
    dtype: torch.dtype,
    say: Callable[[str], object],
) -> None:
    """Serve the explorer of a model.

    Args:
        name: the model.
        requests: what is looked at; None takes the first of the model's own set.
        port: of 127.0.0.1; 0 takes a free one.
        browser: whether a browser is opened.
        device: as of `load`.
        dtype: as of `load`.
        say: shows a sentence.
    """
    say(f"loading {shown(name)} ...")
    explorer = Explorer(load(name, device=device, dtype=dtype), requests, name=name)
    server = PageServer(explorer, port=port, title=f"{shown(name)}, lens_defense")
    say(f"The page is at {server.address}\nCtrl-C ends it.")
    server.run(browser=browser)
