"""A hook of mkdocs: pages whose files are outside of docs/, and the links between them and the others.

In the repository every link is relative and leads to a file. This hook gives the same links the names of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: File of the repository -> page of the site.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "trace_tasks/README.md": "tasks.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")


def site_text(text: str, folder: str) -> str:
    """The text of a file in a folder of the repository, with its links as the site has them."""

    def page(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, link[1]))
        return PAGES.get(file, file.removeprefix("docs/"))

    return _LINK.sub(page, text)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside."""
    for file, page in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_text(text, posixpath.dirname(file))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The pages of docs/ link to those from outside."""
    return markdown if page.file.src_uri in PAGES.values() else site_text(markdown, "docs")
