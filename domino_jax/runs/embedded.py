"""The embedded default: chats from the standard library, a tokenizer and a small target trained on them, offline.

Everything lands in the run's folder in the formats that any other target and data set would have: JSONL chats and a
Hugging Face directory. From there on the run is like any other.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.huggingface import save_target
from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.config import TargetConfig, to_json_dict
from domino_jax.data.buckets import LengthBuckets
from domino_jax.data.chat_template import render_chat
from domino_jax.data.responses import read_chats, write_chats
from domino_jax.data.stdlib_chats import Chat, build_chats
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.records import ChatRow
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs.errors import RunStopped, stop_requests
from domino_jax.runs.folder import RunError, RunFolder, build_once
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.training.target_step import TargetState, create_target_state, make_target_optimizer, target_train_step

STAGE = "target"
_LOG_EVERY, _CHECKPOINT_EVERY, _KEEP = 20, 200, 2


def build_corpus(config: RunConfig, corpus: CorpusConfig, folder: RunFolder, monitor: RunMonitor) -> None:
    """Write training and held-out chats; each row also names its task and module.

    Raises:
        CorpusError: the standard library found here cannot give the chats asked for.
    """

    def write(parts: Path) -> None:
        split = build_chats(corpus.task, config.seed, corpus.num_train_chats, corpus.num_eval_chats)
        for name, chats in (("train", split.train), ("eval", split.eval)):
            write_chats(parts / f"{name}.jsonl", [_to_row(chat) for chat in chats])
        monitor.say(f"corpus: {len(split.train)} chats, {len(split.eval)} held out, from the standard library")

    build_once(folder.train_chats.parent, write)


def _to_row(chat: Chat) -> dict:
    return {"messages": list(chat.messages), "task": chat.task, "module": chat.module}


def read_corpus_chats(path: Path) -> list[Chat]:
    """Return the chats that `build_corpus` wrote."""
    return [Chat(tuple(row["messages"]), row["task"], row["module"]) for row in read_rows(path)]


def build_target(config: RunConfig, corpus: CorpusConfig, folder: RunFolder, monitor: RunMonitor) -> None:
    """Train tokenizer and target, and save both in Hugging Face format; a stopped training goes on where it was.

    Raises:
        RunStopped: the run was asked to stop and has saved.
        RunError: the chats have changed since a checkpoint was saved.
        CheckpointError: no checkpoint can be used, or none can be written.
    """
    if folder.target.exists():
        return
    chats = [messages for _, messages in read_chats(folder.train_chats)]
    texts = (message["content"] for messages in chats for message in messages)
    tokenizer = train_tokenizer(texts, corpus.vocab_size, corpus.max_length)
    target = embedded_target_config(corpus, len(tokenizer))
    rows = [ChatRow(*render_chat(tokenizer, messages, enable_thinking=False)) for messages in chats]
    batches = LengthBuckets(rows, corpus.bucket_widths, corpus.tokens_per_batch, config.seed)
    if batches.num_dropped:
        monitor.say(
            f"{batches.num_dropped} of {len(rows)} chats are longer than {max(corpus.bucket_widths)} tokens: unused"
        )
    state = _train(config, corpus, target, batches, folder, monitor)

    def save(directory: Path) -> None:
        save_tokenizer(tokenizer, directory)
        extra = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        save_target(str(directory), target, state.params, extra_config=extra)

    build_once(folder.target, save)


def embedded_target_config(corpus: CorpusConfig, vocab_size: int) -> TargetConfig:
    """Return the sizes of the target that a corpus configuration asks for."""
    return TargetConfig(
        vocab_size=vocab_size,
        hidden_size=corpus.hidden_size,
        intermediate_size=corpus.intermediate_size,
        num_hidden_layers=corpus.num_hidden_layers,
        num_attention_heads=corpus.num_attention_heads,
        num_key_value_heads=corpus.num_key_value_heads,
        head_dim=corpus.head_dim,
        rope_theta=corpus.rope_theta,
        max_position_embeddings=corpus.max_length,
        tie_word_embeddings=True,
    )


def _train(
    config: RunConfig,
    corpus: CorpusConfig,
    target: TargetConfig,
    batches: LengthBuckets,
    folder: RunFolder,
    monitor: RunMonitor,
) -> TargetState:
    optimizer = make_target_optimizer(corpus.target_learning_rate, corpus.target_steps)
    state = create_target_state(target, optimizer, jax.random.key(config.seed))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    monitor.say(f"target: {num_params:,} parameters, vocabulary {target.vocab_size}")
    checkpoints = TrainCheckpoints(folder.target_checkpoints, _KEEP, monitor.say)
    with folder.train_chats.open("rb") as file:
        data_state = {"chats": hashlib.file_digest(file, "sha256").hexdigest()[:16]}
    restored = checkpoints.restore(state)
    if restored:
        state, stored, _ = restored
        if stored != data_state:
            raise RunError(
                f"{folder.train_chats} has changed since the target's checkpoints were saved (hash {stored['chats']}, "
                f"now {data_state['chats']}); put it back as it was, or remove {folder.root} to start again"
            )
        monitor.say(f"going on from step {int(state.step)}")
    monitor.drop_rows_after(STAGE, int(state.step))
    first, window = int(state.step), []
    try:
        with stop_requests() as stopped, monitor.stage("train the target", corpus.target_steps, first) as progress:
            began = time.perf_counter()
            for step in range(first + 1, corpus.target_steps + 1):
                batch = batches.batch(step - 1)
                state, metrics = target_train_step(
                    state, batch.input_ids, batch.loss_mask, batch.lengths, config=target, optimizer=optimizer
                )
                window.append((metrics, int(batch.lengths.sum())))
                if step % _LOG_EVERY == 0 or step == corpus.target_steps:
                    values = _summarise(window, began)
                    monitor.log(STAGE, step, values)
                    progress.advance(
                        len(window), **{"tokens/s" if k == "tokens_per_s" else k: values[k] for k in values}
                    )
                    began, window = time.perf_counter(), []
                if step % _CHECKPOINT_EVERY == 0 or stopped:
                    monitor.flush()
                    checkpoints.save(step, state, data_state, {"corpus": to_json_dict(corpus)})
                    if stopped:
                        raise RunStopped(f"stopped at step {step} of the target and saved; the same command goes on")
    finally:
        checkpoints.close()
    return state


def _summarise(window: Sequence[tuple[dict, int]], began: float) -> dict[str, float]:
    """Return the means of a window of steps; reading them waits for the device, so the clock is read afterwards."""
    means = {name: float(np.mean([float(m[name]) for m, _ in window])) for name in ("loss", "accuracy")}
    return means | {"tokens_per_s": sum(count for _, count in window) / (time.perf_counter() - began)}


def prompt_messages(chats: Sequence[Chat]) -> list[list[dict[str, str]]]:
    """Return the messages before each chat's answer."""
    return [list(chat.messages[:-1]) for chat in chats]


def decode_answer(tokenizer: PreTrainedTokenizerBase, output_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Return the text of an answer without its stop token."""
    return tokenizer.decode([token for token in output_ids if token not in stop_ids])
