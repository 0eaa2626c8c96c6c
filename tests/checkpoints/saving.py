"""Run by `test_gathered_tensors.py` in each of several processes: `ADDRESS COUNT NUMBER FOLDER`; prints a JSON line."""

import json
import os
import sys
import traceback
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp

from domino_jax.checkpoints import gathered_tensors
from domino_jax.checkpoints.huggingface import save_draft
from domino_jax.models.domino_head import init_draft_params
from domino_jax.processes import on_first
from domino_jax.run_config import MeshConfig
from domino_jax.sharding import build_layout
from tests.decoding.tiny_pair import draw_params, make_configs
from tests.together import told

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
DRAFT = make_configs(sizes=SIZES)[1]


def draw():
    return draw_params(init_draft_params, DRAFT, 3)


class Watch:
    """Counts what is whole on the host and on the devices while a drafter is saved."""

    def __init__(self):
        self.num_on_host = self.most_on_host = self.num_gathered = self.most_gathered = 0
        self._on_host, self._gathered = [], []
        self._to_host, self._gather = gathered_tensors._to_host, gathered_tensors._gather
        gathered_tensors._to_host, gathered_tensors._gather = self.to_host, self.gather

    def to_host(self, whole):
        array = self._to_host(whole)
        self.num_on_host += 1
        self.most_on_host = max(self.most_on_host, count_alive(self._on_host, array))
        return array

    def gather(self, leaf, is_turned):
        whole = self._gather(leaf, is_turned)
        if isinstance(whole, jax.Array):
            self.num_gathered += 1
            self.most_gathered = max(self.most_gathered, count_alive(self._gathered, whole))
        return whole


def count_alive(seen, array):
    """Return how many of the arrays given so far are still there."""
    seen.append(weakref.ref(array))
    return sum(reference() is not None for reference in seen)


def main():
    address, count, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    jax.distributed.initialize(address, count, number)
    layout = build_layout(MeshConfig(data=count, fsdp=True))
    params = layout.place(draw())
    watch = Watch()
    save_draft(folder / "draft", DRAFT, params)
    said = {name: value for name, value in vars(watch).items() if not name.startswith("_")}
    (large := jax.tree.map(lambda x: x, params))["backbone"]["norm"] = 1e6 * params["backbone"]["norm"]
    said["too_large"] = told(lambda: save_draft(folder / "half", DRAFT, large, dtype="float16"))
    on_first(lambda: (folder / "file").write_text("x"))
    said["no_folder"] = told(lambda: save_draft(folder / "file", DRAFT, params))
    said["out_of_order"] = told(
        lambda: gathered_tensors.write_gathered(
            {"a": params["backbone"]["fc"], "b": params["backbone"]["norm"]}, set(), lambda read: read("b")
        )
    )
    said["sum"] = float(jnp.sum(params["backbone"]["fc"]))  # still in step
    print(json.dumps(said), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - jax's own way out would wait for the others
        traceback.print_exc()
        os._exit(1)
