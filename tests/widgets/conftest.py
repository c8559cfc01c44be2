"""What the widgets would send to a page is counted, since there is none."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def sent(monkeypatch):
    """The sizes in bytes of all messages to the page, in order."""
    comm = pytest.importorskip("comm", reason="needs the extra `notebook`")
    from comm.base_comm import BaseComm

    sizes: list[int] = []

    class Counting(BaseComm):
        def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
            sizes.append(len(json.dumps(data)) + sum(memoryview(each).nbytes for each in buffers or ()))

    monkeypatch.setattr(comm, "create_comm", Counting)
    return sizes
