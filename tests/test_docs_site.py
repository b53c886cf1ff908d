"""The check of links in the built site, and the rewriting of links in notebooks (docs/site)."""

import pathlib
import runpy
import types

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "site"


def test_links_to_missing_files_and_fragments_are_found(tmp_path):
    broken_links = runpy.run_path(str(FOLDER / "check_links.py"))["broken_links"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h2 id="there">A</h2><img src="no.png">')
    (tmp_path / "index.html").write_text(
        '<a href="a/">1</a><a href="a/#there">2</a><a href="a/#gone">3</a><a href="#gone">4</a><a href="https://x.org">5</a>'
    )
    assert broken_links(tmp_path) == ["a/index.html: no.png", "index.html: a/#gone", "index.html: #gone"]


def test_links_of_a_notebook_lead_to_the_folders_of_pages():
    rewrite = runpy.run_path(str(FOLDER / "hooks.py"))["on_page_content"]
    text = '<a href="concepts.md">1</a> <a href="results/README.md#files">2</a> <a href="https://x.org/a.md">3</a>'
    notebook, page = (
        types.SimpleNamespace(file=types.SimpleNamespace(src_path=name)) for name in ("quickstart.ipynb", "concepts.md")
    )
    assert rewrite(text, page) == text
    assert (
        rewrite('<a href="a--b">--mode=x, 1 -- 2</a>', page)
        == '<a href="a--b"><span class="flag">--mode</span>=x, 1 -- 2</a>'
    )
    assert rewrite(text, notebook).count("../concepts/") == 1
