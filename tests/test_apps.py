"""The dashboard through Streamlit's own test driver."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

DASHBOARD = Path(__file__).parent.parent / "apps/dashboard.py"


def test_dashboard_compares():
    page = AppTest.from_file(str(DASHBOARD), default_timeout=120).run()
    assert not page.exception and page.info
    page.slider[0].set_value(128)
    page.slider[1].set_value(1)
    page.multiselect[1].set_value([0.5])
    page.button[0].click().run()
    assert not page.exception and not page.error
    kept = next(box for box in page.selectbox if box.label == "What was kept by")
    assert "snapkv(budget=0.5)" in kept.options
