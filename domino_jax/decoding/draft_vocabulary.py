"""What drafts come from: part of the vocabulary, by how often the target writes its tokens (JSON), and its weights.

A drafter reads the target's whole LM head every round although a few thousand tokens are nearly all that is ever
written. With a draft vocabulary it reads the rows of those. Tokens outside are never drafted, so a round that comes to
one ends there; what is committed is the target's own in any case. A drafter whose weights are bfloat16 reads its rows
in that type too.

Source: FR-Spec, arXiv 2502.14856; EAGLE-3's draft vocabulary.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import ConfigError
from domino_jax.decoding.state import DraftVocabulary, ModelParams
from domino_jax.durable import write_atomically
from domino_jax.ops.products import takes_bfloat16
from domino_jax.shapes import Array, Int
from domino_jax.sharding import Layout, activate

_TABLES = "embed_tokens", "lm_head"
_HOW = "make one with scripts/choose_draft_vocabulary.py"


class DraftVocabularyError(ConfigError):
    """A draft vocabulary that cannot be used; the message names the file, what is wrong and how to make one."""


def choose_token_ids(counts: Int[np.ndarray, " V"], size: int, always: Iterable[int] = ()) -> Int[np.ndarray, " U"]:
    """Return the `size` most frequent tokens and among them those of `always`, ascending; of equals the lowest ids.

    Raises:
        DraftVocabularyError: the size is not within 1 .. V, or smaller than `always`.
    """
    forced = np.unique(np.fromiter(always, np.int64))
    if not max(len(forced), 1) <= size <= len(counts):
        raise DraftVocabularyError(
            f"a draft vocabulary of {size} tokens was asked for; {max(len(forced), 1)} .. {len(counts)} are possible"
        )
    ranks = np.array(counts, np.int64)
    ranks[forced] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-ranks, kind="stable")[:size])


def check_token_ids(token_ids: np.ndarray, vocab_size: int) -> None:
    """Refuse what are no different ids of a vocabulary, ascending.

    Raises:
        DraftVocabularyError: they are none.
    """
    is_list = token_ids.ndim == 1 and token_ids.size > 0 and token_ids.dtype.kind in "iu"
    if not (is_list and token_ids[0] >= 0 and token_ids[-1] < vocab_size and (np.diff(token_ids) > 0).all()):
        raise DraftVocabularyError(f"token_ids must be different ids of 0 .. {vocab_size - 1}, ascending, one at least")


def save_draft_vocabulary(path: Path, vocab_size: int, token_ids: Int[np.ndarray, " U"]) -> None:
    """Write a draft vocabulary as JSON."""
    content = {"vocab_size": vocab_size, "token_ids": token_ids.tolist()}
    with write_atomically(path) as file:
        file.write((json.dumps(content) + "\n").encode())


def load_draft_vocabulary(path: Path | None, vocab_size: int) -> Int[np.ndarray, " U"] | None:
    """Read the draft vocabulary of a target with `vocab_size` tokens; None, all of them, where no file is named.

    Raises:
        DraftVocabularyError: there is no such file, it is not one, or it was made for another vocabulary.
    """
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        token_ids, made_for = np.array(content["token_ids"]), int(content["vocab_size"])
        check_token_ids(token_ids, made_for)
    except DraftVocabularyError as error:
        raise DraftVocabularyError(f"{path} is not a draft vocabulary: {error}; {_HOW}") from error
    except OSError as error:
        raise DraftVocabularyError(f"no draft vocabulary at {path} ({error.strerror}); {_HOW}") from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DraftVocabularyError(f"{path} is not a draft vocabulary ({error!r}); {_HOW}") from error
    if made_for != vocab_size:
        raise DraftVocabularyError(
            f"{path} was made for a vocabulary of {made_for} tokens, the target has {vocab_size}; {_HOW}"
        )
    return token_ids


def prepare_drafting(
    params: ModelParams, token_ids: Int[np.ndarray, " U"] | None, dtype: str, layout: Layout | None = None
) -> ModelParams:
    """Return parameters that draft from `token_ids`, None: all, with activations in `dtype`.

    Where the drafter's weights are bfloat16, the target's are not, and products take them so, it drafts from copies of
    embedding and LM head in that type.

    Raises:
        DraftVocabularyError: `token_ids` are no different ids of the target, ascending.
    """
    params = params if token_ids is None else limit_vocabulary(params, token_ids, layout)
    if params.draft is None or layout is not None or not takes_bfloat16(dtype):
        return params
    vocabulary = params.vocabulary or DraftVocabulary(None, **_read_tables(params))
    tables = {name: getattr(vocabulary, name) for name in _TABLES}
    wide = {name: table for name, table in tables.items() if table is not None and table.dtype != jnp.bfloat16}
    if params.draft["backbone"]["fc"].dtype != jnp.bfloat16 or not wide:
        return params
    narrow = {name: table.astype(jnp.bfloat16) for name, table in wide.items()}
    return params.replace(vocabulary=vocabulary.replace(**narrow))


def _read_tables(params: ModelParams) -> dict[str, Array]:
    """Return the target's tables that drafting reads.

    A head looks up what was drafted; without one the embedding serves as LM head only, where the two are tied.
    """
    names = _TABLES if "head" in params.draft else _TABLES[1:] if "lm_head" in params.target else _TABLES[:1]
    return {name: params.target[name] for name in names if name in params.target}


def limit_vocabulary(
    params: ModelParams, token_ids: Int[np.ndarray, " U"], layout: Layout | None = None
) -> ModelParams:
    """Return parameters that draft from `token_ids` alone; `DecodeSettings.draft_vocab_size` must be their number.

    With a layout `params` are laid out as it says, and so is what is added.

    Raises:
        DraftVocabularyError: `token_ids` are no different ids of the target, ascending.
    """
    assert params.draft is not None
    check_token_ids(token_ids, params.target["embed_tokens"].shape[0])
    head = params.draft.get("head")

    def cut(target: dict, up: Array | None, token_ids: Array) -> tuple[DraftVocabulary, Array | None]:
        vocabulary = DraftVocabulary(token_ids, **{name: weight[token_ids] for name, weight in target.items()})
        found = {"vocabulary": vocabulary, "head": {"up": None if up is None else up[:, token_ids]}}
        found = layout.constrain(found) if layout else found
        return found["vocabulary"], found["head"]["up"]

    with activate(layout):
        vocabulary, up = jax.jit(cut)(_read_tables(params), head and head["up"], jnp.asarray(token_ids, jnp.int32))
    draft = params.draft if head is None else {**params.draft, "head": {**head, "up": up}}
    return params.replace(draft=draft, vocabulary=vocabulary)
