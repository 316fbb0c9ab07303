"""A stop that SIGTERM or Ctrl-C asks for: what waits ends at once, what works is finished first.

In the main thread a signal raises :class:`Stopped`, which ends any wait in Python code, unless the thread has said that
it works; then it is raised when the work is done. Waits in other threads are :func:`pause`, or :func:`waking` wakes
them. A second Ctrl-C stops at once. Used inside :func:`signals_stop`; outside of it nothing asks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NUDGE = signal.SIGURG  # ignored by default; of all uses of signals the least common
_POLL = 0.1  # seconds
_DEAF = 1.5  # seconds; a main thread that has not heard a signal for so long runs no Python code


class Stopped(BaseException):
    """A stop was asked for. Not an Exception, so that nothing takes it for an error that can be handled."""


class _State:
    """Plain values: a signal handler must not take a lock that its own thread may hold."""

    active = False  # signals are handled here
    came = False  # a signal came, though the main thread may not have heard it yet
    asked = False  # a stop was asked for
    interrupted = False  # ... and then Ctrl-C was pressed again
    works = False  # the main thread must finish something first
    began = False  # there may be something to save
    wakers: tuple[Callable[[], object], ...] = ()


_lock = threading.Lock()  # between the threads that change `wakers`


def came() -> bool:
    """Whether a signal came, even if the main thread is in a library where it hears nothing."""
    return _State.came


def asked() -> bool:
    """Whether a stop was asked for, and the main thread knows it."""
    return _State.asked


def interrupted() -> bool:
    """Whether Ctrl-C was pressed after that."""
    return _State.interrupted


def check() -> None:
    """End here if a stop was asked for.

    Raises:
        Stopped: it was.
    """
    if _State.asked:
        raise Stopped


def begin() -> None:
    """From now on there is something to save, so the main thread is never cut off."""
    _State.began = True


def began() -> bool:
    """Whether there may be something to save."""
    return _State.began


def hold() -> None:
    """From now on the main thread works, whatever was asked for: it saves."""
    _State.works = True


def work(works: bool) -> None:
    """Say, in the main thread, whether it works, which is finished, or may be waiting, which is not.

    Raises:
        Stopped: it no longer works, and a stop was asked for while it did.
    """
    _State.works = works
    if not works:
        check()


@contextmanager
def finishing() -> Iterator[None]:
    """The main thread works within the block, whatever it does around it.

    Raises:
        Stopped: a stop was asked for meanwhile, and it does not work around it.
    """
    before, _State.works = _State.works, True
    try:
        yield
    finally:
        _State.works = before
    work(before)


def pause(seconds: float) -> None:
    """Sleep, in any thread.

    Raises:
        Stopped: a stop was asked for.
    """
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_POLL, left))
        check()


@contextmanager
def waking(wake: Callable[[], object]) -> Iterator[None]:
    """Have ``wake`` called, in the main thread, if a stop is asked for within the block.

    Raises:
        Stopped: it was asked for before.
    """
    with _lock:
        _State.wakers = (*_State.wakers, wake)
    try:
        check()
        yield
    finally:
        with _lock:
            _State.wakers = tuple(x for x in _State.wakers if x is not wake)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.asked and number == signal.SIGINT:
        _State.interrupted = True
        raise KeyboardInterrupt
    _State.asked = True
    for wake in _State.wakers:
        wake()
    if not _State.works:
        raise Stopped


def keep_signals() -> None:
    """Handle the signals again, which another library has taken meanwhile."""
    if _State.active and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def signals_stop() -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C ask for a stop. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.came = _State.asked = _State.interrupted = _State.works = _State.began = False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    before[_NUDGE] = signal.signal(_NUDGE, lambda number, frame: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _State.active = True
    watch = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        _State.active = False
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watch.join()


def _watch(reader: int) -> None:
    """See to it that the main thread hears a signal, or end the process where it does not.

    A signal that comes just before the thread waits for a lock is not heard before the wait ends, unless it is nudged.
    In a library that waits for another host in C++ it hears nothing at all; but if that host is told, it may end the
    wait.
    """
    main, interrupts = threading.main_thread().ident or 0, 0
    with os.fdopen(reader, "rb", 0) as signals:
        while number := signals.read(1):
            interrupts += number[0] == signal.SIGINT
            if number[0] not in _SIGNALS:
                continue
            _State.came = True
            end = time.monotonic() + _DEAF
            while not (_State.interrupted if interrupts > 1 else _State.asked):
                if time.monotonic() > end and (interrupts > 1 or not _State.began):
                    os.write(2, b"specforge: stopped by a signal\n")
                    os._exit(130 if interrupts > 1 else 143)
                signal.pthread_kill(main, _NUDGE)
                time.sleep(_POLL)
