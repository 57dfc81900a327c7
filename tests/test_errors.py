"""What is said of other libraries' errors."""

import pytest

from vwt.errors import first_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", "ValueError"),
        ("\n  \n", "ValueError"),
        ("no such tensor\n\nat line 3", "no such tensor"),
        ("from core.cpp:117:\n  from plugin:\nnot here\n\nmore", "from core.cpp:117: from plugin: not here"),
        ("in a file:\n\nnot here", "in a file: not here"),
        ("what follows:", "what follows:"),
        ("x" * 400, "x" * 300),
    ],
)
def test_first_line(message, expected):
    assert first_line(ValueError(message)) == expected
