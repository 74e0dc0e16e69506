"""Makes the embedded model: its tokenizer, its training text, its weights.

    python -m folovllm.models.train_tiny --device cuda          # the committed checkpoint: minutes on one H200
    python -m folovllm.models.train_tiny --quick --out /tmp/x   # the same path, small, in minutes on two CPU cores

Everything is seeded: the tokenizer and every document are the same on every machine; the weights differ between
machines only by the rounding of their arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from folovllm.models.documents import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, OTHER_WORDS, document

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results"
ANSWER_BIT = 1 << 15  # set on the ids of answer tokens in the packed rows; ids need 11 bits


@dataclass(frozen=True)
class Phase:
    """`rows` x `length` tokens make a batch; `tokens` of such rows are made beforehand and used again and again.
    The phase takes `steps` steps, in which the schedule of the learning rate moves on by `share`."""

    length: int
    rows: int
    tokens: int
    steps: int
    share: float


@dataclass(frozen=True)
class Recipe:
    """The numbers of one training run. Looking facts up is learned on short rows, where there is less to confuse, and
    in many small steps; the long rows then carry it to 4,096 positions."""

    phases: tuple[Phase, ...] = (Phase(1024, 32, 100_000_000, 8_000, 0.4), Phase(4096, 16, 250_000_000, 6_481, 0.6))
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.05
    answer_weight: float = 10.0
    clip: float = 1.0
    seed: int = 0


QUICK = Recipe(phases=(Phase(128, 4, 100_000, 30, 0.7), Phase(512, 1, 100_000, 10, 0.3)), warmup=10)
MODEL: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    bos_token_id=None,
)


def make_tokenizer(out: Path, seed: int, documents: int = 6000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens, learned from the training documents; written to `out`. Any text round-trips."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, IM_START, IM_END]
    trainer = BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for number in range(documents):
            for text, _ in document(f"{seed}/tokenizer/{number}"):
                for special in specials:
                    text = text.replace(special, "\n")
                yield text
        yield " ".join(OTHER_WORDS * 100)

    bpe.train_from_iterator(texts(), trainer)
    if bpe.get_vocab_size() != MODEL["vocab_size"]:
        raise RuntimeError(f"the text has only {bpe.get_vocab_size()} tokens to learn, not {MODEL['vocab_size']}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=specials,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def encoded(seed: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a document, uint16, with the bit of answer tokens set."""
    pieces = document(seed)
    encodings = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
    ids = [np.array(e.ids, dtype=np.uint16) | (ANSWER_BIT * a) for e, (_, a) in zip(encodings, pieces, strict=True)]
    return np.concatenate(ids)


def packed_rows(shard: int, tokenizer_file: str, seed: int, length: int, rows: int) -> np.ndarray:
    """uint16 [rows, length + 1] of documents one after another. A row begins with the start of a document, every second
    one with the end-of-text token before it. A document that does not fit is begun at the end of the row and given
    whole in the next, so that no question loses its answer; only what is longer than a row is cut."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    packed = np.zeros((rows, length + 1), dtype=np.uint16)  # 0 is the end-of-text token
    number, carried = 0, np.empty(0, dtype=np.uint16)
    for index, row in enumerate(packed):
        first = filled = index % 2
        while filled < len(row):
            if not len(carried):
                carried = encoded(f"{seed}/{length}/{shard}/{number}", tokenizer)
                number += 1
            piece = carried[: len(row) - filled]
            row[filled : filled + len(piece)] = piece
            if len(piece) == len(carried) or filled == first:
                carried = carried[:0]
            filled += len(piece)
    return packed


def make_data(out: Path, seed: int, phase: Phase, workers: int) -> Tensor:
    """int32 [N, length + 1]: the rows of a phase, made by `workers` processes."""
    per_shard = 64 * max(1, 4096 // phase.length) if phase.tokens > 10_000_000 else 16
    shards = max(1, phase.tokens // (per_shard * (phase.length + 1)))
    make = partial(
        packed_rows, tokenizer_file=str(out / "tokenizer.json"), seed=seed, length=phase.length, rows=per_shard
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(make, range(shards), chunksize=1)
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def make_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(**MODEL, eos_token_id=[0, 2], pad_token_id=0)
    return Qwen3ForCausalLM(config)


def weighted_loss(model: Qwen3ForCausalLM, rows: Tensor, answer_weight: float) -> tuple[Tensor, Tensor]:
    """(the weighted loss to train on, the plain mean loss) of rows [B, length + 1], in nats a token."""
    inputs, targets = rows[:, :-1] & (ANSWER_BIT - 1), rows[:, 1:] & (ANSWER_BIT - 1)
    # The mask given as a mapping tells transformers to leave masking to is_causal: the flash kernel, no mask tensor.
    hidden = model.model(input_ids=inputs, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
    logits = F.linear(hidden, model.lm_head.weight)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    weights = 1.0 + (answer_weight - 1.0) * ((rows[:, 1:] & ANSWER_BIT) != 0).flatten()
    return (losses * weights).sum() / weights.sum(), losses.detach().mean()


def schedule(steps: list[int], recipe: Recipe) -> float:
    """How far training is, 0 to 1, after so many steps in each phase."""
    if all(done >= phase.steps for done, phase in zip(steps, recipe.phases, strict=True)):
        return 1.0
    return sum(phase.share * done / phase.steps for done, phase in zip(steps, recipe.phases, strict=True))


def learning_rate(step: int, progress: float, recipe: Recipe) -> float:
    """Linear warm-up times half a cosine, down to 1 % of the peak."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * cosine * min(1.0, (step + 1) / recipe.warmup)


class Batches:
    """Endless shuffled batches from the rows of one phase."""

    def __init__(self, data: Tensor, rows: int, seed: int) -> None:
        self.data, self.rows = data, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        if len(self.order) < self.rows:
            self.order = torch.cat([self.order, torch.randperm(len(self.data), generator=self.generator)])
        chosen, self.order = self.order[: self.rows], self.order[self.rows :]
        return self.data[chosen.to(self.data.device)].long()


def make_optimizer(model: Qwen3ForCausalLM, recipe: Recipe, device: str) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )


def train(
    model: Qwen3ForCausalLM, data: list[Tensor], recipe: Recipe, device: str, seconds: float | None
) -> tuple[list[dict[str, float]], list[int]]:
    """Trains in place; returns the curve and the number of steps of each phase. With `seconds`, the schedule ends at
    that time if the steps do not end it sooner."""
    torch.nn.Module.to(model, device).train()
    batches = [Batches(d.to(device), p.rows, recipe.seed) for d, p in zip(data, recipe.phases, strict=True)]
    optimizer = make_optimizer(model, recipe, device)
    loss_of = torch.compile(weighted_loss, dynamic=False) if device == "cuda" else weighted_loss
    curve: list[dict[str, float]] = []
    steps = [0] * len(batches)
    started, progress, total = time.perf_counter(), 0.0, sum(phase.steps for phase in recipe.phases)
    while progress < 1.0:
        now_in = 0 if progress < recipe.phases[0].share else len(batches) - 1
        rate = learning_rate(sum(steps), progress, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss, plain = loss_of(model, batches[now_in].next(), recipe.answer_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps[now_in] += 1
        step, elapsed = sum(steps), time.perf_counter() - started
        progress = max(schedule(steps, recipe), elapsed / seconds if seconds else 0.0)
        if step % max(1, total // 150) == 0 or progress >= 1.0:
            point = {"step": step, "phase": now_in, "loss": plain.item(), "weighted_loss": loss.item(), "lr": rate}
            curve.append({**point, "seconds": elapsed})
            print(f"step {step}/{total} loss {plain.item():.4f} weighted {loss.item():.4f} {elapsed:.0f} s", flush=True)
    return curve, steps


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """The checkpoint in bf16, with the defaults for generation."""
    torch.nn.Module.to(model, "cpu", torch.bfloat16).eval()
    model.generation_config = GenerationConfig(eos_token_id=[0, 2], pad_token_id=0, do_sample=True, temperature=0.7)
    model.save_pretrained(out)


def plot(curve: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["loss"] for point in curve], label="all tokens")
    axes.plot(steps, [point["weighted_loss"] for point in curve], label="answers weighted", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log", title="Training of the embedded model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the embedded story model.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a short run that shows the path, not a usable model")
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="the checkpoint folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the curve and the record go")
    parser.add_argument("--seconds", type=float, help="end the schedule at this time even if steps are left")
    args = parser.parse_args(argv)
    recipe = QUICK if args.quick else Recipe()
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    make_tokenizer(args.out, recipe.seed, 300 if args.quick else 6000)
    data = [make_data(args.out, recipe.seed, phase, os.cpu_count() or 1) for phase in recipe.phases]
    made = time.perf_counter() - started
    print(f"{sum(d.numel() for d in data):,} tokens in {made:.0f} s", flush=True)
    model = make_model(recipe.seed)
    parameters = sum(p.numel() for p in model.parameters())
    torch.set_float32_matmul_precision("high")
    curve, steps = train(model, data, recipe, args.device, args.seconds)
    save(model, args.out)
    record: dict[str, Any] = {
        "command": "python -m folovllm.models.train_tiny " + " ".join(sys.argv[1:] if argv is None else argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": asdict(recipe),
        "steps": steps,
        "parameters": parameters,
        "unique_tokens": [d.numel() for d in data],
        "tokens_seen": sum(n * p.rows * p.length for n, p in zip(steps, recipe.phases, strict=True)),
        "data_seconds": made,
        "train_seconds": curve[-1]["seconds"],
        "final_loss": sum(p["loss"] for p in curve[-20:]) / len(curve[-20:]),
        "curve": curve,
    }
    (args.results / "tiny_training.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curve, args.results / "tiny_training.png")
    print(
        f"{parameters:,} parameters, {sum(steps)} steps, final loss {record['final_loss']:.4f}, written to {args.out}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
