"""What the C library does with freed memory is the user's to say, and a step leaves it so."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import torch
from psgd_torch_backend import QUAD

class Counts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts

def outside_of_the_heap(mebibytes):
    before = mallinfo().hblkhd
    held = torch.empty(mebibytes << 20, dtype=torch.uint8)
    return mallinfo().hblkhd - before

p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
QUAD([p]).step()
print(outside_of_the_heap(24))
"""
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "67108864"}


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="other C libraries have rules of their own")
@pytest.mark.parametrize(("said", "outside"), [({}, 24 << 20), (KEEPING, 0)], ids=["by default", "kept"])
def test_large_blocks_come_from_the_heap_where_the_user_says_so(said: dict[str, str], outside: int):
    run = [sys.executable, "-c", PROGRAM]
    plain = {name: value for name, value in os.environ.items() if name not in KEEPING}
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800, check=True, env={**plain, **said})
    assert (int(done.stdout) >= outside) if outside else int(done.stdout) == 0
