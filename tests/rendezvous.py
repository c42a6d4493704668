"""How processes find each other: ports, and what the environment tells a rank.

A port that the system picks may be taken by anybody's outgoing connection before its owner listens on it. These lie
below the range that the system picks from.
"""

import os
import random
import socket

OF_A_LAUNCHED_RANK = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")  # with `LOCAL_RANK` Lightning launches no ranks
_BELOW_EPHEMERAL = range(15000, 32000)
_draw = random.Random(os.getpid())


def free_port():
    while True:
        port = _draw.choice(_BELOW_EPHEMERAL)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
