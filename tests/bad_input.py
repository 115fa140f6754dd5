"""Recipes and rows that are good, and a call that is refused."""

from __future__ import annotations

import pytest

from bitpress import oneshot
from conftest import token_rows
from helpers import OPTIONS

W4 = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
ROUND = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
ROWS = token_rows()


def refused(error, words, out, *arguments, **options):
    """The call fails with exactly this class, its message has these words, and nothing has been written."""
    with pytest.raises(error) as caught:
        oneshot(*arguments, **{"output_dir": out, **OPTIONS, **options})
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert not out.exists()
    return caught.value
