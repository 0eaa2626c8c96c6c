"""Operations and traffic are counted as often as they happen."""

import jax
import jax.numpy as jnp
import pytest

from domino_jax.runs.program_costs import count_flops, read_traffic

HLO = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%take_row (all: bf16[7,64,32], i: s32[]) -> bf16[1,64,32] {
  %all = bf16[7,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = bf16[1,64,32]{2,1,0} dynamic-slice(%all, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
}

%counted_body (p: (s32[], bf16[7,64,32])) -> (s32[], bf16[7,64,32]) {
  %p = (s32[], bf16[7,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p), index=0
  %w = bf16[7,64,32]{2,1,0} get-tuple-element(%p), index=1
  %row.1 = bf16[1,64,32]{2,1,0} fusion(%w, %i.1), kind=kLoop, calls=%take_row
  %all-gather-start = (bf16[1,64,32]{2,1,0}, bf16[4,64,32]{2,1,0}) all-gather-start(%row.1), dimensions={0}
  %all-gather-done = bf16[4,64,32]{2,1,0} all-gather-done(%all-gather-start)
  ROOT %next = (s32[], bf16[7,64,32]{2,1,0}) tuple(%i.1, %w)
}

%counted_condition (p.1: (s32[], bf16[7,64,32])) -> pred[] {
  %p.1 = (s32[], bf16[7,64,32]{2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.1), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%i.2, %seven), direction=LT
}

%open_condition (p.2: (f32[8], f32[8])) -> pred[] {
  %p.2 = (f32[8]{0}, f32[8]{0}) parameter(0)
  %a = f32[8]{0} get-tuple-element(%p.2), index=0
  %b = f32[8]{0} get-tuple-element(%p.2), index=1
  %zero.1 = f32[] constant(0)
  %total = f32[] reduce(%a, %zero.1), dimensions={0}, to_apply=%add
  %limit = f32[] reduce(%b, %zero.1), dimensions={0}, to_apply=%add
  ROOT %less.1 = pred[] compare(%total, %limit), direction=LT
}

%open_body (p.3: (f32[8], f32[8])) -> (f32[8], f32[8]) {
  %p.3 = (f32[8]{0}, f32[8]{0}) parameter(0)
  %a.1 = f32[8]{0} get-tuple-element(%p.3), index=0
  %all-reduce.1 = f32[8]{0} all-reduce(%a.1), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %pair = (f32[8]{0}, f32[8]{0}) tuple(%all-reduce.1, %a.1)
}

%noted_body (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.4 = (s32[], f32[8]{0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %v = f32[8]{0} get-tuple-element(%p.4), index=1
  %permuted = f32[8]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %pair.4 = (s32[], f32[8]{0}) tuple(%i.4, %permuted)
}

%noted_condition (p.5: (s32[], f32[8])) -> pred[] {
  %p.5 = (s32[], f32[8]{0}) parameter(0)
  ROOT %unclear = pred[] custom-call(%p.5), custom_call_target="opaque"
}

%near (n: f32[8]) -> f32[8] {
  %n = f32[8]{0} parameter(0)
  ROOT %reduced = f32[8]{0} reduce-scatter(%n), dimensions={0}, to_apply=%add
}

%far (m: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} parameter(0)
}

ENTRY %main (w.1: bf16[7,64,32], v.1: f32[8], on_chip: f32[8]) -> f32[8] {
  %w.1 = bf16[7,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %v.1 = f32[8]{0} parameter(1)
  %which = s32[] constant(1)
  %start = (s32[], bf16[7,64,32]{2,1,0}) tuple(%which, %w.1)
  %loop = (s32[], bf16[7,64,32]{2,1,0}) while(%start), condition=%counted_condition, body=%counted_body
  %open = (f32[8]{0}, f32[8]{0}) while(%start), condition=%open_condition, body=%open_body
  %noted = (s32[], f32[8]{0}) while(%start), condition=%noted_condition, body=%noted_body, TRIPS
  %chosen = f32[8]{0} conditional(%which, %v.1, %v.1), branch_computations={%near, %far}
  %kept = f32[8]{0:T(128)S(1)} negate(%chosen)
  ROOT %result = f32[8]{0} add(%kept, %chosen)
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


IN_PIECES = """HloModule pieces

%start_piece (p.1: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %whole.1 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=5, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %begun = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) custom-call(%whole.1), custom_call_target="AsyncStart"
}

%next_piece (p.2: bf16[4,8], p.3: bf16[16,8], x.2: f32[32]) -> (f32[32], bf16[4,8], bf16[16,8], bf16[16,8]) {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %p.3 = bf16[16,8]{1,0} parameter(1)
  %x.2 = f32[32]{0} parameter(2)
  %negated = f32[32]{0} negate(%x.2)
  %whole.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=5, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %all.2 = (f32[32]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, bf16[16,8]{1,0}) tuple(%negated, %p.2, %whole.2, %p.3)
}

%last_piece (p.4: bf16[4,8], p.5: bf16[16,8]) -> bf16[16,8] {
  %p.4 = bf16[4,8]{1,0} parameter(0)
  %p.5 = bf16[16,8]{1,0} parameter(1)
  %whole.3 = bf16[16,8]{1,0} all-gather(%p.4), channel_id=5, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %ended = bf16[16,8]{1,0} custom-call(%whole.3, %p.5), custom_call_target="AsyncDone"
}

ENTRY %main (w: bf16[4,8], x: f32[32]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %x = f32[32]{0} parameter(1)
  %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, FIRST, calls=%start_piece
  %s.0 = bf16[4,8]{1,0} get-tuple-element(%s), index=0
  %s.1 = bf16[16,8]{1,0} get-tuple-element(%s), index=1
  %n = (f32[32]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, bf16[16,8]{1,0}) fusion(%s.0, %s.1, %x), kind=kOutput, NEXT
  %n.1 = bf16[4,8]{1,0} get-tuple-element(%n), index=1
  %n.2 = bf16[16,8]{1,0} get-tuple-element(%n), index=2
  ROOT %d = bf16[16,8]{1,0} fusion(%n.1, %n.2), kind=kCustom, LAST, calls=%last_piece
}
"""
for name, aliases in {
    "FIRST": "{0}: (0, {})",
    "NEXT": "{1}: (0, {}), {2}: (1, {}), {3}: (1, {})",
    "LAST": "{}: (1, {})",
}.items():
    called = ", calls=%next_piece" if name == "NEXT" else ""
    IN_PIECES = IN_PIECES.replace(name, f"output_to_operand_aliasing={{{aliases}}}{called}")


def test_an_exchange_in_pieces_beside_computation_is_one():
    """As libtpu writes an all-gather that goes on in the background of several fusions."""
    traffic = read_traffic(IN_PIECES)
    part, whole, vector = 4 * 8 * 2, 16 * 8 * 2, 32 * 4
    assert traffic.collective_bytes == {"all-gather": whole}
    assert traffic.moved_bytes == part + whole + 2 * vector


def test_collectives_count_as_often_as_their_loop_runs():
    traffic = read_traffic(HLO)
    assert traffic.collective_bytes == {
        "all-gather": 7 * 4 * 64 * 32 * 2,  # seven rounds, its result and not the pair that it starts with
        "all-reduce": 8 * 4,  # in a loop that ends on data: once
        "collective-permute": 5 * 8 * 4,  # as the compiler noted
        "reduce-scatter": 8 * 4 // 2,  # in one of two branches
    }
    assert traffic.num_unknown_loops == 1
    assert traffic.host_calls == ()


def test_a_slice_moves_what_it_takes_and_memory_on_the_chip_is_free():
    row, vector = 64 * 32 * 2, 8 * 4
    compare = 1 + 4 + 4
    # A slice is read and written, read to be gathered, four of them arrive; its index is read, the counter compared.
    expected = 7 * (2 * row + 4 + row + 4 * row + compare)
    turn = 2 * (vector + 4 + 4) + compare + 2 * vector  # the loop that ends on data
    expected += turn
    expected += 5 * (1 + 4 + vector + 2 * vector)  # the one whose length is noted
    expected += 2 * vector // 2  # one of two branches
    expected += vector + 2 * vector  # what is kept on the chip is neither written nor read
    assert (read_traffic(HLO).moved_bytes, read_traffic(HLO).turn_bytes) == (expected, turn)
    everywhere = read_traffic(HLO.replace("T(128)S(1)", "T(128)"))
    assert everywhere.moved_bytes == expected + 2 * vector


@pytest.mark.parametrize(
    "line",
    [
        '%h = f32[8]{0} custom-call(%v.1), custom_call_target="xla_ffi_python_cpu_callback"',
        "%h = ((f32[8]{0}), token[]) infeed(%v.1)",
        "%h = token[] outfeed(%v.1, %v.1)",
    ],
)
def test_what_asks_the_host_is_found(line):
    text = HLO.replace("  %which = ", f"  {line}\n  %which = ")
    assert len(read_traffic(text).host_calls) == 1


def test_flops_of_loops_branches_and_gradients():
    a, ws = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    one = 2 * 8 * 16 * 16

    def chain(a, ws):
        return jax.lax.scan(lambda c, w: (c @ w, None), a, ws)[0]

    assert count_flops(jax.make_jaxpr(chain)(a, ws)) == 5 * one
    assert count_flops(jax.make_jaxpr(jax.grad(lambda a: chain(a, ws).sum()))(a)) == 10 * one

    def choose(i, a, w):
        return jax.lax.switch(i, [lambda a: a @ w, lambda a: a, lambda a: (a @ w) @ w, lambda a: a], a)

    assert count_flops(jax.make_jaxpr(choose)(0, a, ws[0])) == 3 / 4 * one


def test_flops_and_bytes_agree_with_the_compiler_where_nothing_loops():
    def layer(x, w, v):
        return jnp.tanh(x @ w) @ v

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 512), (512, 1024), (1024, 512))]
    traced = jax.jit(layer).trace(*shapes)
    compiled = traced.lower().compile()
    said = compiled.cost_analysis()
    assert count_flops(traced.jaxpr) == pytest.approx(said["flops"], rel=0.01)
    assert read_traffic(compiled.as_text()).moved_bytes == pytest.approx(said["bytes accessed"], rel=0.01)


def test_a_scan_moves_its_body_every_time():
    def chain(x, ws):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]

    def read(steps):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (steps, 64, 64))]
        return read_traffic(jax.jit(chain).lower(*shapes).compile().as_text())

    few, many = read(10), read(40)
    assert few.num_unknown_loops == many.num_unknown_loops == 0
    assert many.moved_bytes == pytest.approx(4 * few.moved_bytes, rel=0.05)


def test_copies_are_found():
    """Alone or as all that a fusion does; neither a prefetch nor what is turned within a product's fusion."""
    text = """HloModule jit_g, is_scheduled=true

%turn (w: bf16[8,4]) -> bf16[4,8] {
  %w = bf16[8,4]{1,0} parameter(0)
  ROOT %turned = bf16[4,8]{1,0} transpose(%w), dimensions={1,0}
}

%turn_and_add (w.1: f32[64,4]) -> f32[4,64] {
  %w.1 = f32[64,4]{1,0} parameter(0)
  %turned.1 = f32[4,64]{1,0} transpose(%w.1), dimensions={1,0}
  ROOT %sum = f32[4,64]{1,0} add(%turned.1, %turned.1)
}

ENTRY %main (w.2: bf16[8,4], w.3: f32[64,4]) -> f32[4,64] {
  %w.2 = bf16[8,4]{1,0} parameter(0)
  %w.3 = f32[64,4]{1,0} parameter(1)
  %fetch = (f32[64,4]{1,0:S(1)}, f32[64,4]{1,0}, u32[]) copy-start(%w.3)
  %fetched = f32[64,4]{1,0:S(1)} copy-done(%fetch)
  COPY
  ROOT %result = f32[4,64]{1,0} fusion(%fetched), kind=kLoop, calls=%turn_and_add
}
"""
    alone = "%small = bf16[8,4]{0,1} copy(%w.2)"
    fused = "%small = bf16[4,8]{1,0} fusion(%w.2), kind=kLoop, calls=%turn"
    assert [read_traffic(text.replace("COPY", line)).largest_copy for line in (alone, fused, "")] == [64, 64, 0]


def test_what_a_loop_takes_back_from_the_chips_own_memory():
    """A loop whose end is not known that fetches an array, changes and returns it, as XLA does with small caches."""
    text = """HloModule jit_f, is_scheduled=true

%goes_on (c: (f32[64,4], pred[])) -> pred[] {
  %c = (f32[64,4]{1,0}, pred[]) parameter(0)
  ROOT %flag = pred[] get-tuple-element(%c), index=1
}

%turn (c.1: (f32[64,4], pred[])) -> (f32[64,4], pred[]) {
  %c.1 = (f32[64,4]{1,0}, pred[]) parameter(0)
  %flag.1 = pred[] get-tuple-element(%c.1), index=1
  %cache = f32[64,4]{1,0} get-tuple-element(%c.1), index=0
  %fetch = (f32[64,4]{1,0:S(1)}, f32[64,4]{1,0}, u32[]) copy-start(%cache)
  %fetched = f32[64,4]{1,0:S(1)} copy-done(%fetch)
  %changed = f32[64,4]{1,0:S(1)} negate(%fetched)
  %return = (f32[64,4]{1,0}, f32[64,4]{1,0:S(1)}, u32[]) copy-start(%changed)
  %returned = f32[64,4]{1,0} copy-done(%return)
  ROOT %next = (f32[64,4]{1,0}, pred[]) tuple(RESULT, %flag.1)
}

ENTRY %main (p: (f32[64,4], pred[])) -> (f32[64,4], pred[]) {
  %p = (f32[64,4]{1,0}, pred[]) parameter(0)
  ROOT %loop = (f32[64,4]{1,0}, pred[]) while(%p), condition=%goes_on, body=%turn
}
"""
    assert read_traffic(text.replace("RESULT", "%returned")).returned_types == ("f32[64,4]",)
    without = "\n".join(line for line in text.splitlines() if "return" not in line)
    assert read_traffic(without.replace("RESULT", "%cache")).returned_types == ()


def test_what_an_inner_fusion_hands_on_is_read():
    """libtpu wraps a large weight in a fusion of a bitcast within that of its product."""
    text = """HloModule jit_h, is_scheduled=true

%hand_on (w: bf16[64,32]) -> bf16[64,32] {
  %w = bf16[64,32]{1,0} parameter(0)
  ROOT %same = bf16[64,32]{1,0} bitcast(%w)
}

%product (w.1: bf16[64,32], x: f32[1,32]) -> f32[1,64] {
  %w.1 = bf16[64,32]{1,0} parameter(0)
  %x = f32[1,32]{1,0} parameter(1)
  %w.2 = bf16[64,32]{1,0} fusion(%w.1), kind=kLoop, calls=%hand_on
  ROOT %y = f32[1,64]{1,0} dot(%x, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (w.3: bf16[64,32], x.1: f32[1,32]) -> f32[1,64] {
  %w.3 = bf16[64,32]{1,0} parameter(0)
  %x.1 = f32[1,32]{1,0} parameter(1)
  ROOT %result = f32[1,64]{1,0} fusion(%w.3, %x.1), kind=kOutput, calls=%product
}
"""
    assert read_traffic(text).moved_bytes == 64 * 32 * 2 + 32 * 4 + 64 * 4
