"""The colours of figures on a light and on a dark page.

Colours of all hues, moved by a search until every line stands out from the page (contrast 3 of WCAG 2.2,
https://www.w3.org/TR/WCAG22/#non-text-contrast) and any two colours stay apart also for people who lack one kind of cone
(as Machado, Oliveira and Fernandes simulate it, 2009, https://doi.org/10.1109/TVCG.2009.113). A test computes both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """The colours of a page. Fields of the same place mean the same in both."""

    paper: str
    ink: str
    """Texts, and marks that must be seen first."""
    grid: str
    mark: str
    """Lines and small texts that say where something happened."""
    dense: str
    """The dense run, in every figure."""
    low: str
    """Nothing of a share, in heat maps."""
    high: str
    """All of it."""
    high_under_text: str
    """All of it, where a number is written over it."""
    palette: tuple[str, ...]


LIGHT = Look(
    paper="#FFFFFF",
    ink="#1F2933",
    grid="#E3E8EE",
    mark="#6E6E6E",
    dense="#666666",
    low="#F4F4F4",
    high="#0072B2",
    high_under_text="#6FB7E9",
    palette=(
        *("#126CDE", "#BE2F07", "#B57FA3", "#2A2446", "#47190D", "#7B00FB", "#DE7478", "#12533A"),
        *("#A50DA4", "#460063", "#E700FB", "#000EC2", "#7E1F01", "#470195", "#0F9DCF", "#2C8656"),
        *("#FF008D", "#F943CC", "#869D00", "#573572", "#537D24", "#0E3233", "#67572D", "#A09452"),
    ),
)
DARK = Look(
    paper="#171614",
    ink="#F0F2F6",
    grid="#34353A",
    mark="#9AA4B2",
    dense="#B8B8B8",
    low="#24272C",
    high="#4FB3FF",
    high_under_text="#1F5F99",
    palette=(
        *("#2D9BCB", "#B97471", "#D61C4B", "#7749D1", "#FF6440", "#D2A1FF", "#FECFB2", "#3DFF77"),
        *("#844BAC", "#8E00FF", "#FF57D3", "#606893", "#DD0100", "#DD12FF", "#679098", "#5ACB81"),
        *("#AA476B", "#FFAAE5", "#397805", "#CD71F8", "#89B255", "#B2FFEA", "#FF9402", "#EAFF15"),
    ),
)
