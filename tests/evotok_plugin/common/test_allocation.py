"""Memory that is freed and allocated again is not filled by the system again."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from evotok_plugin.common.allocation import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
def step():
    parts = [np.ones(1 << 20) for _ in range(4)] + [np.ones(1 << 23)]  # 8 MiB each, and 64 MiB
    del parts
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again_without_page_faults():
    faults = {}
    for mode in ("kept", "default"):
        result = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True)
        if result.returncode == 77:
            pytest.skip("only glibc keeps freed memory on request")
        faults[mode] = int(result.stdout)
    assert faults["kept"] < faults["default"] / 10, faults
