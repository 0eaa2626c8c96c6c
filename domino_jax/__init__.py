"""Domino speculative decoding in JAX/Flax: train, decode with and measure block-parallel drafters.

Source: Domino, arXiv 2605.29707.
"""

import os

# transformers is used for tokenizers alone; without this it advises every user to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
