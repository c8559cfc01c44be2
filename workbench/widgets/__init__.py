"""The notebook's door: widgets that choose arguments and show figures, one a file, found by importing this folder.

Their libraries (`pip install 'workbench-llm[notebook]'`) are imported when the first widget is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from workbench.errors import UserError
from workbench.registry import Registry, import_folder


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    widgets = _widgets()
    if name not in widgets:
        raise AttributeError(f"module {__name__!r} has no widget {name!r}; there are {', '.join(widgets)}")
    return widgets[name]


def __dir__() -> list[str]:
    return [*globals(), *_widgets()]


def _widgets() -> Registry[type]:
    """All widgets, by class name."""
    try:
        base = importlib.import_module(f"{__name__}.door")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"ipywidgets", "anywidget", "traitlets"}:
            raise
        raise UserError(f"Widgets need {error.name}; run pip install 'workbench-llm[notebook]'.") from None
    import_folder(__name__, __path__)
    return base.WIDGETS
