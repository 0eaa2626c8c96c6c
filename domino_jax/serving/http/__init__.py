"""The OpenAI-compatible HTTP API over `serving.contract`: requests in, event streams out, metrics, limits, the page.

A request's way: `http_guard -> body_reader -> request_plan -> contract.Engine -> event_router -> choice -> answer_json
-> event_stream`. Knows no device and no tokenizer library's details; never imports jax.
"""
