"""Processes that train together, as torchrun would start them, and that can be killed. For programs of their own, which
fork."""

import importlib
import os
import signal
import time
import traceback

from garbage import leave_out_what_is_there
from rendezvous import free_port


def import_vllm():
    """Once, before the fork, what every rank with an engine would import for itself."""
    for name in ("vllm.model_executor.models.transformers", "vllm.v1.worker.cpu_worker", "vllm.entrypoints.llm"):
        importlib.import_module(name)


class Ranks:
    """Forks as many processes as asked for; each calls a function and ends.

    Args:
        num_ranks: 1 for a run without a process group.
        train: called in each process with a function that tells the parent that training has begun.
    """

    def __init__(self, num_ranks, train):
        self.children, port = [], free_port()
        self.reading, self.writing = os.pipe()
        leave_out_what_is_there()  # a collection of a rank would copy every page of it
        for rank in range(num_ranks):
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                _act(rank, num_ranks, port, train, self.writing)
            self.children.append(child)
        os.close(self.writing)

    def wait_for_training(self):
        """False where the ranks end without."""
        return os.read(self.reading, 1) == b"t"

    def kill(self):
        """Kill -9 of all ranks; returns whether one was still at it."""
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        self._expect_nobody()
        return any(status == -signal.SIGKILL for status in statuses)

    def terminate(self):
        """SIGTERM to all ranks, as a scheduler sends it; returns whether one was still at it."""
        for child in self.children:
            os.kill(child, signal.SIGTERM)
        return any(self.end())

    def end(self):
        """Exit statuses of all ranks, when they have ended."""
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        self._expect_nobody()
        return statuses

    def _expect_nobody(self):
        """What a rank has started ends with it."""
        os.close(self.reading)
        give_up_at = time.monotonic() + 20
        for child in self.children:
            while _exists(child):
                assert time.monotonic() < give_up_at, "a process of a rank outlives it"
                time.sleep(0.05)


def _act(rank, num_ranks, port, train, writing):
    status = 1
    try:
        if num_ranks > 1:
            os.environ |= {
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
            }
        train(lambda: os.write(writing, b"t"))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
