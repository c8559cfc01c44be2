"""The README cannot drift: its code runs, its table is the registry's, its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

from workbench.methods.base import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "report.html").exists()


def test_methods_table():
    """`workbench methods --markdown` prints what belongs here."""
    shown = README.partition("<!-- methods -->\n")[2].partition("\n<!-- /methods -->")[0]
    assert shown == markdown_table()


def test_file_tree():
    tree = README.partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    inside = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert inside == {path.name for path in (ROOT / "workbench").iterdir() if (path / "__init__.py").exists()}
    for name in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / name).is_dir()


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
