"""What the documentation takes from outside its folder: the figures and the notebook of analyses/."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ANY = r"(?:(?!</script>).)*"
LOADER = re.compile(rf'<script type="module">{ANY}mermaid{ANY}</script>', re.DOTALL)
ROOT = Path(__file__).parents[1]
TAKEN = {"figures": (".svg", ".png"), "notebooks": (".ipynb",)}
"""Endings of what is taken, by folder."""


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures and the notebook to the site, before the plugin that renders notebooks looks."""
    for folder, endings in TAKEN.items():
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in endings:
                name = f"{folder}/{path.name}"
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Drop the notebook page's loader of diagrams: it has none, and they would come from a network."""
    return LOADER.sub("", output) if page.file.src_uri.endswith(".ipynb") else output
