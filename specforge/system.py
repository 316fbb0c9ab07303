"""Devices, memory and signals of this process."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from specforge.errors import UserError
from specforge.logs import write_last

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PR_SET_PDEATHSIG = 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel.

    Every training step frees and allocates the same hundreds of megabytes; getting the pages back from the kernel costs
    about 7 % of a step on two CPU cores. Has no effect without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> str:
    """A device by name; ``auto`` is cuda if available, else cpu.

    Raises:
        UserError: the name is not that of a device, or this machine has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: use auto, cpu, cuda or cuda:N") from error
    # Counts devices without initialising one, because the process may still fork.
    kind = getattr(torch, device.type, None)
    count = kind.device_count() if kind is not None and kind.is_available() else 0
    if (device.index or 0) >= count:
        raise UserError(
            f"device {name!r}: this machine has {count or 'no'} {device.type} device{'s' * (count != 1)} that PyTorch "
            "can use; use auto or cpu"
        )
    return name


def multiplies_in(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of matrix products that are wanted in ``dtype``: fp32 on a CPU without instructions for bf16 or fp16.

    PyTorch emulates these there; a training step in bf16 takes 15 times as long as in fp32 (benchmarks/README.md).
    """
    import torch

    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)  # absent from builds without oneDNN
    return dtype if supported is not None and supported() else torch.float32


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that a service has one way to end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def say_on_sigterm() -> Iterator[None]:
    """Within the block, this process says so if SIGTERM ends it. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        write_last("stopped by a signal")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_free(host: str, port: int, option: str) -> None:
    """Check that a server can listen at an address; ``option`` names what chooses its port.

    Raises:
        UserError: another process does, or the address does not belong to this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_listen(host, port, error, option) from error


def cannot_listen(host: str, port: int, error: OSError, option: str = "--port") -> UserError:
    """A one-line error for an address that a server cannot listen at; ``option`` names what chooses its port."""
    other = f"port with {option}" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "address with --host"
    return UserError(f"{host}:{port}: cannot listen there ({error.strerror or error}); choose another {other}")


def available_memory() -> int:
    """Bytes of memory that can be allocated without swapping; the machine's total if that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: str) -> int:
    """Peak memory of this process in bytes: allocated on a CUDA device, or resident on the CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def end_with_parent(parent: int) -> Callable[[], None]:
    """A ``preexec_fn`` for a new process that sends it SIGTERM when its parent dies (Linux only)."""

    def prepare() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent has died already
                os._exit(1)

    return prepare
