"""The house rules: which way imports point, what the packages are, and what may not exist."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import workbench as wb

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("workbench", "kernels", "apps") for path in (ROOT / folder).rglob("*.py"))

LAYERS = {
    "errors": set(),
    "folders": set(),
    "registry": {"errors"},
    "texts": {"errors"},
    "trace": {"errors"},
    "cost": {"errors", "folders", "trace"},
    "models": {"errors", "folders", "trace", "texts"},
    "probes": {"errors", "trace", "cost", "models", "kernels"},
    "engine": {"errors", "folders", "trace", "models", "probes", "kernels"},
    "methods": {"errors", "registry", "trace", "cost", "models", "engine", "kernels"},
    "workloads": {"errors", "registry", "texts", "models", "engine"},
    "experiments": {"errors", "trace", "cost", "models", "probes", "engine", "methods", "workloads", "kernels"},
    "live": {"errors", "trace", "cost", "models", "engine", "experiments"},
    "plots": {"errors", "trace", "cost"},
    "report": {"errors", "trace", "plots"},
    "widgets": {
        *(
            "errors",
            "registry",
            "texts",
            "trace",
            "cost",
            "models",
            "engine",
            "methods",
            "experiments",
            "live",
            "plots",
            "report",
        )
    },
    "magics": {"errors", "models", "probes"},
    "terminal": {"plots"},
    "pictures": {"errors"},
    "ports": {"errors"},
    "visiting": set(),
    "lab": {"errors", "ports"},
    "doctor": {"errors", "folders", "models", "probes", "engine"},
    "testing": {"models", "engine", "experiments", "methods"},
    "kernels": {"kernels"},
}
"""What each room may import; every door (cli, apps, the package itself) may import all."""

CONVENIENCES = {
    ("trace/trace.py", "cost"),
    ("trace/comparison.py", "plots"),
    ("trace/comparison.py", "report"),
    ("plots/theme.py", "methods"),
}
"""Local one-line imports that point back: a value that draws or counts itself, and colours that follow the registry."""


def room(module: str) -> str | None:
    """The room a module name belongs to, or None if it is not ours."""
    parts = module.split(".")
    if parts[0] == "workbench_kernels":
        return "kernels"
    return (parts[1] if len(parts) > 1 else "workbench") if parts[0] == "workbench" else None


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules a file imports, and whether at its top level (imports for type checking left out)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "workbench":
                names = [f"workbench.{alias.name}" for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "apps" or relative.name in {"cli.py"} or relative == Path("workbench/__init__.py"):
        return
    home = "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")
    for module, at_top in imports(path):
        assert module != "kernels" and not module.startswith("kernels."), "kernels/ is a source root, not a package"
        target = room(module)
        if target is None or target == home:
            continue
        inside = "/".join(relative.parts[1:])
        if (inside, target) in CONVENIENCES:
            assert not at_top, f"{inside} may import {target} only inside a function"
            continue
        assert target in LAYERS[home], f"{relative} imports {module}, but {home} may not import {target}"


def test_methods_of_a_slot_do_not_import_each_other():
    for path in (ROOT / "workbench/methods").glob("*/*.py"):
        siblings = {f"workbench.methods.{path.parent.name}.{other.stem}" for other in path.parent.glob("*.py")}
        helpers = ("base", "budgets", "coreset", "quantised", "trained")
        allowed = {f"workbench.methods.{path.parent.name}.{helper}" for helper in helpers}
        for module, _ in imports(path):
            assert module not in siblings - allowed, f"{path.name} imports {module}"


def test_one_file_talks_to_nvml():
    callers = [path.name for path in MODULES if "pynvml" in [module for module, _ in imports(path)]]
    assert callers == ["nvml.py"]


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/kernels").exists()


def test_packages_in_pyproject_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "workbench").rglob("__init__.py")}
    roots = {path.parent.name for root in ("kernels", "apps") for path in (ROOT / root).glob("*/__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | roots | {"workbench.notebooks"}
    assert listed == sorted(names)


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == wb.__version__
    assert f"## {wb.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_are_sorted_and_there():
    assert wb.__all__ == sorted(wb.__all__)
    for name in wb.__all__:
        assert getattr(wb, name) is not None
    for cls in wb.METHODS.values():
        assert cls.__name__ in wb.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        wb.Nonsense  # noqa: B018 (the access is the test)


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)


def test_importing_workbench_is_light():
    out = run_python("import sys, workbench; print([m for m in ('plotly', 'ipywidgets', 'streamlit') if m in sys.modules])")
    assert out.stdout.strip() == "[]"


def test_values_open_without_transformers():
    code = """
import sys
sys.modules['transformers'] = None
import workbench.trace.trace, workbench.trace.comparison, workbench.cost.metrics, workbench.plots, workbench.report
print('ok')
"""
    assert run_python(code).stdout.strip() == "ok"


def test_transformers_does_not_take_our_kernels():
    code = """
import sys
from transformers.utils.import_utils import is_kernels_available
is_kernels_available()
module = sys.modules.get('kernels')
print(getattr(module, '__file__', None))
"""
    assert run_python(code).stdout.strip().splitlines()[-1] == "None"


def test_the_project_names_no_machine():
    """No path of one machine, and nothing unfinished."""
    folders = [path for name in ("tests", "docs", "notebooks") for path in (ROOT / name).rglob("*")]
    texts = [path for path in folders if path.suffix in {".py", ".md", ".ipynb"}]
    for path in [*MODULES, *texts, *ROOT.glob("*.md"), ROOT / "Makefile"]:
        text = path.read_text()
        for word in ("/" + "work/", "/" + "root/", "TO" + "DO", "FIX" + "ME"):
            assert word not in text, f"{path} holds {word}"
