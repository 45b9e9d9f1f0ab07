"""Hook of mkdocs: README is the front page, and files of the repository that pages link to are part of the site.

Pages link to each other and to other files as they lie in the repository, so that the links also work where the
repository is read. On the site, `docs/` is the top, and what lies elsewhere is put into `repository/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"(\]\(|<img src=\")(?![a-z]+:|#)([^)#\"\s]+)")
_HOME = {"README.md": "index.md"}


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return _HOME.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def links_of(path: str) -> set[str]:
    """Return the files of the repository that a page of it links to."""
    text = (_ROOT / path).read_text(encoding="utf-8")
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for _, target in _LINK.findall(text)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and every file outside `docs/` that a page leads to."""
    known: dict[str, str] = {}
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        known[site_path(path)] = path
        if not path.startswith("docs/") and (_ROOT / path).is_file():
            files.append(File.generated(config, site_path(path), abs_src_path=str(_ROOT / path)))
        if path.endswith(".md") and (_ROOT / path).is_file():
            waiting += sorted(links_of(path) - set(known.values()) - set(waiting))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where files are on the site."""
    here = page.file.src_uri
    path = {"index.md": "README.md"}.get(here) or here.removeprefix("repository/")
    if path == here:
        path = f"docs/{here}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)
