"""Measuring: metrics over finished rows, prompt files and sets, and the same prompts through both loops.

Rows are plain dictionaries (one a decoded prompt, JSONL on disk); tables are recomputed from rows alone.
"""
