from hypothesis import given, settings
from hypothesis import strategies as st

from domino_jax.serving.prefix_cache import PrefixCache

BLOCK = 3


def blocks_of(tokens):
    return [tuple(tokens[: i + BLOCK]) for i in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def test_whole_common_blocks_are_found_in_order():
    cache = PrefixCache(10, BLOCK)
    filled = cache.insert([1, 2, 3, 4, 5, 6, 7])
    assert list(filled) == [0, 1]
    assert cache.match([1, 2, 3, 4, 5, 6, 9, 9, 9]) == [filled[0], filled[1]]
    assert cache.match([1, 2, 3, 4, 5]) == [filled[0]]
    assert cache.match([2, 3, 4, 5, 6, 7]) == []
    assert (cache.num_queries, cache.num_hits) == (9 + 5 + 6, 6 + 3)


def test_the_least_recently_used_end_is_given_up_first():
    cache = PrefixCache(4, BLOCK)
    cache.insert([1] * 6)
    cache.insert([2] * 6)
    cache.match([1] * 6)
    cache.insert([3] * 3)
    assert len(cache.match([1] * 6)) == 2
    assert len(cache.match([2] * 6)) == 1
    assert len(cache.match([3] * 3)) == 1


def test_a_prefix_longer_than_the_pool_is_kept_as_far_as_it_fits():
    cache = PrefixCache(2, BLOCK)
    assert list(cache.insert([1] * 12)) == [0, 1]
    assert len(cache.match([1] * 12)) == 2
    assert PrefixCache(0, BLOCK).insert([1] * 12) == {}


sequences = st.lists(st.integers(0, 1), max_size=14)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), sequences), max_size=40), st.integers(0, 6))
def test_what_is_found_is_what_was_stored(steps, num_blocks):
    cache = PrefixCache(num_blocks, BLOCK)
    content = {}
    for is_insert, tokens in steps:
        prefixes = blocks_of(tokens)
        if is_insert:
            for place, block in cache.insert(tokens).items():
                content[block] = prefixes[place]
        found = cache.match(tokens)
        assert [content[block] for block in found] == prefixes[: len(found)]
        if is_insert:
            assert len(found) == min(len(prefixes), num_blocks)
        assert len(cache) <= num_blocks
