"""How the CPU is used: the allocator's settings, and stretches that must run on one thread. A plain helper."""

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
KEEP_BYTES = 1 << 30


def tune_allocator() -> bool:
    """Keep freed memory instead of handing it back: page faults otherwise cost CPU training a factor of two.

    glibc only (elsewhere nothing happens and the answer is False). Call it before the first large allocation.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_BYTES), (M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread: their sums then do not depend on the machine's core count."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
