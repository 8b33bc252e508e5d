"""ONNX attention over unsplit heads: no transpositions are left, and what cannot be unsplit is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import pytest

from dcc.exports.templates import export_templates
from dcc.ir.program import Program
from dcc.passes import ALWAYS, CUT, EXACT, run_passes


@pytest.mark.parametrize(
    ("name", "transposed"),
    # FLUX turns its queries and keys by rotary embeddings after splitting the heads: they stay split.
    [("dit", False), ("diffusers_dit", False), ("flux", True)],
)
def test_attention_components(name: str, transposed: bool, traced: Callable[[str], Program]) -> None:
    program = traced(name)
    run_passes(program, (*ALWAYS, *EXACT, CUT))
    hashes = {stage.template for stage in program.stages if stage.kind == "component"}
    found = 0
    for template in export_templates({key: program.templates[key] for key in hashes}).values():
        counts = Counter(node.op_type for node in template.nodes)
        if not counts["Attention"]:
            continue
        found += 1
        attention = next(node for node in template.nodes if node.op_type == "Attention")
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in attention.attribute}
        assert bool(counts["Transpose"]) == transposed
        assert ("q_num_heads" in attributes) != transposed
        read = {name for node in template.nodes for name in node.input}
        assert {tensor.name for tensor in template.initializers} <= read
    assert found
