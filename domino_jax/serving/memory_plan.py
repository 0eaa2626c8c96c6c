"""What an engine needs of the device's memory, counted from shapes before anything is loaded.

In: sizes of both models and of the engine. Out: a breakdown, and a refusal that says what would fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from domino_jax.config import ConfigError
from domino_jax.decoding.prefill import CHUNK_LENGTHS
from domino_jax.decoding.state import DecodeSettings
from domino_jax.durable import format_bytes
from domino_jax.serving.programs import Ladders, Programs, Shape
from domino_jax.sharding import Layout, count_device_bytes

_LOGIT_COPIES = 4
"""Float32 arrays as large as a round's logits that sampling holds at once: logits, log-weights, noise, ranks."""

_SCORE_COPIES = 2
"""Float32 score arrays of one layer at once: before and after the softmax."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, in the order they are shown."""

    parts: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(size for _, size in self.parts)

    def lines(self) -> list[str]:
        """Return the breakdown as text, one line a part, the sum last."""
        rows = [*self.parts, ("in all", self.total_bytes)]
        width = max(len(name) for name, _ in rows)
        return [f"  {name:{width}}  {format_bytes(size):>10}" for name, size in rows]


def plan_memory(
    settings: DecodeSettings, ladders: Ladders, target_bytes: int, draft_bytes: int, layout: Layout | None = None
) -> MemoryPlan:
    """Return what each device holds at its largest: every slot in use at the longest length.

    `target_bytes` and `draft_bytes` are those of its weights. Temporaries of a round are counted as on one device.
    """
    programs = Programs(settings, ladders, layout)
    full = Shape(ladders.rows[-1], ladders.positions[-1])
    slots = programs.slots_shape(full)
    caches = slots.decode.target_cache, slots.decode.draft_cache
    largest_step = max((_shape_bytes(programs, shape) for shape in ladders.shapes[:-1]), default=0)
    logits = full.rows * (programs.num_draft_tokens(max(ladders.block_sizes)) + 1) * settings.target.vocab_size * 4
    chunk = max(CHUNK_LENGTHS)
    num_queries = max(chunk, full.rows * (programs.num_draft_tokens(max(ladders.block_sizes)) + 1))
    scores = settings.target.num_attention_heads * full.positions * num_queries * 4
    parts = [
        ("target's weights", target_bytes),
        ("drafter's weights", draft_bytes),
        (f"target's caches ({full.rows} slots x {full.positions} positions)", count_device_bytes(caches[0])),
        ("draft's context caches", count_device_bytes(caches[1])),
        ("tokens, bias and counts of the slots", count_device_bytes(slots) - count_device_bytes(caches)),
        ("the next smaller batch, held while slots are moved", largest_step),
        ("a prompt being run", _shape_bytes(programs, Shape(1, full.positions))),
        (f"prefix cache ({ladders.num_blocks} blocks)", count_device_bytes(programs.pool_shape())),
        ("logits of a round and their sampling", _LOGIT_COPIES * logits),
        ("attention scores of a round or of a prompt's chunk", _SCORE_COPIES * scores),
        ("logits of a prompt's chunk, where they are scored", 2 * chunk * settings.target.vocab_size * 4),
    ]
    return MemoryPlan(tuple(parts))


def find_memory_limit(fraction: float, num_devices: int = 1) -> int:
    """Return the bytes an engine may use of each of `num_devices`: `fraction` of its memory, on a CPU of what is free.

    Virtual devices of a CPU share that.
    """
    stats = jax.devices()[0].memory_stats() or {}
    available = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if "bytes_limit" not in stats:
        available = _free_host_memory() // num_devices
    return int(available * fraction)


def _free_host_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63 - 1  # unknown: the system will say


def require_fit(plan: MemoryPlan, limit_bytes: int, largest_fit: Callable[[], str]) -> None:
    """Refuse a plan that is larger than the limit.

    Raises:
        ConfigError: it is; the message holds the breakdown and `largest_fit`'s advice.
    """
    if plan.total_bytes > limit_bytes:
        shown = "\n".join(plan.lines())
        raise ConfigError(
            f"the server needs {format_bytes(plan.total_bytes)} and may use {format_bytes(limit_bytes)}:\n{shown}\n"
            + largest_fit()
        )


def _shape_bytes(programs: Programs, shape: Shape) -> int:
    return count_device_bytes(programs.slots_shape(shape))
