"""What weights of four bits cost and gain: `python -m folovllm.bench.quantized`.

Four parts, chosen by `--parts`. *quality*: what the original model, the nearest codes and GPTQ's make of stories that
the model was not trained on. *memory*: bytes of the weights, by hand and as an engine holds them. *decode*: tokens a
second at growing batch sizes, beside the same shape in its own precision. *kernels*: on a GPU, the products of single
layers, with weights that no cache holds.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from .. import TINY, lab
from ..evaluate import check_window, encode, sample_token_ids, stage_module
from ..models.documents import END_OF_TEXT
from ..models.make_shapes import SHAPES_FOLDER
from ..models.stories import stories
from .decode_step import SPARE, WARMUP, clear, fill, milliseconds
from .options import parse_variant, run_script
from .paged import copy_gb_per_s, stage_part
from .prefix import numbers

PARTS = ("quality", "memory", "decode", "kernels")
CONFIGS = "4/32,4/32/act,4/64,4/64/act,4/128,4/128/act,4/-1,4/-1/act,8/128"
BATCHES = {"cpu": "1", "cuda": "1,2,4,8,16,32,64,128,256"}
SHAPES = {"cpu": "Qwen3-0.6B", "cuda": "Qwen3-0.6B,Qwen3-4B,Llama-2-7B"}
GROUP_SIZES = (32, 64, 128, -1)
SCALE_BYTES = 2
DUMMY_GROUP = 128  # what random quantised weights have
FORMATS = "4/32,4/64,4/128,4/128/act,8/128"  # of the products of one layer
FORMAT_ROWS = (1, 8, 64)
COLD_BYTES = 2**28  # weights that take turns: several times what a GPU's cache holds
COPY_REPEATS = 30
REPLAYS = 7
BOTH_PATHS = 16  # rows from which a product is timed both with codes unpacked in registers and unpacked beforehand


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folovllm.bench.quantized", description="What quantised weights cost and gain."
    )
    parser.add_argument("--parts", default="quality", help=f"of {','.join(PARTS)} (default: quality)")
    parser.add_argument("--stage", default="m7", help="with engine options if need be (default: m7)")
    parser.add_argument("--configs", default=CONFIGS, help=f"quality: bits/group size[/act] (default: {CONFIGS})")
    parser.add_argument("--tokens", type=int, default=100_000, help="quality: of held-out text (default: 100,000)")
    parser.add_argument("--seeds", type=int, default=3, help="quality: calibration texts of each (default: 3)")
    parser.add_argument("--samples", type=int, default=64, help="quality: windows of such a text (default: 64)")
    parser.add_argument("--shapes", help=f"memory, decode, kernels (default: {SHAPES['cpu']}, a GPU {SHAPES['cuda']})")
    parser.add_argument("--batches", help=f"decode, kernels: rows (default: {BATCHES['cpu']}, a GPU {BATCHES['cuda']})")
    parser.add_argument("--context", type=int, default=128, help="decode: tokens of each prompt (default: 128)")
    parser.add_argument("--steps", type=int, default=30, help="decode: timed steps of each size (default: 30)")
    parser.add_argument("--model", default=str(TINY), help="quality: folder or hub id (default: the embedded model)")
    parser.add_argument("--dtype", default="bfloat16", help="decode: of activations, and of what is not quantised")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for. ValueError or TypeError for anything that the user can mend."""
    parts = [part for part in args.parts.split(",") if part]
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"--parts must be some of {', '.join(PARTS)} with commas between, got {args.parts!r}")
    for option in ("tokens", "seeds", "samples", "context", "steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    if "kernels" in parts and (args.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("the part kernels needs a CUDA GPU; leave it out, or try a machine that has one")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    stage, _ = parse_variant(args.stage)
    figures: dict[str, Any] = {"stage": lab.load_stage(stage).__name__, "device": device}
    shapes = [name for name in (args.shapes or SHAPES[device]).split(",") if name]
    batches = numbers("--batches", args.batches or BATCHES[device])
    if "kernels" in parts:  # first, while there is nothing else on the card
        figures["kernels"] = measure_kernels(lab.load_stage(stage), shapes, batches)
    if "quality" in parts:
        figures["quality"] = measure_quality(args, [parse_config(text) for text in args.configs.split(",")])
    if "memory" in parts:
        figures["memory"] = measure_memory(args, shapes)
    if "decode" in parts:
        figures["decode"] = measure_decode(args, shapes, batches, device)
    return figures


# ---- quality ---------------------------------------------------------------------------------------------------------


def parse_config(text: str) -> tuple[int, int, bool]:
    """ "4/32/act" -> bits, group size, act-order. ValueError for anything else."""
    parts = text.split("/")
    try:
        bits, group_size = int(parts[0]), int(parts[1])
        if parts[2:] not in ([], ["act"]):
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"--configs must be bits/group size or bits/group size/act, got {text!r}") from None
    return bits, group_size, bool(parts[2:])


def measure_quality(args: argparse.Namespace, configs: Sequence[tuple[int, int, bool]]) -> dict[str, Any]:
    """The same stories with every config: in float32, so that nothing but the weights differs.

    GPTQ is calibrated with what the model itself says, as `folovllm quantize` does, from so many seeds.
    """
    name, options = parse_variant(args.stage)
    quantizer, evaluator = stage_module(name, "quantize"), stage_module(name, "evaluate")
    fixed = {"dtype": "float32", "device": args.device, "enforce_eager": True, "log_level": "WARNING"}
    with lab.load_stage(name).LLM(args.model, **{**fixed, **options}) as llm:
        model, window = llm.model, check_window(llm, None)
        texts = held_out_stories(llm, args.tokens)
        before = read_stories(model, evaluator, texts)
        linears = quantizable(model, quantizer)
        originals = {path: linear.weight.clone() for path, linear in linears.items()}
        samples = [sample_token_ids(llm, args.samples, window, seed) for seed in range(args.seeds)]
        rounded: dict[tuple[int, int], Reading] = {}
        rows = []
        for bits, group_size, act_order in configs:
            config = quantizer.QuantizationConfig(bits, group_size, act_order)
            if (bits, group_size) not in rounded:
                for path, linear in linears.items():
                    linear.weight.copy_(quantizer.round_to_nearest(originals[path], config).dequantize())
                rounded[bits, group_size] = read_stories(model, evaluator, texts, before)
            runs, errors = [], []
            for sample in samples:
                for path, linear in linears.items():
                    linear.weight.copy_(originals[path])
                tensors, found = quantizer.quantize_layers(model, sample, config, use_tqdm=False)
                runs.append(read_stories(model, evaluator, texts, before))
                errors.append(found)
            row = {"bits": bits, "group_size": group_size, "act_order": act_order}
            rows.append({**row, **quality_figures(before, rounded[bits, group_size], runs, errors, tensors)})
        others = sum(p.nbytes for p in model.parameters()) - sum(w.nbytes for w in originals.values())
        num_weights = sum(weight.numel() for weight in originals.values())
    return {
        "model": Path(args.model).name,
        "dtype": "float32",
        "device": llm.config.device,
        "text": "held-out stories, each from its beginning to its end",
        "tokens": sum(len(text) - 1 for text in texts),
        "calibration": f"{args.samples} windows of {window} tokens that the model itself says",
        "perplexity": round(before.perplexity, 6),
        "quantised_weights": num_weights,
        "bytes_bf16": 2 * num_weights,
        "bytes_of_the_rest": others // 2,  # as the checkpoint has them: in bfloat16
        "rows": rows,
    }


def held_out_stories(llm: Any, least: int) -> list[torch.Tensor]:
    """Stories that the embedded model was not trained on, together at least so many tokens: int64 each.

    Each stands between two tokens that end a text, as in training. Text that is cut anywhere is not what the model
    knows: there it is too sure of itself, and any disturbance of its weights may do it good.
    """
    found: list[torch.Tensor] = []
    for story in stories(held_out=True, seed="quantized", count=least):
        if sum(map(len, found)) >= least:
            break
        found.append(encode(llm, END_OF_TEXT + story.text + END_OF_TEXT))
    return found


@dataclass
class Reading:
    """What a model makes of texts.

    Attributes:
        perplexity: of all tokens but the first ones.
        divergence: of its predictions from the original's, KL in nats a token; 0 for the original.
        hidden: of each text, what the predictions are made of: [T - 1, H].
    """

    perplexity: float
    divergence: float
    hidden: list[torch.Tensor]


@torch.inference_mode()
def read_stories(
    model: Any, evaluator: ModuleType, texts: Sequence[torch.Tensor], original: Reading | None = None
) -> Reading:
    """A forward pass over each text. The head is quantised nowhere, so both models' predictions can be had at once."""
    surprise = divergence = 0.0
    kept: list[torch.Tensor] = []
    for number, text in enumerate(texts):
        ids = text.to(model.model.embed_tokens.weight.device)
        with evaluator.window_metadata(model, 1, len(ids)) as (positions, metadata):
            hidden = model(ids, positions, metadata)[:-1]
        found = model.compute_logits(hidden).float().log_softmax(-1)
        surprise += F.nll_loss(found, ids[1:], reduction="sum").item()
        if original is None:
            kept.append(hidden)
        else:
            expected = model.compute_logits(original.hidden[number]).float().log_softmax(-1)
            divergence += F.kl_div(found, expected, log_target=True, reduction="sum").item()
    num_tokens = sum(len(text) - 1 for text in texts)
    return Reading(math.exp(surprise / num_tokens), divergence / num_tokens, kept)


def quantizable(model: Any, quantizer: ModuleType) -> dict[str, Any]:
    """The linear layers that `quantize_layers` quantises, by path."""
    return {path: module for path, module in model.model.named_modules() if isinstance(module, quantizer.Linear)}


def quality_figures(
    before: Reading,
    rounded: Reading,
    runs: Sequence[Reading],
    errors: Sequence[Sequence[Any]],
    tensors: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """One config. An excess is the part by which a perplexity is above the original's; medians over the seeds.

    Args:
        before, rounded: with the original weights, and with these rounded to nearest.
        runs: after GPTQ, for each calibration text.
        errors: the layers' errors (`LayerError`) of each.
        tensors: what a checkpoint holds of it.
    """
    excess = [run.perplexity / before.perplexity - 1 for run in runs]
    rtn_excess = rounded.perplexity / before.perplexity - 1
    divergence = [run.divergence for run in runs]
    ratios = [[layer.error / layer.rtn_error for layer in run] for run in errors]
    return {
        "bytes": sum(t.nbytes for name, t in tensors.items() if not name.endswith("g_idx")),
        "rtn_perplexity": round(rounded.perplexity, 6),
        "rtn_excess": round(rtn_excess, 7),
        "gptq_perplexity": [round(run.perplexity, 6) for run in runs],
        "gptq_excess": [round(value, 7) for value in excess],
        "gptq_excess_p50": round(statistics.median(excess), 7),
        "excess_ratio": round(statistics.median(excess) / rtn_excess, 3) if rtn_excess > 0 else None,
        "rtn_divergence": float(f"{rounded.divergence:.5g}"),
        "gptq_divergence": [float(f"{value:.5g}") for value in divergence],
        "divergence_ratio": round(statistics.median(divergence) / rounded.divergence, 3),
        "layer_error_ratio_p50": round(statistics.median(ratio for run in ratios for ratio in run), 4),
        "layers_worse_than_rtn": sum(ratio > 1 for run in ratios for ratio in run),
        "layers": {layer.name: [float(f"{e:.4g}") for e in (layer.error, layer.rtn_error)] for layer in errors[0]},
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def read_config(shape: str) -> dict[str, Any]:
    """The config.json of a shape. ValueError if there is none of that name."""
    path = SHAPES_FOLDER / shape / "config.json"
    if not path.is_file():
        known = ", ".join(sorted(folder.name for folder in SHAPES_FOLDER.iterdir()))
        raise ValueError(f"there is no shape {shape!r}; there are {known}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{layer: (K inputs, N outputs)} of a decoder block's products, stacked as the engine stacks them."""
    hidden, heads, mlp = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * head_dim),
        "o": (heads * head_dim, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }


def packed_bytes(num_inputs: int, num_outputs: int, bits: int, group_size: int) -> int:
    """Codes, and a scale and a zero point for every group of every output."""
    num_groups = 1 if group_size == -1 else num_inputs // group_size
    return num_inputs * num_outputs * bits // 8 + num_groups * num_outputs * SCALE_BYTES + (
        num_groups * num_outputs * bits // 8
    )  # fmt: skip


def bytes_by_hand(config: dict[str, Any], bits: int, group_size: int) -> dict[str, int]:
    """Of a model in bfloat16 whose linear layers, but the head, are quantised so; 16 bits: not quantised."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    shapes = layer_shapes(config)
    linears = sum(2 * k * n if bits == 16 else packed_bytes(k, n, bits, group_size) for k, n in shapes.values())
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    small = layers * (2 * hidden + (2 * head_dim if config["model_type"] == "qwen3" else 0)) + hidden  # norms
    if config["model_type"] == "qwen2":
        small += layers * shapes["qkv"][1]  # biases
    return {"quantised": layers * linears, "total": layers * linears + 2 * (embeddings + small)}


def measure_memory(args: argparse.Namespace, shapes: Sequence[str]) -> dict[str, Any]:
    """By hand for every group size, and as an engine holds them (random weights, groups of 128)."""
    rows = {}
    for shape in shapes:
        config = read_config(shape)
        with open_shape(args, shape, True, max_model_len=64, max_num_seqs=1, enforce_eager=True) as llm:
            loaded = bytes_loaded(llm.model)
        rows[shape] = {
            "bf16": bytes_by_hand(config, 16, -1),
            **{f"4-bit g{group}": bytes_by_hand(config, 4, group) for group in GROUP_SIZES if fits(config, group)},
            "8-bit g128": bytes_by_hand(config, 8, 128),
            "loaded": loaded,
        }
    return {"dtype": args.dtype, "loaded_group_size": DUMMY_GROUP, "rows": rows}


def fits(config: dict[str, Any], group_size: int) -> bool:
    return group_size == -1 or all(k % group_size == 0 for k, _ in layer_shapes(config).values())


def bytes_loaded(model: Any) -> dict[str, int]:
    """Of all weights of a model, and of those that are quantised."""
    packed = [module.quantized for module in model.modules() if getattr(module, "quantized", None) is not None]
    return {
        "quantised": sum(p.nbytes for weight in packed for p in weight.parameters()),
        "total": sum(p.nbytes for p in model.parameters()),
    }


# ---- decode ----------------------------------------------------------------------------------------------------------


def open_shape(args: argparse.Namespace, shape: str, quantised: bool, **options: Any) -> Any:
    """An engine with random weights of that shape, quantised or not."""
    read_config(shape)
    name, more = parse_variant(args.stage)
    quantization = {"quantization": "gptq"} if quantised else {}
    fixed = {"load_format": "dummy", "dtype": args.dtype, "device": args.device, "log_level": "WARNING"}
    return lab.load_stage(name).LLM(SHAPES_FOLDER / shape, **{**fixed, **quantization, **options, **more})


def measure_decode(
    args: argparse.Namespace, shapes: Sequence[str], batches: Sequence[int], device: str
) -> dict[str, Any]:
    """Decode steps of every shape, quantised and not.

    On a CPU both engines are open, and their steps take turns: what else the machine does then meets both. On a GPU one
    follows the other, each with the whole card.
    """
    name, _ = parse_variant(args.stage)
    options: dict[str, Any] = {
        "max_model_len": args.context + args.steps + WARMUP + SPARE + 1,
        "max_num_seqs": max(batches) * 21 // 20 + 1,  # an admission leaves some blocks free
    }
    if "cuda_graph_sizes" in {option.name for option in fields(lab.load_stage(name).EngineConfig)}:
        options["cuda_graph_sizes"] = sorted(batches)
    rows: dict[str, Any] = {}
    for shape in shapes:
        times: dict[str, dict[int, list[float]]] = {}
        loaded: dict[str, dict[str, int]] = {}
        with ExitStack() as stack:
            llms = {}
            for variant in ("bf16", "gptq"):
                llms[variant] = stack.enter_context(open_shape(args, shape, variant == "gptq", **options))
                loaded[variant] = bytes_loaded(llms[variant].model)
                if device == "cpu" and variant == "bf16":
                    continue
                for num_seqs in batches:
                    for measured, found in time_in_turns(llms, num_seqs, args.context, args.steps).items():
                        times.setdefault(measured, {})[num_seqs] = found
                if device != "cpu":
                    llms.clear()
                    stack.close()
        sizes = {str(n): decode_figures(n, times["bf16"][n], times["gptq"][n], device == "cpu") for n in batches}
        rows[shape] = {"bytes": loaded, "batches": sizes}
    return {
        "dtype": args.dtype,
        "context": args.context,
        "steps": args.steps,
        "in_turns": device == "cpu",
        "rows": rows,
    }


def time_in_turns(llms: dict[str, Any], num_seqs: int, context: int, num_steps: int) -> dict[str, list[float]]:
    """Milliseconds of decode steps of every engine, which take turns step by step.

    Raises:
        ValueError: memory does not hold so many sequences.
    """
    times: dict[str, list[float]] = {name: [] for name in llms}
    for llm in llms.values():
        fill(llm, num_seqs, context, num_steps + WARMUP + SPARE)
        running = llm.engine.core.scheduler.running
        if len(running) < num_seqs:
            raise ValueError(f"{len(running)} of {num_seqs} sequences of {context} tokens run: memory holds no more")
    for number in range(WARMUP + num_steps):
        for name, llm in llms.items():
            spent = milliseconds(llm.engine.step)
            if number >= WARMUP:
                times[name].append(spent)
    for llm in llms.values():
        clear(llm.engine)
    return times


def decode_figures(num_seqs: int, bf16: Sequence[float], gptq: Sequence[float], in_turns: bool) -> dict[str, Any]:
    """From step times in ms; in turns the speed-up is the median of that within each turn."""
    medians = {"bf16": statistics.median(bf16), "gptq": statistics.median(gptq)}
    if in_turns:
        speed_up = statistics.median(a / b for a, b in zip(bf16, gptq, strict=True))
    else:
        speed_up = medians["bf16"] / medians["gptq"]
    return {
        **{f"{name}_step_ms": round(median, 4) for name, median in medians.items()},
        **{f"{name}_tokens_per_s": round(1e3 * num_seqs / median, 2) for name, median in medians.items()},
        "speed_up": round(speed_up, 3),
    }


# ---- kernels ---------------------------------------------------------------------------------------------------------


def measure_kernels(stage: ModuleType, shapes: Sequence[str], batches: Sequence[int]) -> dict[str, Any]:
    """Every layer of every shape at every number of rows, at 4 bits and groups of 128; the last one's qkv in others."""
    quantization = stage_part(stage, "model_executor.layers.quantization")
    copied = copy_gb_per_s(COPY_REPEATS)
    torch.cuda.empty_cache()
    rows, deviation = [], 0.0
    for shape in shapes:
        for layer, (k, n) in layer_shapes(read_config(shape)).items():
            weight, dense = random_weight(quantization, k, n)
            timed = Products(stage, weight, dense)
            deviation = max(deviation, timed.largest_deviation())
            for num_rows in batches:
                found = kernel_figures(timed.num_bytes, copied, *timed.seconds(num_rows))
                rows.append({"shape": shape, "layer": layer, "k": k, "n": n, "rows": num_rows, **found})
    k, n = next(iter(layer_shapes(read_config(shapes[-1])).values()))
    formats = []
    for text in FORMATS.split(","):
        config = parse_config(text)
        timed = Products(stage, *random_weight(quantization, k, n, *config))
        for num_rows in FORMAT_ROWS:
            found = kernel_figures(timed.num_bytes, copied, *timed.seconds(num_rows))
            formats.append(
                {"bits": config[0], "group_size": config[1], "act_order": config[2], "rows": num_rows, **found}
            )
    return {
        "dtype": "bfloat16",
        "bits": 4,
        "group_size": DUMMY_GROUP,
        "copy_gb_per_s": round(copied, 1),
        "max_fused_rows": quantization.quantized_matmul.MAX_ROWS,
        "largest_relative_deviation": float(f"{deviation:.2g}"),
        "rows": rows,
        "formats": {"shape": shapes[-1], "k": k, "n": n, "rows": formats},
    }


def random_weight(
    quantization: ModuleType,
    num_inputs: int,
    num_outputs: int,
    bits: int = 4,
    group_size: int = DUMMY_GROUP,
    act_order: bool = False,
) -> tuple[Any, torch.Tensor]:
    """Random codes, scales and zero points in the form that the kernels read, and what they stand for: float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    num_groups = num_inputs // group_size
    options: dict[str, Any] = {"device": "cuda", "generator": generator}
    codes = torch.randint(0, 2**bits, (num_outputs, num_inputs), dtype=torch.uint8, **options)
    zeros = torch.randint(0, 2**bits, (num_groups, num_outputs), dtype=torch.uint8, **options)
    scales = (torch.rand(num_groups, num_outputs, **options) * 0.01 + 0.001).half()
    dense = codes.float().unflatten(1, (num_groups, -1)).sub_(zeros.T[..., None]).mul_(scales.T[..., None]).flatten(1)
    order = torch.randperm(num_inputs, **options) if act_order else None
    weight = quantization.PackedWeight(codes, quantization.pack(zeros, bits, dim=1), scales, order, bits)
    return weight, weight.dequantize(torch.float32) if act_order else dense


class Products:
    """The products of one matrix, packed and in bfloat16, each in so many copies that no cache holds them."""

    def __init__(self, stage: ModuleType, weight: Any, dense: torch.Tensor) -> None:
        self.matvec = stage_part(stage, "model_executor.layers.fused").matvec
        self.kernels = stage_part(stage, "model_executor.layers.quantized_matmul")
        self.dense = dense
        self.num_bytes = sum(p.nbytes for p in weight.parameters())
        self.packed = [weight, *(copy.deepcopy(weight) for _ in range(COLD_BYTES // self.num_bytes))]
        matrix = dense.bfloat16()
        self.matrices = [matrix, *(matrix.clone() for _ in range(COLD_BYTES // matrix.nbytes))]

    def largest_deviation(self) -> float:
        """Of the kernels' products from those in double precision, relative to the largest."""
        worst = 0.0
        for num_rows in (1, 2, 16, 33):
            x = torch.randn(num_rows, self.dense.shape[1], device="cuda", dtype=torch.bfloat16)
            expected = x.double() @ self.dense.double().T
            found = self.packed[0](x, None).double()
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
        return worst

    def seconds(self, num_rows: int) -> tuple[float | None, float | None, float]:
        """(unpacked in registers, unpacked to memory and multiplied, the product in bfloat16); None: not timed."""
        x = torch.randn(num_rows, self.dense.shape[1], device="cuda", dtype=torch.bfloat16)

        def sorted_x(weight: Any) -> torch.Tensor:  # what act-order costs, as in QuantizedWeight.forward
            return x if weight.order is None else x[:, weight.order]

        fused = unpacked = None
        if num_rows <= 2 * self.kernels.MAX_ROWS:
            fused = graph_seconds(lambda weight: self.kernels.matmul(sorted_x(weight), weight, None), self.packed)
        if num_rows >= BOTH_PATHS:
            unpacked = graph_seconds(
                lambda weight: F.linear(sorted_x(weight), self.kernels.dequantize(weight, x.dtype)), self.packed[:20]
            )
        if num_rows == 1:
            return fused, unpacked, graph_seconds(lambda matrix: self.matvec(x, matrix, None), self.matrices)
        return fused, unpacked, graph_seconds(lambda matrix: F.linear(x, matrix), self.matrices)


def graph_seconds(call: Callable[[Any], object], weights: Sequence[Any]) -> float:
    """Median time of a call in a CUDA graph that goes through all weights, at least twenty calls."""
    calls = [weights[i % len(weights)] for i in range(max(len(weights), 20))]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles what must be compiled
        for weight in calls[:3]:
            call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in calls:
            call(weight)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def kernel_figures(
    num_bytes: int, copied: float, fused: float | None, unpacked: float | None, bf16: float
) -> dict[str, Any]:
    """One product, from seconds; `copied` is what a copy moves in GB/s. The share is that of the packed weight's bytes;
    the speed-up that of the faster of the two ways over bfloat16."""
    known = [seconds for seconds in (fused, unpacked) if seconds is not None]
    return {
        "fused_us": None if fused is None else round(1e6 * fused, 2),
        "unpacked_us": None if unpacked is None else round(1e6 * unpacked, 2),
        "bf16_us": round(1e6 * bf16, 2),
        "share_of_copy": None if fused is None else round(num_bytes / fused / 1e9 / copied, 3),
        "speed_up": round(bf16 / min(known), 3),
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    if quality := figures.get("quality"):
        console.print(
            f"{quality['model']}, {quality['tokens']:,} tokens of {quality['text']}: perplexity "
            f"{quality['perplexity']:.4f}; by how much quantised weights are above that, in %"
        )
        table = Table(
            "bits", "group", "act-order", "MiB", "RTN", "GPTQ", "of each seed", "GPTQ / RTN", "of KL", "layers"
        )
        for row in quality["rows"]:
            names = (str(row["bits"]), str(row["group_size"]), "yes" if row["act_order"] else "no")
            seeds = " ".join(f"{100 * value:.3f}" for value in row["gptq_excess"])
            table.add_row(
                *names, f"{row['bytes'] / 2**20:.2f}", f"{100 * row['rtn_excess']:.3f}",
                f"{100 * row['gptq_excess_p50']:.3f}", seeds,
                "–" if row["excess_ratio"] is None else f"{row['excess_ratio']:.2f}",
                f"{row['divergence_ratio']:.2f}", f"{row['layer_error_ratio_p50']:.2f}",
            )  # fmt: skip
        console.print(table)
    if memory := figures.get("memory"):
        table = Table("MiB", "", "quantised layers", "all weights")
        for shape, row in memory["rows"].items():
            for name, found in row.items():
                table.add_row(shape, name, *(f"{found[key] / 2**20:,.1f}" for key in ("quantised", "total")))
        console.print(table)
    if decode := figures.get("decode"):
        table = Table("decode", "batch", "bf16, ms", "gptq, ms", "bf16, tokens/s", "gptq, tokens/s", "speed-up")
        for shape, row in decode["rows"].items():
            for batch, found in row["batches"].items():
                times = (f"{found[f'{name}_step_ms']:,.2f}" for name in ("bf16", "gptq"))
                speeds = (f"{found[f'{name}_tokens_per_s']:,.1f}" for name in ("bf16", "gptq"))
                table.add_row(shape, batch, *times, *speeds, f"{found['speed_up']:.2f}")
        console.print(table)
    if kernels := figures.get("kernels"):
        console.print(f"a copy moves {kernels['copy_gb_per_s']:,.0f} GB/s; microseconds")
        table = Table("shape", "layer", "K", "N", "rows", "fused", "unpacked", "bf16", "share of the copy", "speed-up")
        for row in kernels["rows"]:
            times = (row[f"{name}_us"] for name in ("fused", "unpacked", "bf16"))
            share = row["share_of_copy"]
            table.add_row(
                row["shape"], row["layer"], str(row["k"]), str(row["n"]), str(row["rows"]),
                *("–" if found is None else f"{found:,.1f}" for found in times),
                "–" if share is None else f"{share:.2f}", f"{row['speed_up']:.2f}",
            )  # fmt: skip
        console.print(table)
        formats = kernels["formats"]
        console.print(f"{formats['shape']}, {formats['k']} x {formats['n']}, in other formats")
        table = Table("bits", "group", "act-order", "rows", "fused", "share of the copy", "speed-up")
        for row in formats["rows"]:
            table.add_row(
                str(row["bits"]), str(row["group_size"]), "yes" if row["act_order"] else "no", str(row["rows"]),
                f"{row['fused_us']:,.1f}", f"{row['share_of_copy']:.2f}", f"{row['speed_up']:.2f}",
            )  # fmt: skip
        console.print(table)
        console.print(f"largest deviation, relative: {kernels['largest_relative_deviation']:.1e}")


def main(argv: list[str] | None = None) -> int:
    return run_script(make_parser(), argv, measure, show)


if __name__ == "__main__":
    sys.exit(main())
