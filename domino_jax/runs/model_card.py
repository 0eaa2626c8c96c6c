"""The model card beside an exported drafter: what it is, what it was trained on, what was measured, how to use it.

Holds only what the run itself knows; what was not measured is said to be so. The front matter is what the Hugging Face
Hub reads; a licence is for the owner to choose. A card that is there is left alone, as its owner may have added to it.

Source: model cards of the Hugging Face Hub.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from domino_jax.checkpoints.safetensors_io import read_json_object
from domino_jax.config import to_json_dict
from domino_jax.data.pipeline import RowIndex
from domino_jax.run_config import RunConfig
from domino_jax.runs.draft import TrainedDraft
from domino_jax.runs.folder import RunFolder, write_text
from domino_jax.runs.monitor import read_rows
from domino_jax.runs.pages import render_table
from domino_jax.runs.provenance import name_writer, settings_path
from domino_jax.runs.report import ReportNumbers, best_width_sentence

CARD_FILE = "README.md"
_NOT_MEASURED = "not measured"


def write_model_cards(
    config: RunConfig,
    folder: RunFolder,
    trained: TrainedDraft,
    numbers: ReportNumbers | None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the cards of the best and of the latest drafter of a run.

    `numbers` belong to the best drafter; `warnings` are sentences about the data that a user of the drafter must know.
    """
    held_out = {row["step"]: row for row in read_rows(folder.metrics) if row["stage"] == "held_out"}
    for directory, step in ((folder.best_draft, trained.best_step), (folder.latest_draft, trained.num_steps)):
        path = directory / CARD_FILE
        if not path.exists():
            own_numbers = numbers if step == trained.best_step else None
            text = render_card(config, directory, step, trained, own_numbers, held_out.get(step), warnings)
            write_text(path, text)


def render_card(
    config: RunConfig,
    directory: Path,
    step: int,
    trained: TrainedDraft,
    numbers: ReportNumbers | None,
    held_out: dict[str, Any] | None,
    warnings: Sequence[str] = (),
) -> str:
    """Return the card of the drafter in `directory`, taken after `step` optimizer steps.

    `held_out` is the metric row of the held-out prompts decoded at that step, if there were any.
    """
    target = config.target.path or str(Path(config.output_dir) / config.name / "target")
    kind = "Domino" if trained.config.has_head else "DFlash"
    sections = [
        f"---\n{_front_matter(config, kind)}\n---",
        f"# {config.name}: a {kind} drafter for {target}",
        "A block-parallel drafter for lossless speculative decoding, trained with `domino_jax`. It drafts for exactly "
        "this target and is of no use alone. Method: Domino, arXiv [2605.29707](https://arxiv.org/abs/2605.29707).",
        "## What was measured",
        *(_measured(numbers) if numbers else _measured_along_the_run(config, step, trained, held_out)),
        "## How to use it",
        *_usage(config, directory, target, trained),
        "## Training data",
        *_data(config, trained.data, warnings),
        "## Settings",
        render_table(_settings(config, step, trained)),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(config: RunConfig, kind: str) -> str:
    path = config.target.path
    is_hub_id = bool(path) and path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    card = ModelCardData(
        base_model=path if is_hub_id else None,
        library_name="domino_jax",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", kind.lower(), "jax"],
    )
    return card.to_yaml() + "\n# license: choose one before you publish; the target's own may bind you"


def _measured(numbers: ReportNumbers) -> list[str]:
    tau = [
        {"drafts": name, "tau over prompts": means["prompts"], "tau over rounds": means["rounds"]}
        for name, means in numbers.tau.items()
    ]
    slots = [
        {"drafted token": i + 1, **{name: shares[i] for name, shares in numbers.slots.items()}}
        for i in range(len(numbers.slots["head on"]))
    ]
    return [
        f"On {numbers.num_prompts} held-out prompts, at most {numbers.max_new_tokens} new tokens each; device: "
        f"{numbers.device}, jax {numbers.jax_version}, Python {numbers.python_version}. A dash stands for what could "
        "not be measured. No other prompts, devices or servers were tried by this run.",
        "### Tokens committed a round (tau), greedy",
        render_table(tau),
        "### Share of rounds that accept a drafted token, greedy",
        render_table(slots),
        "### Speed over plain decoding, batch 1, greedy, by block width",
        render_table(numbers.widths),
        f"{best_width_sentence(numbers.widths)} Speed belongs to the device it was measured on.",
        "### Text",
        render_table(numbers.quality),
    ]


def _measured_along_the_run(
    config: RunConfig, step: int, trained: TrainedDraft, held_out: dict[str, Any] | None
) -> list[str]:
    if held_out is None:
        return ["Nothing: the run had no held-out chats. tau, acceptance by slot and speed-up: " + _NOT_MEASURED + "."]
    names = {
        "tau": "tau over prompts, head on",
        "tau_head_off": "tau over prompts, head off",
        "tau_rounds": "tau over rounds, head on",
        "tau_rounds_head_off": "tau over rounds, head off",
    }
    rows = [{"greedy": label, "value": held_out[name]} for name, label in names.items() if name in held_out]
    return [
        f"On at most {config.train.eval_prompts} held-out prompts, {config.train.eval_max_new_tokens} new tokens each, "
        "along the run:",
        render_table(rows),
        f"Acceptance by slot and speed-up: {_NOT_MEASURED} for this drafter (step {step}), only for the best one of "
        f"its run (step {trained.best_step}).",
    ]


def _usage(config: RunConfig, directory: Path, target: str, trained: TrainedDraft) -> list[str]:
    dtype = config.target.dtype
    architecture = "DominoDraftModel" if trained.config.has_head else "DFlashDraftModel"
    return [
        f"```bash\npython bench.py --target {target} --draft {directory} --prompts prompts.jsonl "
        f"--max-new-tokens 256 --dtype {dtype} --output rows.jsonl\n```",
        "```python\n"
        "from domino_jax.checkpoints.huggingface import load_draft, load_target\n"
        "from domino_jax.decoding.generate import Decoder\n\n"
        f'target_config, target_params = load_target("{target}", "{dtype}")\n'
        f'draft = load_draft("{directory}", "{dtype}")\n'
        f'decoder = Decoder(target_config, target_params, draft.config, draft.params, dtype="{dtype}")\n'
        "(generation,) = decoder.generate([prompt_ids], max_new_tokens=256, stop_ids=stop_ids)\n"
        "```",
        f"The folder is in the public drafter layout (`{architecture}`, as written by SpecForge and read by servers "
        "such as SGLang and vLLM in versions that know it). Loading it in another program was not tried by this run.",
    ]


def _data(config: RunConfig, index: RowIndex, warnings: Sequence[str]) -> list[str]:
    num_bad = index.report.num_bad
    rows = [
        {"data": "where from", "": _where_from(config)},
        {"data": "who wrote the answers", "": _who_answered(config)},
        {"data": "rows used", "": f"{len(index.offsets):,}" + (f" ({num_bad:,} skipped)" if num_bad else "")},
        {"data": "tokens", "": f"{index.num_tokens:,}"},
        {"data": "learned tokens", "": f"{index.num_learned_tokens:,}"},
        {"data": f"rows cut to {config.data.max_length} tokens", "": f"{index.num_truncated:,}"},
        {"data": "thinking", "": "on" if config.data.enable_thinking else "off"},
    ]
    notes = ["**Mind:**\n\n" + "\n".join(f"- {warning}" for warning in warnings)] if warnings else []
    return [render_table(rows), *notes]


def _where_from(config: RunConfig) -> str:
    if config.corpus:
        return f"made from Python's standard library by the run ({config.corpus.task})"
    return Path(config.data.train_path).name


def _who_answered(config: RunConfig) -> str:
    if config.corpus:
        return "the target itself, greedy"
    record = settings_path(Path(config.data.train_path))
    if not record.exists():
        return f"not recorded ({record.name} is missing)"
    made_from = read_json_object(record)
    temperature = made_from.get("sampling", {}).get("temperature", 0.0)
    how = "greedy" if temperature == 0 else f"temperature {temperature}"
    return f"{name_writer(made_from.get('target'))}, {how}"


def _settings(config: RunConfig, step: int, trained: TrainedDraft) -> list[dict[str, Any]]:
    draft, objective, optimizer = trained.config, config.objective, config.optimizer
    head = f"GRU of {draft.gru_hidden_dim}, rank {draft.emb_dim}" if draft.has_head else "none"
    values = {
        "block size": f"{draft.block_size}, {draft.num_draft_tokens()} tokens drafted a round",
        "draft layers": draft.num_hidden_layers,
        "target layers read": ", ".join(map(str, draft.target_layer_ids)),
        "head": head,
        "initial weights": "copied from the target" if config.draft.initial_weights == "target" else "drawn",
        "objective": _list_fields(objective),
        "optimizer": _list_fields(optimizer),
        "steps": f"{step} of {trained.num_steps}, batches of {config.data.batch_size}",
        "sequence length": config.data.max_length,
        "types": f"target {config.target.dtype}, activations {config.train.compute_dtype}, trained weights float32",
        "seed": config.seed,
    }
    return [{"setting": name, "value": value} for name, value in values.items()]


def _list_fields(config: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in to_json_dict(config).items())
