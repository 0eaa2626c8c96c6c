"""Pure functions on arrays: attention, key/value caches, sampling, verification.

No parameters, no model configuration, no files. Importing a room costs nothing; take what you need from its modules.
"""
