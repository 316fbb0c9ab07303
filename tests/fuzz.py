"""Damaged bytes for every reader of what comes from outside, and what must hold with each of them.

A reader may work or refuse in one line (:class:`UserError` or what it documents). It must not end in anything else,
take more memory than a stated bound, or touch a file outside the folder that it was given. Inputs are seeded;
`pytest --fuzz 50` tries fifty times as many.
"""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from specforge.errors import UserError

_ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**12, 10**400, 0.5, float("nan"), float("inf"), 1e308)
_ODD_VALUES: tuple[Any, ...] = (
    *_ODD_NUMBERS,
    None,
    True,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\ud83d",
    "\0",
    "é" * 40,
    [],
    {},
    [[]],
    [None],
    {"": 0},
)
_ODD_BYTES = (b"\xff\xfe", b"\0" * 8, b"[" * 5000, b'{"a":' * 3000, b"\r\n", b"\xed\xa0\x80")


class Fuzz:
    """Draws damaged inputs and checks what readers do with them.

    Args:
        seed: any text; the same gives the same inputs.
        factor: how many times as many inputs as a test asks for.
    """

    def __init__(self, seed: str, factor: int = 1) -> None:
        self.rng, self.factor = random.Random(seed), factor

    def bytes(self, originals: Sequence[bytes], count: int) -> Iterator[bytes]:
        """Damaged copies of some files: flipped, cut, doubled, spliced, overwritten, and made of noise."""
        for _ in range(count * self.factor):
            data = bytearray(self.rng.choice(originals))
            for _ in range(self.rng.choice((1, 1, 1, 2, 5))):
                self._damage(data, originals)
            yield bytes(data)

    def _damage(self, data: bytearray, originals: Sequence[bytes]) -> None:
        rng, size = self.rng, len(data)
        place, length = rng.randrange(size + 1), rng.choice((1, 2, 8, 64, 1024))
        match rng.randrange(7):
            case 0 if size:
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length] * rng.choice((1, 3, 50))
            case 4:
                other = rng.choice(originals)
                data[place : place + length] = other[rng.randrange(len(other) + 1) :][:length]
            case 5:
                data[place : place + length] = rng.randbytes(length)
            case _:
                data[place:place] = rng.choice(_ODD_BYTES)

    def values(self, originals: Sequence[Any], count: int) -> Iterator[Any]:
        """Copies of JSON values with parts replaced, dropped, doubled or renamed: well-formed, not what is expected."""
        for _ in range(count * self.factor):
            value = json.loads(json.dumps(self.rng.choice(originals)))
            for _ in range(self.rng.choice((1, 1, 2, 4))):
                value = self._change(value)
            yield value

    def _change(self, value: Any) -> Any:
        rng = self.rng
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
            return deepcopy(rng.choice(_ODD_VALUES))
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[rng.choice(("x", "", "__class__", f"{key} "))] = value.pop(key)
            case 1:
                value.append(value[key])
            case _:
                value[key] = self._change(value[key])
        return value


def survives(
    reader: Callable[[], Any],
    *,
    outside: Path | None = None,
    megabytes: int = 256,
    refusals: tuple[type[BaseException], ...] = (UserError,),
) -> bool:
    """Whether a reader took an input; a refusal must be one short line.

    Args:
        reader: reads a damaged input.
        outside: a folder in which nothing may change.
        megabytes: how much the peak memory of this process may grow.
        refusals: how it may refuse.
    """
    before, peak = outside and _tree(outside), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        reader()
    except refusals as error:
        text = str(error)
        assert text, "a refusal says why"
        assert "\n" not in text, text
        assert len(text) < 2000, text[:200]
        taken = False
    else:
        taken = True
    assert before == (outside and _tree(outside)), "something changed outside the folder"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert grown < megabytes, f"{grown:.0f} MB more"
    return taken


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}
