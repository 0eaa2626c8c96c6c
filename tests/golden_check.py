"""Judge this implementation by recorded data: `python tests/golden_check.py DIR`.

DIR has the layout of `tests/golden` (described in its README.md); the names, sizes and targets in it are read from
the directory. One line a case with its largest error; exit status 0: all passed, 1: a case failed, 2: DIR is not of
the layout. A directory may lack whole kinds of cases; one without any is not of the layout.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from domino_jax.config import default_target_layer_ids
from domino_jax.decoding.generate import Decoder
from domino_jax.models.qwen3 import Qwen3
from domino_jax.run_config import ObjectiveConfig
from domino_jax.training.schedule import base_weight_schedule
from tests.golden_draft import check_backbone, check_training
from tests.golden_files import RULE_TOLERANCE, Recorded, Result, find_target, open_draft, open_target, read_json


@dataclass(frozen=True)
class Case:
    """One thing to check; `run` raises nothing for a wrong number, it returns it."""

    name: str
    run: Callable[[], Result]


def check_target_io(root: Path, stem: str) -> Result:
    config, params = open_target(root / stem)
    recorded = Recorded(load_file(root / "target_io" / f"{stem}.safetensors"))
    model = Qwen3(config, tuple(range(config.num_hidden_layers)))
    prefixes = sorted({key.split(".")[0] for key in recorded})
    prompts = {p: recorded[f"{p}.input_ids"] for p in prefixes}
    greedy = {p: recorded[f"{p}.greedy_ids"] for p in prefixes}
    length = max(prompts[p].shape[1] + greedy[p].shape[1] for p in prefixes)

    @jax.jit
    def forward(params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = model.apply({"params": params}, ids)
        layers = jnp.stack(jnp.split(output.features, config.num_hidden_layers, axis=-1)[:-1])
        hidden = jnp.concatenate([params["embed_tokens"][ids][None], layers, output.hidden[None]])
        return hidden, model.apply({"params": params}, output.hidden, method=Qwen3.logits)

    result = Result()
    for p in prefixes:
        # Prompt, recorded continuation, padding: attention is causal, so one compiled length serves them all.
        ids = np.concatenate([prompts[p], greedy[p]], axis=1)
        hidden, logits = forward(params, np.pad(ids, ((0, 0), (0, length - ids.shape[1]))).astype(np.int32))
        size = prompts[p].shape[1]
        result.compare(f"{p}.hidden_states", hidden[:, :, :size], recorded[f"{p}.hidden_states"])
        result.compare(f"{p}.logits", logits[:, :size], recorded[f"{p}.logits"])
        ends = logits[:, [size - 1, ids.shape[1] - 2]]
        result.compare(f"{p}.greedy_logits_first_last", ends, recorded[f"{p}.greedy_logits_first_last"])
        if f"{p}.greedy_margins" in recorded:
            second, first = np.moveaxis(np.sort(logits[:, size - 1 : ids.shape[1] - 1])[..., -2:], -1, 0)
            result.compare(f"{p}.greedy_margins", first - second, recorded[f"{p}.greedy_margins"])
    rows = [(p, i) for p in prefixes for i in range(len(prompts[p]))]
    generations = Decoder(config, params).generate(
        [prompts[p][i].tolist() for p, i in rows], max_new_tokens=[greedy[p].shape[1] for p, _ in rows]
    )
    for (p, i), generation in zip(rows, generations, strict=True):
        result.equal(f"{p}.greedy_ids[{i}]", generation.output_ids, greedy[p][i])
    result.all_read(recorded)
    return result


@lru_cache(maxsize=32)
def decode_cases(root: Path, name: str) -> dict[str, object]:
    """Decode all cases of a drafter, those of one block width together, and return the generations by case name."""
    draft = open_draft(root / "draft" / name)
    decoder = Decoder(*open_target(find_target(root, name)), draft.config, draft.params)
    cases = read_json(root / "spec_generate" / f"{name}.json")["cases"]
    generations = {}
    for width in sorted({case["block_size"] or draft.config.block_size for case in cases}):
        group = [case for case in cases if (case["block_size"] or draft.config.block_size) == width]
        outputs = decoder.generate(
            [case["prompt"] for case in group],
            max_new_tokens=[case["max_new_tokens"] for case in group],
            stop_ids=[tuple(case["stop_token_ids"] or ()) for case in group],
            block_size=width,
        )
        generations |= {case["name"]: output for case, output in zip(group, outputs, strict=True)}
    return generations


def check_generation(root: Path, name: str, case: dict) -> Result:
    result = Result()
    generation = decode_cases(root, name)[case["name"]]
    result.equal("output_ids", case["prompt"] + generation.output_ids, case["output_ids"])
    lengths, recorded = generation.stats.acceptance_lengths, case["acceptance_lengths"]
    if case["block_size"] == 1:
        lengths = [1] * (len(generation.output_ids) - 1)  # plain decoding: a round is a token
    new_ids, stops = case["output_ids"][len(case["prompt"]) :], case["stop_token_ids"] or []
    if new_ids and new_ids[0] in stops:
        result.equal("acceptance_lengths after a stop token from the prefill", lengths, [])
        return result
    room = case["max_new_tokens"] - 1
    if sum(recorded) > room and not open_draft(root / "draft" / name).config.has_head:
        num_within = int(np.sum(np.cumsum(recorded) <= room))
        result.equal("acceptance_lengths before the overrun", lengths[:num_within], recorded[:num_within])
        result.equal("tokens of all rounds", sum(lengths), room)
    else:
        result.equal("acceptance_lengths", lengths, recorded)
    return result


def check_base_weight(root: Path) -> Result:
    result = Result()
    for case in read_json(root / "train" / "lambda_base.json")["cases"]:
        ratio, num_steps = case["lambda_base_decay_ratio"], case["total_steps"]
        config = ObjectiveConfig(base_weight_start=case["lambda_base_start"], base_weight_decay_ratio=ratio)
        schedule = base_weight_schedule(config, num_steps)
        ours = [schedule(step) for step in range(num_steps + 1)]
        result.compare(f"lambda_base over {num_steps} steps, ratio {ratio}", ours, case["values"], RULE_TOLERANCE)
    return result


def check_layer_ids(root: Path) -> Result:
    result = Result()
    for case in read_json(root / "train" / "target_layer_ids.json")["cases"]:
        sizes = case["num_target_layers"], case["num_draft_layers"]
        result.equal(f"target_layer_ids of {sizes}", default_target_layer_ids(*sizes), case["target_layer_ids"])
    return result


def find_cases(root: Path) -> Iterator[Case]:
    """Yield every case of a directory; file names decide, nothing is run yet."""
    for path in sorted((root / "target_io").glob("*.safetensors")):
        yield Case(f"target_io/{path.stem}", lambda stem=path.stem: check_target_io(root, stem))
    for path in sorted((root / "backbone").glob("*.safetensors")):
        yield Case(f"backbone/{path.stem}", lambda name=path.stem: check_backbone(root, name))
    for path in sorted((root / "spec_generate").glob("*.json")):
        for case in read_json(path)["cases"]:
            yield Case(
                f"spec_generate/{path.stem}/{case['name']}",
                lambda name=path.stem, case=case: check_generation(root, name, case),
            )
    for path in sorted((root / "train").glob("*.safetensors")):
        yield Case(f"train/{path.stem}", lambda name=path.stem: check_training(root, name))
    if (root / "train" / "lambda_base.json").exists():
        yield Case("train/lambda_base", lambda: check_base_weight(root))
    if (root / "train" / "target_layer_ids.json").exists():
        yield Case("train/target_layer_ids", lambda: check_layer_ids(root))


def run_case(case: Case) -> Result:
    """Run a case; whatever it raises fails it instead of ending the whole check."""
    try:
        return case.run()
    except Exception as error:  # noqa: BLE001 - a judge goes through all cases; safetensors and flax raise plain ones
        return Result(float("nan"), [f"{type(error).__name__}: {error}"])


def main(arguments: list[str]) -> int:
    """Check the directory named on the command line; return the exit status."""
    if len(arguments) != 1:
        print("usage: python tests/golden_check.py DIR", file=sys.stderr)
        return 2
    root = Path(arguments[0]).resolve()
    try:
        cases = list(find_cases(root))
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"{root} is not of the layout of tests/golden: {error!r}", file=sys.stderr)
        return 2
    if not cases:
        print(f"{root} holds no case; it must be a directory of the layout of tests/golden", file=sys.stderr)
        return 2
    num_failed = 0
    for case in cases:
        with jax.default_matmul_precision("highest"):
            result = run_case(case)
        num_failed += bool(result.failures)
        print(f"{'FAIL' if result.failures else 'ok  '} {case.name:<40} largest error {result.error:.2e}", flush=True)
        for sentence in result.failures or []:
            print(f"       {sentence}")
    print(f"{len(cases) - num_failed} of {len(cases)} cases passed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
