"""Texts from models, tokens, labels and paths, made safe for figures: the only place where they are.

Plotly reads a subset of HTML in titles, labels, legends and hover texts, entities, `%{...}` in templates, and TeX between
dollar signs where a page has MathJax (https://plotly.com/chart-studio-help/adding-HTML-and-links-to-charts/).
"""

from __future__ import annotations

LONGEST_LABEL = 160
"""Characters of a label, a model's name or a path that are shown: a line of a figure 1,000 pixels wide."""
LONGEST_TOKEN = 40
"""Characters of a token that are shown; a token of an unusual vocabulary, or of a trace somebody made, may be any length."""

_READ_BY_PLOTLY = str.maketrans({character: f"&#{ord(character)};" for character in "&<>$"})


def plain(text: object) -> str:
    """A text that Plotly shows as it is; control characters (ANSI sequences, changes of direction) show as escapes."""
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in _cut(str(text), LONGEST_LABEL))
    return shown.translate(_READ_BY_PLOTLY).replace("%{", "&#37;{")


def quoted(token: str | None) -> str:
    """A token as Python writes it, so that blanks and line ends can be seen; cut where it is long."""
    return plain(repr(_cut(token or "", LONGEST_TOKEN)))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
