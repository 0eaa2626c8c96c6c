"""A file of response rows that were appended as they ended: where each is, and all of them in order.

In: JSONL whose rows have their number in `row`. Out: offsets by number, or the same file sorted.
"""

import json
from pathlib import Path

from domino_jax.data.responses import scan_rows
from domino_jax.durable import write_atomically
from domino_jax.runs.folder import RunError


def index_rows(output: Path) -> dict[int, tuple[int, int]]:
    """Return offset and length in bytes of every row by its number.

    Raises:
        RunError: a line is no row of responses.
    """
    index: dict[int, tuple[int, int]] = {}
    for raw in scan_rows(output):
        try:
            number = json.loads(raw.content)["row"]
        except (ValueError, KeyError, TypeError):
            number = None
        if not isinstance(number, int):
            raise RunError(
                f"{output}:{raw.line_no} is no row that this command wrote (an object with its number in 'row'); "
                "remove the line or give another --output"
            )
        index.setdefault(number, (raw.offset, len(raw.content)))
    return index


def sort_rows(output: Path) -> None:
    """Put the rows of a file into the order of their numbers, each of them once; at once or not at all.

    Raises:
        RunError: a line is no row of responses.
    """
    places = [place for _, place in sorted(index_rows(output).items())]
    if places == sorted(places) and sum(num_bytes for _, num_bytes in places) == output.stat().st_size:
        return
    with output.open("rb") as file, write_atomically(output) as sorted_file:
        for offset, num_bytes in places:
            file.seek(offset)
            sorted_file.write(file.read(num_bytes))
