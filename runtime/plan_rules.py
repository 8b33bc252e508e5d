"""What a plan's values must mean together: named rules, checked before anything of the plan is used.

A plan that passes can be executed without checking anything again: every name resolves, every port meets a
value of its own dtype and shape, every value is written before it is read, and live buffers share no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from dcc.runtime.plan import (
    DTYPES,
    BufferSpec,
    ConstantSpec,
    EngineSpec,
    InputSpec,
    Plan,
    PortSpec,
    Shape,
    TensorSpec,
    WeightSpec,
)
from dcc.runtime.plan_flow import (
    BATCH,
    READS,
    broken,
    check_bindings,
    check_buffers,
    check_guidance,
    check_histories,
    check_liveness,
    check_ports,
    check_timesteps,
    type_text,
)
from dcc.runtime.strict_json import shown

RANK_LIMIT = 16
DIMENSION_LIMIT = 2**31
SYMBOL_LIMIT = 65536
# Elements of one tensor at the largest sizes: far above any model, far below where 64-bit offsets wrap.
TENSOR_LIMIT = 2**48
WEIGHT_ALIGNMENT = 64
INTEGERS = {"int64": 63, "int32": 31, "int8": 7, "uint8": 8}

Named = InputSpec | WeightSpec | EngineSpec | ConstantSpec | PortSpec | BufferSpec | TensorSpec
ROLES = ("latent", "timestep", "condition")


def check_plan(plan: Plan) -> None:
    """Every rule of `RULES` holds, or one ArtifactError names the first that does not."""
    for rule in RULES:
        rule(plan)


def check_names(plan: Plan) -> None:
    """names-are-unique: within each table, and among an engine's inputs and outputs."""
    tables: dict[str, tuple[Named, ...]] = {
        "inputs": plan.inputs, "weights": plan.weights, "engines": plan.engines, "constants": plan.constants,
        "timestep_ports": plan.timestep_ports, "request_ports": plan.request_ports,
        "table_ports": plan.table_ports, "buffers": plan.buffers, "histories": plan.histories,
    }  # fmt: skip
    for table, entries in tables.items():
        _check_unique((entry.name for entry in entries), table)
    for engine in plan.engines:
        _check_unique((port.name for port in engine.inputs + engine.outputs), f"ports of engine {shown(engine.name)}")
        _check_unique(engine.weights, f"weights of engine {shown(engine.name)}")


def check_symbols(plan: Plan) -> None:
    """symbols-in-range: identifiers, each with 1 <= minimum <= maximum <= 65536."""
    for name, (minimum, maximum) in plan.symbols.items():
        if not name.isidentifier() or not 1 <= minimum <= maximum <= SYMBOL_LIMIT:
            raise broken(
                "symbols-in-range",
                f"symbol {shown(name)}",
                f"{minimum} to {maximum}",
                f"an identifier, with 1 <= minimum <= maximum <= {SYMBOL_LIMIT}",
            )


def check_tensors(plan: Plan) -> None:
    """tensors-are-known: dtypes, ranks and dimensions of everything that has them."""
    ports = [port for engine in plan.engines for port in engine.inputs + engine.outputs]
    specs: tuple[InputSpec | TensorSpec | PortSpec | BufferSpec, ...] = (
        *plan.inputs, plan.output, *plan.timestep_ports, *plan.request_ports, *plan.table_ports,
        *plan.buffers, *plan.histories, *ports,
    )  # fmt: skip
    for spec in specs:
        _check_tensor(spec.name, spec.dtype, spec.shape, plan.symbols)
    for weight in plan.weights:
        _check_tensor(weight.name, weight.dtype, weight.shape, {})
    for port in plan.timestep_ports + plan.request_ports + plan.table_ports:
        if port.rows and port.shape[:1] != (BATCH,):
            raise broken(
                "tensors-are-known",
                f"port {shown(port.name)}",
                f"{port.shape}",
                f"rows first: ({BATCH}, ...)",
            )


def check_inputs(plan: Plan) -> None:
    """inputs-have-roles: one latent, at most one timestep, and bounds that integers can keep."""
    roles = [entry.role for entry in plan.inputs]
    if roles.count("latent") != 1 or roles.count("timestep") > 1 or not set(roles) <= set(ROLES):
        want = "one latent, at most one timestep, and conditions"
        raise broken("inputs-have-roles", "inputs", shown(", ".join(roles)), want)
    for entry in plan.inputs:
        bits = INTEGERS.get(entry.dtype)
        if bits is None:
            if entry.minimum is not None or entry.maximum is not None:
                raise broken("inputs-have-roles", shown(entry.name), f"bounds on {entry.dtype}", "bounds on integers")
            continue
        lowest, highest = (0 if entry.dtype == "uint8" else -(2**bits)), 2**bits - 1
        low = lowest if entry.minimum is None else entry.minimum
        high = highest if entry.maximum is None else entry.maximum
        null = low if entry.null is None else entry.null
        if not lowest <= low <= null <= high <= highest or null != int(null):
            got = f"minimum {entry.minimum}, maximum {entry.maximum}, null {entry.null}"
            want = f"minimum <= null <= maximum, all of {entry.dtype}"
            raise broken("inputs-have-roles", shown(entry.name), got, want)


def check_weights(plan: Plan) -> None:
    """weights-fill-their-bytes: size from dtype and shape, at an aligned offset."""
    for weight in plan.weights:
        size = math.prod(weight.shape) * DTYPES[weight.dtype]
        if weight.nbytes != size or weight.offset < 0 or weight.offset % WEIGHT_ALIGNMENT:
            raise broken(
                "weights-fill-their-bytes",
                f"weight {shown(weight.name)}",
                f"{weight.nbytes} bytes at {weight.offset}",
                f"{size} bytes at a multiple of {WEIGHT_ALIGNMENT}",
            )


def check_constants(plan: Plan) -> None:
    """constants-are-stored: each in a weight; a row per sampler call; a `1` where rows repeat."""
    shapes = {weight.name: weight.shape for weight in plan.weights}
    for constant in plan.constants:
        at = f"constant {shown(constant.name)}"
        shape = shapes.get(constant.weight)
        if shape is None:
            raise broken("constants-are-stored", at, f"no weight {shown(constant.weight)}", "a weight of the plan")
        if constant.per_call and shape[:1] != (len(plan.order),):
            raise broken("constants-are-stored", at, f"{shape}", f"{len(plan.order)} sampler calls first")
        if constant.rows and shape[constant.per_call :][:1] != (1,):
            raise broken("constants-are-stored", at, f"{shape}", "a 1 where the rows of the batch go")


def check_engines(plan: Plan) -> None:
    """engines-are-complete: of a known kind, with outputs, and weights that exist."""
    weights = {weight.name for weight in plan.weights}
    for engine in plan.engines:
        at = f"engine {shown(engine.name)}"
        if engine.kind not in READS or not engine.outputs:
            got = f"kind {shown(engine.kind)}, {len(engine.outputs)} outputs"
            raise broken("engines-are-complete", at, got, f"{', '.join(READS)}; at least one output")
        for name in engine.weights:
            if name not in weights:
                raise broken("engines-are-complete", at, f"no weight {shown(name)}", "weights of the plan")


def check_order(plan: Plan) -> None:
    """order-names-programs: at least one step program, and every sampler call runs one of them."""
    if not plan.step_programs:
        raise broken("order-names-programs", "step_programs", "none", "at least one")
    for call, program in enumerate(plan.order):
        if not 0 <= program < len(plan.step_programs):
            want = f"0 to {len(plan.step_programs) - 1}"
            raise broken("order-names-programs", f"order[{call}]", f"{program}", want)


def _check_tensor(name: str, dtype: str, shape: Shape, symbols: Mapping[str, tuple[int, int]]) -> None:
    # The largest size of each dimension; 0 is a size that no tensor may have.
    sizes = [size if isinstance(size, int) else symbols.get(size, (0, 0))[1] for size in shape]
    known = dtype in DTYPES and len(sizes) <= RANK_LIMIT
    known &= all(0 < size <= DIMENSION_LIMIT for size in sizes)
    if not known or math.prod(sizes) > TENSOR_LIMIT:
        want = f"a known dtype; up to {RANK_LIMIT} dimensions, each a symbol or 1 to {DIMENSION_LIMIT}"
        raise broken("tensors-are-known", f"tensor {shown(name)}", type_text((dtype, shape)), want)


def _check_unique(names: Iterable[str], table: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise broken("names-are-unique", table, f"{shown(name)} twice", "each name once")
        seen.add(name)


RULES: tuple[Callable[[Plan], None], ...] = (
    check_names, check_symbols, check_tensors, check_inputs, check_order, check_weights, check_constants,
    check_engines, check_bindings, check_timesteps, check_ports, check_buffers, check_liveness,
    check_guidance, check_histories,
)  # fmt: skip
"""In this order: a rule relies on those before it."""
