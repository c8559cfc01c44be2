"""Runs the notebooks and writes them as Markdown, with what they print and draw, into docs/notebooks.

usage: python docs/render.py [NOTEBOOK ...]

Each runs in a kernel of its own and in an empty folder. One whose model is not here is left as it was rendered last.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly.io
from nbclient import NotebookClient

from workbench.models.catalogue import catalogue
from workbench.pictures import photograph_figure

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs/notebooks"
_PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_LEFT_OUT_OF_TABLES = re.compile(r"<style.*?</style>|<script.*?</script>", re.DOTALL)
"""GitHub would show a style sheet as text."""


def main() -> None:
    """Renders the notebooks named, or all."""
    OUT.mkdir(exist_ok=True)
    missing = {entry["name"]: entry["how"] for entry in catalogue() if not entry["ready"]}
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        needs = [name for name in missing if any(f'"{name}"' in cell.source for cell in notebook.cells)]
        if needs:
            print(f"{path.name} is left as it was: {needs[0]} is not here ({missing[needs[0]]}).")
            continue
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        write(notebook, path.stem)


def write(notebook: nbformat.NotebookNode, stem: str) -> None:
    """Writes one that has run: its Markdown, and a picture beside it for each figure."""
    for old in OUT.glob(f"{stem}-*.png"):
        old.unlink()
    parts = [f"<!-- made by `make docs` from notebooks/{stem}.ipynb -->"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [part for output in cell.outputs if (part := shown(output, stem, len(parts)))]
    (OUT / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def shown(output: nbformat.NotebookNode, stem: str, number: int) -> str:
    """One output as Markdown: a picture, a table or text; empty for what a page without scripts cannot show."""
    if output.output_type == "stream":
        return "" if output.name == "stderr" else _text(output.text)
    if _PLOTLY in output.data:
        figure = plotly.io.from_json(plotly.io.json.to_json_plotly(output.data[_PLOTLY]), skip_invalid=True)
        picture = photograph_figure(figure, OUT / f"{stem}-{number:02d}.png")
        title = re.sub(r"<.*", "", figure.layout.title.text or "")
        return f"![{html.escape(title)}]({picture.name})"
    if _WIDGET in output.data:
        return "*(Here stand controls and figures once the notebook runs.)*"
    if "text/html" in output.data:
        return _LEFT_OUT_OF_TABLES.sub("", output.data["text/html"]).strip()
    return _text(output.data.get("text/plain", ""))


def _text(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    main()
