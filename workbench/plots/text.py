"""Texts from models, tokens, labels and paths, made safe for figures: the only place where they are.

Plotly reads a subset of HTML in titles, labels, legends and hover texts, entities, `%{...}` in templates, and TeX between
dollar signs where a page has MathJax (https://plotly.com/chart-studio-help/adding-HTML-and-links-to-charts/).
"""

from __future__ import annotations

LONGEST_TOKEN = 40
"""Characters of a token that are shown; a token of an unusual vocabulary, or of a trace somebody made, may be any length."""

_READ_BY_PLOTLY = str.maketrans({character: f"&#{ord(character)};" for character in "&<>%$"})


def plain(text: object) -> str:
    """A text that Plotly shows as it is; control characters (ANSI sequences, changes of direction) show as escapes."""
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))
    return shown.translate(_READ_BY_PLOTLY)


def quoted(token: str | None) -> str:
    """A token as Python writes it, so that blanks and line ends can be seen; cut where it is long."""
    token = token or ""
    return plain(repr(token if len(token) <= LONGEST_TOKEN else f"{token[:LONGEST_TOKEN]}…"))
