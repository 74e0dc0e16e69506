"""A forward pass recorded in pieces: for steps with prompts.

How their tokens divide into sequences is different every time, and a recording is not. But only attention asks for it;
the rest of the model sees so many tokens, whosever they are. So the recording is cut at every attention layer, and a
replay launches a piece, attention, the next piece, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..attention.backends.abstract import AttentionBackend
from ..attention.metadata import AttentionMetadata
from ..model_executor.layers.attention import Attention


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The usual stream cannot be recorded; and one is enough, since cuBLAS takes 32 MiB for every stream it sees."""
    return torch.cuda.Stream(device)


class PiecewiseGraph(AttentionBackend):
    """CUDA graphs of what lies between the attention layers. While they are recorded, it stands in for attention.

    Args:
        layers: the model's attention layers, in order.
        q, out: [T, num_heads, head_dim]; where pieces leave their queries, and where they find what attention made
            of them. Any number of recordings may share them.
    """

    name = "piecewise"

    def __init__(self, layers: Sequence[Attention], q: torch.Tensor, out: torch.Tensor) -> None:
        self.layers = layers
        self.backend = layers[0].backend
        self.q, self.out = q, out
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.hidden: torch.Tensor  # [T, H], once it is recorded
        self.pool: Any = None

    def run(self, forward: Callable[[], torch.Tensor], pool: Any = None) -> None:
        """The model's `forward` without attention; if there is a memory pool for its pieces, it is recorded."""
        self.pool = pool
        for layer in self.layers:
            layer.backend = self
        try:
            if pool is None:
                forward()
                return
            with torch.cuda.stream(capture_stream(self.q.device)):
                self._begin_piece()
                try:
                    self.hidden = forward()
                finally:
                    self.graphs[-1].capture_end()
        finally:
            for layer in self.layers:
                layer.backend = self.backend

    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        """A piece ends here, and the next one begins."""
        self.q[: len(q)] = q
        if self.pool is not None:
            self.graphs[-1].capture_end()
            self._begin_piece()
        return self.out[: len(q)]

    def replay(self, metadata: AttentionMetadata) -> torch.Tensor:
        """Hidden states [T, H] of as many tokens as were recorded, until the next replay."""
        num_tokens = len(metadata.slot_mapping)
        for graph, layer in zip(self.graphs, self.layers, strict=False):  # after the last layer comes one more piece
            graph.replay()
            q = self.q[:num_tokens]
            self.out[:num_tokens] = self.backend.forward(q, layer.k_cache, layer.v_cache, metadata, layer.scale)
        self.graphs[-1].replay()
        return self.hidden

    def _begin_piece(self) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        self.graphs[-1].capture_begin(self.pool)
