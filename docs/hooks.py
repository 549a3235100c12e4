"""Pages of the site that lie outside docs/, and the links to them; mkdocs.yml names this file.

In the repository a link leads to a file. In the site it leads to that file's page, or, where the file has none, is the
file's path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: path of its page.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "embedded/README.md": "embedded.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of one page."""
    uri = page.file.src_uri
    source = next((ROOT / path for path, own in OUTSIDE.items() if own == uri), ROOT / "docs" / uri)

    def turned(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        target = Path(os.path.normpath(source.parent / path))
        if not target.exists():
            raise PluginError(f"{source}: the link to {path} leads nowhere")
        name = target.relative_to(ROOT).as_posix()
        within = name.removeprefix("docs/") if name.startswith("docs/") else OUTSIDE.get(name)
        if within is None:
            return text if text.strip("`") == name else f"{text} (`{name}`)"
        return f"[{text}]({os.path.relpath(within, Path(uri).parent)}{anchor})"

    return _LINK.sub(turned, markdown)
