"""What MkDocs needs beyond mkdocs.yml to make a site of the guides.

A hook: the guides in the project's root are pages, too, README.md the first, so that nothing is described twice; links
to files that are no pages become plain text. An extension: `smallcoder_jax.train` is a function, and a room of the same
name.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Module
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "README.md": "index.md",
    "BUILD.md": "BUILD.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)")  # no colon: not an address of the web


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(root / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The links of a page, which are written for the repository, as those of the site."""
    root, here = Path(config.config_file_path).parent, page.file.src_uri
    source = next((name for name, uri in ROOT_PAGES.items() if uri == here), f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        name, mark, anchor = link.partition("#")
        if not name:
            return match.group()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        uri = ROOT_PAGES.get(place, place.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            # What does not exist either is left for MkDocs to refuse.
            return text if (root / place).exists() else match.group()
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{mark}{anchor})"

    return LINK.sub(rewrite, markdown)


class FunctionBesideRoom(Extension):
    """Keeps the function `train` under the name `train()`, before the room takes its place among the members."""

    def on_module_members(self, *, mod: Module, **others: Any) -> None:
        if mod.path == "smallcoder_jax":
            mod.members["train()"] = mod.members["train"]
