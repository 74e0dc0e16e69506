"""A damaged quantised checkpoint is one clear ValueError that names the tensor, and says what to do.

Damage is done to copies of good checkpoints, one way at a time. Whatever is wrong with codes, scales and groups, nobody
else would notice: a model with a scale too few says something, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ..damage import edit_json, edit_weights, read_weights
from ..quantized import LEAVES, Checkpoint, Scheme, save_quantized
from .conftest import load_llm

pytestmark = pytest.mark.since("m7")

Weights = dict[str, torch.Tensor]

DOWN = "model.layers.1.mlp.down_proj"  # 256 inputs, 128 outputs
UP = "model.layers.0.mlp.up_proj"  # stacked with the gate
Q = "model.layers.1.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"

IN_ORDER = Scheme(group_size=64)
ACT_ORDER = Scheme(group_size=64, desc_act=True, sym=False, checkpoint_format="gptq_v2")

AGAIN = r".*quantise it again \(`folovllm quantize`\)"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scheme], Checkpoint]:
    made: dict[Scheme, Checkpoint] = {}

    def get(scheme: Scheme) -> Checkpoint:
        if scheme not in made:
            made[scheme] = save_quantized(tmp_path_factory.mktemp("good"), scheme)
        return made[scheme]

    return get


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        weights[name] = how(weights[name]).clone(memory_format=torch.contiguous_format)

    return edit


def drop(*names: str) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        for name in names:
            del weights[name]

    return edit


def unquantise(prefix: str, rows: int, columns: int) -> Callable[[Weights], None]:
    """A plain weight in place of the packed one."""

    def edit(weights: Weights) -> None:
        drop(*(f"{prefix}.{leaf}" for leaf in LEAVES))(weights)
        weights[f"{prefix}.weight"] = torch.zeros(rows, columns)

    return edit


def swap_two(g_idx: torch.Tensor) -> torch.Tensor:
    """Two inputs of different groups change places: still a permutation, and another one."""
    first, second = 0, int((g_idx != g_idx[0]).nonzero()[0])
    swapped = g_idx.clone()
    swapped[[first, second]] = g_idx[[second, first]]
    return swapped


# name: (how it is quantised, what happens to its tensors, what the message must say)
DAMAGE: dict[str, tuple[Scheme, Callable[[Weights], Any], str]] = {
    # ---- tensors that are not there, or too many
    "no qzeros": (IN_ORDER, drop(f"{DOWN}.qzeros"), f"{DOWN}.qzeros is missing{AGAIN}"),
    "no scales": (IN_ORDER, drop(f"{DOWN}.scales"), f"{DOWN}.scales is missing{AGAIN}"),
    "no qzeros of a part of a stack": (IN_ORDER, drop(f"{K}.qzeros"), f"{K}.qzeros is missing"),
    "no qweight": (IN_ORDER, drop(f"{DOWN}.qweight"), rf"{DOWN}\.(weight is missing|qzeros is unknown)"),
    "no g_idx, and an order": (ACT_ORDER, drop(f"{DOWN}.g_idx"), f"{DOWN}.g_idx is missing{AGAIN}"),
    "a weight beside its codes": (
        IN_ORDER,
        lambda w: w.update({f"{DOWN}.weight": torch.zeros(128, 256)}),
        f"{DOWN}.weight is unknown to the model",
    ),
    "a bias that is not zero": (
        IN_ORDER,
        lambda w: w.update({f"{DOWN}.bias": torch.ones(128)}),
        f"{DOWN}.bias is unknown to the model",
    ),
    "codes of a layer that is not there": (
        IN_ORDER,
        lambda w: w.update({f"model.layers.7.mlp.up_proj.{leaf}": w[f"{UP}.{leaf}"].clone() for leaf in LEAVES}),
        r"model\.layers\.7\.mlp\.up_proj\.\w+ is unknown to the model",
    ),
    # ---- shapes
    "qweight cut": (
        IN_ORDER,
        change(f"{DOWN}.qweight", lambda t: t[:-1]),
        rf"{DOWN}\.qweight has shape \[31, 128\], the model needs \[32, 128\]{AGAIN}",
    ),
    "qweight transposed": (
        IN_ORDER,
        change(f"{DOWN}.qweight", lambda t: t.T),
        rf"{DOWN}\.qweight has shape \[128, 32\], the model needs \[32, 128\]",
    ),
    "a scale for all groups": (
        IN_ORDER,
        change(f"{DOWN}.scales", lambda t: t[:1]),
        rf"{DOWN}\.scales has shape \[1, 128\], the model needs \[4, 128\]",
    ),
    "scales of a part of a stack": (
        IN_ORDER,
        change(f"{K}.scales", lambda t: t[:, :1]),
        rf"{K}\.scales has shape \[2, 1\], the model needs \[2, 64\]",
    ),
    "zero points that are not packed": (
        IN_ORDER,
        change(f"{DOWN}.qzeros", lambda t: t.repeat_interleave(8, 1)),
        rf"{DOWN}\.qzeros has shape \[4, 128\], the model needs \[4, 16\]",
    ),
    "a g_idx too short": (
        IN_ORDER,
        change(f"{DOWN}.g_idx", lambda t: t[:-1]),
        rf"{DOWN}\.g_idx has shape \[255\], the model needs \[256\]",
    ),
    "qweight of one dimension": (
        IN_ORDER,
        change(f"{DOWN}.qweight", lambda t: t.flatten()),
        rf"{DOWN}\.qweight has shape \[4096\]",
    ),
    # ---- dtypes
    "a float qweight": (
        IN_ORDER,
        change(f"{DOWN}.qweight", lambda t: t.float()),
        rf"{DOWN}\.qweight is of torch\.float32, the model needs torch\.int32{AGAIN}",
    ),
    "float zero points": (
        IN_ORDER,
        change(f"{DOWN}.qzeros", lambda t: t.half()),
        rf"{DOWN}\.qzeros is of torch\.float16, the model needs torch\.int32",
    ),
    "integer scales": (
        IN_ORDER,
        change(f"{DOWN}.scales", lambda t: t.int()),
        rf"{DOWN}\.scales is of torch\.int32, the model needs torch\.float16",
    ),
    "a float g_idx": (
        ACT_ORDER,
        change(f"{DOWN}.g_idx", lambda t: t.float()),
        rf"{DOWN}\.g_idx is of torch\.float32, the model needs torch\.int32",
    ),
    # ---- groups
    "a g_idx of one group": (
        ACT_ORDER,
        change(f"{DOWN}.g_idx", torch.zeros_like),
        rf"{DOWN} has a g_idx that does not put group_size inputs into each group; quantise it again",
    ),
    "a g_idx beyond the groups": (
        ACT_ORDER,
        change(f"{DOWN}.g_idx", lambda t: t + 1),
        f"{DOWN} has a g_idx that does not .*quantise it again",
    ),
    "a negative g_idx": (
        ACT_ORDER,
        change(f"{DOWN}.g_idx", lambda t: t - 1),
        f"{DOWN} has a g_idx that does not .*quantise it again",
    ),
    "a g_idx with an input too many in a group": (
        ACT_ORDER,
        change(f"{DOWN}.g_idx", lambda t: torch.where(torch.arange(256) == int((t == 1).nonzero()[0]), 0, t)),
        f"{DOWN} has a g_idx that does not .*quantise it again",
    ),
    "orders that differ within a stack": (
        ACT_ORDER,
        change(f"{K}.g_idx", swap_two),
        r"model\.layers\.1\.self_attn\.qkv_proj has another g_idx in each of its matrices.*quantise it again",
    ),
    "a bad g_idx where none is needed": (
        IN_ORDER,
        change(f"{DOWN}.g_idx", lambda t: t.clamp(max=2)),
        f"{DOWN} has a g_idx that does not",
    ),
    # ---- stacks
    "a stack that is quantised in part": (
        IN_ORDER,
        unquantise(Q, 128, 128),
        rf"of {Q}, {K}, \S*v_proj some are quantised and some are not.*quantise all of them, or none",
    ),
    "another one": (IN_ORDER, unquantise(UP, 256, 128), rf"of \S*gate_proj, {UP} some are quantised and some are not"),
}

# name: (what its config says, what the message must say)
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "groups that do not divide the inputs": (
        {"group_size": 96},
        r"model\.layers\.0\.self_attn\.qkv_proj has 128 inputs, which groups of 96 do not divide; quantise it with a "
        "group_size that does, or with -1",
    ),
    "groups larger than the inputs": ({"group_size": 1024}, "has 128 inputs, which groups of 1024 do not divide"),
    "smaller groups than there are": ({"group_size": 32}, rf"\.scales has shape \[\d, \d+\], the model needs{AGAIN}"),
    "larger groups than there are": ({"group_size": 128}, rf"\.scales has shape \[\d, \d+\], the model needs{AGAIN}"),
    "one group": ({"group_size": -1}, rf"\.scales has shape \[\d, \d+\], the model needs{AGAIN}"),
    "8 bits": ({"bits": 8}, rf"\.qweight has shape \[16, \d+\], the model needs \[32, \d+\]{AGAIN}"),
}


def copy_of(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "damaged"))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_sentence(
    stage: ModuleType, good: Callable[[Scheme], Checkpoint], tmp_path: Path, name: str
) -> None:
    scheme, damage, message = DAMAGE[name]
    folder = copy_of(good(scheme), tmp_path)
    before = read_weights(folder)
    edit_weights(folder, damage)
    after = read_weights(folder)
    assert before.keys() != after.keys() or not all(same(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match=message) as error:
        load_llm(stage, folder, dtype="float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_another_ones(
    stage: ModuleType, good: Callable[[Scheme], Checkpoint], tmp_path: Path, name: str
) -> None:
    changes, message = CONFIGS[name]
    folder = copy_of(good(IN_ORDER), tmp_path)
    edit_json(folder, quantization_config={**IN_ORDER.settings(), **changes})
    with pytest.raises(ValueError, match=message) as error:
        load_llm(stage, folder)
    assert "\n" not in str(error.value)


def test_the_good_ones_load(stage: ModuleType, good: Callable[[Scheme], Checkpoint]) -> None:
    """Else the tests above would show nothing."""
    for scheme in (IN_ORDER, ACT_ORDER):
        params = stage.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        with load_llm(stage, good(scheme).folder) as llm:
            assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].token_ids) == 2


def test_a_side_that_does_not_fill_words(stage: ModuleType, tmp_path: Path) -> None:
    """A matrix of 252 outputs has no place in words of eight codes."""
    checkpoint = save_quantized(tmp_path, IN_ORDER)
    edit_json(checkpoint.folder, intermediate_size=252)
    with pytest.raises(ValueError, match=r"gate_up_proj has a side of 252, which does not fill words of 8 codes"):
        load_llm(stage, checkpoint.folder)


def test_several_problems_are_reported_together(
    stage: ModuleType, good: Callable[[Scheme], Checkpoint], tmp_path: Path
) -> None:
    folder = copy_of(good(IN_ORDER), tmp_path)

    def edit(weights: Weights) -> None:
        drop(f"{DOWN}.qzeros", f"{K}.scales")(weights)
        weights[f"{UP}.qweight"] = weights[f"{UP}.qweight"].float()

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM") as error:
        load_llm(stage, folder)
    for problem in (f"{DOWN}.qzeros is missing", f"{K}.scales is missing", f"{UP}.qweight is of torch.float32"):
        assert problem in str(error.value)
    assert str(error.value).count("quantise it again") == 1
