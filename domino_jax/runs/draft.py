"""Train the drafter: data in, checkpoints, metrics and exported drafters out.

The loop only joins the rooms: batches from `data`, the jitted step from `training`, checkpoints with the data position
in them, a real decode of held-out prompts every so many steps, and the drafter in the public layout at the end.
A run that is stopped (SIGINT, SIGTERM) saves first; started again it goes on from the last checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax.checkpoints.fingerprint import fingerprint_target
from domino_jax.checkpoints.huggingface import check_draft_fits, save_draft
from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.config import DraftConfig, TargetConfig, diff_configs, to_json_dict
from domino_jax.data.chat_template import ChatTemplateError, encode_prompt, find_mask_id, find_stop_ids
from domino_jax.data.pipeline import BatchIterator, ChatSource, RowIndex, RowSource, build_dataset
from domino_jax.data.responses import RowError, RowReport, read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.models.domino_head import init_draft_params
from domino_jax.processes import is_first
from domino_jax.records import TrainBatch
from domino_jax.run_config import RunConfig
from domino_jax.runs.errors import RunStopped
from domino_jax.runs.features import open_features
from domino_jax.runs.folder import RunError, RunFolder
from domino_jax.runs.held_out import HeldOutPrompts, measure_tau
from domino_jax.runs.launch import check_same_settings, compile_together, is_stop_agreed, shared_stop_requests
from domino_jax.runs.monitor import RunMonitor, StageProgress
from domino_jax.runs.provenance import describe_tokenizer
from domino_jax.runs.skip_watch import SkipWatch
from domino_jax.runs.target_model import TargetModel
from domino_jax.sharding import Layout, activate, check_sizes
from domino_jax.training.draft_init import check_start, start_from_target
from domino_jax.training.step import StepInputs, TrainState, create_train_state, make_train_step, pad_sequences

STAGE = "draft"
_EVAL_BATCH = 32
_LACKS_TAU = "lacks_tau"


def read_held_out(
    config: RunConfig, eval_path: str, target: TargetModel, limit: int, monitor: RunMonitor
) -> HeldOutPrompts | None:
    """Return up to `limit` held-out prompts, or None where the run has no held-out chats.

    A chat is decoded up to its first assistant turn. Prompts that are longer than `data.max_length`, or leave no room
    for the answer in the context, are counted and left out; bad rows are treated as `data.bad_rows` says.

    Raises:
        RunError: no prompt is left.
        ResponsesError: a bad row that the configuration does not allow.
    """
    if not eval_path:
        return None
    room = min(target.config.max_position_embeddings - config.train.eval_max_new_tokens, config.data.max_length)
    report = RowReport(eval_path, config.data.bad_rows, config.data.max_bad_rows)
    prompts: dict[int, list[int]] = {}
    num_long = 0
    for line_no, messages in read_chats(eval_path, report, needs_answer=False):
        prompt = list(takewhile(lambda message: message["role"] != "assistant", messages))
        try:
            ids = encode_prompt(target.tokenizer, prompt, config.data.enable_thinking)
        except ChatTemplateError as error:
            report.add_bad(RowError(eval_path, line_no, "chat template failed", str(error)))
            continue
        if len(ids) > room:
            num_long += 1
        else:
            prompts[line_no] = ids
        if len(prompts) == limit:
            break
    if report.num_bad:
        monitor.say(report.summary())
    if num_long:
        monitor.say(f"{eval_path}: {num_long} prompts of more than {room} tokens left out")
    if not prompts:
        raise RunError(
            f"{eval_path} has no prompt of at most {room} tokens; shorten train.eval_max_new_tokens or raise "
            "data.max_length"
        )
    stop_ids = find_stop_ids(target.tokenizer, target.path)
    return HeldOutPrompts(list(prompts.values()), list(prompts), stop_ids, config.train.eval_max_new_tokens)


def resolve_draft(config: RunConfig, target: TargetModel) -> DraftConfig:
    """Return the drafter's sizes for the target.

    Raises:
        ChatTemplateError: the settings leave the mask token open and the tokenizer has none to offer.
        RunError: the mask token is one that ends or pads texts.
        CheckpointError: the drafter does not fit the target.
        ConfigError: it cannot start from the target's weights although it is to, or cannot be split as the mesh asks.
    """
    mask_id = config.draft.mask_token_id
    if mask_id < 0:
        mask_id = find_mask_id(target.tokenizer, target.config.vocab_size)
    if mask_id in (target.tokenizer.pad_token_id, target.tokenizer.eos_token_id):
        raise RunError(
            f"draft.mask_token_id is {mask_id}, which pads or ends texts; give an id that no text holds, or -1"
        )
    draft = config.draft.resolve(target.config, mask_id)
    check_draft_fits(draft, target.config)
    check_sizes(target.layout, target.config, draft)
    if config.draft.initial_weights == "target":
        check_start(draft, target.config)
    return draft


@dataclass(frozen=True)
class TrainedDraft:
    """What `train_draft` leaves.

    Attributes:
        data: what the check of the training rows found.
        num_steps: optimizer steps of the run, all of them done.
        best_step: step of the exported best drafter; that of the latest is `num_steps`.
    """

    config: DraftConfig
    data: RowIndex
    num_steps: int
    best_step: int


@dataclass
class _Training:
    """What the loop carries; local to `train_draft`.

    Attributes:
        identity: what must not change below a run although its configuration stays the same.
        tau: the latest, to be shown.
    """

    config: RunConfig
    folder: RunFolder
    target: TargetModel
    draft: DraftConfig
    train_path: str
    batches: BatchIterator
    checkpoints: TrainCheckpoints
    monitor: RunMonitor
    held_out: HeldOutPrompts | None
    num_steps: int
    identity: dict[str, Any]
    tau: float | None = None

    def save(self, state: TrainState, step: int, tau: float | None = None, *, lacks_tau: bool = False) -> None:
        """Store the step; `lacks_tau` has the next start decode the held-out prompts first."""
        metadata = {"config": to_json_dict(self.config), _LACKS_TAU: lacks_tau, **self.identity}
        self.monitor.flush()
        self.checkpoints.save(step, state, self.batches.get_state(), metadata, tau)
        self.monitor.say(f"saved step {step}")

    def evaluate_and_save(self, state: TrainState, step: int) -> None:
        """Store the step with its tau; a decode that fails or is interrupted costs no steps.

        But in several processes: to save takes all of them, and the others are still decoding.
        """
        try:
            tau = self.evaluate(state, step)
        except BaseException:
            if jax.process_count() == 1:
                self.save(state, step, lacks_tau=True)
            raise
        self.save(state, step, tau)

    def evaluate(self, state: TrainState, step: int) -> float | None:
        if self.held_out is None:
            return None
        target = self.target
        decoder = Decoder(
            target.config, target.weights.by_layer(), self.draft, state.params, self.config.target.dtype, target.layout
        )
        values = measure_tau(decoder, self.held_out, _EVAL_BATCH)
        self.monitor.log("held_out", step, values)
        self.tau = values["tau"]
        return self.tau or None  # without a single round nothing is known of the drafter


def train_draft(
    config: RunConfig, folder: RunFolder, target: TargetModel, train_path: str, eval_path: str, monitor: RunMonitor
) -> TrainedDraft:
    """Train to the last step, going on from the latest checkpoint, and export the best and the latest drafter.

    Raises:
        RunStopped: the run was asked to stop and has saved.
        ResponsesError: the data cannot be used.
        FeatureCacheError: the features cannot be kept, or those that are kept do not belong to the run.
        TrainingError: too many updates in a row are not finite.
        CheckpointError: the drafter does not fit the target, no checkpoint can be used, or none can be written.
        RunError: target, tokenizer or held-out prompts are not those of the latest checkpoint.
    """
    draft = resolve_draft(config, target)
    epochs = None if config.train.num_steps else config.train.num_epochs
    chats = ChatSource(
        train_path,
        target.tokenizer,
        config.data,
        target.config.vocab_size,
        folder.root / "bad_rows.jsonl" if is_first() else None,
    )
    places = find_places(config, target.layout)

    def batch_rows(source: RowSource) -> tuple[BatchIterator, RowIndex, int]:
        vocab_size = target.config.vocab_size
        return build_dataset(
            train_path, target.tokenizer, config.data, vocab_size, config.seed, epochs, source=source, places=places
        )

    batches, index, num_rows = batch_rows(chats)
    monitor.say(
        f"data: {num_rows} rows ({index.num_truncated} cut to max_length {config.data.max_length}), "
        f"{index.num_tokens} tokens, {index.num_learned_tokens} learned"
    )
    monitor.say(batches.layout)
    if index.report.num_bad:
        monitor.say(index.report.summary())
    num_steps = config.train.num_steps or batches.num_batches or 0
    checkpoints = TrainCheckpoints(folder.checkpoints, config.train.keep_checkpoints, monitor.say)
    held_out = read_held_out(config, eval_path, target, config.train.eval_prompts, monitor)
    identity = _identify(draft, target, held_out)
    check_same_settings(
        {"rows": index.fingerprint, "tokens": index.token_fingerprint, **identity},
        "give all processes the same target, tokenizer and data files",
    )
    run = _Training(
        config, folder, target, draft, train_path, batches, checkpoints, monitor, held_out, num_steps, identity
    )
    try:
        state = _restore(run)
        if config.data.feature_cache and int(state.step) < num_steps:  # a finished run needs no features
            position = run.batches.get_state()
            run.batches, _, _ = batch_rows(open_features(config, draft, target, chats, monitor))
            run.batches.set_state(position)
        state = _run_steps(run, state)
        best_step = _export(run, state)
    finally:
        checkpoints.close()
    return TrainedDraft(draft, index, num_steps, best_step)


def build_train_step(
    config: RunConfig, target: TargetConfig, draft: DraftConfig, num_steps: int, layout: Layout | None = None
) -> Callable[..., tuple[TrainState, dict]]:
    """Return the jitted train step of a run of `num_steps` steps, see `training.step.make_train_step`."""
    return make_train_step(
        target,
        draft,
        config.objective,
        config.optimizer,
        num_steps,
        config.train.compute_dtype,
        config.target.dtype,
        layout,
    )


def start_state(config: RunConfig, draft: DraftConfig, target: TargetModel) -> TrainState:
    """Return the state before the first step, with the initial weights that the configuration asks for.

    Raises:
        ConfigError: the drafter cannot start from the target's weights although it is to.
    """
    key, params = jax.random.key(config.seed), None
    if config.draft.initial_weights == "target":
        params = start_from_target(init_draft_params(draft, key), draft, target.config, target.weights.by_layer())
    return create_train_state(draft, config.optimizer, key, params, target.layout)


def _restore(run: _Training) -> TrainState:
    state = start_state(run.config, run.draft, run.target)
    restored = run.checkpoints.restore(state)
    if restored is not None:
        state, data_state, metadata = restored
        run.batches.set_state(data_state)
        stored = {name: metadata[name] for name in run.identity if name in metadata}
        differences = diff_configs(stored, run.identity)
        if differences:
            raise RunError(
                f"the target ({run.target.path}), its tokenizer or the held-out prompts are not those of step "
                f"{int(state.step)} in {run.folder.checkpoints}; put them back as they were, or give this run another "
                "--config.name:\n  " + "\n  ".join(differences)
            )
        run.monitor.say(f"going on from step {int(state.step)}")
    step, lacks_tau = int(state.step), restored is not None and restored[2][_LACKS_TAU]
    run.monitor.drop_rows_after(STAGE, step)
    run.monitor.drop_rows_after("held_out", step - 1 if lacks_tau else step)
    if lacks_tau:
        run.monitor.say(f"step {step} lacks its tau: decoding the held-out prompts")
        run.save(state, step, run.evaluate(state, step))
    return state


def _run_steps(run: _Training, state: TrainState) -> TrainState:
    train = run.config.train
    layout, weights = run.target.layout, run.target.weights
    find_frozen = weights.vocabulary if run.config.data.feature_cache else weights.stacked
    train_step = build_train_step(run.config, run.target.config, run.draft, run.num_steps, layout)
    first = int(state.step)
    skips = SkipWatch(run.train_path, train.max_skipped, run.monitor)
    steps = dict[int, Callable[..., tuple[TrainState, dict]]]()
    with shared_stop_requests() as stopped, run.monitor.stage("train the drafter", run.num_steps, first) as progress:
        began, num_tokens = time.perf_counter(), 0
        for step in range(first + 1, run.num_steps + 1):
            batch = next(run.batches)
            num_tokens += batch.num_tokens
            called = time.perf_counter()
            with activate(layout):
                inputs = split_batch(batch, run.config.data.micro_steps, layout)
                width = batch.input_ids.shape[1]
                is_new = width not in steps
                if is_new:
                    steps[width] = compile_together(train_step, state, find_frozen(), inputs)
                state, metrics = steps[width](state, find_frozen(), inputs)
            if is_new:  # the call returned when the step was compiled; its work goes on
                compile_s = time.perf_counter() - called
                run.monitor.say(f"step {step}: compiled for batches padded to {width} tokens in {compile_s:.1f} s")
                began += compile_s
            skips.check()
            skips.watch(step, batch, metrics)
            is_last = step == run.num_steps
            if step % train.log_every == 0 or is_last:
                values = {name: np.asarray(value).tolist() for name, value in metrics.items()}  # waits for the device
                _log(run, progress, step, values, num_tokens / (time.perf_counter() - began))
                began, num_tokens = time.perf_counter(), 0
            else:
                progress.advance()
            is_eval = step % train.eval_every == 0 or is_last
            if is_eval or step % train.checkpoint_every == 0 or is_stop_agreed(stopped, step):
                skips.check()
                paused = time.perf_counter()
                if is_eval:
                    run.evaluate_and_save(state, step)
                else:
                    run.save(state, step)
                began += time.perf_counter() - paused
                if is_stop_agreed(stopped, step):
                    raise RunStopped(f"stopped at step {step} of {run.num_steps} and saved; the same command goes on")
    return state


def _identify(draft: DraftConfig, target: TargetModel, held_out: HeldOutPrompts | None) -> dict[str, Any]:
    """Return what must not change below a run although its configuration stays the same."""
    return {
        "draft": to_json_dict(draft),
        "held_out": held_out.fingerprint() if held_out else "",
        "target": fingerprint_target(Path(target.path)),
        "tokenizer": describe_tokenizer(target.tokenizer),
    }


def split_batch(batch: TrainBatch, micro_steps: int, layout: Layout | None = None) -> StepInputs:
    """Return the arrays of a batch with a leading axis of micro-steps, placed and filled up for a layout.

    Of a batch that several processes share each gives the rows that its devices hold (`find_places`).
    """

    def split(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else x.reshape(micro_steps, -1, *x.shape[1:])

    arrays = (batch.input_ids, batch.loss_mask, batch.lengths, batch.features, batch.last_hidden)
    inputs = StepInputs(*map(split, arrays))
    if layout is None:
        return inputs
    num_rows = len(batch.line_nos) // micro_steps
    if inputs.lengths.shape[1] < num_rows:
        return layout.place_rows(inputs, num_rows)
    return layout.place(pad_sequences(inputs, layout.num_data))


def find_places(config: RunConfig, layout: Layout | None) -> list[int] | None:
    """Return the places of a batch whose rows this process reads; None: all, where there is no other process."""
    if layout is None or jax.process_count() == 1:
        return None
    num_rows = config.data.batch_size // config.data.micro_steps
    held = layout.find_places(num_rows)
    return [micro_step * num_rows + place for micro_step in range(config.data.micro_steps) for place in held]


def _log(run: _Training, progress: StageProgress, step: int, values: dict, tokens_per_s: float) -> None:
    run.monitor.log(STAGE, step, values | {"tokens_per_s": tokens_per_s})
    progress.advance(loss=values["loss"], accept_len=values["accept_len"], tau=run.tau, **{"tokens/s": tokens_per_s})


def _export(run: _Training, state: TrainState) -> int:
    """Save the latest and the best drafter and return the step of the best."""
    best, chosen = run.checkpoints.restore_best(state) or (int(state.step), state)
    for directory, params in ((run.folder.latest_draft, state.params), (run.folder.best_draft, chosen.params)):
        save_draft(str(directory), run.draft, params)
    run.monitor.say(f"drafters: {run.folder.best_draft} (step {best}), {run.folder.latest_draft}")
    return best
