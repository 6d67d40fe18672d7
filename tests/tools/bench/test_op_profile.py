"""Whose time a moment is, and what instructions compute and move."""

import pytest

from tools.bench.op_profile import Costs, Event, Row, shares, table

PROGRAM = """HloModule jit_step

%fused (p.1: f32[8,16], p.2: bf16[16,4]) -> f32[8,4] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  %p.2 = bf16[16,4]{1,0} parameter(1)
  %convert.1 = f32[16,4]{1,0} convert(%p.2)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p.1, %convert.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %copy.9 = (s32[], f32[8,4]{1,0}) copy((s32[], f32[8,4]{1,0}) %t)
}

ENTRY %main (a: f32[8,16], b: bf16[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%c, body=%body
  %add.3 = f32[8,4]{1,0} add(f32[8,4]{1,0} %fusion.2, f32[8,4]{1,0} %fusion.2)
  ROOT %fusion.2 = f32[8,4]{1,0:T(8,128)} fusion(f32[8,16]{1,0} %a, bf16[16,4]{1,0} %b), kind=kOutput, calls=%fused
}
"""


def test_a_moment_belongs_to_the_innermost_of_each_thread_in_equal_parts() -> None:
    main = [Event("while", 0.0, 10.0), Event("dot", 1.0, 4.0), Event("dot", 5.0, 6.0), Event("add", 11.0, 12.0)]
    other = [Event("exp", 3.0, 5.0)]
    assert shares([main, other]) == pytest.approx(
        {"while": 1 + 0.5 + 4, "dot": 2 + 0.5 + 1, "exp": 0.5 + 0.5, "add": 1}
    )
    assert shares([]) == {}


def test_an_operation_in_itself_is_counted_once() -> None:
    assert shares([[Event("call", 0.0, 4.0), Event("call", 1.0, 2.0)]]) == pytest.approx({"call": 4.0})


def test_products_are_found_inside_of_fusions_and_bytes_at_their_borders() -> None:
    costs = Costs(PROGRAM)
    assert costs.of("dot.1") == (2.0 * 8 * 4 * 16, 4 * (8 * 4 + 8 * 16 + 16 * 4))
    assert costs.of("fusion.2") == (2.0 * 8 * 4 * 16, 4 * (8 * 4 + 8 * 16) + 2 * 16 * 4)
    assert costs.of("add.3") == (0.0, 4 * 3 * 8 * 4)
    assert costs.of("while.1") == (0.0, 0.0)
    assert costs.of("not there") == (0.0, 0.0)
    assert costs.label("fusion.2") == "fusion f32[8,4]"
    assert costs.label("while.1") == "while s32[] f32[8,4]"
    assert costs.label("not.there.12") == "not.there"


def test_what_is_not_shown_is_summed() -> None:
    rows = [Row(f"dot.{i}", 0.01 * (10 - i), 1.0, 1e9, 1e6) for i in range(10)]
    lines = table([*rows, Row("(idle)", 0.05, 0.0, 0.0, 0.0)], most=4).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["dot.0", "dot.1", "dot.2", "dot.3"]
    assert lines[6].startswith("(6 others)")
    assert lines[6].split()[2:5] == ["35.0%", "210ms", "6"]
    assert lines[7].split()[:3] == ["(idle)", "8.3%", "50ms"]
    assert lines[8].split() == ["one", "step", "100%", "600ms"]
