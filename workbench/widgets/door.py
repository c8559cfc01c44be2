"""What all widgets share: they are found by name, say what went wrong in one sentence, and close what they opened."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ipywidgets import HTML, VBox, Widget

from workbench.errors import UserError
from workbench.registry import Registry

WIDGETS: Registry[type[Door]] = Registry("widget")


def register(cls: type[Door]) -> type[Door]:
    """Enters a widget under its class name: `wb.widgets.NAME`."""
    return WIDGETS.register(cls.__name__)(cls)


class Door(VBox):
    """A column of controls and figures. Its verbs raise UserError; a control that calls one shows the sentence instead."""

    def __init__(self, rows: Sequence[Widget]):
        self.error: str | None = None
        """The sentence that is shown; None if nothing is wrong."""
        self._sentence = HTML()
        super().__init__([*rows, self._sentence])

    def say(self, error: str | None) -> None:
        """Shows a sentence, or takes it away."""
        self.error = error
        self._sentence.value = "" if error is None else f'<p role="alert" style="color:#B3261E">{html.escape(error)}</p>'

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What a caller got wrong inside is shown."""
        try:
            yield
        except UserError as error:
            self.say(str(error))
        else:
            self.say(None)

    def close(self) -> None:
        """Takes the widget and all in it off the page."""
        _close_inside(self)
        super().close()


def _close_inside(widget: Widget) -> None:
    for child in getattr(widget, "children", ()):
        _close_inside(child)
        child.close()
