"""Lossless speculative decoding, and the lean plain loop it is measured against.

`state` holds what a batch carries from round to round, `prefill` fills it, `plain` and `speculative` advance it, and
`generate` is the host's door: prompts in, finished generations out.
"""
