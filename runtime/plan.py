"""The plan: everything the runtime knows about a compiled sampling loop.

A plan is data (JSON in the artifact's manifest). The compiler writes it, the runtime executes it, and
nothing in it is code. Dimensions are integers or the name of a symbol in `Plan.symbols`; the symbol `B`
counts the rows of one denoiser call, which is twice the images under classifier-free guidance.

Life of a request:

1. `request` calls run once on the conditions and fill *request ports*.
2. `table` calls run once, batched over all sampler calls: their row inputs come from `constants` with a
   leading sampler-call dimension (timestep-only values, computed at compile time) and from request ports;
   they fill *table ports*, `[calls, B, ...]`.
3. For sampler call `i`, the calls of `step_programs[order[i]]` run: they read the latent, request ports,
   constants and row `i` of table ports and of timestep constants, pass values through `buffers`, and write
   the output of the denoiser. Values that later sampler calls read lie in `histories`. Under guidance,
   `guidance[i]` says whether both halves of the batch run or the conditional one alone.

`denoise` at any timestep runs `timestep` calls (timestep-only values for the timesteps given), then the same
`request` and `table` calls as if there were one sampler call, then one step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

DTYPES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip

Dimension = int | str
Shape = tuple[Dimension, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with its dtype and shape."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class InputSpec:
    """An input of the denoiser: `role` is latent, timestep or condition.

    `null` fills the row of the unconditional half under guidance; without it the caller gives negative
    conditions. `minimum` and `maximum` bound integer conditions (rows of an embedding table), both inclusive.
    """

    name: str
    role: str
    dtype: str
    shape: Shape
    null: float | None = None
    minimum: int | None = None
    maximum: int | None = None


@dataclass(frozen=True)
class WeightSpec:
    """A tensor in the artifact: bytes `offset` to `offset + nbytes` of `member`, little-endian, C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    member: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class EngineSpec:
    """One ONNX model of the artifact; its ports carry the names given here.

    `weights` names the entries of `Plan.weights` that its external initializers point at; `kind` is the scope
    it belongs to: timestep, request, table or step.
    """

    name: str
    kind: str
    member: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConstantSpec:
    """A tensor computed at compile time, stored like a weight.

    `per_call` says that its leading dimension counts sampler calls: row `i` is read at sampler call `i`, and
    a leading `1` after it is repeated over the rows of the batch (`rows` says that it is).
    """

    name: str
    weight: str
    per_call: bool
    rows: bool


@dataclass(frozen=True)
class Ref:
    """Where a port reads or writes. `kind` is one of

    `input` (an input of the denoiser), `constant`, `timestep` (a timestep-only value: row of a `per_call`
    constant in `sample`, output of the timestep calls in `denoise`), `request` and `table` (ports filled by
    those calls), `buffer` (a value between two step engines), `history` (a value for later sampler calls), `output`
    (the denoiser's output).
    """

    kind: str
    name: str


REF_KINDS = ("input", "constant", "timestep", "request", "table", "buffer", "history", "output")


@dataclass(frozen=True)
class Call:
    """Run `engine` with its ports, in the order of the engine's specs, bound to these places."""

    engine: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass(frozen=True)
class BufferSpec:
    """A value between two step engines. Buffers of one `slot` share memory, never while both are live."""

    name: str
    dtype: str
    shape: Shape
    slot: int


@dataclass(frozen=True)
class PortSpec:
    """A value kept for the whole request (`request`) or for all sampler calls (`table`).

    The shape of a table port leaves out the dimension of sampler calls. `rows` says that its leading
    dimension is the batch `B`; a port without it is shared by all rows.
    """

    name: str
    dtype: str
    shape: Shape
    rows: bool


@dataclass(frozen=True)
class CallGuidance:
    """How one sampler call is guided. `mode` is one of

    `both` (both halves run), `conditional` (the conditional half alone, unguided), `reuse` (the conditional half;
    the difference of the halves is the sum of `weights` times those of earlier `both` calls, newest first).
    """

    mode: str
    weights: tuple[float, ...]


GUIDANCE_MODES = ("both", "conditional", "reuse")


@dataclass(frozen=True)
class Plan:
    """A whole compiled loop; see the module's text for how it is executed."""

    symbols: dict[str, tuple[int, int]]
    inputs: tuple[InputSpec, ...]
    output: TensorSpec
    weights: tuple[WeightSpec, ...]
    engines: tuple[EngineSpec, ...]
    constants: tuple[ConstantSpec, ...]
    timestep_ports: tuple[PortSpec, ...]
    request_ports: tuple[PortSpec, ...]
    table_ports: tuple[PortSpec, ...]
    buffers: tuple[BufferSpec, ...]
    histories: tuple[TensorSpec, ...]
    timestep: tuple[Call, ...]
    request: tuple[Call, ...]
    table: tuple[Call, ...]
    step_programs: tuple[tuple[Call, ...], ...]
    order: tuple[int, ...]
    guidance: tuple[CallGuidance, ...]


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: a dataclass is an object of its fields, a `Ref` is the text `kind:name`."""
    encoded: dict[str, Any] = _encode(plan)
    return encoded


def plan_from_json(value: object) -> Plan:
    """The plan that `plan_to_json` gave, which keeps every rule of `plan_rules.RULES`.

    Raises ArtifactError, and nothing else, whatever `value` is.
    """
    # Decoder and rules stand on the types above, so they can only be imported after this module.
    from dcc.runtime.plan_reader import decode_plan
    from dcc.runtime.plan_rules import check_plan

    plan = decode_plan(value)
    check_plan(plan)
    return plan


def _encode(value: object) -> Any:
    if isinstance(value, Ref):
        return f"{value.kind}:{value.name}"
    if is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value
