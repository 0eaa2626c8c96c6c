"""Rehearse a training run without writing anything: sizes, memory, disk, examples, and one executed step.

The stages are those of `training_run`, up to the first optimizer step. Where the embedded default has not built its
target or its chats yet, both are made in memory and the target's weights are random. The step runs on the run's own
first batch: with a target that is there its loss is the first one that the run will log.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.huggingface import load_target, read_target_config
from domino_jax.config import DraftConfig
from domino_jax.data.chat_template import load_tokenizer, render_chat
from domino_jax.data.pipeline import build_dataset, pad_batch
from domino_jax.data.stdlib_chats import build_chats
from domino_jax.data.tokenizer import train_tokenizer
from domino_jax.durable import find_room, format_bytes
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.records import ChatRow, TrainBatch
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs.draft import (
    build_train_step,
    read_held_out,
    resolve_draft,
    split_batch,
    start_state,
)
from domino_jax.runs.embedded import embedded_target_config, read_corpus_chats
from domino_jax.runs.features import choose_feature_shape
from domino_jax.runs.folder import RunError, RunFolder, find_run
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.target_model import HeldWeights, TargetModel, find_target
from domino_jax.runs.training_run import check_run, warn_of_mismatches
from domino_jax.sharding import activate, count_device_bytes, find_layout
from domino_jax.training.step import TrainState, create_train_state

Messages = list[dict[str, str]]
_NUM_EXAMPLES = 5
_SHOWN_TOKENS = 40
_SAYS_NOTHING = "weights are random, the loss says nothing"


@dataclass(frozen=True)
class _Rehearsal:
    """What a run would train; parameters are shapes until the step is executed.

    Attributes:
        examples: training rows.
        num_steps: optimizer steps of the whole run.
        num_tokens: tokens of all rows; None while the target has not answered.
        is_random: the target is not built yet.
    """

    config: RunConfig
    folder: RunFolder
    target: TargetModel
    draft: DraftConfig
    state: TrainState
    batch: TrainBatch
    examples: list[ChatRow]
    num_steps: int
    num_tokens: int | None
    is_random: bool


def rehearse(config: RunConfig) -> None:
    """Print what the run would need and do, and execute its first step; nothing is written.

    Weights of a hub id are downloaded into the hub's own cache, as a run does.

    Raises:
        RunError: a file of chats is missing, or the run's folder holds results of another configuration.
        ValueError: of the room that found a mistake in data, checkpoint or configuration.
    """
    check_run(config)
    folder = find_run(config)
    monitor = RunMonitor(None, None)
    monitor.say(f"\ndry run: nothing is written\n{describe_folder(folder)}")
    rehearsal = _prepare(config, folder, monitor)
    monitor.say(_format("parameters", _parameter_lines(rehearsal)))
    monitor.say(_format("disk", _disk_lines(rehearsal)))
    _show_examples(rehearsal, monitor)
    compiled, compile_s = _compile(rehearsal)
    layout = rehearsal.target.layout
    device = f"each of {layout.mesh.size} devices" if layout else "the device"
    monitor.say(_format(f"memory of {device}, in training", _memory_lines(rehearsal, compiled)))
    monitor.say("decoding of held-out prompts along the run comes on top, between steps")
    monitor.say(f"\ntrain step compiled in {compile_s:.1f} s")
    monitor.say(_execute(rehearsal, compiled))


def describe_folder(folder: RunFolder) -> str:
    """Return in a line what the run's folder holds and where a run would go on."""
    if not folder.root.exists():
        return f"folder: {folder.root} does not exist yet"
    stored = [int(path.name) for path in folder.checkpoints.glob("*") if path.name.isdigit()]
    if not stored:
        return f"folder: {folder.root} exists, without a checkpoint of the drafter"
    return f"folder: {folder.root} exists; a run goes on from step {max(stored)}, this rehearsal shows step 1"


def _prepare(config: RunConfig, folder: RunFolder, monitor: RunMonitor) -> _Rehearsal:
    is_random = config.corpus is not None and not folder.target.exists()
    chats: list[Messages] = []
    if config.corpus and not folder.responses.exists():
        chats = _corpus_chats(config, config.corpus, folder)
    if config.corpus and is_random:
        target = _imagine_target(config, config.corpus, chats)
        monitor.say(f"target: not built yet, made in memory; {_SAYS_NOTHING}")
    else:
        path = find_target(config, folder)
        target_config = read_target_config(path)[0]
        target = TargetModel(
            path, target_config, HeldWeights(_target_shapes(config, target_config)), load_tokenizer(path)
        )
        monitor.say(f"target: {path}")
    layout = find_layout(config.mesh)
    if layout:
        target = replace(target, layout=layout, weights=HeldWeights(layout.abstract(target.weights.by_layer())))
    draft = resolve_draft(config, target)
    if config.corpus and chats:
        batch, examples, num_steps, num_tokens = _imagine_data(config, config.corpus, target, chats, monitor)
    else:
        batch, examples, num_steps, num_tokens = _read_data(config, folder, target, monitor)
    state = jax.eval_shape(partial(create_train_state, draft, config.optimizer), jax.random.key(config.seed))
    state = layout.abstract(state) if layout else state
    return _Rehearsal(config, folder, target, draft, state, batch, examples, num_steps, num_tokens, is_random)


def _corpus_chats(config: RunConfig, corpus: CorpusConfig, folder: RunFolder) -> list[Messages]:
    if folder.train_chats.exists():
        chats = read_corpus_chats(folder.train_chats)
    else:
        chats = build_chats(corpus.task, config.seed, corpus.num_train_chats, corpus.num_eval_chats).train
    return [list(chat.messages) for chat in chats]


def _imagine_target(config: RunConfig, corpus: CorpusConfig, chats: list[Messages]) -> TargetModel:
    texts = (message["content"] for messages in chats for message in messages)
    tokenizer = train_tokenizer(texts, corpus.vocab_size, corpus.max_length)
    target_config = embedded_target_config(corpus, len(tokenizer))
    return TargetModel("", target_config, HeldWeights(_target_shapes(config, target_config)), tokenizer)


def _target_shapes(config: RunConfig, target_config: Any) -> Any:
    shapes = jax.eval_shape(partial(init_target_params, target_config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.target.dtype)), shapes)


def _imagine_data(
    config: RunConfig,
    corpus: CorpusConfig,
    target: TargetModel,
    chats: Sequence[Messages],
    monitor: RunMonitor,
) -> tuple[TrainBatch, list[ChatRow], int, int | None]:
    chats = chats[: corpus.num_draft_chats or None]
    batch_size, max_length = config.data.batch_size, config.data.max_length
    rows = list(islice(_render(config, target.tokenizer, chats), max(batch_size, _NUM_EXAMPLES)))
    if not rows:
        raise RunError(
            f"data.max_length is {max_length}, which leaves nothing to learn of any of the {len(chats)} chats; raise it"
        )
    monitor.say(
        f"data: {len(chats)} chats; the target has not answered them yet, so the answers shown and learned from here "
        "are the corpus' own"
    )
    num_steps = config.train.num_steps or round(config.train.num_epochs * len(chats)) // batch_size
    return (
        pad_batch([rows[i % len(rows)] for i in range(batch_size)], max_length),
        rows[:_NUM_EXAMPLES],
        num_steps,
        None,
    )


def _render(config: RunConfig, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]) -> Iterator[ChatRow]:
    for messages in chats:
        ids, mask = (
            part[: config.data.max_length] for part in render_chat(tokenizer, messages, config.data.enable_thinking)
        )
        if any(first and second for first, second in pairwise(mask)):
            yield ChatRow(ids, mask)


def _read_data(
    config: RunConfig, folder: RunFolder, target: TargetModel, monitor: RunMonitor
) -> tuple[TrainBatch, list[ChatRow], int, int | None]:
    train_path = str(folder.responses) if config.corpus else config.data.train_path
    eval_path = str(folder.eval_chats) if config.corpus else config.data.eval_path
    epochs = None if config.train.num_steps else config.train.num_epochs
    batches, index, num_rows = build_dataset(
        train_path, target.tokenizer, config.data, target.config.vocab_size, config.seed, epochs
    )
    monitor.say(
        f"data: {train_path}: {num_rows} rows ({index.num_truncated} cut to max_length {config.data.max_length}), "
        f"{index.num_tokens} tokens, {index.num_learned_tokens} learned"
    )
    if index.report.num_bad:
        monitor.say(index.report.summary())
    if target.path:
        warn_of_mismatches(config, train_path, target, monitor)
    held_out = read_held_out(config, eval_path, target, config.train.eval_prompts, monitor)
    monitor.say(f"held-out prompts decoded along the run: {len(held_out.prompt_ids) if held_out else 0}")
    first = next(batches)
    rows = _unpad(first)
    while len(rows) < _NUM_EXAMPLES:
        following = next(batches, None)
        if following is None:
            break
        rows += _unpad(following)
    num_steps = config.train.num_steps or batches.num_batches or 0
    # The widest bucket needs the most memory; padding changes no loss.
    batch = pad_batch(_unpad(first), config.data.max_length)
    return batch, rows[:_NUM_EXAMPLES], num_steps, index.num_tokens


def _unpad(batch: TrainBatch) -> list[ChatRow]:
    return [
        ChatRow(ids[:length].tolist(), mask[:length].astype(int).tolist())
        for ids, mask, length in zip(batch.input_ids, batch.loss_mask, batch.lengths, strict=True)
    ]


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _num_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parameter_lines(rehearsal: _Rehearsal) -> list[tuple[str, str]]:
    params = rehearsal.state.params
    lines = [("target (frozen)", f"{_count(rehearsal.target.weights.by_layer()):,}")]
    lines += [(f"drafter: {name}", f"{_count(params[name]):,}") for name in params]
    return [*lines, ("trained in all", f"{_count(params):,}"), ("optimizer steps", f"{rehearsal.num_steps:,}")]


def _disk_lines(rehearsal: _Rehearsal) -> list[tuple[str, str]]:
    """Return what the run's folder will hold; every entry but the free space is a part of the sum."""
    state, keep = _num_bytes(rehearsal.state), rehearsal.config.train.keep_checkpoints
    parts = [
        (f"checkpoints: {keep} latest, the best, one being written", (keep + 2) * state),
        ("exported drafters: the best, the latest", 2 * _num_bytes(rehearsal.state.params)),
    ]
    if rehearsal.config.corpus:
        # A checkpoint holds float32 weights and two moments; two lie beside the next one while that is written.
        parts.append(
            ("embedded target and its checkpoints", (1 + 3 * 3) * 4 * _count(rehearsal.target.weights.by_layer()))
        )
    existing, free = find_room(rehearsal.folder.root)
    return [
        *((name, format_bytes(size)) for name, size in parts),
        ("in all, at most (without data, metrics and report)", format_bytes(sum(size for _, size in parts))),
        (f"free at {existing}", format_bytes(free)),
        *_feature_lines(rehearsal),
    ]


def _feature_lines(rehearsal: _Rehearsal) -> list[tuple[str, str]]:
    data = rehearsal.config.data
    if not data.feature_cache:
        return []
    name = f"features in {data.feature_cache}, beside it"
    if rehearsal.num_tokens is None:
        return [(name, "not known before the target has answered")]
    shape = choose_feature_shape(rehearsal.config, rehearsal.draft, rehearsal.target.config)
    return [(name, f"{format_bytes(rehearsal.num_tokens * shape.bytes_per_token)}, less what is there already")]


def _memory_lines(rehearsal: _Rehearsal, compiled: Any) -> list[tuple[str, str]]:
    config, target, draft = rehearsal.config, rehearsal.target.config, rehearsal.draft
    layout = rehearsal.target.layout
    num_data, num_model = (layout.num_data, layout.num_model) if layout else (1, 1)
    micro_batch = -(-config.data.batch_size // config.data.micro_steps // num_data)
    features = micro_batch * config.data.max_length * len(draft.target_layer_ids) * target.hidden_size
    num_blocks = min(config.objective.head_chunk, micro_batch * config.objective.num_anchors)
    drafter = count_device_bytes(rehearsal.state.params)
    logits = num_blocks * draft.num_draft_tokens() * target.vocab_size * 4 // num_model
    lines = [
        ("target's weights", format_bytes(count_device_bytes(rehearsal.target.weights.by_layer()))),
        ("drafter's weights (float32)", format_bytes(drafter)),
        ("optimizer moments", format_bytes(count_device_bytes(rehearsal.state.opt_state))),
        ("gradients", format_bytes(drafter)),
        ("target features of a micro-step", format_bytes(features * jnp.dtype(config.target.dtype).itemsize)),
        ("logits of a chunk of blocks, base or corrected", format_bytes(logits)),
    ]
    analysis = compiled.memory_analysis()
    if analysis is None:
        return [*lines, ("XLA's own account", "not given by this backend")]
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    in_all = held + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    lines += [
        ("XLA: weights, moments and batch, held between steps", format_bytes(held)),
        ("XLA: gradients, features, activations, logits", format_bytes(analysis.temp_size_in_bytes)),
        ("XLA: in all", format_bytes(in_all)),
    ]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return [*lines, (f"{jax.devices()[0].device_kind} has", "(this device does not tell)")]
    fits = "" if in_all <= limit else "   too little: raise data.micro_steps, or lower data.max_length"
    return [*lines, (f"{jax.devices()[0].device_kind} has", format_bytes(limit) + fits)]


def _format(title: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    right = max(len(value.partition("   ")[0]) for _, value in lines)
    rows = [f"  {name:<{width}}  {' ' * (right - len(value.partition('   ')[0]))}{value}" for name, value in lines]
    return "\n".join([f"\n{title}", *rows])


def mark_row(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[int], with_brackets: bool
) -> list[tuple[str, bool]]:
    """Return a training row as pieces of text, each with whether it is learned; long pieces lose their middle.

    `with_brackets` puts `[[` and `]]` around what is not learned.
    """
    pieces = []
    for is_learned, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1] > 0):
        run = [token for token, _ in group]
        text = tokenizer.decode(run)
        if len(run) > 2 * _SHOWN_TOKENS:
            head, tail = tokenizer.decode(run[:_SHOWN_TOKENS]), tokenizer.decode(run[-_SHOWN_TOKENS:])
            text = f"{head} ... {len(run) - 2 * _SHOWN_TOKENS} tokens ... {tail}"
        pieces.append((f"[[{text}]]" if with_brackets and not is_learned else text, is_learned))
    return pieces


def _show_examples(rehearsal: _Rehearsal, monitor: RunMonitor) -> None:
    is_terminal = monitor.console.is_terminal
    legend = "dim: not learned" if is_terminal else "[[...]]: not learned"
    monitor.say(f"\nexamples of training rows ({legend})")
    for number, row in enumerate(rehearsal.examples, start=1):
        monitor.say(f"--- {number}: {len(row.ids)} tokens, {sum(row.loss_mask)} learned")
        pieces = mark_row(rehearsal.target.tokenizer, row.ids, row.loss_mask, with_brackets=not is_terminal)
        monitor.console.print(Text.assemble(*((text, "" if is_learned else "dim") for text, is_learned in pieces)))


def _compile(rehearsal: _Rehearsal) -> tuple[Any, float]:
    config, target = rehearsal.config, rehearsal.target
    train_step = build_train_step(config, target.config, rehearsal.draft, rehearsal.num_steps, target.layout)
    inputs = split_batch(rehearsal.batch, config.data.micro_steps, target.layout)
    began = time.perf_counter()
    with activate(target.layout):
        frozen = jax.eval_shape(stack_params, target.weights.by_layer())
        frozen = target.layout.abstract(frozen) if target.layout else frozen
        compiled = train_step.lower(rehearsal.state, frozen, inputs).compile()
    return compiled, time.perf_counter() - began


def _execute(rehearsal: _Rehearsal, compiled: Any) -> str:
    """Load or draw the weights, do the step, and say what came out."""
    config, target = rehearsal.config, rehearsal.target
    if rehearsal.is_random:
        params = jax.jit(init_target_params, static_argnums=0)(target.config, jax.random.key(config.seed))
        params = jax.tree.map(lambda leaf: leaf.astype(config.target.dtype), params)
        params = target.layout.place(params) if target.layout else params
    else:
        params = load_target(target.path, config.target.dtype, target.layout)[1]
    target = replace(target, weights=HeldWeights(params))
    del params
    state = start_state(config, rehearsal.draft, target)
    inputs = split_batch(rehearsal.batch, config.data.micro_steps, target.layout)
    began = time.perf_counter()
    _, metrics = jax.block_until_ready(compiled(state, target.weights.stacked(), inputs))
    step_s = time.perf_counter() - began
    said = (
        f"one train step on the first batch ({int(rehearsal.batch.lengths.sum())} tokens): {step_s:.2f} s, "
        f"loss {float(metrics['loss']):.6f}"
    )
    return f"{said} ({_SAYS_NOTHING})" if rehearsal.is_random else said
