"""What a step frees is there for the next one."""

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

before = outside_of_the_heap(8)  # from then on blocks of that size come from the heap, but no larger ones
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
QUAD([p]).step()
print(before, outside_of_the_heap(24))
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="other C libraries have rules of their own")
def test_large_temporaries_come_from_the_heap_after_a_step():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=1800, check=True)
    before, after = map(int, done.stdout.split())
    assert before >= 8 << 20 and after == 0
