"""Serve a target with its drafter: requests in, token events out, and the HTTP API around it.

`scheduler` decides who runs, `engine` owns the device, `http` speaks HTTP; `contract` is what the last two know of each
other. Nothing here knows how models are trained or where text data lies.
"""
