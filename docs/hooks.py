"""What the documentation takes from outside its folder: the figures and the notebooks of analyses/."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ANY = r"(?:(?!</script>).)*"
LOADER = re.compile(rf'<script type="module">{ANY}mermaid{ANY}</script>', re.DOTALL)
ROOT = Path(__file__).parents[1]
LINK = re.compile(r'href="([^":#]+)\.(ipynb|md)(#[^"]*)?"')
TAKEN = {"figures": (".svg", ".png"), "notebooks": (".ipynb",)}
"""Endings of what is taken, by folder."""


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures and the notebooks to the site, before the plugin that renders notebooks looks."""
    for folder, endings in TAKEN.items():
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in endings:
                name = f"{folder}/{path.name}"
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Let a notebook's links, which are for a folder of files, lead to the site's pages.

    Its loader of diagrams is dropped: it has none, and they would come from a network.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    return LINK.sub(lambda link: _site_link(page, link), LOADER.sub("", output))


def _site_link(page: Page, link: re.Match[str]) -> str:
    """The link of a notebook to a file of the repository, as a link to its page."""
    if not (ROOT / page.file.src_uri).parent.joinpath(f"{link[1]}.{link[2]}").is_file():
        raise ValueError(f"{page.file.src_uri} links to {link[1]}.{link[2]}, which does not exist")
    return f'href="{link[1].replace("../docs/", "../")}.html{link[3] or ""}"'
