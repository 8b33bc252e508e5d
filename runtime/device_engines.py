"""The engines that a loop on a device runs: those of the plan, and the updates between two forwards."""

from __future__ import annotations

from dcc.runtime.loop_spec import LoopSpec, update_ports
from dcc.runtime.plan import EngineSpec, Plan
from dcc.runtime.workspace import TABLE_ROWS

UPDATE = "update"
TYPICAL_IMAGES = 4


def engine_specs(plan: Plan, loop: LoopSpec | None) -> dict[str, EngineSpec]:
    """Every engine by its name; an update engine is in no member of the artifact, and counts images with B."""
    updates = () if loop is None else loop.kinds
    return {engine.name: engine for engine in plan.engines} | {
        kind.name: EngineSpec(kind.name, UPDATE, "", *update_ports(kind)) for kind in updates
    }


def profile_rows(plan: Plan, engine: EngineSpec) -> tuple[int, int, int] | None:
    """Least, typical and most rows that the engine is given; None where no port of it counts rows."""
    if not any("B" in port.shape for port in (*engine.inputs, *engine.outputs)):
        return None
    low, high = plan.symbols["B"]
    guided = 2 if any(mode.mode != "conditional" for mode in plan.guidance) or not plan.guidance else 1
    typical = min(high, guided * TYPICAL_IMAGES)
    if engine.kind == UPDATE:
        return 1, min(high, TYPICAL_IMAGES), high
    if engine.kind == "table":
        most = largest_table_rows(plan)
        return low, min(most, max(1, len(plan.order)) * typical), most
    # Half the rows run in calls without the unconditional half.
    return max(1, low // 2), max(low, typical), high


def largest_table_rows(plan: Plan) -> int:
    """The most rows that a table engine is ever run with."""
    most = plan.symbols["B"][1]
    calls = max(len(plan.order), 1)
    return max(rows * min(calls, max(1, TABLE_ROWS // rows)) for rows in range(1, most + 1))
