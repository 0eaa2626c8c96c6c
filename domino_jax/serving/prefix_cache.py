"""Which block of the prefix pool holds which tokens: a tree of full blocks, the least recently used leaves given up.

Standard library only. A block is named by its tokens and by the block before it, so two prompts share exactly their
common whole blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Block:
    index: int
    key: tuple[int, ...]
    parent: "_Block | None"
    children: dict[tuple[int, ...], "_Block"] = field(default_factory=dict)


class PrefixCache:
    """The tree over a pool of `num_blocks` blocks of `block_len` tokens.

    Attributes:
        num_queries: tokens looked up so far.
        num_hits: those of them that were found.
    """

    def __init__(self, num_blocks: int, block_len: int) -> None:
        """Begin with an empty pool; without blocks nothing is ever found."""
        self.block_len = block_len
        self.num_queries = 0
        self.num_hits = 0
        self._free = list(range(num_blocks))[::-1]
        self._root = _Block(-1, (), None)
        # Least recently used first. A path is touched from its end to its start, so no block comes before its children.
        self._by_use: OrderedDict[int, _Block] = OrderedDict()

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Return the blocks of the longest known prefix of `tokens`, first to last."""
        path = self._find(self._split(tokens))
        self.num_queries += len(tokens)
        self.num_hits += len(path) * self.block_len
        return [block.index for block in path]

    def insert(self, tokens: Sequence[int]) -> dict[int, int]:
        """Make room for the whole blocks of `tokens`; return position in `tokens`, in blocks -> pool block to fill.

        Blocks known already are left out. Where the pool is full, leaves that were not used for longest are given up;
        a prefix longer than the pool is kept as far as it fits.
        """
        keys = self._split(tokens)
        path = self._find(keys)
        to_fill, kept = {}, {block.index for block in path}
        for position in range(len(path), len(keys)):
            index = self._take(kept)
            if index is None:
                break
            parent = path[-1] if path else self._root
            block = _Block(index, keys[position], parent)
            parent.children[block.key] = block
            path.append(block)
            kept.add(index)
            to_fill[position] = index
        self._touch(path)
        return to_fill

    def __len__(self) -> int:
        """Return the number of blocks in use."""
        return len(self._by_use)

    def _split(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.block_len
        return [tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)]

    def _find(self, keys: list[tuple[int, ...]]) -> list[_Block]:
        node, path = self._root, []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        self._touch(path)
        return path

    def _touch(self, path: list[_Block]) -> None:
        for block in reversed(path):
            self._by_use[block.index] = block
            self._by_use.move_to_end(block.index)

    def _take(self, kept: set[int]) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._by_use.values()), None)
        if oldest is None or oldest.index in kept:
            return None
        assert oldest.parent is not None
        del oldest.parent.children[oldest.key]
        del self._by_use[oldest.index]
        return oldest.index
