"""Seeds that torch's generators take."""

from __future__ import annotations

import numpy as np

from dcc.errors import UsageError

SEED_RANGE = (-(2**63), 2**64 - 1)


def check_seed(seed: object) -> int:
    """Return `seed` as an int that `torch.Generator.manual_seed` takes too, or raise UsageError."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise UsageError("a seed is not an integer", got=repr(seed), want="an integer", next="give seed=0")
    value = int(seed)
    if not SEED_RANGE[0] <= value <= SEED_RANGE[1]:
        raise UsageError("a seed does not fit in 64 bits", got=value, want=f"{SEED_RANGE[0]} to {SEED_RANGE[1]}")
    return value
