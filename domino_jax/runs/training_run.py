"""A training run from configuration to report, stage by stage; what `train.py` runs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from domino_jax.checkpoints.huggingface import load_target, read_target_config
from domino_jax.config import require
from domino_jax.data.chat_template import find_stop_ids, load_tokenizer
from domino_jax.data.feature_cache import check_array_record
from domino_jax.data.pipeline import ChatSource
from domino_jax.data.tokenizer import MASK, SPECIAL_TOKENS
from domino_jax.decoding.generate import Decoder
from domino_jax.ops import cpu_kernels
from domino_jax.processes import is_first, on_all, on_first
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs.draft import resolve_draft, train_draft
from domino_jax.runs.embedded import (
    build_corpus,
    build_target,
    embedded_target_config,
    prompt_messages,
    read_corpus_chats,
)
from domino_jax.runs.features import open_features
from domino_jax.runs.folder import RunError, RunFolder, hold_run, write_text
from domino_jax.runs.model_card import write_model_cards
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.provenance import describe_directory, find_mismatches, settings_path
from domino_jax.runs.report import write_report
from domino_jax.runs.responses import ResponseSettings, describe_job, has_rows, regenerate
from domino_jax.runs.target_model import HeldWeights, TargetModel, find_target
from domino_jax.runs.wandb_log import WandbLog, load_wandb
from domino_jax.sharding import check_sizes, find_layout
from domino_jax.training.draft_init import check_start


def run_training(config: RunConfig) -> None:
    """Do every stage that the run's folder does not hold yet.

    Raises:
        RunStopped: the run was asked to stop and has saved.
        RunError: a file of chats is missing, the folder holds results of another configuration, or another process
            works in it.
        ValueError: of the room that found a mistake in data, checkpoint or configuration.
    """
    on_all(lambda: check_run(config))
    with hold_run(config) as folder:
        _run_stages(config, folder)


def _run_stages(config: RunConfig, folder: RunFolder) -> None:
    monitor = _open_monitor(folder)
    try:
        if config.train.wandb_project and is_first():
            monitor.also_log_to(WandbLog(config, folder, monitor.say))
        target, train_path, eval_path = _prepare(config, folder, monitor)
        warnings = warn_of_mismatches(config, train_path, target, monitor)
        trained = train_draft(config, folder, target, train_path, eval_path, monitor)
        with _own_report(folder) as own:
            numbers = write_report(config, own, target, eval_path, monitor)
        on_first(lambda: write_model_cards(config, folder, trained, numbers, warnings))
    finally:
        monitor.close()


def _open_monitor(folder: RunFolder) -> RunMonitor:
    if is_first():
        return RunMonitor(folder.metrics, folder.root / "tensorboard")
    return RunMonitor(None, None, is_quiet=True)


@contextmanager
def _own_report(folder: RunFolder) -> Iterator[RunFolder]:
    """Give processes that decode along with the first a folder whose report goes nowhere."""
    if is_first():
        yield folder
        return
    with TemporaryDirectory() as scratch:
        yield replace(folder, report_root=Path(scratch))


def cache_features(config: RunConfig, verify: bool = False) -> None:
    """Do every stage up to the feature cache, which is filled; with `verify` every record that is there is read.

    Raises:
        ConfigError: `data.feature_cache` is empty.
        ValueError: as `run_training`.
    """
    require(bool(config.data.feature_cache), "data.feature_cache is empty; give a directory")
    check_run(config)
    with hold_run(config) as folder:
        _fill_cache(config, folder, verify)


def _fill_cache(config: RunConfig, folder: RunFolder, verify: bool) -> None:
    monitor = RunMonitor(folder.metrics, folder.root / "tensorboard")
    try:
        target, train_path, _ = _prepare(config, folder, monitor)
        warn_of_mismatches(config, train_path, target, monitor)
        bad_rows_log = folder.root / "bad_rows.jsonl"
        chats = ChatSource(train_path, target.tokenizer, config.data, target.config.vocab_size, bad_rows_log)
        if chats.index.report.num_bad:
            monitor.say(chats.index.report.summary())
        open_features(config, resolve_draft(config, target), target, chats, monitor, verify)
        monitor.say(f"features of {len(chats)} rows are in {config.data.feature_cache}")
    finally:
        monitor.close()


def _prepare(config: RunConfig, folder: RunFolder, monitor: RunMonitor) -> tuple[TargetModel, str, str]:
    """Do the stages before the drafter; return the target and the files of training and held-out chats."""
    if config.corpus is None:
        return load_target_model(config, folder), config.data.train_path, config.data.eval_path
    if jax.process_count() > 1:
        on_first(lambda: _check_prepared(folder))
        return load_target_model(config, folder), str(folder.responses), str(folder.eval_chats)
    build_corpus(config, config.corpus, folder, monitor)
    build_target(config, config.corpus, folder, monitor)
    target = load_target_model(config, folder)
    _answer_prompts(config, config.corpus, folder, target, monitor)
    return target, str(folder.responses), str(folder.eval_chats)


def _check_prepared(folder: RunFolder) -> None:
    if not (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
        raise RunError(
            "this configuration builds its own target and answers (corpus), which one process does alone: start the "
            f"same command without the flags of many processes, stop it (Ctrl-C) when it trains the drafter of "
            f"{folder.root}, then start all processes; or train for a target that is there: --config.corpus=None "
            "--config.target.path=... --config.data.train_path=..."
        )


def check_run(config: RunConfig) -> None:
    """Refuse, before the first minute is spent, what a later stage would refuse.

    Raises:
        RunError: a file of chats or a package is missing, or held-out answers leave no room for a prompt.
        FeatureCacheError: features are to be kept and this platform has no ArrayRecord.
        ConfigError: the mesh does not fit the devices, mesh, drafter or sequences do not fit the target that the run
            builds, or `DOMINO_JAX_KERNELS` is neither 0 nor 1.
    """
    cpu_kernels.has_kernels_for("float32")  # refuses a wrong switch
    layout = find_layout(config.mesh)
    per_step = config.data.batch_size // config.data.micro_steps
    require(
        layout is None or per_step >= layout.num_data,
        f"data.batch_size {config.data.batch_size} by data.micro_steps {config.data.micro_steps} is {per_step} rows "
        f"at a time for {layout.num_data if layout else 1} groups of devices (mesh.data), some of which would have "
        "nothing to do; lower data.micro_steps, or give mesh.model more of the devices",
    )
    require(
        jax.process_count() == 1 or layout is None or per_step % layout.num_data == 0,
        f"data.batch_size {config.data.batch_size} by data.micro_steps {config.data.micro_steps} is {per_step} rows "
        f"at a time, which {layout.num_data if layout else 1} groups of devices (mesh.data) in "
        f"{jax.process_count()} processes cannot share evenly; give --config.data.batch_size a multiple of "
        f"{(layout.num_data if layout else 1) * config.data.micro_steps}",
    )
    for name, path in (("data.train_path", config.data.train_path), ("data.eval_path", config.data.eval_path)):
        if path and not Path(path).is_file():
            raise RunError(f"{name} is {path!r}, which is no file; give a JSONL of chats")
    if config.train.wandb_project:
        load_wandb()

    if config.data.feature_cache:
        check_array_record()
    if config.corpus:
        budget, context = config.train.eval_max_new_tokens, config.corpus.max_length
        length = config.data.max_length
        require(
            length <= context, f"data.max_length is {length}; the target's context, corpus.max_length, is {context}"
        )
        if budget >= context:
            raise RunError(
                f"train.eval_max_new_tokens is {budget}; prompt and answer share corpus.max_length {context}"
            )
        target = embedded_target_config(config.corpus, config.corpus.vocab_size)
        draft = config.draft.resolve(target, SPECIAL_TOKENS.index(MASK))
        check_sizes(layout, target, draft)
        if config.draft.initial_weights == "target":
            check_start(draft, target)


def load_target_model(config: RunConfig, folder: RunFolder) -> TargetModel:
    """Load the target the run trains for, with its tokenizer.

    Raises:
        ConfigError: the run's sequences are longer than the target's context, or mesh and target do not fit.
        CheckpointError: the checkpoint cannot be used.
        ChatTemplateError: the tokenizer cannot be used.
    """
    path = find_target(config, folder)
    layout = find_layout(config.mesh)
    check_sizes(layout, read_target_config(path)[0])
    target_config, params = load_target(path, config.target.dtype, layout)
    return TargetModel(path, target_config, HeldWeights(params), load_tokenizer(path), layout)


def warn_of_mismatches(config: RunConfig, train_path: str, target: TargetModel, monitor: RunMonitor) -> list[str]:
    """Say in which ways the training data are not this target's own words; return the lines said.

    The target's weights need not be loaded.
    """
    path = config.target.path or target.path
    mismatches = find_mismatches(Path(train_path), target, path, config.data.enable_thinking)
    for line in mismatches:
        monitor.say(f"WARNING: {line}")
    return mismatches


def _answer_prompts(
    config: RunConfig, corpus: CorpusConfig, folder: RunFolder, target: TargetModel, monitor: RunMonitor
) -> None:
    prompts = prompt_messages(read_corpus_chats(folder.train_chats))
    prompts = prompts[: corpus.num_draft_chats or None]
    settings = ResponseSettings(
        max_new_tokens=corpus.response_max_new_tokens,
        max_prompt_tokens=target.config.max_position_embeddings - corpus.response_max_new_tokens,
        batch_size=corpus.response_batch_size,
        enable_thinking=config.data.enable_thinking,
    )
    if not has_rows(folder.responses) or not settings_path(folder.responses).exists():
        # Rows without settings are of this run all the same: the folder's configuration is theirs.
        writer = describe_directory(folder.target, target.tokenizer)
        made_from = describe_job(writer, folder.train_chats, prompts, settings, config.target.dtype)
        write_text(settings_path(folder.responses), json.dumps(made_from, indent=2) + "\n")
    decoder = Decoder(target.config, target.weights.by_layer(), dtype=config.target.dtype, layout=target.layout)
    stop_ids = find_stop_ids(target.tokenizer, target.path)
    counts = regenerate(decoder, target.tokenizer, stop_ids, prompts, folder.responses, settings, monitor)
    monitor.say(f"responses: {counts.summary()}")
