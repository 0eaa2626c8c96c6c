"""What a compiled program computes and moves, counted from its two texts.

In: a jaxpr, what was asked for, and the optimised HLO text of one device, what the compiler made of it. Out:
operations over all devices; bytes moved and exchanged by one. A loop's body counts as often as it runs (XLA's own
`cost_analysis` counts it once), the branches of a switch as if they were equally frequent. Knows nothing about models.

Source: the HLO text format and HloCostAnalysis of openxla/xla.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from jax.extend import core as jax_core

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Operations that exchange data between devices."""

_HOST_OPERATIONS = ("infeed", "outfeed", "send", "recv")
_HOST_CALL = re.compile(r'custom_call_target="([^"]*callback[^"]*)"')
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id",
                  "replica-id", "while", "conditional", "call", "async-start", "async-update", "async-done",
                  "opt-barrier", "optimization-barrier", "slice-start"}  # fmt: skip
_CHAIN = re.compile(r'chain_id="(\d+)"')
"""libtpu's note on an exchange that it spreads over several fusions: each of these pieces has all of it in its text."""
_PASSED_ON = re.compile(r"\{(\d*)\}: \((\d+), \{\}\)")
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def called(self) -> list[str]:
        return _CALLED.findall(self.attributes)

    @property
    def chain(self) -> str:
        found = _CHAIN.search(self.attributes)
        return found[1] if found else ""


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.attributes): i.name for i in self.instructions.values() if i.op == "parameter"}

    @cached_property
    def piece(self) -> _Instruction | None:
        """The exchange that this computation does a part of."""
        return next((i for i in self.instructions.values() if i.op in COLLECTIVES and i.chain), None)

    def users(self, name: str) -> list[tuple[_Instruction, int]]:
        return self._users.get(name, [])

    @cached_property
    def _users(self) -> dict[str, list[tuple[_Instruction, int]]]:
        users: dict[str, list[tuple[_Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for i, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, i))
        return users


@dataclass(frozen=True)
class Traffic:
    """What one device moves in a run of a program.

    Attributes:
        moved_bytes: to and from its memory, as far as it is not kept on the chip.
        collective_bytes: output sizes of what devices exchange, by operation.
        num_unknown_loops: loops that end on data; their bodies count once.
        turn_bytes: what of `moved_bytes` lies in such loops.
        host_calls: operations that ask the host in the middle of the program.
        largest_copy: bytes of the largest array that is copied on its own, in another layout or not; what only goes to
            the chip's own memory ahead of its use is none.
        returned_types: arrays that loops of unknown length copy back from the chip's own memory as they are, in the
            manner of `bf16[8,128]`.
    """

    moved_bytes: int
    collective_bytes: dict[str, int]
    num_unknown_loops: int
    turn_bytes: int
    host_calls: tuple[str, ...]
    largest_copy: int
    returned_types: tuple[str, ...]


def count_flops(jaxpr: Any) -> float:
    """Return multiplications and additions of all matrix products of a (closed) jaxpr, over all devices."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        primitive, params = equation.primitive.name, equation.params
        if primitive == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(shape[i] for i in contracted)
        elif primitive == "scan":
            total += params["length"] * count_flops(params["jaxpr"])
        elif primitive == "cond":
            total += sum(map(count_flops, params["branches"])) / len(params["branches"])
        elif primitive == "shard_map":
            shards = prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += shards * count_flops(params["jaxpr"])
        else:
            total += sum(map(count_flops, _inner_jaxprs(params.values())))
    return total


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, jax_core.Jaxpr | jax_core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)


def read_traffic(hlo_text: str) -> Traffic:
    """Return what one device moves and exchanges in a run of an optimised HLO module."""
    computations, entry = _parse(hlo_text)
    times, open_loops, turned = _count_runs(computations, entry)
    moved, turn_bytes, largest_copy, exchanged = 0.0, 0.0, 0, defaultdict[str, float](float)
    returned_types: set[str] = set()
    chains: dict[str, tuple[str, float, float, bool]] = {}
    fused = _fused_names(computations)
    for name, runs in times.items():
        for instruction in computations[name].instructions.values():
            kind = instruction.op.removesuffix("-done")
            if kind in COLLECTIVES:
                size = runs * _array_bytes(instruction.type, everywhere=True)
                if instruction.chain:
                    own = runs * _moved_bytes(instruction, computations[name], computations)
                    chains[instruction.chain] = kind, size, own, name in turned
                    continue
                exchanged[kind] += size
            if name not in fused:
                own = runs * _moved_bytes(instruction, computations[name], computations)
                moved += own
                turn_bytes += own if name in turned else 0
                if _is_copy(instruction, computations):
                    largest_copy = max(largest_copy, _array_bytes(instruction.type, everywhere=True))
                if name in turned:
                    returned_types |= _find_returned(instruction)
    for kind, size, own, is_turned in chains.values():
        exchanged[kind] += size
        moved += own
        turn_bytes += own if is_turned else 0
    host_calls = [i.op for c in computations.values() for i in c.instructions.values() if i.op in _HOST_OPERATIONS]
    host_calls += _HOST_CALL.findall(hlo_text)
    collective_bytes = {k: round(v) for k, v in exchanged.items()}
    return Traffic(
        round(moved),
        collective_bytes,
        len(open_loops),
        round(turn_bytes),
        tuple(host_calls),
        largest_copy,
        tuple(sorted(returned_types)),
    )


def _is_copy(instruction: _Instruction, computations: dict[str, _Computation]) -> bool:
    if instruction.op != "fusion":
        return instruction.op in ("copy", "transpose")
    inner = {i.op for i in computations[instruction.called[0]].instructions.values()}
    return bool(inner & {"copy", "transpose"}) and inner <= {"parameter", "copy", "transpose", "bitcast"}


def _find_returned(instruction: _Instruction) -> set[str]:
    """Return the type of an array that a copy begins to take from the chip's own memory to the other one."""
    if instruction.op != "copy-start":
        return set()
    there, here = (f"{dtype}[{shape}]{layout}" for dtype, shape, layout in _ARRAY.findall(instruction.type)[:2])
    is_returned = _array_bytes(there) > 0 and _array_bytes(here) == 0
    return {there.partition("{")[0]} if is_returned else set()


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header["name"]] = _Computation(header["name"])
            entry = header["name"] if header["entry"] else entry
        elif current and (found := _LINE.match(line)):
            inside, attributes = _split_at_close(found["rest"])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            if found["op"] in ("parameter", "constant"):  # their number or value
                operands, attributes = (), inside
            instruction = _Instruction(
                found["name"], found["type"], found["op"], operands, attributes, bool(found["root"])
            )
            current.instructions[instruction.name] = instruction
    return computations, entry


def _split_at_close(text: str) -> tuple[str, str]:
    """Return what stands before the parenthesis that closes one opened before `text`, and what after."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _count_runs(computations: dict[str, _Computation], entry: str) -> tuple[dict[str, float], set[str], set[str]]:
    """Return how often every computation runs, the loops whose end is not known, and what runs in their bodies."""
    times, unknown, turned = defaultdict[str, float](float), set[str](), set[str]()

    def visit(name: str, runs: float, is_turned: bool) -> None:
        times[name] += runs
        if is_turned:
            turned.add(name)
        for instruction in computations[name].instructions.values():
            if instruction.op == "while":
                count = _find_trip_count(instruction, computations)
                if count is None:
                    unknown.add(instruction.name)
                for called in instruction.called:
                    visit(called, runs * (1 if count is None else count), is_turned or count is None)
            elif instruction.op == "conditional":
                found = _BRANCHES.search(instruction.attributes)
                branches = re.findall(r"%?([\w.\-]+)", found[1]) if found else instruction.called
                for branch in branches:
                    visit(branch, runs / len(branches), is_turned)
            elif instruction.op in ("fusion", "call", "async-start"):
                for called in instruction.called:
                    visit(called, runs, is_turned)

    visit(entry, 1.0, False)
    return times, unknown, turned


def _find_trip_count(loop: _Instruction, computations: dict[str, _Computation]) -> int | None:
    """Return how often a loop runs: what the compiler notes, else the constant that its counter is compared with.

    Loops that `scan` makes count from 0 by 1; one that goes on until data say otherwise has another condition.
    """
    noted = _TRIP_COUNT.search(loop.attributes)
    if noted:
        return int(noted[1])
    (name,) = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = computations[name]
    root, where = condition.root, condition
    if root.op == "fusion":
        where, outer = computations[root.called[0]], root
        root = where.root
        constants = {where.parameters[i]: condition.instructions[o] for i, o in enumerate(outer.operands)}
    else:
        constants = {}
    if root.op != "compare" or "direction=LT" not in root.attributes:
        return None
    limit = constants.get(root.operands[1], where.instructions[root.operands[1]])
    return int(limit.attributes) if limit.op == "constant" and limit.type.startswith(("s32", "s64")) else None


def _fused_names(computations: dict[str, _Computation]) -> set[str]:
    """Return the computations that run inside one kernel: nothing in them moves on its own."""
    names: set[str] = set()
    waiting = [c for i in _all_instructions(computations) if i.op == "fusion" for c in i.called]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += [c for i in computations[name].instructions.values() for c in i.called]
    return names


def _all_instructions(computations: dict[str, _Computation]) -> Iterator[_Instruction]:
    for computation in computations.values():
        yield from computation.instructions.values()


def _moved_bytes(instruction: _Instruction, owner: _Computation, computations: dict[str, _Computation]) -> int:
    """Return what an instruction that is not fused reads from and writes to memory."""
    op = instruction.op
    if op in _MOVES_NOTHING:
        return 0
    written = 0 if op.endswith("-start") else _array_bytes(instruction.type)
    types = [owner.instructions[o].type for o in instruction.operands if o in owner.instructions]
    if op.endswith("-done"):
        return written + (_array_bytes(instruction.type, everywhere=True) if op == "slice-done" else 0)
    if op in _SLICES:
        return written + min(_array_bytes(types[0]), _array_bytes(instruction.type, everywhere=True))
    if op == "dynamic-update-slice":
        return _array_bytes(types[1]) + min(written, _array_bytes(types[1], everywhere=True))
    if op == "fusion":
        inner = computations[instruction.called[0]]
        if inner.piece:
            return _moved_beside(inner.piece, instruction, types, inner, computations)
        read = sum(_read_bytes(inner, inner.parameters[i], t, computations) for i, t in enumerate(types))
        return read + min(written, _written_bytes(inner, inner.root, computations))
    return written + sum(map(_array_bytes, types))


def _moved_beside(
    piece: _Instruction,
    fusion: _Instruction,
    types: list[str],
    inner: _Computation,
    computations: dict[str, _Computation],
) -> int:
    """Return what a fusion moves beside the exchange that it does a piece of, whose arrays it hands on as they are."""
    pairs = _PASSED_ON.findall(fusion.attributes)
    handed = {inner.parameters[int(operand)] for _, operand in pairs} | set(piece.operands)
    own = [(inner.parameters[i], text) for i, text in enumerate(types) if inner.parameters[i] not in handed]
    read = sum(_read_bytes(inner, name, text, computations) for name, text in own)
    if inner.root.op != "tuple":  # it begins or ends the exchange
        return read
    results = {int(result) for result, _ in pairs if result}
    parts = [inner.instructions[o] for i, o in enumerate(inner.root.operands) if i not in results]
    return read + sum(min(_array_bytes(p.type), _written_bytes(inner, p, computations)) for p in parts)


def _read_bytes(inner: _Computation, name: str, type_text: str, computations: dict[str, _Computation]) -> int:
    """Return what a fused computation reads of a parameter: all of it, or the slices it takes."""
    whole = _array_bytes(type_text)
    if whole == 0 or inner.instructions[name].is_root:  # handed on as it is: to be read by who comes after
        return whole
    read = 0
    for user, at in inner.users(name):
        if user.op in _SLICES and at == 0:
            read += _array_bytes(user.type, everywhere=True)
        elif user.op == "bitcast":
            read += _read_bytes(inner, user.name, type_text, computations)
        elif user.op == "fusion":
            called = computations[user.called[0]]
            read += _read_bytes(called, called.parameters[at], type_text, computations)
        elif user.op != "dynamic-update-slice" or at != 0:
            return whole
        if read >= whole:
            return whole
    return read


def _written_bytes(inner: _Computation, root: _Instruction, computations: dict[str, _Computation]) -> int:
    """Return what a fused computation writes: all of its results, but only the update of what is updated in place."""
    if root.op == "tuple":
        parts = [inner.instructions[o] for o in root.operands]
        return sum(_written_bytes(inner, part, computations) for part in parts)
    if root.op == "dynamic-update-slice":
        return _array_bytes(inner.instructions[root.operands[1]].type, everywhere=True)
    if root.op == "bitcast" and inner.instructions[root.operands[0]].op == "dynamic-update-slice":
        return _written_bytes(inner, inner.instructions[root.operands[0]], computations)
    if root.op == "fusion":
        called = computations[root.called[0]]
        return _written_bytes(called, called.root, computations)
    return _array_bytes(root.type, everywhere=True)


def _array_bytes(type_text: str, everywhere: bool = False) -> int:
    """Return the size of the arrays of a type; what is kept on the chip (memory space 1) only if `everywhere`."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_text):
        if not everywhere and re.search(r"S\([1-9]", layout):
            continue
        total += prod(int(n) for n in shape.split(",") if n) * _bits(dtype)
    return total // 8


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0
