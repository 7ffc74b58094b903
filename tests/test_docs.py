"""What the pages show is true: every block of Python in README.md and docs/ runs, every link leads somewhere.

Blocks marked ```python run, from top to bottom of a page in one namespace; a block that only shows is ```py.
"""

import re
from pathlib import Path
from runpy import run_path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)?(#[^)\s]+)?\)")
MARKER = re.compile(r"<!-- print: (\w+) -->")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def source(page: Path) -> str:
    """A page without what stands in blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, name(page), "exec"), namespace)


def headings(text: str) -> set[str]:
    """The anchors of a page: of its headings, and those set by hand."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
    return made | set(re.findall(r"\{ #(\w+) \}", text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(source(page)):
        if path.startswith(("https://", "http://")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {path}, which is not there"
        text = target.read_text(encoding="utf-8") if anchor else ""
        if anchor and not MARKER.search(text):  # what is printed from the code has its headings when built
            assert anchor[1:] in headings(text), f"{name(page)} links to {path}{anchor}: no such heading"


def test_tables_printed_on_one_page_link_within_it():
    """As files they link to each other."""
    text = "\n".join(run_path(str(ROOT / "docs" / "hooks" / "pages.py"))["results"]())
    found = [link for link in LINK.findall(text) if not link[0].startswith("https://")]
    assert found and all(not path and anchor[1:] in headings(text) for path, anchor in found), found


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert sorted(listed) == sorted(there)
