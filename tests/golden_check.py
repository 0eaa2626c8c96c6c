"""Judge this implementation by recorded data: `python tests/golden_check.py DIR`.

DIR has the layout of `tests/golden` (described in its README.md); the names, sizes and targets in it are read from
the directory. One line a case with its largest error; exit status 0: all passed, 1: a case failed, 2: DIR is not of
the layout. A directory may lack whole kinds of cases; one without any is not of the layout.
"""

import json
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

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import default_target_layer_ids
from domino_jax.decoding.generate import Decoder
from domino_jax.models.domino_head import DominoHead
from domino_jax.models.draft_backbone import DraftBackbone, init_draft_cache
from domino_jax.models.qwen3 import Qwen3, init_target_cache

# The tolerances, here and nowhere else. An error is |ours - recorded| / max(1, |recorded|), its largest in a tensor;
# of a gradient it is max |ours - recorded| / max |recorded|. Ids, masks, labels and lengths are compared exactly.
STATE_TOLERANCE = 1e-4  # hidden states, logits, caches, GRU states
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
RULE_TOLERANCE = 1e-7


class LayoutError(ValueError):
    """A directory that does not hold what a case needs."""


@dataclass
class Result:
    """What one case found.

    Attributes:
        error: the largest floating-point error of the case.
        failures: one sentence for everything outside its tolerance; empty: the case passed.
    """

    error: float = 0.0
    failures: list[str] | None = None

    def compare(self, name: str, ours: object, recorded: object, tolerance: float = STATE_TOLERANCE) -> None:
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if ours.shape != recorded.shape:
            self.fail(f"{name} has shape {ours.shape}, recorded {recorded.shape}")
            return
        if ours.size:
            self.bound(name, float(np.max(np.abs(ours - recorded) / np.maximum(1.0, np.abs(recorded)))), tolerance)

    def bound(self, name: str, error: float, tolerance: float) -> None:
        self.error = max(self.error, error) if np.isfinite(error) else float("inf")
        if not error <= tolerance:
            self.fail(f"{name} differs by {error:.2e}, more than {tolerance:.0e}")

    def equal(self, name: str, ours: object, recorded: object) -> None:
        ours, recorded = np.asarray(ours), np.asarray(recorded)
        if ours.shape != recorded.shape:
            self.fail(f"{name} has shape {ours.shape}, recorded {recorded.shape}")
        elif not np.array_equal(ours, recorded):
            at = tuple(int(i) for i in np.argwhere(ours != recorded)[0])
            self.fail(f"{name} differs, first at {at}: {ours[at]}, recorded {recorded[at]}")

    def fail(self, sentence: str) -> None:
        self.failures = [*(self.failures or []), sentence]


@dataclass(frozen=True)
class Case:
    """One thing to check; `run` raises nothing for a wrong number, it returns it."""

    name: str
    run: Callable[[], Result]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=8)
def open_target(path: Path) -> tuple:
    return load_target(str(path), "float32")


@lru_cache(maxsize=32)
def open_draft(path: Path) -> object:
    return load_draft(str(path), "float32")


def find_target(root: Path, draft_name: str) -> Path:
    """Return the target of a drafter: the one its recorded cases name, else the only one that it fits."""
    for kind in ("spec_generate", "backbone", "train"):
        path = root / kind / f"{draft_name}.json"
        named = read_json(path).get("target") if path.exists() else None
        if isinstance(named, str) and (root / named / "config.json").exists():
            return root / named
    fitting = []
    for config in sorted(root.glob("*/config.json")):
        try:
            check_draft_fits(open_draft(root / "draft" / draft_name).config, open_target(config.parent)[0])
        except CheckpointError:
            continue
        fitting.append(config.parent)
    if len(fitting) != 1:
        raise LayoutError(
            f"drafter {draft_name}: no file names its target, and {len(fitting)} directories of {root} fit it; "
            'give "target" in spec_generate'
        )
    return fitting[0]


def check_target_io(root: Path, stem: str) -> Result:
    config, params = open_target(root / stem)
    recorded = load_file(root / "target_io" / f"{stem}.safetensors")
    model = Qwen3(config, tuple(range(config.num_hidden_layers)))
    variables = {"params": params}
    decoder = Decoder(config, params)
    result = Result()
    for prefix in sorted({key.split(".")[0] for key in recorded}):
        ids = recorded[f"{prefix}.input_ids"]
        greedy = recorded[f"{prefix}.greedy_ids"]
        output = model.apply(variables, jnp.asarray(ids, jnp.int32))
        layers = jnp.stack(jnp.split(output.features, config.num_hidden_layers, axis=-1)[:-1])
        embedded = model.apply(variables, jnp.asarray(ids), method=Qwen3.embed)
        hidden = jnp.concatenate([embedded[None], layers, output.hidden[None]])
        result.compare(f"{prefix}.hidden_states", hidden, recorded[f"{prefix}.hidden_states"])
        logits = model.apply(variables, output.hidden, method=Qwen3.logits)
        result.compare(f"{prefix}.logits", logits, recorded[f"{prefix}.logits"])
        cache = init_target_cache(config, ids.shape[0], ids.shape[1] + greedy.shape[1], jnp.float32)
        start = jnp.zeros(ids.shape[0], jnp.int32)
        first = model.apply(variables, jnp.asarray(ids), start, cache, method=Qwen3.forward_cached)
        rest = model.apply(
            variables, jnp.asarray(greedy[:, :-1]), start + ids.shape[1], first.cache, method=Qwen3.forward_cached
        )
        ends = model.apply(variables, jnp.stack([first.hidden[:, -1], rest.hidden[:, -1]]), method=Qwen3.logits)
        ends_recorded = recorded[f"{prefix}.greedy_logits_first_last"]
        if ends_recorded.shape[0] == ids.shape[0] and ids.shape[0] != 2:
            ends_recorded = ends_recorded.transpose(1, 0, 2)
        result.compare(f"{prefix}.greedy_logits_first_last", ends, ends_recorded)
        generations = decoder.generate(ids.tolist(), greedy.shape[1])
        result.equal(f"{prefix}.greedy_ids", [g.output_ids for g in generations], greedy)
    return result


def check_backbone(root: Path, name: str) -> Result:
    draft = open_draft(root / "draft" / name)
    target_config, target_params = open_target(find_target(root, name))
    recorded = load_file(root / "backbone" / f"{name}.safetensors")
    target, variables = Qwen3(target_config, draft.config.target_layer_ids), {"params": target_params}
    backbone, draft_variables = DraftBackbone(draft.config), {"params": draft.params["backbone"]}
    result = Result()
    num_rounds = len({key.split(".")[0] for key in recorded if key.startswith("round")})
    prompt = jnp.asarray(recorded["prompt_ids"], jnp.int32)
    num_positions = recorded[f"round{num_rounds - 1}.cache_k_after_forward"].shape[3] + 2
    target_cache = init_target_cache(target_config, 1, num_positions, jnp.float32)
    cache = init_draft_cache(draft.config, 1, num_positions, jnp.float32)
    start = 0
    output = target.apply(variables, prompt, jnp.zeros(1, jnp.int32), target_cache, method=Qwen3.forward_cached)
    features = output.features
    for r in range(num_rounds):
        data = {key.split(".", 1)[1]: value for key, value in recorded.items() if key.startswith(f"round{r}.")}
        num_new, width = data["target_hidden"].shape[1], data["noise_embedding"].shape[1]
        result.compare(f"round{r}.target_hidden", features[:, :num_new], data["target_hidden"])
        context = backbone.apply(draft_variables, data["target_hidden"], method=DraftBackbone.project_context)
        cache = backbone.apply(
            draft_variables, context, jnp.full(1, start), cache, method=DraftBackbone.write_context
        )
        start += num_new
        anchor_pos = jnp.full(1, start)
        result.equal(f"round{r}.position_ids", np.arange(start - num_new, start + width)[None], data["position_ids"])
        block = target.apply(variables, jnp.asarray(data["block_ids"]), method=Qwen3.embed)
        result.compare(f"round{r}.noise_embedding", block, data["noise_embedding"])
        hidden = backbone.apply(draft_variables, block, anchor_pos, cache, method=DraftBackbone.draft)
        result.compare(f"round{r}.draft_hidden", hidden, data["draft_hidden"])
        keys = jnp.stack([k[..., :start].swapaxes(-1, -2) for k in cache.keys])
        values = jnp.stack([v[..., :start, :] for v in cache.values])
        result.compare(f"round{r}.cache_k", keys, data["cache_k_after_forward"][..., :start, :])
        result.compare(f"round{r}.cache_v", values, data["cache_v_after_forward"][..., :start, :])
        rows = hidden if draft.config.shift_label else hidden[:, 1:]
        base_logits = target.apply(variables, rows, method=Qwen3.logits)
        result.compare(f"round{r}.base_logits", base_logits, data["base_logits"])
        _compare_rollout(result, f"round{r}", draft, target_params["embed_tokens"], rows, base_logits, data)
        output = target.apply(
            variables, jnp.asarray(data["verify_ids"]), anchor_pos, output.cache, method=Qwen3.forward_cached
        )
        features = output.features
        logits = target.apply(variables, output.hidden, method=Qwen3.logits)
        num_verified = data["target_posterior"].shape[1]
        result.compare(f"round{r}.target_verify_logits", logits[:, :num_verified], data["target_verify_logits"])
        result.equal(f"round{r}.target_posterior", logits[:, :num_verified].argmax(-1), data["target_posterior"])
    return result


def _compare_rollout(
    result: Result, where: str, draft: object, embedding: jax.Array, rows: jax.Array, base: jax.Array, data: dict
) -> None:
    if not draft.config.has_head:
        result.equal(f"{where}.draft_tokens", base.argmax(-1), data["draft_tokens"])
        return
    head, variables = DominoHead(draft.config), {"params": draft.params["head"]}
    prefix_len = min(draft.config.pure_draft_prefix_len, base.shape[1])
    state = head.apply(variables, (1,), method=DominoHead.init_state)
    token, tokens, states, corrected = jnp.asarray(data["block_ids"][:, 0]), [], [], []
    for k in range(base.shape[1]):
        state = head.apply(variables, state, embedding[token], method=DominoHead.step)
        logits = base[:, k]
        if k >= prefix_len:
            logits = logits + head.apply(variables, rows[:, k], state, method=DominoHead.correct)
            states.append(state)
            corrected.append(logits)
        token = logits.argmax(-1)
        tokens.append(token)
    result.equal(f"{where}.draft_tokens", jnp.stack(tokens, 1), data["draft_tokens"])
    if corrected:
        result.compare(f"{where}.corrected_logits", jnp.stack(corrected, 1), data["corrected_logits"])
        result.compare(f"{where}.gru_states", jnp.stack(states, 1), data["gru_states"])
    if "prefix_logits" in data:
        result.compare(f"{where}.prefix_logits", base[:, :prefix_len], data["prefix_logits"])


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
    if (root / "train" / "target_layer_ids.json").exists():
        yield Case("train/target_layer_ids", lambda: check_layer_ids(root))


def run_case(case: Case) -> Result:
    """Run a case; a file that cannot be used fails it instead of ending the whole check."""
    try:
        return case.run()
    except (KeyError, ValueError, OSError) as error:
        return Result(float("nan"), [f"{type(error).__name__}: {error}"])


def main(arguments: list[str]) -> int:
    """Check the directory named on the command line; return the exit status."""
    if len(arguments) != 1:
        print("usage: python tests/golden_check.py DIR", file=sys.stderr)
        return 2
    root = Path(arguments[0]).resolve()
    jax.config.update("jax_default_matmul_precision", "highest")
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
        result = run_case(case)
        num_failed += bool(result.failures)
        print(f"{'FAIL' if result.failures else 'ok  '} {case.name:<40} largest error {result.error:.2e}", flush=True)
        for sentence in result.failures or []:
            print(f"       {sentence}")
    print(f"{len(cases) - num_failed} of {len(cases)} cases passed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
