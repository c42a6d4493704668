import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from lit_specrl import allocator
from lit_specrl.bench.memory import PeakMemory
torch.ones(8) + 1  # code and threads are loaded
getattr(allocator, sys.argv[1])()
for turn in range(2):
    memory = PeakMemory("cpu")
    tensors = [torch.ones(2**20) for _ in range(40)]
    del tensors
    print(memory.beyond_start() / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is told by Linux")
@pytest.mark.parametrize("setting", ["give_back_freed_memory", "keep_freed_memory"])
def test_memory_that_is_taken_again_is_seen_where_it_was_given_back(setting):
    program = [sys.executable, "-c", PROGRAM, setting]
    output = subprocess.run(program, capture_output=True, text=True, check=True, timeout=100).stdout
    first, again = (float(line) for line in output.split())
    assert first == pytest.approx(160, abs=8)
    if setting == "give_back_freed_memory":
        assert again == pytest.approx(160, abs=8)
    else:
        assert again < 80  # new pages only where the pieces do not fit
