"""Joining a cluster; whole runs are in tests/test_cluster.py."""

from __future__ import annotations

import pytest

from specforge.errors import UserError

pytest.importorskip("ray", reason="needs Ray (pip install -e '.[ray]')")

from specforge.cluster import driver
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


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, r"^Ray cannot be started here \(The current node timed out during startup\.\)$"),
        (
            "127.0.0.1:1",
            r"^cluster\.address 127\.0\.0\.1:1: cannot be used \(The current node timed out during startup\.\); "
            r"~/\.ray/auth_token exists, so the cluster may ask for it: set RAY_AUTH_MODE=token$",
        ),
    ],
)
def test_a_failure_of_ray_itself_is_one_line(address, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()

    def fail(*args, **kwargs):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(driver.ray, "init", fail)
    monkeypatch.setattr(driver, "resolve", str)
    with pytest.raises(UserError, match=message), driver._connected(address):
        pass
