"""Join target, drafter, engine and API into one server.

In: what the command line asked for. Out: a running server, or one sentence why it cannot run. Sizes come from the
checkpoints' configurations: a server that does not fit is refused before a weight is read.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.huggingface import (
    CONFIG_FILE,
    check_draft_fits,
    draft_table,
    find_kept,
    load_draft,
    load_target,
    read_draft_config,
    read_target_config,
    resolve_directory,
    shape_params,
    target_table,
)
from domino_jax.checkpoints.safetensors_io import read_json_object
from domino_jax.config import ConfigError, DraftConfig, SamplingConfig, TargetConfig, require
from domino_jax.data.chat_template import find_stop_ids, load_tokenizer
from domino_jax.decoding.draft_vocabulary import limit_vocabulary, load_draft_vocabulary, prepare_drafting
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.ops import cpu_kernels
from domino_jax.run_config import MeshConfig, RunConfig
from domino_jax.runs.draft_files import require_draft
from domino_jax.runs.folder import RunError, RunFolder
from domino_jax.runs.target_model import find_target
from domino_jax.serving.engine import SlotEngine
from domino_jax.serving.engine_config import EngineConfig, plan_ladders
from domino_jax.serving.http.api import create_app
from domino_jax.serving.http.http_server import run_server
from domino_jax.serving.http.settings import ApiSettings
from domino_jax.serving.http.text_codec import ByteLevelCodec
from domino_jax.serving.memory_plan import MemoryPlan, find_memory_limit, plan_memory, require_fit
from domino_jax.shapes import Int
from domino_jax.sharding import Layout, check_sizes, count_device_bytes, find_layout

_USUAL_SLOTS = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves and how.

    Attributes:
        target: directory or hub id.
        draft: the same; None: plain decoding.
        draft_vocabulary: file of the tokens to draft from; None: all.
        model_id: name in the API; None: the target's directory, or the run's where the target lies in one.
        max_slots: sequences that run at once; None: as many of 32 as fit.
        mesh: devices that share the models and the slots; None: one device.
        dtype: type of activations and caches. Weights come in it, but stay bfloat16 where that is what is stored and
            what a CPU's kernels take.
        draft_weights: type that the drafter's weights are rounded to; None: as the target's.
        memory_fraction: part of the device's memory that may be used.
        engine: the rest of the engine's settings.
        api: settings of the API; its `model_id` and `default_sampling` are replaced.
    """

    target: str
    draft: str | None = None
    draft_vocabulary: Path | None = None
    model_id: str | None = None
    mesh: MeshConfig | None = None
    dtype: str = "float32"
    draft_weights: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_slots: int | None = None
    memory_fraction: float = 0.9
    engine: EngineConfig = field(default_factory=EngineConfig)
    api: ApiSettings = field(default_factory=lambda: ApiSettings(model_id="model"))


def find_pair(config: RunConfig) -> tuple[str, str]:
    """Return the target and the drafter of a finished run.

    Raises:
        RunError: the run has no drafter yet.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    if not folder.best_draft.is_dir():
        raise RunError(
            f"{folder.root} holds no drafter: the run is not finished; run python train.py with the same --config "
            "first, or give --target and --draft"
        )
    return find_target(config, folder), str(folder.best_draft)


def find_newest_pair(output_dir: Path) -> tuple[str, str]:
    """Return target and drafter of the newest finished run that built its own target.

    Raises:
        RunError: there is none.
    """
    found = [
        folder
        for folder in map(RunFolder, sorted(output_dir.glob("*")))
        if (folder.report / "report.md").is_file() and (folder.target / CONFIG_FILE).is_file()
    ]
    if not found:
        raise RunError(
            f"nothing to serve: no finished run in {output_dir}/. Train the embedded default first (python train.py "
            "--config configs/tiny.py, minutes), name a run with --config, or give --target and --draft"
        )
    newest = max(found, key=lambda folder: folder.best_draft.stat().st_mtime)
    return str(newest.target), str(newest.best_draft)


def read_default_sampling(directory: Path) -> SamplingConfig:
    """Return how a target samples where a request does not say: as its `generation_config.json`, else temperature 1.

    Raises:
        ConfigError: the file holds values that cannot be used.
        CheckpointError: it is no JSON object.
    """
    file = directory / "generation_config.json"
    raw = read_json_object(file) if file.is_file() else {}
    if raw.get("do_sample") is False:
        return SamplingConfig()
    kinds = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
    try:
        known = {name: kind(raw[name]) for name, kind in kinds.items() if raw.get(name) is not None}
        return SamplingConfig(**{"temperature": 1.0, **known})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error


def make_codec(tokenizer: PreTrainedTokenizerBase, directory: str) -> ByteLevelCodec:
    """Return the API's view of a target's tokenizer.

    Raises:
        TextCodecError: the tokenizer is not a byte-level one.
        ChatTemplateError: no token ends a text.
    """

    def render(messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> str:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **{"enable_thinking": False, **template_kwargs},
        )
        assert isinstance(rendered, str)
        return rendered

    return ByteLevelCodec(tokenizer.backend_tokenizer, render, find_stop_ids(tokenizer, directory))


def serve(options: ServerOptions) -> int:
    """Serve until a signal or a fault ends the server; return the exit status.

    Raises:
        ConfigError: the options do not fit each other or the machine.
        CheckpointError, ChatTemplateError, TextCodecError: a model or its tokenizer cannot be used.
    """
    require_draft(options.draft_weights, options.draft)
    directory = resolve_directory(options.target)
    target, _ = read_target_config(str(directory))
    draft, draft_directory = None, None
    if options.draft is not None:
        draft_directory = resolve_directory(options.draft)
        draft, _ = read_draft_config(str(draft_directory))
        check_draft_fits(draft, target)
    codec = make_codec(load_tokenizer(str(directory)), str(directory))
    layout = find_layout(options.mesh) if options.mesh else None
    check_sizes(layout, target, draft)
    cpu_kernels.has_kernels_for(options.dtype)  # refuses a wrong switch here, not while programs are compiled
    options, vocabulary = read_vocabulary(options, target, draft)
    kept = find_kept(str(directory), target_table(target), options.dtype, layout)
    draft_type = options.draft_weights or options.dtype
    if draft:
        kept |= find_kept(str(draft_directory), draft_table(draft), draft_type, layout)
    config, plan = size_engine(options, target, draft, layout, kept=kept)
    each = f" on each of {layout.mesh.size} devices" if layout else ""
    print(f"memory ({config.max_slots} slots){each}:", *plan.lines(), sep="\n", flush=True)

    def load() -> ModelParams:
        _, target_params = load_target(str(directory), options.dtype, layout, keep_bfloat16=True)
        loaded = load_draft(str(draft_directory), draft_type, layout, keep_bfloat16=True) if draft_directory else None
        params = ModelParams(target_params, loaded.params if loaded else None)
        return prepare_drafting(params, vocabulary, options.dtype, layout)

    engine = SlotEngine(target, draft, load, config, options.dtype, layout)
    path = directory.resolve()
    settings = replace(
        options.api,
        model_id=options.model_id or (path.parent if path == RunFolder(path.parent).target else path).name,
        default_sampling=read_default_sampling(directory),
    )
    print(
        f"serving {settings.model_id} on http://{options.host}:{options.port} (ready when /ready answers 200)",
        flush=True,
    )
    return run_server(create_app(engine, codec, settings), options.host, options.port)


def read_vocabulary(
    options: ServerOptions, target: TargetConfig, draft: DraftConfig | None
) -> tuple[ServerOptions, Int[np.ndarray, " U"] | None]:
    """Return the tokens that may be drafted, None for all, and the options with their number.

    Raises:
        ConfigError: there is a file and no drafter.
        DraftVocabularyError: the file is no draft vocabulary of the target.
    """
    vocabulary = load_draft_vocabulary(options.draft_vocabulary, target.vocab_size)
    if vocabulary is None:
        return options, None
    require(
        draft is not None,
        f"--draft-vocabulary {options.draft_vocabulary} is given but no drafter; name one with --draft or leave it out",
    )
    return replace(options, engine=replace(options.engine, draft_vocab_size=len(vocabulary))), vocabulary


def size_engine(
    options: ServerOptions,
    target: TargetConfig,
    draft: DraftConfig | None,
    layout: Layout | None = None,
    device_bytes: int | None = None,
    kept: Collection[str] = (),
) -> tuple[EngineConfig, MemoryPlan]:
    """Return the engine's settings with its number of slots, and what it needs.

    `device_bytes` is what a device has; None: what the one at hand has. `kept` are the public names of
    weights that stay bfloat16.

    Raises:
        ConfigError: it does not fit the memory; the message says what would.
    """
    fraction = options.memory_fraction
    require(0 < fraction <= 1, f"memory_fraction is {fraction}; it must be more than 0 and at most 1")
    num_devices = layout.mesh.size if layout else 1
    limit = find_memory_limit(fraction, num_devices) if device_bytes is None else int(device_bytes * fraction)

    shapes = shape_pair(options, target, draft, layout, kept)
    shapes = layout.abstract(shapes) if layout else shapes
    target_bytes, draft_bytes = count_device_bytes(shapes.target), count_device_bytes((shapes.draft, shapes.vocabulary))

    def plan(config: EngineConfig) -> MemoryPlan:
        settings = DecodeSettings(target=target, draft=draft, dtype=options.dtype)
        return plan_memory(settings, plan_ladders(config, target, draft), target_bytes, draft_bytes, layout)

    def with_slots(num_slots: int) -> EngineConfig:
        sizes = options.engine.batch_sizes
        if options.max_slots is None and sizes is not None:
            sizes = tuple(size for size in sizes if size <= num_slots)
        return replace(options.engine, max_slots=num_slots, batch_sizes=sizes)

    if options.max_slots is None:
        for num_slots in _USUAL_SLOTS:
            if plan(with_slots(num_slots)).total_bytes <= limit:
                return with_slots(num_slots), plan(with_slots(num_slots))
    config = with_slots(1 if options.max_slots is None else options.max_slots)

    def advise() -> str:
        fewer = [n for n in _USUAL_SLOTS if n < config.max_slots]
        fitting = [n for n in fewer if plan(replace(config, max_slots=n, batch_sizes=None)).total_bytes <= limit]
        if fitting:
            return f"--max-slots {fitting[0]} would fit; so may a smaller --max-model-len or --prefix-cache-tokens 0"
        length = config.max_model_len or target.max_position_embeddings
        while length > 256:
            length //= 2
            if plan(replace(config, max_model_len=length)).total_bytes <= limit:
                return f"--max-model-len {length} would fit with {config.max_slots} slots; so may fewer --max-slots"
        return "not even one short sequence fits beside the weights; use --dtype bfloat16 or a larger device"

    require_fit(plan(config), limit, advise)
    return config, plan(config)


def shape_pair(
    options: ServerOptions,
    target: TargetConfig,
    draft: DraftConfig | None,
    layout: Layout | None = None,
    kept: Collection[str] = (),
) -> ModelParams:
    """Return shapes and types of the weights that a server holds; `kept` as for `size_engine`."""
    whole = ModelParams(
        shape_params(target_table(target), options.dtype, kept),
        shape_params(draft_table(draft), options.draft_weights or options.dtype, kept) if draft else None,
    )
    token_ids = np.arange(options.engine.draft_vocab_size) if options.engine.draft_vocab_size else None
    if layout is None:
        return jax.eval_shape(lambda params: prepare_drafting(params, token_ids, options.dtype), whole)
    return whole if token_ids is None else jax.eval_shape(lambda params: limit_vocabulary(params, token_ids), whole)


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs in a directory, so that the next start finds them; `none`: do not."""
    if directory == "none":
        return
    path = Path(directory).expanduser()
    require(
        not path.exists() or (path.is_dir() and os.access(path, os.W_OK)),
        f"--compilation-cache {directory} is not a directory that can be written; give another one, or none",
    )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
