"""Collections that leave out what has been imported.

vLLM asks for several of them whenever an engine starts and stops. Each walks through all that torch, transformers and
vLLM have imported; together they took longer than the rest of start and stop.
"""

import gc

_look_at_everything = gc.unfreeze


def leave_out_what_is_there():
    """Until `look_at_everything`, also where vLLM asks for all."""
    gc.freeze()
    gc.unfreeze = lambda: None


def look_at_everything():
    gc.unfreeze = _look_at_everything
    gc.unfreeze()
