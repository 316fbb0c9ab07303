"""Joining a cluster; whole runs are in tests/test_cluster.py."""

from __future__ import annotations

import pytest

from specforge.errors import UserError

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")

from specforge.cluster.driver import resolve


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("nowhere", "Invalid address format"),
        ("ray://127.0.0.1:10001", "Invalid address format"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named(address, reason):
    with pytest.raises(UserError, match=rf"^cluster\.address {address}: no Ray cluster answers \(.*{reason}"):
        resolve(address)
