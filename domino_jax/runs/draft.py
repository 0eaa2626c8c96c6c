"""Train the drafter: data in, checkpoints, metrics and exported drafters out.

The loop only joins the rooms: batches from `data`, the jitted step from `training`, checkpoints with the data position
in them, a real decode of held-out prompts every so many steps, and the drafter in the public layout at the end.
A run that is stopped (SIGINT, SIGTERM) saves first; started again it goes on from the last checkpoint.
"""

import time
from dataclasses import dataclass
from itertools import takewhile

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.huggingface import check_draft_fits, save_draft
from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.config import DraftConfig, TargetConfig, to_json_dict
from domino_jax.data.chat_template import encode_prompt, find_mask_id, find_stop_ids
from domino_jax.data.pipeline import BatchIterator, build_dataset
from domino_jax.data.responses import read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.records import TrainBatch
from domino_jax.run_config import RunConfig
from domino_jax.runs.errors import RunStopped, stop_requests
from domino_jax.runs.folder import RunError, RunFolder
from domino_jax.runs.held_out import HeldOutPrompts, measure_tau
from domino_jax.runs.monitor import RunMonitor, StageProgress
from domino_jax.shapes import Params
from domino_jax.training.step import TrainState, create_train_state, make_train_step

STAGE = "draft"
_EVAL_BATCH = 32


@dataclass(frozen=True)
class TargetModel:
    """A loaded target and what belongs to it.

    Attributes:
        path: directory or hub id it was loaded from.
    """

    path: str
    config: TargetConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase


def read_held_out(config: RunConfig, eval_path: str, target: TargetModel, limit: int) -> HeldOutPrompts | None:
    """Return up to `limit` held-out prompts that fit the context, or None where the run has no held-out chats.

    A chat is decoded up to its first assistant turn.
    """
    if not eval_path:
        return None
    room = target.config.max_position_embeddings - config.train.eval_max_new_tokens
    prompts: list[list[int]] = []
    for _, messages in read_chats(eval_path, needs_answer=False):
        prompt = list(takewhile(lambda message: message["role"] != "assistant", messages))
        ids = encode_prompt(target.tokenizer, prompt, config.data.enable_thinking)
        if len(ids) <= room:
            prompts.append(ids)
        if len(prompts) == limit:
            break
    if not prompts:
        raise RunError(f"{eval_path} has no prompt of at most {room} tokens; shorten train.eval_max_new_tokens")
    stop_ids = find_stop_ids(target.tokenizer, target.path)
    return HeldOutPrompts(prompts, stop_ids, config.train.eval_max_new_tokens)


def resolve_draft(config: RunConfig, target: TargetModel) -> DraftConfig:
    """Return the drafter's sizes for the target.

    Raises:
        ChatTemplateError: the settings leave the mask token open and the tokenizer has none to offer.
        CheckpointError: the drafter does not fit the target.
    """
    mask_id = config.draft.mask_token_id
    if mask_id < 0:
        mask_id = find_mask_id(target.tokenizer, target.config.vocab_size)
    draft = config.draft.resolve(target.config, mask_id)
    check_draft_fits(draft, target.config)
    return draft


@dataclass
class _Training:
    """What the loop carries; local to `train_draft`."""

    config: RunConfig
    folder: RunFolder
    target: TargetModel
    draft: DraftConfig
    batches: BatchIterator
    checkpoints: TrainCheckpoints
    monitor: RunMonitor
    held_out: HeldOutPrompts | None
    num_steps: int
    tau: float | None = None

    def save(self, state: TrainState, step: int, tau: float | None) -> None:
        metadata = {"config": to_json_dict(self.config), "draft": to_json_dict(self.draft)}
        self.checkpoints.save(step, state, self.batches.get_state(), metadata, tau)

    def evaluate(self, state: TrainState, step: int) -> float | None:
        if self.held_out is None:
            return None
        decoder = Decoder(self.target.config, self.target.params, self.draft, state.params, self.config.target.dtype)
        values = measure_tau(decoder, self.held_out, _EVAL_BATCH)
        self.monitor.log("held_out", step, values)
        self.tau = values["tau"]
        return self.tau


def train_draft(
    config: RunConfig, folder: RunFolder, target: TargetModel, train_path: str, eval_path: str, monitor: RunMonitor
) -> DraftConfig:
    """Train to the last step, going on from the latest checkpoint, and export the best and the latest drafter.

    Raises:
        RunStopped: the run was asked to stop and has saved.
        ResponsesError: the data cannot be used.
        CheckpointError: the drafter does not fit the target, or a checkpoint does not fit the run.
    """
    draft = resolve_draft(config, target)
    epochs = None if config.train.num_steps else config.train.num_epochs
    batches, index, num_rows = build_dataset(
        train_path,
        target.tokenizer,
        config.data,
        target.config.vocab_size,
        config.seed,
        epochs,
        bad_rows_log=folder.root / "bad_rows.jsonl",
    )
    monitor.say(
        f"data: {num_rows} rows ({index.num_truncated} cut to max_length {config.data.max_length}), "
        f"{index.num_tokens} tokens, {index.num_learned_tokens} learned"
    )
    if index.report.num_bad:
        monitor.say(index.report.summary())
    num_steps = config.train.num_steps or batches.num_batches or 0
    checkpoints = TrainCheckpoints(folder.checkpoints, config.train.keep_checkpoints)
    held_out = read_held_out(config, eval_path, target, config.train.eval_prompts)
    run = _Training(config, folder, target, draft, batches, checkpoints, monitor, held_out, num_steps)
    try:
        state = _run_steps(run, _restore(run))
        _export(run, state)
    finally:
        checkpoints.close()
    return draft


def _restore(run: _Training) -> TrainState:
    state = create_train_state(run.draft, run.config.optimizer, jax.random.key(run.config.seed))
    restored = run.checkpoints.restore(state)
    if restored is None:
        return state
    state, data_state, _ = restored
    run.batches.set_state(data_state)
    step = int(state.step)
    run.monitor.say(f"going on from step {step}")
    run.monitor.drop_rows_after(STAGE, step)
    run.monitor.drop_rows_after("held_out", step)
    return state


def _run_steps(run: _Training, state: TrainState) -> TrainState:
    train, dtype = run.config.train, run.config.train.compute_dtype
    train_step = make_train_step(
        run.target.config,
        run.draft,
        run.config.objective,
        run.config.optimizer,
        run.num_steps,
        dtype,
        run.config.target.dtype,
    )
    first = int(state.step)
    with stop_requests() as stopped, run.monitor.stage("train the drafter", run.num_steps, first) as progress:
        began, num_tokens = time.perf_counter(), 0
        for step in range(first + 1, run.num_steps + 1):
            batch = next(run.batches)
            num_tokens += int(batch.lengths.sum())
            state, metrics = train_step(state, run.target.params, *_split(batch, run.config.data.micro_steps))
            is_last = step == run.num_steps
            if step % train.log_every == 0 or is_last:
                values = {name: np.asarray(value).tolist() for name, value in metrics.items()}  # waits for the device
                _log(run, progress, step, values, num_tokens / (time.perf_counter() - began))
                began, num_tokens = time.perf_counter(), 0
            else:
                progress.advance()
            is_eval = step % train.eval_every == 0 or is_last
            if is_eval or step % train.checkpoint_every == 0 or stopped:
                paused = time.perf_counter()
                run.save(state, step, run.evaluate(state, step) if is_eval else None)
                began += time.perf_counter() - paused
            if stopped and not is_last:
                raise RunStopped(f"stopped at step {step} of {run.num_steps} and saved; the same command goes on")
    return state


def _split(batch: TrainBatch, micro_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(micro_steps, -1, *x.shape[1:])

    return split(batch.input_ids), split(batch.loss_mask), split(batch.lengths)


def _log(run: _Training, progress: StageProgress, step: int, values: dict, tokens_per_s: float) -> None:
    run.monitor.log(STAGE, step, values | {"tokens_per_s": tokens_per_s})
    progress.advance(loss=values["loss"], accept_len=values["accept_len"], tau=run.tau, **{"tokens/s": tokens_per_s})


def _export(run: _Training, state: TrainState) -> None:
    save_draft(str(run.folder.latest_draft), run.draft, state.params)
    best = run.checkpoints.best_step()
    chosen = state if best is None else run.checkpoints.restore(state, best)[0]
    save_draft(str(run.folder.best_draft), run.draft, chosen.params)
    run.monitor.say(f"drafters: {run.folder.best_draft} (step {best or int(state.step)}), {run.folder.latest_draft}")
