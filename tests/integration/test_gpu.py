"""On a GPU, at the size of a real model: the engine's logits are transformers' logits, and so are its tokens.

The weights are random ("dummy") and the shape is Qwen3-0.6B's; they are copied from the engine into transformers, so no
checkpoint has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from ..conftest import ROOT, submodule
from ..oracle import engine_logits

pytestmark = [pytest.mark.gpu, pytest.mark.exclusive]  # engines here take the default share of the memory

SHAPE = ROOT / "folovllm" / "models" / "shapes" / "Qwen3-0.6B"
# ‖ours - theirs‖ / ‖theirs‖ of the logits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
PROMPT = torch.randint(0, 150_000, (300,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module", params=list(TOLERANCE))
def pair(request: pytest.FixtureRequest, stage: ModuleType) -> Iterator[tuple[Any, Any]]:
    """The engine and transformers with the same weights."""
    from transformers import AutoModelForCausalLM

    llm = stage.LLM(SHAPE, load_format="dummy", device="cuda", dtype=request.param, max_model_len=4096)
    dtype = getattr(torch, request.param)
    with torch.device("cuda"):
        theirs = AutoModelForCausalLM.from_config(llm_hf_config(stage), dtype=dtype, attn_implementation="eager")
    state = dict(export_weights(stage, engine_model(llm)))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "only the tied head may have no tensor of its own"
    theirs.tie_weights()
    yield llm, theirs.eval()
    llm.close()
    del theirs
    torch.cuda.empty_cache()


def llm_hf_config(stage: ModuleType) -> Any:
    return submodule(stage, "model_executor.model_loader").load_hf_config(SHAPE)


def engine_model(llm: Any) -> Any:
    return llm.model if hasattr(llm, "model") else llm.engine.worker.model_runner.model


def export_weights(stage: ModuleType, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their names in a checkpoint."""
    names = submodule(stage, "model_executor.model_loader").checkpoint_names(model)
    for name, (module, param_name, shard_id) in names.items():
        tensor = module.get_parameter(param_name)
        if hasattr(module, "offsets"):
            tensor = tensor[module.offsets[shard_id] : module.offsets[shard_id + 1]]
        yield name, tensor


def test_logits(pair: tuple[Any, Any], stage: ModuleType, record_property: Any) -> None:
    llm, theirs = pair
    token_ids, ours = engine_logits(stage, llm, PROMPT, max_tokens=4)
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids], device="cuda")).logits[0].float().cpu()
    error = float((ours.float() - expected).norm() / expected.norm())
    record_property(f"relative_error_{llm.config.dtype}", error)
    assert error < TOLERANCE[llm.config.dtype]


def test_greedy_tokens(pair: tuple[Any, Any], stage: ModuleType) -> None:
    """Teacher-forced: every generated token is within the error of the logits of the best."""
    llm, theirs = pair
    params = stage.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    with torch.inference_mode():
        rows = theirs(torch.tensor([PROMPT + output.token_ids], device="cuda")).logits[0, len(PROMPT) - 1 : -1].float()
    tokens = torch.tensor(output.token_ids, device="cuda")
    gaps = rows.amax(-1) - rows.gather(-1, tokens[:, None]).squeeze(-1)
    allowed = TOLERANCE[llm.config.dtype] * rows.norm(dim=-1) / rows.shape[-1] ** 0.5 * 4
    assert (gaps <= allowed).all(), gaps


def test_close_gives_all_memory_back(stage: ModuleType) -> None:
    options: dict[str, Any] = {"load_format": "dummy", "device": "cuda", "max_model_len": 2048}
    if hasattr(stage.EngineConfig, "kv_cache_memory_bytes"):  # or it would take what other tests need
        options["kv_cache_memory_bytes"] = 2**32
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with stage.LLM(SHAPE, **options) as llm:
        llm.generate([[1, 2, 3]], stage.SamplingParams(max_tokens=2), use_tqdm=False)
        assert torch.cuda.memory_allocated() > before + 2**30
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.since("m3")
def test_tokens_of_small_pools_and_forks(stage: ModuleType) -> None:
    """The kernel on tables that change and copies that are made: the same as gathering, with blocks to spare."""
    prompts = [PROMPT[:length] for length in (5, 16, 63, 130, 31)]
    params = [
        stage.SamplingParams(
            # So cold that rounding does not change a draw; a flat distribution over 151,936 tokens would be all edges.
            temperature=0.01 * (number % 2),
            seed=number,
            max_tokens=40,
            ignore_eos=True,
            n=1 + 3 * (number % 2),
        )
        for number in range(5)
    ]

    def run(**options: Any) -> tuple[list[Any], int]:
        sizes: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
        with stage.LLM(SHAPE, load_format="dummy", device="cuda", **sizes, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens = [[completion.token_ids for completion in output.outputs] for output in outputs]
            return tokens, llm.engine.stats.steps[-1].num_preemptions

    expected, num_preemptions = run(attention_backend="naive", num_kv_blocks=400)
    assert num_preemptions == 0
    counts = {}
    for num_blocks, block_size in ((18, 16), (400, 16), (4, 64), (3, 256)):
        tokens, counts[num_blocks] = run(num_kv_blocks=num_blocks, block_size=block_size)
        assert tokens == expected
    assert counts[18] > 0 and counts[400] == 0
