"""PrefixCache: which blocks hold the keys and values of which tokens, so that nobody computes them twice.

Keys and values of a token depend on it and on all tokens before it, so a full block is known by a hash of its tokens
and of the hash of the block before it: equal hashes, equal prefixes. The map from hash to block is thereby a trie. It
holds on to nothing: a block that nobody holds any more is found until the pool gives it to somebody else.

The idea is RadixAttention's (Zheng et al., SGLang, arXiv 2312.07104), the hashed blocks are vLLM's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import TYPE_CHECKING, NamedTuple

from ..request import Sequence

if TYPE_CHECKING:
    from .block_pool import KVCacheBlock

# Of the blocks that begin where a match ends and with the right token, so many are looked at, the newest first.
MAX_CANDIDATES = 8
# A block is copied only if that saves this part of its tokens: a first token alone is often equal by chance.
MIN_COPIED_SHARE = 1 / 8


class ComputedBlocks(NamedTuple):
    """What the cache has of a sequence's tokens.

    Attributes:
        block_ids: blocks that hold the sequence's tokens, from its first one on; the last one perhaps at its beginning
            only, so that it is copied before the sequence writes what comes next.
        num_tokens: tokens that need not be computed.
    """

    block_ids: list[int]
    num_tokens: int


NOTHING_COMPUTED = ComputedBlocks([], 0)


@dataclass(eq=False)
class PrefixNode:
    """Cached blocks in a row, up to where prefixes part, or where others hold them.

    Attributes:
        token_ids: theirs.
        ref_cnt: how many sequences hold each of them.
        is_orphan: the blocks before them are gone, so that they cannot be found until these are computed again.
    """

    block_ids: list[int]
    token_ids: list[int]
    ref_cnt: int
    is_orphan: bool = False
    children: list[PrefixNode] = field(default_factory=list)


class PrefixCache:
    """The map from hashes to blocks. Blocks are added once computed; the pool says when one is used for other tokens.

    Attributes:
        num_evictions: blocks that were taken out for that reason.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_evictions = 0
        self._blocks: dict[bytes, KVCacheBlock] = {}
        # Of the blocks that follow the same tokens and begin with the same one (`first_token_key`), the newest last.
        # Their hashes: bytes are nothing that the garbage collector has to look at.
        self._children: dict[bytes, dict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, seq: Sequence) -> ComputedBlocks:
        """The longest cached prefix of `seq`, without its last token, which has to be computed for its logits.

        Changes nothing.
        """
        block_size, limit = self.block_size, seq.num_tokens - 1
        block_ids = []
        parent_hash = root_hash(seq.request.cache_salt)
        for block_hash in islice(extend_hashes(seq, block_size), limit // block_size):
            block = self._blocks.get(block_hash)
            if block is None:
                break
            block_ids.append(block.block_id)
            parent_hash = block_hash
        num_tokens = len(block_ids) * block_size
        rest = seq.token_ids[num_tokens : min(num_tokens + block_size, limit)]
        part, num_equal = self._match_part(parent_hash, rest)
        return ComputedBlocks(block_ids + part, num_tokens + num_equal)

    def next_missing(self, seq: Sequence) -> bytes | None:
        """The hash of the block that `seq` computes next; None if it will not be full, or is there already."""
        index = seq.num_computed_tokens // self.block_size
        if index >= len(seq.block_hashes) or seq.block_hashes[index] in self._blocks:
            return None
        return seq.block_hashes[index]

    def _match_part(self, parent_hash: bytes, token_ids: list[int]) -> tuple[list[int], int]:
        """The block after `parent_hash` that has most of `token_ids` at its beginning, and how many; or none."""
        best: list[int] = []
        most = max(int(MIN_COPIED_SHARE * self.block_size), 1) - 1
        if len(token_ids) > most:
            children = self._children.get(first_token_key(parent_hash, token_bytes(token_ids)), {})
            for block_hash in islice(reversed(children), MAX_CANDIDATES):
                block = self._blocks[block_hash]
                num_equal = num_equal_tokens(block.token_ids, token_ids)
                if num_equal > most:
                    best, most = [block.block_id], num_equal
        return best, most if best else 0

    def add(self, seq: Sequence, index: int, block: KVCacheBlock) -> None:
        """`block`, number `index` of `seq`, has been computed. If there is another one like it, that one stays.

        Raises:
            RuntimeError: `block` is in the cache for other tokens.
        """
        hashes = extend_hashes(seq, self.block_size)
        if hashes[index] in self._blocks:
            return
        if block.block_hash is not None:
            raise RuntimeError(f"block {block.block_id} is in the prefix cache already")
        block.index, block.parent_hash = index, hashes[index - 1] if index > 0 else root_hash(seq.request.cache_salt)
        block.token_bytes = token_bytes(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
        siblings = self._children.setdefault(first_token_key(block.parent_hash, block.token_bytes), {})
        block.block_hash = hashes[index]
        self._blocks[block.block_hash] = block
        siblings[block.block_hash] = None

    def evict(self, block: KVCacheBlock) -> None:
        """`block` is about to be used for other tokens. One that is not in the cache is ignored."""
        if block.block_hash is None:
            return
        del self._blocks[block.block_hash]
        key = first_token_key(block.parent_hash, block.token_bytes)
        siblings = self._children[key]
        del siblings[block.block_hash]
        if not siblings:
            del self._children[key]
        block.block_hash = None
        self.num_evictions += 1

    def reset(self) -> None:
        """Forget all blocks. Nobody may hold any of them."""
        for block in self._blocks.values():
            block.block_hash = None
        self._blocks.clear()
        self._children.clear()

    def check_integrity(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Compare with the pool's blocks. Raises RuntimeError if the two disagree on what is cached."""
        hashes = {block.block_hash: block for block in blocks if block.block_hash is not None}
        children = sorted(block_hash for siblings in self._children.values() for block_hash in siblings)
        if hashes != self._blocks or children != sorted(hashes):
            raise RuntimeError(f"{len(hashes)} blocks have a hash, {len(self)} are cached, {len(children)} as children")

    # ------------------------------------------------------------------ to look at

    def as_tree(self) -> list[PrefixNode]:
        """All cached prefixes, as trees that branch where they part."""
        nodes = {
            block_hash: PrefixNode([block.block_id], block.token_ids.tolist(), block.ref_cnt)
            for block_hash, block in self._blocks.items()
        }
        roots: list[PrefixNode] = []
        for block_hash, block in self._blocks.items():
            node, parent = nodes[block_hash], nodes.get(block.parent_hash)
            (roots if parent is None else parent.children).append(node)
            node.is_orphan = parent is None and block.index > 0
        to_join = list(roots)
        while to_join:
            node = to_join.pop()
            while len(node.children) == 1 and node.children[0].ref_cnt == node.ref_cnt:
                child = node.children[0]
                node.block_ids += child.block_ids
                node.token_ids += child.token_ids
                node.children = child.children
            to_join += node.children
        return roots


def root_hash(cache_salt: str | None) -> bytes:
    """What stands for the block before the first one. Different salts share nothing."""
    return hashlib.sha256(
        b"root" if cache_salt is None else b"salt" + cache_salt.encode(errors="surrogatepass")
    ).digest()


def extend_hashes(seq: Sequence, block_size: int) -> list[bytes]:
    """`seq.block_hashes`, with those of the blocks that its tokens have filled since."""
    hashes, token_ids = seq.block_hashes, seq.token_ids
    num_full = len(token_ids) // block_size
    if len(hashes) < num_full:
        parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
        for start in range(len(hashes) * block_size, num_full * block_size, block_size):
            parent = hashlib.sha256(parent + token_bytes(token_ids[start : start + block_size])).digest()
            hashes.append(parent)
    return hashes


def token_bytes(token_ids: list[int]) -> bytes:
    """Four bytes a token."""
    return array("I", token_ids).tobytes()


def first_token_key(parent_hash: bytes, tokens: bytes) -> bytes:
    """What blocks have in common that follow the same tokens and begin with the same one."""
    return parent_hash + tokens[:4]


def num_equal_tokens(a: Iterable[int], b: Iterable[int]) -> int:
    """How many tokens the two have in common, from the first one on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
