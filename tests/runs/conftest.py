"""Material that runs are tested on, and the embedded run at a size of seconds as a process of its own."""

import os
import resource
import subprocess
import sys

import pytest

from tests.runs.small_embedded import SMALL


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A random target of a few thousand parameters with a tokenizer, and two files of chats."""
    import jax

    from domino_jax.checkpoints.huggingface import save_target
    from domino_jax.config import TargetConfig
    from domino_jax.data.responses import write_chats
    from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
    from domino_jax.models.qwen3 import init_target_params

    root = tmp_path_factory.mktemp("material")
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    chats = [
        [
            {"role": "user", "content": f"say {words[i % 6]} {words[i // 6 % 6]}"},
            {"role": "assistant", "content": f"{words[i % 6]} and {words[i // 6 % 6]}, that is number {i}"},
        ]
        for i in range(24)
    ]
    tokenizer = train_tokenizer((m["content"] for chat in chats for m in chat), 300)
    config = TargetConfig(len(tokenizer), 16, 32, 4, 2, 1, 8, max_position_embeddings=96, tie_word_embeddings=True)
    save_tokenizer(tokenizer, root / "target")
    save_target(str(root / "target"), config, init_target_params(config, jax.random.key(0)))
    write_chats(root / "train.jsonl", chats[:20])
    write_chats(root / "eval.jsonl", chats[20:])
    return root


@pytest.fixture(scope="session")
def start_tiny(repository):
    """Start `train.py` on the small embedded run; settings override it, programs compiled once are kept in `cache`."""

    def start(output_dir, cache=None, before=(), stdout=subprocess.PIPE, **changes):
        overrides = [f"--config.{name}={value}" for name, value in (SMALL | changes).items()]
        command = [sys.executable, "train.py", "--config", "configs/tiny.py", f"--config.output_dir={output_dir}"]
        environment = os.environ | {"PYTHONPATH": str(repository)}
        if cache:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        return subprocess.Popen(
            [*before, *command, *overrides],
            cwd=repository,
            env=environment,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def finish():
    """Wait for a run that was started and return what it said."""

    def finish(process):
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return said

    return finish


@pytest.fixture
def small_files():
    """Let no file grow beyond a size in bytes, as a disk that gets full does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
