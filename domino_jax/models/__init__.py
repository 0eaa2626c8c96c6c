"""Flax Linen modules: the Qwen3 target, the block-parallel draft backbone and the Domino head.

Modules hold parameters and one forward each; they know nothing about files, loops or losses.
"""
