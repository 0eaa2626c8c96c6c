"""`train.py` whose steps take PACE seconds at least, so that a signal can reach it between two of them."""

import os
import sys
import time

from domino_jax.runs import draft
from train import main


def split_batch_slowly(*arguments):
    time.sleep(float(os.environ.get("PACE", "0")))
    return split_batch(*arguments)


if __name__ == "__main__":
    split_batch, draft.split_batch = draft.split_batch, split_batch_slowly
    sys.exit(main(sys.argv[1:]))
