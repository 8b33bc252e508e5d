"""How far a lowering may be from the original, by dtype. The one table; no test or command has its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference over the range (maximum minus minimum) of the reference, and why."""

    forward: float
    loop: float
    reason: str


TOLERANCE = {
    "float32": Tolerance(
        forward=1e-5,
        loop=1e-3,
        reason="sums of up to a few thousand float32 products in another order differ by some 1e-6 of the range;"
        " a loop of 50 steps with guidance multiplies that by the guidance scale and by the model's slope",
    ),
    "float64": Tolerance(1e-12, 1e-9, "the same argument with 53-bit products"),
    "float16": Tolerance(
        5e-3, 5e-2, "10-bit mantissas: half a unit in the last place of each activation, over some tens of layers"
    ),
    "bfloat16": Tolerance(4e-2, 2e-1, "7-bit mantissas: eight times float16's rounding"),
}
