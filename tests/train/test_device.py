"""What is asked of the machine."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from pointewa.train.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(8):
    torch.ones(16 * 2**20).add(1)  # two tensors of 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[3])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again_without_asking_the_kernel():
    faults = {}
    for mode in ("keep", "default"):
        command = [sys.executable, "-c", FAULTS, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["default"] > 4 * faults["keep"]
