"""Stopping on SIGTERM or Ctrl-C: waits end at once, work is finished first.

In the main thread a signal raises :class:`Stopped`, which ends any wait in Python code. While the thread is marked as
working, it is raised when the work is done. Other threads wait with :func:`pause`, or register a function with
:func:`call_on_stop`. A second Ctrl-C stops at once. All of this applies only within :func:`signals_stop`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from specforge.logs import write_last

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NUDGE = signal.SIGURG  # ignored by default, and rarely used
_POLL = 0.1  # seconds
_UNRESPONSIVE = 1.5  # seconds without handling a signal after which the main thread must be outside Python code


class Stopped(BaseException):
    """A stop was requested. Not an Exception, so that no handler treats it as an error."""


class _State:
    """Plain values without a lock: the thread that a signal handler interrupts might hold it."""

    active = False  # signals are handled here
    signal_arrived = False  # a signal arrived, though the main thread may not have handled it yet
    stop_requested = False  # a stop was requested
    interrupted = False  # Ctrl-C was pressed again after that
    works = False  # the main thread must finish its work first
    began = False  # there may be something to save
    callbacks: tuple[Callable[[], object], ...] = ()


_lock = threading.Lock()  # for threads that change `callbacks`


def signal_arrived() -> bool:
    """Whether a signal arrived, even if the main thread is in a library and has not handled it yet."""
    return _State.signal_arrived


def stop_requested() -> bool:
    """Whether a stop was requested and the main thread has handled the signal."""
    return _State.stop_requested


def interrupted() -> bool:
    """Whether Ctrl-C was pressed again after that."""
    return _State.interrupted


def check() -> None:
    """End here if a stop was requested.

    Raises:
        Stopped: it was.
    """
    if _State.stop_requested:
        raise Stopped


def request() -> None:
    """Request a stop, in any thread, as SIGTERM does.

    Outside :func:`signals_stop` no wait is interrupted; the stop takes effect at the next :func:`check`.
    """
    if _State.active:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        return
    _State.signal_arrived = _State.stop_requested = True
    for callback in _State.callbacks:
        callback()


def begin() -> None:
    """From now on there is something to save, so the process is not ended from outside the main thread."""
    _State.began = True


def began() -> bool:
    """Whether there may be something to save."""
    return _State.began


def hold() -> None:
    """From now on the main thread works (it saves), whether or not a stop was requested."""
    _State.works = True


def work(works: bool) -> None:
    """Mark the main thread as working, which a stop lets finish, or as possibly waiting, which a stop ends.

    Raises:
        Stopped: the work is done, and a stop was requested meanwhile.
    """
    _State.works = works
    if not works:
        check()


@contextmanager
def finishing() -> Iterator[None]:
    """Mark the main thread as working within the block, and restore the mark after it.

    Raises:
        Stopped: a stop was requested meanwhile, and the thread is not marked as working outside the block.
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
        Stopped: a stop was requested.
    """
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_POLL, left))
        check()


@contextmanager
def call_on_stop(callback: Callable[[], object]) -> Iterator[None]:
    """Have ``callback`` called, in the main thread, if a stop is requested within the block.

    Raises:
        Stopped: a stop was requested before.
    """
    with _lock:
        _State.callbacks = (*_State.callbacks, callback)
    try:
        check()
        yield
    finally:
        with _lock:
            _State.callbacks = tuple(x for x in _State.callbacks if x is not callback)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.stop_requested and number == signal.SIGINT:
        _State.interrupted = True
        raise KeyboardInterrupt
    _State.stop_requested = True
    for callback in _State.callbacks:
        callback()
    if not _State.works:
        raise Stopped


def keep_signals() -> None:
    """Install the handlers again after another library has replaced them."""
    if _State.active and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def signals_stop() -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C request a stop. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.signal_arrived = _State.stop_requested = _State.interrupted = _State.works = _State.began = False
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
    """Make sure that the main thread handles a signal, or end the process if it cannot.

    A signal that arrives just before the thread waits for a lock is handled only after the wait, unless another signal
    follows. In a library that waits for another host in C++, no signal is handled, but that host may end the wait once
    it is told of the stop.
    """
    main, interrupts = threading.main_thread().ident or 0, 0
    with os.fdopen(reader, "rb", 0) as signals:
        while number := signals.read(1):
            interrupts += number[0] == signal.SIGINT
            if number[0] not in _SIGNALS:
                continue
            _State.signal_arrived = True
            end = time.monotonic() + _UNRESPONSIVE
            while not (_State.interrupted if interrupts > 1 else _State.stop_requested):
                if time.monotonic() > end and (interrupts > 1 or not _State.began):
                    write_last("stopped by a signal")
                    os._exit(130 if interrupts > 1 else 143)
                signal.pthread_kill(main, _NUDGE)
                time.sleep(_POLL)
