"""Hooks of the documentation site, called by mkdocs (mkdocs.yml)."""

import re
from typing import Any

_FLAG = re.compile(r"(?<![\w-])--[a-z][\w.]*(?![^<]*>)")  # in text, not in a tag


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Keeps flags in one line, and makes links from a notebook to pages lead to their folders.

    A browser may break a line behind each hyphen. mkdocs rewrites links of Markdown pages only.
    """
    html = _FLAG.sub(r'<span class="flag">\g<0></span>', html)
    if not page.file.src_path.endswith(".ipynb"):
        return html
    return re.sub(r'href="([\w/]+)\.md(#[\w-]+)?"', r'href="../\1/\2"', html)
