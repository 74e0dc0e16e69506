"""EngineConfig: every choice that a user can make about the engine, in one frozen place.

A field that is None means "the largest sensible value that fits here"; the engine settles it at start-up and keeps
the settled copy, so that nobody downstream meets a None. Only values that were given explicitly can be refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .utils.checks import check_int, check_option_names, check_real

# The smallest value of every count; None is always fine.
_SMALLEST = {
    "max_model_len": 2,  # a prompt token and an output token
    "kv_cache_memory_bytes": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 2,
    "block_size": 1,
    "num_kv_blocks": 1,
    "max_chunk_size": 1,
}


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine. Names and meanings are vLLM's (`EngineArgs`) wherever it has the option.

    Attributes:
        model: a folder with a Hugging Face checkpoint, or its id on the hub.
        tokenizer: folder or hub id of the tokenizer; None: the model's own.
        revision: branch, tag or commit on the hub; None: the default branch.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda" or "cuda:N".
        load_format: "auto" reads safetensors; "dummy" draws random weights of the right shapes.
        seed: of the dummy weights, and of requests that bring no seed of their own.
        log_level: "DEBUG", "INFO", "WARNING" or "ERROR".
        max_model_len: longest prompt plus output, in tokens; None: what the model was made for, if it fits in memory.
        attention_backend: "flash", "paged" or "naive"; None or "auto": the first of these that can serve.
        tensor_parallel_size: only 1.
        kv_cache_memory_bytes: most memory that cached keys and values may take; None: what the device can spare.
        max_num_seqs: most sequences that run at once; None: 256.
        max_num_batched_tokens: most tokens in a step, no less than max_num_seqs, and without chunks no less than
            max_model_len; None: 8,192, or the larger of these.
        scheduling_policy: who is next: "fcfs", "priority" (the smallest value) or "sjf" (the shortest prompt).
        enable_paged_kv: False: a block is as long as the longest sequence, so that each holds one.
        block_size: tokens that a block of the cache holds; None: what the attention backend likes best, 16 or 256.
        num_kv_blocks: blocks of the cache, whatever memory there is; None: as many as fit.
        gpu_memory_utilization: share of the GPU's memory that weights, activations and cache may take together.
        enforce_eager: True: no CUDA graphs.
        cuda_graph_sizes: batch sizes of decode steps to record as CUDA graphs; None: a ladder up to max_num_seqs.
        async_scheduling: launch decode steps before the tokens of the step before are known; None: on CUDA.
        enable_chunked_prefill: False: a prompt is computed in one step, and no decode takes part in it.
        max_chunk_size: most tokens of one prompt in a step, while others are there; None: 2,048.
        chunk_policy: "fixed", or "dynamic": prompt tokens of a step such that it lasts target_step_time_ms.
        target_step_time_ms: how long a step should last, in milliseconds; with chunk_policy="dynamic", and only then.

    Raises:
        TypeError: an unknown option.
        ValueError: a value out of range.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    log_level: str = "INFO"
    max_model_len: int | None = None
    attention_backend: str | None = None
    tensor_parallel_size: int = 1
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    enable_paged_kv: bool = True
    block_size: int | None = None
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    cuda_graph_sizes: list[int] | None = None
    async_scheduling: bool | None = None
    enable_chunked_prefill: bool = True
    max_chunk_size: int | None = None
    chunk_policy: str = "fixed"
    target_step_time_ms: float | None = None

    def __new__(cls, *args: Any, **options: Any) -> EngineConfig:
        check_option_names(cls.__name__, options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', got {self.load_format!r}")
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), smallest)
        for name in ("max_num_seqs",) if self.enable_chunked_prefill else ("max_model_len", "max_num_seqs"):
            if self.max_num_batched_tokens is not None and (getattr(self, name) or 0) > self.max_num_batched_tokens:
                raise ValueError(
                    f"max_num_batched_tokens={self.max_num_batched_tokens} is less than {name}={getattr(self, name)}: "
                    "raise it, or lower the other"
                )
        if self.scheduling_policy not in ("fcfs", "priority", "sjf"):
            raise ValueError(f"scheduling_policy must be 'fcfs', 'priority' or 'sjf', got {self.scheduling_policy!r}")
        if self.chunk_policy not in ("fixed", "dynamic"):
            raise ValueError(f"chunk_policy must be 'fixed' or 'dynamic', got {self.chunk_policy!r}")
        if self.chunk_policy == "dynamic" and not self.enable_chunked_prefill:
            raise ValueError("chunk_policy='dynamic' goes with enable_chunked_prefill=True only")
        if (self.chunk_policy == "dynamic") != (self.target_step_time_ms is not None):
            raise ValueError("target_step_time_ms goes with chunk_policy='dynamic': give both or neither")
        if self.target_step_time_ms is not None:
            check_real("target_step_time_ms", self.target_step_time_ms, 0, 60_000, low_is_open=True)
        check_real("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, low_is_open=True)
        if self.attention_backend not in (None, "auto", "flash", "paged", "naive"):
            raise ValueError(
                f"attention_backend must be 'auto', 'flash', 'paged' or 'naive', got {self.attention_backend!r}"
            )
        if self.cuda_graph_sizes is not None:
            if not isinstance(self.cuda_graph_sizes, (list, tuple)) or not self.cuda_graph_sizes:
                raise ValueError(f"cuda_graph_sizes must be a list of batch sizes, got {self.cuda_graph_sizes!r}")
            for size in self.cuda_graph_sizes:
                check_int("every one of cuda_graph_sizes", size, 1)
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} is not supported: the engine runs on one device"
            )
