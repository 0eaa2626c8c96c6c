"""Files of response rows in the order in which they ended, sorted at once or not at all."""

import errno

import pytest

from domino_jax.runs.folder import RunError
from domino_jax.runs.response_rows import sort_rows


def test_rows_are_sorted_at_once_and_strangers_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    for rows in (2, 0, 2, 1), (0, 0, 1, 2):
        path.write_text("".join(f'{{"row": {row}}}\n' for row in rows))
        sort_rows(path)
        assert path.read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n'
    with path.open("a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(RunError, match=r"r\.jsonl:4 is no row that this command wrote"):
        sort_rows(path)


def test_rows_that_cannot_be_sorted_stay_as_they_are(tmp_path, small_files):
    path = tmp_path / "r.jsonl"
    path.write_text('{"row": 2}\n{"row": 0}\n{"row": 1}\n')
    before = path.read_bytes()
    small_files(len(before) - 1)
    with pytest.raises(OSError) as caught:
        sort_rows(path)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
