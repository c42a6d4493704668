"""Kill a process again and again while it saves, and look at the file; a program of its own, for it forks.

Prints how often a half-written temporary file was left behind, so that the test knows that kills hit a save.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from lit_specrl.prefix_cache.store import CachedRollout, RolloutStore

NUM_ROWS, NUM_TOKENS, NUM_KILLS = 200, 1000, 25
IDENTITY = {"model": "tiny"}


def filled_store(generation: int) -> RolloutStore:
    """All tokens equal to the generation, and more rows in odd generations."""
    store, array = RolloutStore(), np.full(NUM_TOKENS, generation)
    num_rows = NUM_ROWS * (1 + generation % 2)
    store.put(CachedRollout(str(i), 0, array, array, array, "stop", generation, generation) for i in range(num_rows))
    return store


def save_for_ever(path: Path) -> None:
    stores = [filled_store(generation) for generation in (0, 1)]
    while True:
        for store in stores:
            store.save(path, IDENTITY)


def main(path: Path) -> None:
    randomness = random.Random(0)
    filled_store(0).save(path, IDENTITY)
    num_partial = 0
    for _ in range(NUM_KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(path)
        time.sleep(0.05 + 0.1 * randomness.random())  # filling the stores takes less than the first 0.05 s
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        num_partial += bool(list(path.parent.glob(f"{path.name}.partial-*")))

        store = RolloutStore.load(path, IDENTITY)
        generation = next(iter(store)).step
        assert len(store) == NUM_ROWS * (1 + generation % 2)
        assert all((row.token_ids == generation).all() and row.step == generation for row in store)
    print(num_partial)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
