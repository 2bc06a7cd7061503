"""Memory that the C library keeps for later allocations."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # numbers of options in glibc's malloc.h
_LARGEST_MAPPED = 32 << 20  # bytes; the most that glibc accepts
_NEVER = 2**31 - 1  # bytes of free memory above which it is returned


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of returning it to the system.

    A training step on a CPU allocates and frees the same large tensors again and again. With glibc's settings each of
    them is fresh memory, and the system fills it with zeros page by page, which takes 10 to 20 % of the time of a
    tokenizer's training, most with large tensors. Memory in use hardly changes, but the process keeps its peak.

    Returns:
        whether the C library has these settings; only glibc, on Linux, does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library or system
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MAPPED), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all([mallopt(option, value) == 1 for option, value in settings])
