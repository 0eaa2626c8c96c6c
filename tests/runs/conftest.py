"""Material that runs are tested on."""

import pytest


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
