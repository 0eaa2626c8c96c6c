"""The only room that knows file formats and foreign tensor names.

In: Hugging Face directories or hub ids, Orbax directories. Out: frozen configs and pytrees of jax arrays, and back.
It knows nothing of prompts, loops or losses, and never reads pickled weights.

Source: the public Qwen3, Domino and DFlash checkpoint layouts; safetensors; Orbax.
"""
