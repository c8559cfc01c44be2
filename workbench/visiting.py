"""A visitor of the dashboard in a real browser: chooses, fills in, presses, and reads what is drawn. For tests and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SCRIPT_RESTS = '[data-testid="stApp"][data-test-script-state="notRunning"]'
_LOOK_S, _TRIES = 0.2, 12
_FIGURES = """() => [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot._fullData).map(plot => ({
    title: plot.layout.title?.text ?? '',
    notes: (plot.layout.annotations ?? []).map(note => note.text),
    traces: plot._fullData.map(trace => ({
        name: trace.name ?? '',
        x: trace.x ? Array.from(trace.x) : null,
        y: trace.y ? Array.from(trace.y) : null,
        z: trace.z ? Array.from(trace.z, row => Array.from(row)) : null,
    })),
}))"""


class Visitor:
    """Wraps a page of Playwright. Everything it does waits for Streamlit, `wait_s` seconds at most."""

    def __init__(self, page: Any, address: str, wait_s: float = 60.0):
        self.page, self.address, self._wait_s = page, address, wait_s
        page.set_default_timeout(1000 * wait_s)

    def open(self, path: str = "") -> None:
        """Opens a page of the dashboard and waits until it is drawn."""
        self.page.goto(f"{self.address}/{path}")
        self.rest()

    def rest(self) -> None:
        """Waits until no script runs and none is about to."""
        self.page.wait_for_timeout(150)
        self.page.wait_for_selector(_SCRIPT_RESTS)

    def choose(self, label: str, option: str) -> None:
        """Takes an option of a select box."""
        from playwright.sync_api import TimeoutError as TookTooLong

        box = self.page.locator('[data-testid="stSelectbox"]').filter(has_text=label).first
        field, found = box.locator("input"), self.page.get_by_role("option", name=option, exact=True).first
        for tries_left in reversed(range(_TRIES)):  # a list closes when the page moves below it
            field.scroll_into_view_if_needed()
            self.page.wait_for_timeout(1000 * _LOOK_S)
            field.fill(option)
            try:
                found.click(timeout=1000 * self._wait_s / _TRIES)
                break
            except TookTooLong:
                if not tries_left:
                    raise
                field.blur()
        self.rest()

    def fill(self, label: str, value: Any) -> None:
        """Writes into a field and leaves it."""
        field = self.page.get_by_label(label, exact=True).first
        field.fill(str(value))
        field.press("Tab")
        self.rest()

    def press(self, name: str) -> None:
        """Presses a button."""
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def slide(self, label: str, steps: int) -> None:
        """Moves a slider by so many steps, to the left if below 0."""
        handle = self.page.get_by_role("slider", name=label).first
        for _ in range(abs(steps)):
            handle.press("ArrowRight" if steps > 0 else "ArrowLeft")

    def see(self, text: str) -> None:
        """Waits until a text is there."""
        self.page.get_by_text(text).first.wait_for()

    def figures(self) -> list[dict[str, Any]]:
        """What the figures on the page show: title, notes, and name, x, y and z of each trace."""
        return self.page.evaluate(_FIGURES)

    def figure(self, title: str) -> dict[str, Any]:
        """The first figure whose title holds a text; waits for it."""
        self.page.wait_for_function(
            "title => [...document.querySelectorAll('.js-plotly-plot')].some("
            "plot => plot._fullData && (plot.layout.title?.text ?? '').includes(title))",
            arg=title,
        )
        return next(figure for figure in self.figures() if title in figure["title"])

    def until(self, title: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Looks at a figure again and again until something holds of it. Raises TimeoutError."""
        for _ in range(round(self._wait_s / _LOOK_S)):
            figure = self.figure(title)
            if holds(figure):
                return figure
            self.page.wait_for_timeout(1000 * _LOOK_S)
        raise TimeoutError(f"What was waited for did not come to hold of the figure {title!r} within {self._wait_s:g} s.")
