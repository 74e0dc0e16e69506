"""Every switch of the engine and of a request, and the engine driven by hand.

    python examples/advanced.py
    python examples/advanced.py --part settings            # or sampling, engine, stages, quantized
    python examples/advanced.py --model Qwen/Qwen3-0.6B --part sampling

Nearly all of these are at their defaults in a program that only wants text: None means "the largest sensible value that
fits here". The part `stages` turns the idea of each stage off again, and shows that the tokens stay the same.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from folovllm import LLM, TINY, EngineConfig, SamplingParams, lab
from folovllm.quantize import quantize

QUIET: dict[str, Any] = {"log_level": "WARNING"}
STORY = (
    "Mia had a red kite. On Friday, Mia took the red kite to the old mill. But then a cheeky goat grabbed the kite and "
    "ran away with it. A strong hunter heard her and came closer."
)
PROMPTS = [f"{STORY} Then", f"{STORY}\n\nQuestion: Where did Mia go?\nAnswer:", "Once upon a time"]


def settings(model: str) -> None:
    """Every option of the engine."""
    config = EngineConfig(
        model=model,  # a folder, or an id on the hub
        tokenizer=None,  # another folder or id for the tokenizer
        revision=None,  # on the hub: a branch, tag or commit
        dtype="float32",  # "auto" is the checkpoint's
        device="auto",  # CUDA if there is a GPU
        load_format="auto",  # "dummy": random weights, to measure a shape without its checkpoint
        seed=0,  # of requests that bring none
        log_level="WARNING",  # "INFO" tells what was chosen, and why
        max_model_len=1024,  # longest prompt plus output
        tensor_parallel_size=1,  # one device
        # the cache and the batch
        kv_cache_memory_bytes=32 * 2**20,  # None: what the device can spare
        gpu_memory_utilization=0.9,  # on a GPU: weights, activations and cache together
        enable_paged_kv=True,  # False: one row of max_model_len a sequence
        block_size=16,  # tokens of a block
        num_kv_blocks=None,  # a number of blocks, whatever memory there is
        max_num_seqs=8,  # sequences that run at once
        max_num_batched_tokens=512,  # tokens of a step: throughput against latency
        scheduling_policy="priority",  # or "fcfs", or "sjf": the shortest prompt first
        # speed
        attention_backend="auto",  # "flash", "paged" or "naive"
        async_scheduling=None,  # launch a decode step before the tokens of the one before are known; None: on CUDA
        enforce_eager=False,  # True: no CUDA graphs
        cuda_graph_sizes=None,  # batch sizes to record
        enable_chunked_prefill=True,  # False: a prompt is computed in one step
        max_chunk_size=128,  # tokens of one prompt in a step while others are there
        chunk_policy="dynamic",  # "fixed", or chunks such that a step lasts...
        target_step_time_ms=50,  # ...so long
        enable_prefix_caching=True,  # what begins alike is computed once
        quantization=None,  # "gptq" insists on a quantised checkpoint
    )
    with LLM(engine_config=config) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
        settled = llm.config  # no None is left where the engine had to choose
        print(f"{settled.num_kv_blocks} blocks of {settled.block_size} tokens, up to {settled.max_num_seqs} sequences")
        print("last text:", repr(outputs[-1].text))


def sampling(model: str) -> None:
    """Every parameter of a request."""
    seen: list[int] = []

    def watch(token_ids: list[int], logits: Tensor) -> Tensor:  # tokens of prompt and output so far
        seen.append(len(token_ids))
        return logits

    params = SamplingParams(
        n=2,  # continuations of one prompt: its blocks are shared, and copied on write
        temperature=0.9,  # 0 is greedy
        top_p=0.95,
        top_k=50,
        min_p=0.02,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.05,
        logit_bias={0: -100.0},  # token 0 is never drawn
        logits_processors=[watch],
        seed=7,  # the same draw every time, whoever shares the batch
        max_tokens=24,
        min_tokens=4,
        stop=["."],  # ends the text, and is cut off...
        include_stop_str_in_output=True,  # ...unless it is wanted
        stop_token_ids=[2],
        ignore_eos=False,
        skip_special_tokens=True,
        logprobs=2,
    )
    with LLM(model, **QUIET) as llm:
        print("the checkpoint suggests temperature", llm.get_default_sampling_params().temperature)
        (output,) = llm.generate("Once upon a time", params, use_tqdm=False)
    for completion in output.outputs:
        print(f"{completion.index}: {completion.text!r} ({completion.finish_reason}: {completion.stop_reason!r})")
    first = output.outputs[0].logprobs[0].values()
    print("first token:", ", ".join(f"{entry.decoded_token!r} {entry.logprob:.2f}" for entry in first))
    print(f"our function was asked {len(seen)} times")


def engine(model: str) -> None:
    """Requests added, stepped and aborted by hand; priorities, salts, statistics."""
    with LLM(model, max_num_seqs=2, scheduling_policy="priority", **QUIET) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=6)
        for name, priority in [("calm", 5), ("dull", 9), ("urgent", 0)]:
            llm.engine.add_request(name, f"This is {name}. Once upon a time", params, priority=priority)
        llm.engine.add_request("unwanted", "On Monday", params)
        llm.engine.abort_request("unwanted")
        finished: list[str] = []
        while llm.engine.has_unfinished_requests():
            finished += [output.request_id for output in llm.engine.step() if output.finished]
        print("finished in this order:", ", ".join(finished))

        steps = llm.engine.stats.steps
        print("phases:", " ".join(step.phase for step in steps), "| tokens:", [step.num_tokens for step in steps])
        with tempfile.TemporaryDirectory() as folder:
            llm.engine.stats.to_trace(Path(folder) / "trace.json")  # opens in ui.perfetto.dev

        for salt in ("alice", "alice", "bob"):  # who has another salt finds nothing of yours
            (output,) = llm.generate(STORY, params, cache_salt=salt, use_tqdm=False)
            print(f"{salt}: {output.num_cached_tokens} of {len(output.prompt_token_ids)} tokens found")
        print("cache:", lab.render_prefix_cache(llm.engine.core.scheduler.kv_cache_manager).splitlines()[0])
        print("forgotten:", llm.reset_prefix_cache())


def stages(model: str) -> None:
    """Each stage's idea turned off in turn: other steps, the same tokens."""
    switches: dict[str, dict[str, Any]] = {
        "all on": {},
        "m2 off": {"max_num_seqs": 1},
        "m3 off": {"enable_paged_kv": False},
        "m4 off": {"attention_backend": "naive", "enforce_eager": True},
        "m5 off": {"enable_chunked_prefill": False},
        "m6 off": {"enable_prefix_caching": False},
        "few blocks": {"num_kv_blocks": 9},
    }
    common: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_chunk_size": 24,
        "kv_cache_memory_bytes": 32 * 2**20,
    }
    expected = None
    for name, options in switches.items():
        with LLM(model, **common, **options, **QUIET) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
            steps = llm.engine.stats.steps
        tokens = [output.token_ids for output in outputs]
        expected = expected or tokens
        num_computed = sum(step.num_tokens for step in steps)
        num_slots = max(step.kv_slots_allocated for step in steps)
        print(
            f"{name:<10} {len(steps):>3} steps, {num_computed:>3} tokens computed, at most {num_slots:>3} slots held, "
            f"{steps[-1].num_preemptions} preempted, the same tokens: {tokens == expected}"
        )


def quantized(model: str) -> None:
    """Weights of four bits: a copy of the checkpoint is made, and loaded like any other."""
    with tempfile.TemporaryDirectory() as folder:
        # In earnest: groups of 128, and 64 samples of 512 tokens or more.
        options: dict[str, Any] = {"group_size": 32, "num_samples": 4, "sample_length": 64}
        report = quantize(model, f"{folder}/4bit", method="gptq", use_tqdm=False, **options, **QUIET)
        print(*str(report).splitlines()[-2:], sep="\n")
        with LLM(f"{folder}/4bit", quantization="gptq", **QUIET) as llm:
            (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
        print("text:", repr(output.text))


PARTS = {part.__name__: part for part in (settings, sampling, engine, stages, quantized)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Every switch.")
    parser.add_argument("--part", choices=PARTS, help="only this one (default: all)")
    parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
    args = parser.parse_args()
    for name in [args.part] if args.part else PARTS:
        print(f"== {name}: {PARTS[name].__doc__}")
        PARTS[name](args.model)
        print()
