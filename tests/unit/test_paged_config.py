"""How many blocks there are: from memory, or as asked for. What was chosen is said; what cannot be had is refused."""

from __future__ import annotations

import logging
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from ..checkpoints import SPECS
from ..conftest import CheckpointPath, MakeLLM, open_llm, submodule
from .test_cache import BYTES_PER_TOKEN, caches

pytestmark = pytest.mark.since("m3")

PER_TOKEN = BYTES_PER_TOKEN["qwen3"]


def test_defaults(stage: ModuleType, make_llm: MakeLLM) -> None:
    config = stage.EngineConfig()
    assert (config.enable_paged_kv, config.block_size, config.num_kv_blocks) == (True, None, None)
    assert config.gpu_memory_utilization == 0.9
    config = make_llm(num_kv_blocks=40).config
    assert (config.block_size, config.num_kv_blocks, config.max_num_seqs) == (16, 40, 256)
    assert (config.max_model_len, config.max_num_batched_tokens) == (512, 8192)


@pytest.mark.parametrize("name", ["block_size", "num_kv_blocks"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "16"])
def test_counts_are_positive_integers(stage: ModuleType, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        stage.EngineConfig(**{name: value})
    assert repr(value) in str(error.value)
    assert getattr(stage.EngineConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan])
def test_gpu_memory_utilization_is_a_share(stage: ModuleType, value: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        stage.EngineConfig(gpu_memory_utilization=value)
    assert stage.EngineConfig(gpu_memory_utilization=1).gpu_memory_utilization == 1


@pytest.mark.parametrize("checkpoint", SPECS)
@pytest.mark.parametrize(("num_blocks", "block_size"), [(5, 16), (1, 80), (80, 1)])
def test_reserved_bytes(
    checkpoint: str, num_blocks: int, block_size: int, stage: ModuleType, make_llm: MakeLLM
) -> None:
    """The blocks' slots and a spare one, and nothing more."""
    llm = make_llm(checkpoint, num_kv_blocks=num_blocks, block_size=block_size, max_model_len=80)
    assert {len(cache) for cache in caches(stage, llm)} == {81}
    assert sum(cache.nbytes for cache in caches(stage, llm)) == 81 * BYTES_PER_TOKEN[checkpoint]
    manager = llm.engine.core.scheduler.kv_cache_manager
    assert (manager.num_blocks, manager.block_size) == (num_blocks, block_size)


@pytest.mark.parametrize(
    ("num_tokens", "options", "num_blocks", "max_model_len"),
    [
        (100, {}, 6, 96),
        (96, {}, 6, 96),
        (95, {}, 5, 80),
        (16, {}, 1, 16),
        (600, {}, 37, 512),
        (100, {"block_size": 1}, 100, 100),
        (100, {"block_size": 32}, 3, 96),
        (1000, {"block_size": 512}, 1, 512),
        (1000, {"max_model_len": 100}, 62, 100),
        (1000, {"max_model_len": 300, "enable_paged_kv": False}, 1, 300),
        (1100, {"max_model_len": 200, "enable_paged_kv": False}, 4, 200),
        (1100, {"max_model_len": 200, "enable_paged_kv": False, "max_num_seqs": 3}, 3, 200),
    ],
)
def test_blocks_fill_the_memory_that_was_asked_for(
    stage: ModuleType,
    checkpoint_path: CheckpointPath,
    num_tokens: int,
    options: dict[str, Any],
    num_blocks: int,
    max_model_len: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As many as fit; a context that does not is shortened, aloud, and then can be used to its end."""
    memory = num_tokens * PER_TOKEN
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=memory, log_level="INFO", **options) as llm,
    ):
        assert (llm.config.num_kv_blocks, llm.config.max_model_len) == (num_blocks, max_model_len)
        assert sum(cache.nbytes for cache in caches(stage, llm)) <= memory + PER_TOKEN, "but for the spare slot"
        if max_model_len < 200:
            params = stage.SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
            outputs = llm.generate([[1, 2], [3]], params, use_tqdm=False)
            assert [len(output.token_ids) for output in outputs] == [max_model_len - 2, max_model_len - 1]
    is_shortened = "max_model_len" not in options and max_model_len < 512
    assert (f"max_model_len lowered from 512 to {max_model_len}" in caplog.text) == is_shortened


@pytest.mark.parametrize("enable_prefix_caching", [None, False, True])
@pytest.mark.parametrize("enable_paged_kv", [True, False])
def test_more_than_all_could_use(
    stage: ModuleType, checkpoint_path: CheckpointPath, enable_prefix_caching: bool | None, enable_paged_kv: bool
) -> None:
    """Three sequences fill six blocks. More are of use to nobody, unless what others have computed can be found."""
    has_cache = "enable_prefix_caching" in stage.EngineConfig.__annotations__
    if enable_prefix_caching is not None and not has_cache:
        pytest.skip("nothing is found again before m6")
    options: dict[str, Any] = {"max_model_len": 20, "max_num_seqs": 3, "enable_paged_kv": enable_paged_kv}
    if enable_prefix_caching is not None:
        options["enable_prefix_caching"] = enable_prefix_caching
    with open_llm(stage, checkpoint_path("qwen3"), kv_cache_memory_bytes=2000 * PER_TOKEN, **options) as llm:
        if not enable_paged_kv:
            assert llm.config.num_kv_blocks == 3
        else:
            assert llm.config.num_kv_blocks == (125 if has_cache and enable_prefix_caching is not False else 6)


def test_the_log_says_what_is_reserved(
    stage: ModuleType, checkpoint_path: CheckpointPath, caplog: pytest.LogCaptureFixture
) -> None:
    """With how many requests of full length would fit."""
    with (
        caplog.at_level(logging.INFO, logger=stage.__name__),
        open_llm(stage, checkpoint_path("llama_bias"), log_level="INFO", num_kv_blocks=1230, max_model_len=160),
    ):
        pass
    mebibytes = 1230 * 16 * BYTES_PER_TOKEN["llama_bias"] / 2**20
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("KV cache")]
    assert line == (
        f"KV cache: 1,230 blocks of 16 tokens × 2 layers = {mebibytes:.0f} MiB; "
        "maximum concurrency for 160 tokens per request: 123.0×"
    )


def test_a_cpu_spares_a_quarter(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is free, up to a limit; what is asked for may take more, and what is not there nobody gets."""
    worker = submodule(stage, "worker.gpu_worker")
    monkeypatch.setattr(worker, "available_memory", lambda device: 4 * 320 * PER_TOKEN)
    folder = checkpoint_path("qwen3")

    def sizes(**options: int) -> tuple[int, int]:
        with open_llm(stage, folder, **options) as llm:
            return llm.config.num_kv_blocks, llm.config.max_model_len

    assert sizes() == (20, 320)
    assert sizes(num_kv_blocks=30) == (30, 480)
    assert sizes(max_model_len=400) == (25, 400)
    assert sizes(max_model_len=401) == (26, 401), "the last block is needed whole"
    assert sizes(kv_cache_memory_bytes=4 * 320 * PER_TOKEN) == (80, 512)
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes=\d+ is more than the \d+ bytes that are free"):
        sizes(kv_cache_memory_bytes=4 * 320 * PER_TOKEN + 1)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_CPU_CACHE_LIMIT", 100 * PER_TOKEN)
        assert sizes() == (6, 96)


@pytest.mark.parametrize("options", [{"num_kv_blocks": 1, "block_size": 1}, {"kv_cache_memory_bytes": 15 * PER_TOKEN}])
def test_no_room_for_a_token_and_the_next(
    stage: ModuleType, checkpoint_path: CheckpointPath, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="no memory for a KV cache"):
        open_llm(stage, checkpoint_path("qwen3"), **options)


@pytest.mark.parametrize("block_size", [16, 48, 96])
def test_the_largest_step_has_no_position_that_the_model_lacks(
    stage: ModuleType, checkpoint_path: CheckpointPath, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile's sequences are whole blocks long, and the model's 512 positions may be no multiple of these."""
    with open_llm(stage, checkpoint_path("qwen3"), max_model_len=64, num_kv_blocks=20) as llm:
        worker = llm.engine.worker
        for name, value in (("empty_cache", None), ("memory_reserved", 0), ("max_memory_reserved", 7)):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        lens: list[int] = []

        def forward(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
            lens.append(metadata.max_seq_len)
            assert len(positions) == len(input_ids) == len(metadata.slot_mapping)
            return run(input_ids, positions, metadata)

        run = worker.model.forward
        monkeypatch.setattr(worker.model, "forward", forward)
        longest = -(-512 // block_size) * block_size
        assert worker._profile_activations(2048, longest, 4) == 7
        assert lens == [longest], "the longest that there can be"
