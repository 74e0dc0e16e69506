"""The quantiser: the algorithm against least squares solved anew for each input, and what it does to real weights.

Perplexity is that of stories which neither training nor calibration has seen. The tools behind `folovllm quantize` and
`folovllm eval` are run on small random checkpoints: what they write is read back to the last bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folovllm import cli
from folovllm import evaluate as evaluate_tool
from folovllm import quantize as quantize_tool
from folovllm.models.stories import stories

from ..checkpoints import VOCAB_SIZE
from ..conftest import CheckpointPath, GetOracle, MakeLLM, forget_prefixes, open_llm, submodule
from ..damage import read_weights
from ..oracle import Oracle
from ..quantized import LEAVES, Checkpoint, Scheme, quantized_parts, save_dense, save_quantized
from .conftest import run

pytestmark = pytest.mark.since("m7")


@pytest.fixture(scope="session")
def quantizer(stage: ModuleType) -> ModuleType:
    return submodule(stage, "quantize")


@pytest.fixture(scope="session")
def make_config(stage: ModuleType) -> Callable[..., Any]:
    config_class: Callable[..., Any] = submodule(stage, "model_executor.layers.quantization").QuantizationConfig
    return config_class


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that can be quantised in groups of 128, not to be changed."""
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def tools(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folovllm quantize` and `eval` compute with the stage under test, also where it is a practice copy."""
    for module in (quantize_tool, evaluate_tool):
        monkeypatch.setattr(module, "import_stage", lambda name: stage)


def linears_of(stage: ModuleType, model: Any) -> dict[str, Any]:
    linear = submodule(stage, "model_executor.layers.linear").Linear
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, linear) and "lm_head" not in path}


# ---------------------------------------------------------------------- one matrix


def make_problem(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and inputs [T, K] that go together, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x *= torch.rand(columns, generator=generator) * 2 + 0.1
    return torch.randn(rows, columns, generator=generator), x


def moments(x: torch.Tensor) -> torch.Tensor:
    """Second moments [K, K] of inputs [T, K]."""
    return x.T @ x / len(x)


def check_against_least_squares(
    weight: torch.Tensor, hessian: torch.Tensor, config: Any, damping: float, matrix: Any
) -> None:
    """Every code is the nearest to what the inputs that are left should be, given all that were rounded before.

    That is solved anew for each input, in float64 and with the codes that came out: a near-tie may fall either way.
    """
    num_inputs, most = weight.shape[1], 2**config.bits - 1
    order = torch.arange(num_inputs)
    if config.desc_act:
        order = torch.argsort(hessian.diag(), descending=True, stable=True)
    group_size = num_inputs if config.group_size == -1 else config.group_size
    damped = hessian.double() + damping * hessian.diag().double().mean() * torch.eye(num_inputs)
    damped, wanted = damped[order][:, order], weight.double()[:, order]
    codes, fitted = matrix.codes.double()[:, order], matrix.dequantize().double()[:, order]
    groups = matrix.g_idx.long()[order]
    assert torch.equal(groups, torch.arange(num_inputs) // group_size)
    for i in range(num_inputs):
        if i == 0:
            target = wanted
        else:
            # min over r of (W - [fitted, r]) H (W - [fitted, r])^T
            pull = (wanted[:, :i] - fitted[:, :i]) @ damped[:i, i:]
            target = wanted[:, i:] + torch.linalg.solve(damped[i:, i:], pull.T).T
        scale, zero = matrix.scales.double()[:, groups[i]], matrix.zeros.double()[:, groups[i]]
        if i % group_size == 0:
            inside = target[:, :group_size]
            low, high = inside.amin(1).clamp(max=0), inside.amax(1).clamp(min=0)
            if config.sym:
                expected = 2 * inside.abs().amax(1) / most
                assert (zero == 2 ** (config.bits - 1)).all()
            else:
                expected = (high - low) / most
                assert ((zero - (-low / scale).clamp(0, most)).abs() <= 0.51).all()
            torch.testing.assert_close(scale, expected, rtol=2e-3, atol=0)
        nearest = (target[:, 0] / scale + zero).clamp(0, most)
        assert float((codes[:, i] - nearest).abs().max()) <= 0.51, f"input {i}"


configs = {
    "bits": st.sampled_from([4, 8]),
    "group_size": st.sampled_from([8, 16, -1]),
    "desc_act": st.booleans(),
    "sym": st.booleans(),
}


@given(
    **configs,
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    damping=st.sampled_from([0.01, 0.1]),
)
def test_the_algorithm_against_least_squares(
    bits: int,
    group_size: int,
    desc_act: bool,
    sym: bool,
    seed: int,
    rows: int,
    groups: int,
    damping: float,
    quantizer: ModuleType,
    make_config: Callable[..., Any],
) -> None:
    config = make_config(bits, group_size, desc_act, sym)
    weight, x = make_problem(seed, rows, groups * 16)
    hessian = moments(x)
    before = weight.clone(), hessian.clone()
    with torch.inference_mode():
        matrix = quantizer.gptq(weight, hessian, config, damping)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    check_against_least_squares(weight, hessian, config, damping, matrix)


@pytest.mark.parametrize(("desc_act", "group_size"), [(False, 48), (True, 32), (True, 144), (True, -1)])
def test_errors_are_passed_on_beyond_a_block(
    quantizer: ModuleType, make_config: Callable[..., Any], desc_act: bool, group_size: int
) -> None:
    """More inputs than are updated one by one, in groups of which some would reach into the next block, and in one."""
    config = make_config(4, group_size, desc_act, True)
    weight, x = make_problem(3, 3, 288)
    hessian = moments(x)
    with torch.inference_mode():
        matrix = quantizer.gptq(weight, hessian, config, 0.01)
    check_against_least_squares(weight, hessian, config, 0.01, matrix)


@given(
    bits=configs["bits"],
    group_size=st.sampled_from([16, 32, -1]),
    desc_act=configs["desc_act"],
    sym=configs["sym"],
    seed=st.integers(0, 1000),
    rows=st.sampled_from([8, 16, 32]),
    groups=st.integers(1, 3),
)
def test_better_than_rounding(
    bits: int,
    group_size: int,
    desc_act: bool,
    sym: bool,
    seed: int,
    rows: int,
    groups: int,
    quantizer: ModuleType,
    make_config: Callable[..., Any],
) -> None:
    """Of inputs that go together. The error is that of the outputs."""
    config = make_config(bits, group_size, desc_act, sym)
    weight, x = make_problem(seed, rows, groups * 32)
    hessian = moments(x)
    with torch.inference_mode():
        fitted = quantizer.gptq(weight, hessian, config).dequantize()
        rounded = quantizer.round_to_nearest(weight, config).dequantize()
    error, rtn_error = (quantizer.output_error(weight, w, hessian) for w in (fitted, rounded))
    by_hand = ((weight - fitted) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert error == pytest.approx(float(by_hand), rel=1e-3)
    assert error < rtn_error


@given(**configs, seed=st.integers(0, 1000), size=st.floats(0.01, 100))
def test_inputs_that_are_independent_leave_rounding(
    bits: int,
    group_size: int,
    desc_act: bool,
    sym: bool,
    seed: int,
    size: float,
    quantizer: ModuleType,
    make_config: Callable[..., Any],
) -> None:
    """There is nothing to make up for an error with."""
    config = make_config(bits, group_size, desc_act, sym)
    weight, _ = make_problem(seed, 5, 48)
    with torch.inference_mode():
        matrix = quantizer.gptq(weight, size * torch.eye(48), config)
        rounded = quantizer.round_to_nearest(weight, config)
    for name in ("codes", "zeros", "scales", "g_idx"):
        assert torch.equal(getattr(matrix, name), getattr(rounded, name)), name


@given(
    bits=configs["bits"],
    group_size=configs["group_size"],
    desc_act=configs["desc_act"],
    seed=st.integers(0, 1000),
    method=st.sampled_from(["gptq", "rtn"]),
)
def test_what_is_on_a_grid_stays(
    bits: int,
    group_size: int,
    desc_act: bool,
    seed: int,
    method: str,
    quantizer: ModuleType,
    make_config: Callable[..., Any],
) -> None:
    """A grid from the least to the largest weight finds itself again, and without an error nothing is passed on."""
    config = make_config(bits, group_size, desc_act, False)
    generator = torch.Generator().manual_seed(seed)
    hessian = moments(make_problem(seed, 1, 32)[1])
    most, size = 2**bits - 1, 32 if group_size == -1 else group_size
    codes = torch.randint(0, most + 1, (3, 32), generator=generator).float()
    order = hessian.diag().argsort(descending=True, stable=True) if desc_act and method == "gptq" else torch.arange(32)
    codes[:, order[::size]], codes[:, order[1::size]] = 0.0, most  # every group has both ends
    zero = float(torch.randint(0, most + 1, (1,), generator=generator))
    weight = 2**-5 * (codes - zero)
    with torch.inference_mode():
        if method == "rtn":
            matrix = quantizer.round_to_nearest(weight, config)
        else:
            matrix = quantizer.gptq(weight, hessian, config)
    assert torch.equal(matrix.codes, codes)
    assert torch.equal(matrix.dequantize(), weight)


@given(
    bits=configs["bits"],
    sym=configs["sym"],
    rows=st.integers(1, 4),
    seed=st.integers(0, 1000),
    std=st.sampled_from([1e-6, 0.02, 30.0]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)
def test_grids(
    bits: int,
    sym: bool,
    rows: int,
    seed: int,
    std: float,
    shift: float,
    quantizer: ModuleType,
    make_config: Callable[..., Any],
) -> None:
    """A float16 scale, a zero point that has a code, and no weight further from its point than half a step."""
    config = make_config(bits, 16, False, sym)
    weight = std * (torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)) + shift)
    weight[0] = 0.0  # nothing to go by
    scale, zero = quantizer.find_grid(weight, config)
    assert scale.shape == zero.shape == (rows, 1)
    assert torch.equal(scale, scale.half().float()) and (scale > 0).all()
    assert torch.equal(zero, zero.round()) and ((zero >= 0) & (zero <= 2**bits - 1)).all()
    if sym:
        assert (zero == 2 ** (bits - 1)).all()
    matrix = quantizer.round_to_nearest(weight, config)
    assert torch.equal(matrix.codes, matrix.codes.round().clamp(0, 2**bits - 1))
    assert (matrix.dequantize()[0] == 0).all()
    slack = 1.0 if std == 1e-6 else 0.51 + 2**bits * 2**-11  # tiny scales are what float16 has
    assert ((matrix.dequantize() - weight).abs() <= slack * scale.clamp(min=2e-7)).all()


@pytest.mark.parametrize("desc_act", [False, True])
def test_inputs_that_are_never_active(quantizer: ModuleType, make_config: Callable[..., Any], desc_act: bool) -> None:
    """Also copies of one another, and fewer samples than inputs: no Hessian that could be inverted as it is."""
    config = make_config(4, 16, desc_act)
    weight, _ = make_problem(1, 4, 64)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] = x[:, 40] = 0.0
    x[:, 7] = x[:, 8]
    for inputs in (x, torch.zeros(10, 64)):
        hessian = moments(inputs)
        with torch.inference_mode():
            fitted = quantizer.gptq(weight, hessian, config).dequantize()
        assert fitted.isfinite().all()
        assert (fitted - weight).abs().max() < 2.0
    hessian = moments(x)
    with torch.inference_mode():
        fitted = quantizer.gptq(weight, hessian, config).dequantize()
        rounded = quantizer.round_to_nearest(weight, config).dequantize()
    errors = [quantizer.output_error(weight, w, hessian) for w in (fitted, rounded)]
    assert errors[0] < 0.5 * errors[1]


# ---------------------------------------------------------------------- the embedded model

WINDOW = 128
KINDS = {"g128": (4, 128, False), "g32 act-order": (4, 32, True), "8 bits": (8, 128, False)}


class Quality:
    """The embedded model, quantised in several ways; `before` is its perplexity."""

    def __init__(self, stage: ModuleType, llm: Any) -> None:
        self.stage, self.llm = stage, llm
        self.linears = linears_of(stage, llm.model)
        self.original = {path: layer.weight.clone() for path, layer in self.linears.items()}
        self.samples = self._encode(False, "calibration", 16)[: 12 * WINDOW].view(-1, WINDOW)
        self.text = self._encode(True, "quality", 16)[:3072]
        assert len(self.samples) == 12 and len(self.text) == 3072
        self.before = self.perplexity()

    def _encode(self, held_out: bool, seed: str, count: int) -> torch.Tensor:
        text = "<|endoftext|>".join(story.text for story in stories(held_out, seed, count))
        return evaluate_tool.encode(self.llm, text)

    def perplexity(self) -> float:
        perplexity: float = submodule(self.stage, "evaluate").perplexity(self.llm.model, self.text, WINDOW)[0]
        return perplexity

    def quantize(self, config: Any) -> tuple[list[Any], float, float]:
        """Errors of layers; the share by which GPTQ raises perplexity, and that by which rounding does."""
        quantizer = submodule(self.stage, "quantize")
        excess = []
        with torch.inference_mode():
            for path, layer in self.linears.items():
                layer.weight.copy_(quantizer.round_to_nearest(self.original[path], config).dequantize())
            excess.append(self.perplexity() / self.before - 1)
            self._restore()
            _, errors = quantizer.quantize_layers(self.llm.model, self.samples, config, use_tqdm=False)
            excess.insert(0, self.perplexity() / self.before - 1)
            self._restore()
        return errors, excess[0], excess[1]

    def _restore(self) -> None:
        for path, layer in self.linears.items():
            layer.weight.copy_(self.original[path])


@pytest.fixture(scope="module")
def quality(
    stage: ModuleType, tiny_path: Path, make_config: Callable[..., Any]
) -> Iterator[dict[str, tuple[list[Any], float, float]]]:
    with open_llm(stage, tiny_path, max_model_len=WINDOW, max_num_seqs=2, kv_cache_memory_bytes=2**24) as llm:
        made = Quality(stage, llm)
        assert made.before < 3  # the model knows the stories
        yield {name: made.quantize(make_config(*kind)) for name, kind in KINDS.items()}


@pytest.mark.parametrize("kind", ["g128", "g32 act-order"])
def test_better_than_rounding_in_every_layer(quality: dict[str, Any], kind: str) -> None:
    errors, excess, rtn_excess = quality[kind]
    assert len(errors) == 24
    for layer in errors:
        assert 0 < layer.error < layer.rtn_error < 0.05, layer
    assert excess < 0.7 * rtn_excess
    assert rtn_excess > 1e-3  # else there was nothing to gain


def test_perplexity_of_the_embedded_model(quality: dict[str, Any]) -> None:
    assert quality["g32 act-order"][1] < 0.03
    assert abs(quality["8 bits"][1]) < 0.003
    ratio = sum(e.error for e in quality["8 bits"][0]) / sum(e.error for e in quality["g128"][0])
    assert ratio < 0.02  # a step is sixteen times smaller
    # A finer grid is nearer.
    assert sum(e.rtn_error for e in quality["g32 act-order"][0]) < sum(e.rtn_error for e in quality["g128"][0])


# ---------------------------------------------------------------------- layers of a model


def test_errors_of_layers_by_hand(
    stage: ModuleType, quantizer: ModuleType, make_config: Callable[..., Any], dense_path: Path
) -> None:
    """Inputs of every layer are what comes out of those before it, quantised as they are in the end."""
    samples = torch.randint(VOCAB_SIZE, (5, 40), generator=torch.Generator().manual_seed(1))
    for method in ("gptq", "rtn"):
        with open_llm(stage, dense_path, max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
            linears = linears_of(stage, llm.model)
            before = {path: layer.weight.clone() for path, layer in linears.items()}
            _, errors = quantizer.quantize_layers(llm.model, samples, make_config(4, 32), method, use_tqdm=False)
            assert [layer.name for layer in errors] == list(before)
            inputs: dict[str, list[torch.Tensor]] = {path: [] for path in before}
            hooks = [
                layer.register_forward_pre_hook(lambda _, args, kept=inputs[path]: kept.append(args[0].double()))
                for path, layer in linears.items()
            ]
            evaluate = submodule(stage, "evaluate")
            for sample in samples:  # one by one
                evaluate.perplexity(llm.model, sample, 40)
            for hook in hooks:
                hook.remove()
            for layer in errors:
                x, old = torch.cat(inputs[layer.name]), before[layer.name].double()
                assert len(x) == samples.numel()
                for fitted, error in (
                    (linears[layer.name].weight, layer.error),
                    (quantizer.round_to_nearest(before[layer.name], make_config(4, 32)).dequantize(), layer.rtn_error),
                ):
                    change = (x @ (old - fitted.double()).T).square().sum() / (x @ old.T).square().sum()
                    assert error == pytest.approx(float(change), rel=1e-3), layer.name


def test_what_cannot_be_packed_is_refused_before_anything_changes(
    stage: ModuleType, quantizer: ModuleType, make_config: Callable[..., Any], dense_path: Path
) -> None:
    """256 inputs of the last layer are not divided, 128 of all others are."""
    samples = torch.zeros(1, 8, dtype=torch.int64)
    with open_llm(stage, dense_path, max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
        before = {name: param.clone() for name, param in llm.model.named_parameters()}
        message = r"model\.layers\.0\.self_attn\.qkv_proj has 128 inputs, which groups of 256 do not divide"
        with pytest.raises(ValueError, match=message):
            quantizer.quantize_layers(llm.model, samples, make_config(4, 256), use_tqdm=False)
        assert all(torch.equal(param, before[name]) for name, param in llm.model.named_parameters())


# ---------------------------------------------------------------------- perplexity


@pytest.mark.parametrize(("num_tokens", "window"), [(2, 16), (17, 16), (64, 16), (75, 16), (75, 512), (90, 30)])
def test_perplexity_against_the_oracle(
    stage: ModuleType, make_llm: MakeLLM, get_oracle: GetOracle, num_tokens: int, window: int
) -> None:
    """Each token but the first of a window, given those before it in the window; a window of one token says nothing."""
    token_ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    surprise, expected_tokens = 0.0, 0
    for start in range(0, num_tokens, window):
        part = token_ids[start : start + window]
        logits = get_oracle("qwen3").logits(part.tolist()).double()
        surprise -= float(logits.log_softmax(-1)[:-1].gather(1, part[1:, None]).sum())
        expected_tokens += len(part) - 1
    llm = make_llm("qwen3", max_model_len=64)
    caches = [layer.k_cache for layer in llm.engine.worker.layers]
    perplexity, counted = submodule(stage, "evaluate").perplexity(llm.model, token_ids, window)
    assert counted == expected_tokens
    assert perplexity == pytest.approx(math.exp(surprise / expected_tokens), rel=1e-4)
    assert all(layer.k_cache is cache for layer, cache in zip(llm.engine.worker.layers, caches, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_text_without_a_perplexity(stage: ModuleType, make_llm: MakeLLM, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="less than two tokens"):
        submodule(stage, "evaluate").perplexity(
            make_llm("qwen3", max_model_len=64).model, torch.zeros(num_tokens).long(), 8
        )


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_that_foresees_nothing(stage: ModuleType, make_llm: MakeLLM, window: int) -> None:
    with pytest.raises(ValueError, match=f"window of {window} tokens"):
        submodule(stage, "evaluate").perplexity(
            make_llm("qwen3", max_model_len=64).model, torch.zeros(20).long(), window
        )


# ---------------------------------------------------------------------- the tool

SMALL: dict[str, Any] = {"num_samples": 3, "sample_length": 32, "use_tqdm": False, "device": "cpu"}
TEXT = "Seven ships were counted before the morning fog had lifted from the harbour. " * 60

WRITTEN: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "asymmetric": {"sym": False, "group_size": 64},
    "act-order": {"act_order": True, "group_size": 32},
    "8 bits, all inputs": {"bits": 8, "group_size": -1},
    "rounded": {"method": "rtn", "sym": False},
}


def make_quantized(folder: Path, out: Path, **options: Any) -> Any:
    return quantize_tool.quantize(folder, out, **{**SMALL, "log_level": "ERROR", "calibration": TEXT, **options})


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_what_was_fitted(
    stage: ModuleType,
    quantizer: ModuleType,
    dense_path: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit of float32; all else is the original's."""
    options, fitted, seen = WRITTEN[name], {}, []
    original = quantizer.quantize_layers

    def keeping(model: Any, samples: torch.Tensor, *arguments: Any) -> Any:
        result = original(model, samples, *arguments)
        fitted.update({path: layer.weight.clone() for path, layer in linears_of(stage, model).items()})
        seen.append(samples)
        return result

    monkeypatch.setattr(quantizer, "quantize_layers", keeping)
    out = tmp_path / "new" / "out"
    report = make_quantized(dense_path, out, **options)
    assert seen[0].shape == (3, 32)

    settings = json.loads((out / "quantize_config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == settings
    assert config == json.loads((dense_path / "config.json").read_text())
    assert settings == {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": options.get("group_size", 128),
        "desc_act": options.get("act_order", False),
        "sym": options.get("sym", True),
        "checkpoint_format": "gptq" if options.get("sym", True) else "gptq_v2",
    }
    before, after = read_weights(dense_path), read_weights(out)
    packed = {key.removesuffix(".qweight") for key in after if key.endswith(".qweight")}
    assert {f"{prefix}.{leaf}" for prefix in packed for leaf in LEAVES} <= after.keys()
    for key, tensor in before.items():
        if key.removesuffix(".weight") in packed:
            assert key not in after
        else:
            assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype
    assert len(packed) == 14
    assert len(after) == len(before) + 3 * len(packed)
    assert {tensor.dtype for key, tensor in after.items() if key.endswith("scales")} == {torch.float16}

    assert (report.bytes_before, report.bytes_after) == tuple(
        sum(tensor.nbytes for tensor in weights.values()) for weights in (before, after)
    )
    with open_llm(stage, out, max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
        read = {name: layer.quantized.dequantize(torch.float32) for name, layer in linears_of(stage, llm.model).items()}
        assert read.keys() == fitted.keys()
        for path, weight in read.items():
            assert torch.equal(weight, fitted[path]), path
        text = evaluate_tool.encode(llm, TEXT)
        windows = text[: len(text) // 32 * 32].view(-1, 32)
        for sample in seen[0]:
            assert (windows == sample).all(1).any()  # a window of the text
        rest = torch.stack([window for window in windows if not (seen[0] == window).all(1).any()])
        assert len(rest) > 0
    assert [layer.name for layer in report.layers] == list(fitted)
    assert report.perplexity_before > 1 and report.perplexity_after > 1
    assert (tmp_path / "new").exists() and [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one may read all


@pytest.mark.usefixtures("tools")
def test_the_report(stage: ModuleType, dense_path: Path, tmp_path: Path) -> None:
    report = make_quantized(dense_path, tmp_path / "out", calibration=None, group_size=32)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 8 + 2
    for layer, line in zip(report.layers, lines[1:], strict=False):
        assert line.split() == [
            layer.name,
            f"{layer.error:.2e}",
            f"{layer.rtn_error:.2e}",
            f"{layer.error / layer.rtn_error:.2f}",
        ]
        assert layer.error < layer.rtn_error
    assert re.fullmatch(r"perplexity: \d+\.\d{4} -> \d+\.\d{4} \([+-]\d+\.\d\d %\)", lines[-2])
    assert re.fullmatch(r"weights: \d+\.\d MiB -> \d+\.\d MiB", lines[-1])
    # Measured on what the original says, of another seed than what it was calibrated with, and so does eval.
    options: dict[str, Any] = {"window": 32, "device": "cpu", "dtype": "float32", "log_level": "ERROR"}
    perplexity, num_tokens, window = evaluate_tool.evaluate(dense_path, **options)
    assert (num_tokens, window) == (16 * 31, 32)
    assert perplexity == pytest.approx(report.perplexity_before, rel=1e-6)


@pytest.mark.usefixtures("tools")
def test_seeds(dense_path: Path, tmp_path: Path) -> None:
    """The same seed writes the same file; another one calibrates with other windows."""
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        make_quantized(dense_path, tmp_path / str(number), seed=seed)
        weights.append(read_weights(tmp_path / str(number)))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("checkpoint", ["llama3", "qwen2_tied"])
def test_shards_ties_and_biases(
    stage: ModuleType, checkpoint_path: CheckpointPath, tmp_path: Path, checkpoint: str
) -> None:
    """An original in several files, whose index would be wrong now."""
    folder = checkpoint_path(checkpoint)
    assert (folder / "model.safetensors.index.json").is_file()
    make_quantized(folder, tmp_path / "out", group_size=32)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    before, after = read_weights(folder), read_weights(tmp_path / "out")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key.endswith("bias"))
    with open_llm(stage, tmp_path / "out", max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
        assert len(run(llm, [[5, 6, 7]])[0]) > 0


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["save_torch_state_dict", "replace"])
def test_an_interruption_leaves_nothing_behind(
    dense_path: Path, tmp_path: Path, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    if where == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(quantize_tool, where, fail)
    with pytest.raises(error):
        make_quantized(dense_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tools")
def test_a_place_that_is_taken(
    quantizer: ModuleType, dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder is none; else it is said before any work is done."""
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    make_quantized(dense_path, empty)
    assert (empty / "model.safetensors").is_file()
    monkeypatch.setattr(quantizer, "quantize_layers", lambda *_: pytest.fail("worked first"))
    for taken in (full, file, empty):
        with pytest.raises(ValueError, match=f"{taken.name} is there already; name another folder, or remove it"):
            make_quantized(dense_path, taken)
    assert [path.name for path in full.iterdir()] == ["notes.txt"] and file.read_text() == "mine"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown method": ({"method": "awq"}, "method must be 'gptq' or 'rtn', got 'awq'"),
    "no samples": ({"num_samples": 0}, "num_samples must be at least 1"),
    "no damping": ({"damping": 0}, "damping above 0"),
    "3 bits": ({"bits": 3}, "3 bits are not supported; supported are 4 and 8"),
    "groups that do not divide": ({"group_size": 96}, "has 128 inputs, which groups of 96 do not divide"),
    "a short text": ({"calibration": "Seven ships."}, "calibration text has .* tokens, and two windows of 32"),
    "an empty text": ({"calibration": ""}, "calibration text has 0 tokens"),
    "long samples": ({"sample_length": 513}, "513 must be from 2 to the model's 512 positions"),
    "samples of a token": ({"sample_length": 1}, "1 must be from 2"),
}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(dense_path: Path, tmp_path: Path, name: str) -> None:
    options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make_quantized(dense_path, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tools")
def test_quantised_once_is_enough(dense_path: Path, tmp_path: Path) -> None:
    make_quantized(dense_path, tmp_path / "once")
    with pytest.raises(ValueError, match="once is quantised already; use the original one"):
        make_quantized(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


# ---------------------------------------------------------------------- the commands


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.usefixtures("tools")
def test_quantize_and_eval(
    dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: ModuleType
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--bits", 4, "--group-size", 32, "--act-order", "--asym", "--calibration", text, "--samples", 4]
    code, said, _ = command(capsys, "quantize", dense_path, out, *options, "--sample-length", 48, "--device", "cpu")
    assert code == 0
    assert said.splitlines()[-1] == f"wrote {out}"
    assert "model.layers.1.mlp.down_proj" in said and "perplexity: " in said
    settings = json.loads((out / "quantize_config.json").read_text())
    wanted = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}
    assert {key: settings[key] for key in wanted} == wanted

    values = []
    for folder in (dense_path, out):
        words = ["--text", text, "--window", 64, "--dtype", "float32", "--device", "cpu"]
        code, said, _ = command(capsys, "eval", folder, *words)
        assert code == 0
        found = re.fullmatch(
            rf"perplexity ([\d.]+) of {re.escape(str(text))} \(([\d,]+) tokens, windows of 64\)\n", said
        )
        assert found, said
        with open_llm(stage, folder, max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
            token_ids = evaluate_tool.encode(llm, TEXT)
            expected, counted = submodule(stage, "evaluate").perplexity(llm.model, token_ids, 64)
        assert (found[1], found[2]) == (f"{expected:.4f}", f"{counted:,}")
        values.append(expected)
    assert values[0] != values[1]


@pytest.mark.usefixtures("tools")
def test_eval_of_what_the_model_says(dense_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = command(capsys, "eval", dense_path, "--window", 16, "--device", "cpu")
    assert code == 0
    first, second = said.splitlines()
    assert re.fullmatch(r"perplexity [\d.]+ of what the model itself says \(240 tokens, windows of 16\)", first)
    assert "--text FILE" in second


@pytest.mark.usefixtures("tools")
def test_mistakes_at_the_command_line(dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and exit code 2."""
    binary, short, out = tmp_path / "binary", tmp_path / "short", tmp_path / "out"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    short.write_text("a", encoding="utf-8")
    for words, message in (
        (["quantize", dense_path, out, "--bits", 3], "3 bits are not supported"),
        (["quantize", dense_path, out, "--calibration", tmp_path / "nowhere.txt"], "nowhere.txt"),
        (["quantize", dense_path, out, "--calibration", binary], f"{binary} is no UTF-8 text"),
        (["quantize", dense_path, out, "--sym", "--asym"], "not allowed with argument"),
        (["quantize", dense_path, dense_path], "is there already"),
        (["quantize", tmp_path / "nowhere", out], "does not exist"),
        (["eval", dense_path, "--text", short], "less than two tokens"),
        (["eval", dense_path, "--window", 100_000], "positions"),
    ):
        code, said, error = command(capsys, *words)
        assert (code, said) == (2, "")
        last = error.splitlines()[-1]  # progress may stand before it
        assert last.startswith("error: ") and message in last
    assert not out.exists()


def test_a_stage_that_cannot(capsys: pytest.CaptureFixture[str], dense_path: Path, tmp_path: Path) -> None:
    code, _, error = command(capsys, "quantize", dense_path, tmp_path / "out", "--stage", "m6")
    assert code == 2
    assert error == "error: m6_prefix has no quantize.py; name a stage that has it with --stage\n"


# ---------------------------------------------------------------------- the engine on quantised weights

CASES: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "v1": (Scheme(group_size=64), {}),
    "act-order, asymmetric": (Scheme(group_size=32, desc_act=True, sym=False, checkpoint_format="gptq_v2"), {}),
    "8 bits, tied": (Scheme(bits=8), {"model": "tied"}),
    "biases": (Scheme(), {"model": "bias"}),
}
PROMPTS = [[7, 30, 200], [5] * 20, list(range(40, 100)), [9], [*range(40, 90), 3, 4], [400, 2, 11]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    checkpoints: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in checkpoints:
            scheme, options = CASES[name]
            checkpoints[name] = save_quantized(tmp_path_factory.mktemp("engine"), scheme, **options)
        return checkpoints[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_dequantised_weights(stage: ModuleType, made: Callable[[str], Checkpoint], name: str) -> None:
    """In float32 the engine says what it says with the same weights not quantised, and what transformers allows."""
    checkpoint = made(name)
    greedy = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True}
    params = [stage.SamplingParams(**greedy) for _ in PROMPTS]
    params[1] = stage.SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)
    tokens = []
    for folder in (checkpoint.dense, checkpoint.folder):
        with open_llm(stage, folder, max_model_len=128, kv_cache_memory_bytes=2**22) as llm:
            tokens.append(run(llm, PROMPTS, params))
    assert tokens[0] == tokens[1]
    assert len({token for output in tokens[1] for token in output}) > 20  # not one token for ever
    oracle = Oracle(checkpoint.dense)
    for prompt, output, param in zip(PROMPTS, tokens[1], params, strict=True):
        oracle.check(prompt, output, param)


def test_tokens_do_not_depend_on_the_company(stage: ModuleType, made: Callable[[str], Checkpoint]) -> None:
    """Batches, chunks, what is found in the cache, and preemption."""
    folder = made("act-order, asymmetric").folder
    params = stage.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with open_llm(stage, folder, max_model_len=128, max_num_seqs=1, kv_cache_memory_bytes=2**22) as llm:
        alone = [run(llm, [prompt], params)[0] for prompt in PROMPTS]
        forget_prefixes(llm)
    with open_llm(stage, folder, max_model_len=128, kv_cache_memory_bytes=2**22) as llm:
        assert run(llm, PROMPTS, params) == alone
        assert run(llm, PROMPTS[::-1], params) == alone[::-1]
        assert llm.engine.stats.steps[-1].prefix_cache_hits > 40
    sizes = {"max_num_batched_tokens": 16, "max_chunk_size": 7, "max_num_seqs": 3, "block_size": 4}
    with open_llm(stage, folder, max_model_len=80, num_kv_blocks=22, **sizes) as llm:
        assert run(llm, PROMPTS, params) == alone
        steps = llm.engine.stats.steps
        assert "mixed" in {step.phase for step in steps} and steps[-1].num_preemptions > 0


@pytest.mark.parametrize("name", ["v1", "act-order, asymmetric", "biases"])
def test_logits_in_bfloat16(stage: ModuleType, made: Callable[[str], Checkpoint], name: str) -> None:
    """Through torch's int4 kernel where it is, few tokens at a time and many: as near as bfloat16 without codes is."""
    checkpoint = made(name)
    token_ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1))
    rows: dict[str, torch.Tensor] = {}
    evaluate = submodule(stage, "evaluate")
    for kind, folder, dtype in (
        ("exact", checkpoint.dense, "float32"),
        ("dense", checkpoint.dense, "bfloat16"),
        ("quantised", checkpoint.folder, "bfloat16"),
    ):
        with open_llm(stage, folder, dtype=dtype, max_model_len=256, kv_cache_memory_bytes=2**22) as llm:
            for length in (20, 200):
                with torch.inference_mode(), evaluate.window_metadata(llm.model, 1, length) as (positions, metadata):
                    hidden = llm.model(token_ids[:length], positions, metadata)
                    rows[f"{kind} {length}"] = llm.model.compute_logits(hidden).float()
    for length in (20, 200):
        exact = rows[f"exact {length}"]
        errors = {
            kind: float((rows[f"{kind} {length}"] - exact).norm() / exact.norm()) for kind in ("dense", "quantised")
        }
        assert errors["quantised"] < 2 * errors["dense"] < 0.3, errors


def test_a_quantised_engine_gives_its_memory_back(stage: ModuleType, made: Callable[[str], Checkpoint]) -> None:
    """Nothing of the checkpoint's form is kept beside what is computed with."""
    with open_llm(stage, made("v1").folder, max_model_len=64, kv_cache_memory_bytes=2**20) as llm:
        names = [name for name, _ in llm.model.named_parameters()]
        assert not [name for name in names if name.endswith("_proj.weight") or name.endswith("_proj.qweight")]
        assert len(list(quantized_parts(llm.model))) == 14
        assert llm.config.quantization is None  # it was not asked for
