"""A process of its own that test_device.py starts with a stand-in for NVIDIA's library, and gives code to run.

Reads lines of JSON, `{"code": …, "environment": {…}}`, and answers each with the code's `result` as a line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import traceback

from workbench.probes import device
from workbench.testing import random_llama


def records(frame) -> list[dict]:
    """A DataFrame as plain rows, nulls as None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def sampling_threads() -> int:
    return sum(thread.name == device.THREAD for thread in threading.enumerate())


def counted(what: str) -> int:
    """A count the stand-in keeps: `opened` or `refusals`."""
    return getattr(ctypes.CDLL("libnvidia-ml.so.1"), f"stand_in_{what}")()


def main() -> None:
    model = random_llama()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        scope = {"model": model, "records": records, "sampling_threads": sampling_threads, "counted": counted}
        try:
            exec(request["code"], scope)
            answer = {"result": scope["result"]}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        for name in request["environment"]:
            del os.environ[name]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
