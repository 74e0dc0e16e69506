"""What the project's first documents promised their readers, as a table.

Every snippet of the quick reference and of the mini-vLLM readme stands here as it was printed (`minivllm` is `folovllm`
now), with what it must do in which stage: run, or give the one sentence that says what to write instead. A stage that
brings an option adds nothing here: its row already says from when on it has to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RUNS = ""  # in place of the error that a snippet must give


@dataclass(frozen=True)
class Snippet:
    """Some code of a user.

    Attributes:
        code: as printed; `llm`, `prompt`, `prompts` and `params` exist where the text around it made them.
        outcomes: {stage: what happens from there on}, oldest first: RUNS, or a regular expression that must match
            "TypeError: the message". Needs an entry for m0.
        needs_cuda: skip it where there is none.
    """

    name: str
    code: str
    outcomes: dict[str, str]
    needs_cuda: bool = False

    def outcome(self, stage_number: int) -> str:
        """The newest entry that is not newer than the stage."""
        return [outcome for since, outcome in self.outcomes.items() if int(since[1:]) <= stage_number][-1]

    def prepare(self, model: Path) -> str:
        """The code with a model that is at hand and few tokens."""
        code = re.sub(r'model="[^"]*"', lambda _: f"model={str(model)!r}", self.code)
        return re.sub(r"max_tokens=\d+", "max_tokens=8", code)


@dataclass(frozen=True)
class Command:
    """A line for the shell, and the first stage with which it must work."""

    line: str
    since: str


def no_option(name: str) -> str:
    return rf"^TypeError: \w+ has no option '{name}'"


def option(name: str, value: str, since: str) -> Snippet:
    """An engine option of that name and value: unknown until a stage brings it."""
    outcomes = {"m0": RUNS} if since == "m0" else {"m0": no_option(name), since: RUNS}
    return Snippet(f"option {name}={value}", f"EngineConfig({name}={value})", outcomes)


def renamed(name: str, value: str, ours: str, since: str) -> Snippet:
    """An engine option that is called otherwise here, and exists since a stage."""
    outcomes = {"m0": no_option(name), since: rf"{no_option(name)}; did you mean {ours}\?$"}
    return Snippet(f"option {name}={value}", f"EngineConfig({name}={value})", outcomes)


QUICK_REFERENCE = [
    Snippet(
        "one minute",
        """
from folovllm import LLM
llm = LLM(model="Qwen/Qwen2.5-0.6B")
output = llm.generate("你好")[0]
print(output.text)
""",
        {"m0": RUNS},
    ),
    Snippet(
        "config with everything",
        """
from folovllm import LLM
from folovllm.config import EngineConfig

config = EngineConfig(
    # M3: Paged KV
    enable_paged_kv=True,
    block_size=16,

    # M4: Flash Attention
    attention_backend="flash",

    # M5: Chunked Prefill
    enable_chunked_prefill=True,
    max_chunk_size=512,

    # M6: Prefix Caching
    enable_prefix_caching=True,

    # M7: GPTQ
    quantization="gptq"
)
""",
        {
            "m0": no_option("enable_paged_kv"),
            "m3": no_option("enable_chunked_prefill"),
            "m5": no_option("enable_prefix_caching"),
            "m6": no_option("quantization"),
            "m7": RUNS,
        },
    ),
    Snippet(
        "engine from a config",
        """
from folovllm import LLM
from folovllm.config import EngineConfig
config = EngineConfig(max_model_len=2048)
llm = LLM(model="Qwen/Qwen2.5-0.6B", engine_config=config)
assert llm.config.max_model_len == 2048
""",
        {"m0": RUNS},
    ),
    Snippet(
        "sampling parameters",
        """
from folovllm.sampling_params import SamplingParams

params = SamplingParams(
    temperature=0.7,
    top_p=0.9,          # nucleus sampling
    top_k=50,           # top-k sampling
    max_tokens=100,
    repetition_penalty=1.1,
)

output = llm.generate(prompt, params)
""",
        {"m0": no_option("top_p"), "m1": RUNS},
    ),
    Snippet("sampling top_p", "SamplingParams(top_p=0.9)", {"m0": no_option("top_p"), "m1": RUNS}),
    Snippet("sampling top_k", "SamplingParams(top_k=50)", {"m0": no_option("top_k"), "m1": RUNS}),
    Snippet(
        "sampling repetition_penalty",
        "SamplingParams(repetition_penalty=1.1)",
        {"m0": no_option("repetition_penalty"), "m1": RUNS},
    ),
    Snippet(
        "batch",
        """
prompts = ["问题1", "问题2", "问题3"]
outputs = llm.generate(prompts, params)

for i, output in enumerate(outputs):
    print(f"Prompt {i}: {output.prompt}")
    print(f"Output {i}: {output.text}")
""",
        {"m0": RUNS},
    ),
    Snippet(
        "high throughput",
        """
config = EngineConfig(
    enable_paged_kv=True,
    max_batch_size=64,
    attention_backend="flash",
    max_chunk_size=1024,
)
""",
        {"m0": no_option("enable_paged_kv"), "m3": r"no option 'max_batch_size'; did you mean max_num_seqs\?$"},
    ),
    Snippet(
        "low latency",
        """
config = EngineConfig(
    attention_backend="flash",
    enable_chunked_prefill=True,
    max_chunk_size=256,
    enable_prefix_caching=True,
    max_batch_size=4,
)
""",
        {
            "m0": no_option("enable_chunked_prefill"),
            "m5": no_option("enable_prefix_caching"),
            "m6": r"no option 'max_batch_size'; did you mean max_num_seqs\?$",
        },
    ),
    Snippet(
        "little memory",
        """
config = EngineConfig(
    enable_paged_kv=True,
    block_size=16,
    quantization="gptq",
    max_model_len=2048,
)
""",
        {"m0": no_option("enable_paged_kv"), "m3": no_option("quantization"), "m7": RUNS},
    ),
    option("enable_paged_kv", "True", since="m3"),
    option("block_size", "16", since="m3"),
    Snippet(
        "option attention_backend='flash'",
        'EngineConfig(attention_backend="flash")',
        {"m0": r"^ValueError: attention_backend must be .*'flash'", "m4": RUNS},
    ),
    option("enable_chunked_prefill", "True", since="m5"),
    option("max_chunk_size", "512", since="m5"),
    option("enable_prefix_caching", "True", since="m6"),
    option("quantization", '"gptq"', since="m7"),
    option("max_model_len", "2048", since="m0"),
    renamed("max_batch_size", "64", "max_num_seqs", since="m2"),
    Snippet(
        "logging",
        """
import logging
logging.basicConfig(level=logging.DEBUG)

llm = LLM(model="...", log_level="DEBUG")
""",
        {"m0": RUNS},
    ),
    Snippet(
        "profiler",
        """
import torch.profiler as profiler

with profiler.profile(activities=[
    profiler.ProfilerActivity.CPU,
    profiler.ProfilerActivity.CUDA
]) as prof:
    llm.generate(prompt)

print(prof.key_averages().table())
""",
        {"m0": RUNS},
    ),
    Snippet(
        "peak memory",
        """
import torch

torch.cuda.reset_peak_memory_stats()
llm.generate(prompt)
peak_mem = torch.cuda.max_memory_allocated() / 1e9
print(f"Peak memory: {peak_mem:.2f} GB")
""",
        {"m0": RUNS},
        needs_cuda=True,
    ),
    Snippet(
        "data structures",
        """
from dataclasses import fields
from folovllm.request import Request, Sequence, SequenceStatus

assert {"request_id", "prompt", "sampling_params", "arrival_time"} <= {field.name for field in fields(Request)}
assert {"seq_id", "request_id", "token_ids", "status"} <= {*dir(Sequence), *(field.name for field in fields(Sequence))}
SequenceStatus.WAITING, SequenceStatus.RUNNING
""",
        {"m0": RUNS},
    ),
]

README = [
    Snippet(
        "basic engine",
        """
from folovllm import LLM, SamplingParams

llm = LLM(
    model="meta-llama/Llama-2-7b-chat-hf",
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    gpu_memory_utilization=0.9
)
""",
        {"m0": no_option("max_num_seqs"), "m2": no_option("gpu_memory_utilization"), "m3": RUNS},
    ),
    Snippet(
        "basic generation",
        """
from folovllm import LLM, SamplingParams

prompts = [
    "Once upon a time",
    "The future of AI is",
    "In the deep learning era"
]

sampling_params = SamplingParams(
    temperature=0.7,
    max_tokens=128,
    ignore_eos=False
)

outputs = llm.generate(prompts, sampling_params)
""",
        {"m0": RUNS},
    ),
    Snippet(
        "basic printing",
        """
outputs = llm.generate(prompts, params)
for output in outputs:
    print(f"Prompt: {output['prompt']}")
    print(f"Generated: {output['text']}")
    print("-" * 50)
""",
        {"m0": r"^TypeError: .*write output\.prompt, not output\['prompt'\]$"},
    ),
    Snippet(
        "several GPUs",
        """
llm = LLM(
    model="meta-llama/Llama-2-70b-chat-hf",
    tensor_parallel_size=4,
    max_num_seqs=512,
    max_num_batched_tokens=16384,
    gpu_memory_utilization=0.85,
    enforce_eager=False,
    max_model_len=4096
)
""",
        {
            "m0": no_option("max_num_seqs"),
            "m2": no_option("gpu_memory_utilization"),
            "m3": no_option("enforce_eager"),
            "m4": r"^ValueError: tensor_parallel_size=4 is not supported",
        },
    ),
    Snippet(
        "creative sampling",
        """
sampling_params = SamplingParams(
    temperature=0.8,
    max_tokens=256,
    ignore_eos=True
)
outputs = llm.generate(prompts, sampling_params)
assert all(len(output.token_ids) == sampling_params.max_tokens for output in outputs)
""",
        {"m0": RUNS},
    ),
    Snippet(
        "streaming",
        """
for output in llm.generate(prompts, params):
    print(output['text'], end="", flush=True)
""",
        {"m0": r"^TypeError: .*write output\.text, not output\['text'\]$"},
    ),
    Snippet(
        "streaming, as the hint has it",
        """
for output in llm.generate(prompts, params):
    print(output.text, end="", flush=True)
""",
        {"m0": RUNS},
    ),
    Snippet(
        "result: tokens",
        "llm.generate(prompt, params)[0]['tokens']",
        {"m0": r"^TypeError: .*output\.token_ids"},
    ),
    Snippet(
        "result: finished",
        "llm.generate(prompt, params)[0]['finished']",
        {"m0": r"^TypeError: .*write output\.finished, not output\['finished'\]$"},
    ),
    option("max_num_seqs", "512", since="m2"),
    option("max_num_batched_tokens", "16384", since="m2"),
    option("max_model_len", "4096", since="m0"),
    option("gpu_memory_utilization", "0.9", since="m3"),
    option("tensor_parallel_size", "1", since="m0"),
    Snippet(
        "option tensor_parallel_size=8",
        "EngineConfig(tensor_parallel_size=8)",
        {"m0": r"^ValueError: tensor_parallel_size=8 is not supported"},
    ),
    option("enforce_eager", "False", since="m4"),
    renamed("kvcache_block_size", "256", "block_size", since="m3"),
    renamed("num_kvcache_blocks", "-1", "num_kv_blocks", since="m3"),
    Snippet("coldest temperature", "SamplingParams(temperature=1e-10, max_tokens=64)", {"m0": RUNS}),
    Snippet("hottest temperature", "SamplingParams(temperature=2.0, ignore_eos=False)", {"m0": RUNS}),
    Snippet(
        "small batches",
        """
llm = LLM(
    model="meta-llama/Llama-2-7b-chat-hf",
    max_num_seqs=128,
    max_num_batched_tokens=4096
)
""",
        {"m0": no_option("max_num_seqs"), "m2": RUNS},
    ),
    Snippet(
        "large batches",
        """
llm = LLM(
    model="meta-llama/Llama-2-7b-chat-hf",
    max_num_seqs=1024,
    max_num_batched_tokens=32768,
    gpu_memory_utilization=0.95
)
""",
        {"m0": no_option("max_num_seqs"), "m2": no_option("gpu_memory_utilization"), "m3": RUNS},
    ),
    Snippet(
        "limited memory",
        """
llm = LLM(
    model="meta-llama/Llama-2-7b-chat-hf",
    gpu_memory_utilization=0.6,
    num_kvcache_blocks=1000,
    kvcache_block_size=512
)
""",
        {
            "m0": no_option("gpu_memory_utilization"),
            "m3": r"no option 'num_kvcache_blocks'; did you mean num_kv_blocks\?$",
        },
    ),
]

COMMANDS = [
    Command("make format", since="m0"),
    Command("make lint", since="m0"),
    Command("make test", since="m0"),
    Command("make coverage", since="m0"),
    Command("python tests/benchmark/latency_test.py --model Qwen/Qwen2.5-0.6B", since="m1"),
    Command("python tests/benchmark/throughput_test.py --batch-size 16", since="m1"),
    Command("python tests/benchmark/compare.py --milestones m1,m2,m3", since="m1"),
    Command("python examples/basic_inference.py", since="m7"),
    Command("python examples/batch_inference.py", since="m7"),
    Command("python examples/few_shot.py", since="m7"),
]
