"""Inputs whose values stand in the page's link, so that a link shows what its sender saw."""

from __future__ import annotations

from typing import Any

import streamlit as st

MOST = 1_000_000


def from_link(name: str, among: list, default: Any) -> Any:
    """What the link says of a choice, if it is one."""
    said = st.query_params.get(name, str(default))
    return next((each for each in among if str(each) == said), default)


def choice(label: str, name: str, among: list, default: Any, **options: Any) -> Any:
    """A choice that the link carries."""
    value = st.selectbox(label, among, index=among.index(from_link(name, among, default)), key=f"link.{name}", **options)
    st.query_params[name] = str(value)
    return value


def number(label: str, name: str, default: int) -> int:
    """A positive number that the link carries."""
    said = st.query_params.get(name, "")
    digits = said[:7] if said.isascii() and said.isdigit() else ""  # as many as the most has
    first = min(int(digits or 0) or default, MOST)
    value = int(st.number_input(label, value=first, min_value=1, max_value=MOST, step=1, key=f"link.{name}"))
    st.query_params[name] = str(value)
    return value
