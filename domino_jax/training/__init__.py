"""Training of the drafter: anchors and their blocks, the two losses, schedules and the jitted step.

Arrays of token ids, masks and lengths come in, a new `TrainState` and metrics go out. The room knows nothing about
files, tokenizers, progress bars or decoding. Importing it costs nothing; take what you need from its modules.
"""
