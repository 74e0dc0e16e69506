"""The loader: every tensor of a checkpoint lands where it belongs, whatever files, spellings and dtypes it comes in."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from tests.checkpoints import SPECS
from tests.conftest import CheckpointPath, open_llm, submodule
from tests.damage import edit_json, edit_weights, read_weights
from tests.inside import model_of
from tests.unit.conftest import CopyOf, load_llm

pytestmark = pytest.mark.since("m0")

CPU = torch.device("cpu")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
PROMPT = "Seven ships were counted in the harbour"


def load(stage: ModuleType, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The bare model of a checkpoint."""
    loader = submodule(stage, "model_executor.model_loader")
    return loader.load_model(folder, loader.load_hf_config(folder), dtype, CPU, **options)


def generate(stage: ModuleType, model: Path | str, **options: Any) -> list[int]:
    """Greedy tokens: a quick answer to whether two checkpoints are the same model."""
    llm = load_llm(stage, model, **options)
    return llm.generate(PROMPT, stage.SamplingParams(**GREEDY), use_tqdm=False)[0].token_ids


# ---- tensors land where they belong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_holds_the_checkpoints_tensors(
    stage: ModuleType, checkpoint_path: CheckpointPath, name: str
) -> None:
    """One file or many, tied or not, with biases or without: q, k and v stand above each other, and gate above up."""
    folder = checkpoint_path(name)
    weights = read_weights(folder)
    model = load(stage, folder)
    for path, param in model.named_parameters():
        for merged, parts in {"qkv_proj": "q_proj k_proj v_proj", "gate_up_proj": "gate_proj up_proj"}.items():
            if merged in path:
                expected = torch.cat([weights.pop(path.replace(merged, part)) for part in parts.split()])
                break
        else:
            expected = weights.pop(path)
        assert torch.equal(param, expected), path
    assert not weights  # every tensor of the checkpoint was used, once


def test_some_checkpoints_are_sharded_and_some_are_not(checkpoint_path: CheckpointPath) -> None:
    """Otherwise the test above would not cover what it says."""
    shards = {name: len(list(checkpoint_path(name).glob("*.safetensors"))) for name in SPECS}
    assert min(shards.values()) == 1
    assert max(shards.values()) > 2


def test_nothing_is_left_uninitialised_or_trainable(stage: ModuleType, checkpoint_path: CheckpointPath) -> None:
    model = load(stage, checkpoint_path("llama3"))
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device == CPU and tensor.isfinite().all() for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert not any(module.training for module in model.modules())


def test_one_file_with_an_index_is_read_by_the_index(stage: ModuleType, copy_of: CopyOf) -> None:
    """A file that the index does not name is none of the checkpoint's business."""
    folder = copy_of("llama3")
    tokens = generate(stage, folder)
    save_file({"model.something.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert generate(stage, folder) == tokens


def test_a_tied_head_may_be_repeated(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3_tied")
    tokens = generate(stage, folder)
    assert "lm_head.weight" not in read_weights(folder)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert generate(stage, folder) == tokens


def test_old_rotary_frequencies_are_passed_over(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("llama_bias")
    tokens = generate(stage, folder)
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}))
    assert generate(stage, folder) == tokens


# ---- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_config", "asked", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        (None, "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtype(stage: ModuleType, copy_of: CopyOf, in_config: str | None, asked: str, expected: torch.dtype) -> None:
    folder = copy_of("qwen3")
    edit_json(folder, dtype=in_config)
    weights = read_weights(folder)
    with load_llm(stage, folder, dtype=asked) as llm:
        assert llm.config.dtype == str(expected).removeprefix("torch.")
        params = dict(model_of(llm).named_parameters())
        assert {param.dtype for param in params.values()} == {expected}
        assert torch.equal(params["lm_head.weight"], weights["lm_head.weight"].to(expected))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", "torch.float32"])
def test_unknown_dtype(stage: ModuleType, checkpoint_path: CheckpointPath, dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype") as error:
        load_llm(stage, checkpoint_path("qwen3"), dtype=dtype)
    assert repr(dtype) in str(error.value)


def test_a_failed_load_leaves_torchs_default_dtype_alone(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3")
    edit_json(folder, hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act"):
        load_llm(stage, folder, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32


# ---- load_format="dummy" ---------------------------------------------------------------------------------------------


@pytest.fixture
def shape(copy_of: CopyOf) -> Path:
    """A checkpoint without weights."""
    folder = copy_of("qwen3")
    (folder / "model.safetensors").unlink()
    return folder


def test_dummy_weights_are_a_function_of_the_seed(stage: ModuleType, shape: Path) -> None:
    a, b, c = (load(stage, shape, load_format="dummy", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    matrices = [name for name in a if a[name].dim() > 1]
    assert not any(torch.equal(a[name], c[name]) for name in matrices)


def test_dummy_weights_are_of_ordinary_size(stage: ModuleType, shape: Path) -> None:
    model = load(stage, shape, load_format="dummy")
    for name, param in model.named_parameters():
        if param.dim() > 1:
            assert param.mean().abs() < 2e-3, name
            assert param.std() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(param, torch.ones_like(param)), name
    matrices = [param for param in model.parameters() if param.dim() > 1]
    assert len({round(float(param.flatten()[0]), 9) for param in matrices}) == len(matrices)  # no two drawn alike


def test_dummy_needs_no_weights_and_generates(stage: ModuleType, shape: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        load_llm(stage, shape)
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "float32"}
    first = generate(stage, shape, seed=5, **options)
    assert len(first) == GREEDY["max_tokens"]
    assert generate(stage, shape, seed=5, **options) == first
    assert generate(stage, shape, seed=6, **options) != first


# ---- spellings of config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama3"])
def test_transformers_4_spellings(stage: ModuleType, copy_of: CopyOf, name: str, type_key: str) -> None:
    folder = copy_of(name)
    edit_json(folder, dtype="bfloat16")
    new = load_llm(stage, folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if rope_type == "default" else {type_key: rope_type, **rope}
    edit_json(
        folder,
        remove=("dtype", "rope_parameters"),
        torch_dtype="bfloat16",
        rope_theta=theta,
        rope_scaling=scaling,
        transformers_version="4.51.0",
    )
    old = load_llm(stage, folder)
    assert new.config.dtype == old.config.dtype == "bfloat16"
    # Beside the weights, a model is made of its rotary table.
    tables = [list(model_of(llm).buffers()) for llm in (new, old)]
    assert tables[0]
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    edit_json(folder, rope_theta=theta * 2)
    assert not torch.equal(next(model_of(load_llm(stage, folder)).buffers()), tables[0][0])


def test_the_rope_scaling_of_llama3_matters(stage: ModuleType, copy_of: CopyOf) -> None:
    """Otherwise the test above would pass for a loader that ignores it."""
    folder = copy_of("llama3")
    scaled = next(load(stage, folder).buffers())
    edit_json(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert not torch.equal(next(load(stage, folder).buffers()), scaled)


def test_sliding_window_that_is_off_does_no_harm(stage: ModuleType, copy_of: CopyOf) -> None:
    """Qwen2.5 checkpoints name a window and say that it is not used."""
    folder = copy_of("qwen2")
    tokens = generate(stage, folder)
    edit_json(folder, remove=("layer_types",), use_sliding_window=False, sliding_window=8, max_window_layers=1)
    assert generate(stage, folder) == tokens


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["nobody/no-such-model", "no-such-model"])
def test_hub_offline_is_one_sentence_with_a_way_out(stage: ModuleType, model: str) -> None:
    with pytest.raises(ValueError, match=model) as error:
        load_llm(stage, model)
    message = str(error.value)
    assert "\n" not in message
    assert "folovllm/models/tiny" in message
    assert "Hugging Face hub" in message


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere", "a/b/c"])
def test_a_path_is_not_looked_for_on_the_hub(stage: ModuleType, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = submodule(stage, "model_executor.model_loader")
    monkeypatch.setattr(loader, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub for a path"))
    with pytest.raises(ValueError, match=f"model folder '{model}' does not exist"):
        load_llm(stage, model)


def test_no_model_at_all(stage: ModuleType) -> None:
    with pytest.raises(ValueError, match="no model"):
        stage.LLM()


QWEN3 = [
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
LLAMA = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
# Gigabytes, pickles and other people's formats, as repositories on the hub have them beside what is needed.
BALLAST = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "figures/benchmark.png",
    "flax_model.msgpack",
    "model.q4_k_m.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "modeling_custom.py",
    "tf_model.h5",
    "training_args.bin",
    "weights.pt",
]


@pytest.mark.parametrize("needed", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_only_what_is_needed_is_downloaded(
    stage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: list[str]
) -> None:
    loader = submodule(stage, "model_executor.model_loader")
    calls: list[tuple[str, str | None]] = []
    fetched: list[str] = []

    def snapshot_download(
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
    ) -> str:
        calls.append((repo_id, revision))
        # The hub client's own way of choosing: its `*` matches a slash as well.
        fetched.extend(
            filter_repo_objects([*needed, *BALLAST], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(tmp_path)

    monkeypatch.setattr(loader, "snapshot_download", snapshot_download)
    assert loader.resolve_model("Qwen/Qwen3-0.6B", "v1.0") == tmp_path
    assert calls == [("Qwen/Qwen3-0.6B", "v1.0")]
    assert sorted(fetched) == sorted(needed)
    fetched.clear()
    assert loader.resolve_model("Qwen/Qwen3-0.6B", with_weights=False) == tmp_path
    assert sorted(fetched) == sorted(name for name in needed if not name.endswith(".safetensors"))


def test_weights_that_nobody_reads_are_not_downloaded(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_path("qwen3")
    loader = submodule(stage, "model_executor.model_loader")
    patterns: dict[str, list[str]] = {}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        patterns[repo_id] = allow_patterns
        return str(folder)

    monkeypatch.setattr(loader, "snapshot_download", snapshot_download)
    load_llm(stage, "someone/shape", tokenizer="someone/tokenizer", load_format="dummy").close()
    load_llm(stage, "someone/model", tokenizer="someone/tokenizer").close()
    assert {name for name, allowed in patterns.items() if "*.safetensors" in allowed} == {"someone/model"}
    assert len(patterns) == 3


def test_a_downloaded_snapshot_runs(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_path("llama3")
    loader = submodule(stage, "model_executor.model_loader")
    monkeypatch.setattr(loader, "snapshot_download", lambda *_, **__: str(folder))
    assert generate(stage, "someone/some-llama") == generate(stage, folder)


def test_the_tokenizer_may_come_from_elsewhere(stage: ModuleType, copy_of: CopyOf) -> None:
    folder = copy_of("qwen3")
    tokens = generate(stage, folder)
    elsewhere = folder.parent / "tokenizer"
    elsewhere.mkdir()
    for path in folder.glob("tokenizer*"):
        path.rename(elsewhere / path.name)
    assert generate(stage, folder, tokenizer=str(elsewhere)) == tokens
    with pytest.raises(ValueError, match="nobody/tokenizer"):
        load_llm(stage, folder, tokenizer="nobody/tokenizer")


def test_a_revision_is_asked_for(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id: str, *, revision: str | None = None, **_: Any) -> str:
        asked.append((repo_id, revision))
        return str(checkpoint_path("qwen3"))

    monkeypatch.setattr(submodule(stage, "model_executor.model_loader"), "snapshot_download", snapshot_download)
    with open_llm(stage, "someone/some-qwen", max_model_len=32, revision="v1.0"):  # type: ignore[arg-type]
        assert asked and set(asked) == {("someone/some-qwen", "v1.0")}


def test_an_impossible_length_is_refused_before_weights_are_read(
    stage: ModuleType, checkpoint_path: CheckpointPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(*_: Any) -> None:
        raise AssertionError("gigabytes were read in vain")

    monkeypatch.setattr(submodule(stage, "model_executor.model_loader"), "load_weights", load_weights)
    with pytest.raises(ValueError, match=r"max_model_len=1000000000 .*512"):
        open_llm(stage, checkpoint_path("qwen3"), max_model_len=10**9)
