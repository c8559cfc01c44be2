"""Text that came from people, models or files, shown as the characters it has: never as markdown, HTML or control codes."""

from __future__ import annotations

import re

_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
"""Control characters have pictures of their own in Unicode; an escape code shows as one."""

_MARKS = re.compile(r"[\\`*_\[\]<>$~&:#|!]|^[-+=]|(?<=\d)[.)](?=\s|$)")
"""What markdown gives a meaning to, in a line or at the start of one; a number at its start may have nine digits."""

_REPLACED = re.compile(r"\\:(?=//|[\w\\+/-]+\\:)|www(?=\.)|@")
"""Beginnings of emoji and icon codes, addresses and e-mail addresses, which are looked for after escapes are resolved."""

_JOINER = "\u2060"


def visible(text: str) -> str:
    """For `st.text` and `st.code`, which take text as it is: control characters become their pictures."""
    return text.translate(_CONTROL)


def as_markdown(text: str) -> str:
    """Markdown that shows exactly this text in one line, for places that know nothing else, such as `st.error` and labels.

    What has a meaning is escaped (CommonMark 2.4); an invisible joiner parts what would be replaced all the same.
    """
    escaped = _MARKS.sub(r"\\\g<0>", " ".join(visible(text).split()))
    return _REPLACED.sub(rf"\g<0>{_JOINER}", escaped)
