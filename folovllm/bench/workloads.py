"""The workloads that every figure in this project is measured on, defined once and as plain data.

A workload is a list of requests: token ids, lengths, sampling settings and arrival steps, all drawn with a fixed seed.
It depends on the vocabulary size and the device only, so that two stages, or two machines, are given the same work;
a model too short for a workload is refused instead of being handed an easier one. Only `decode_growth` adapts: it is
defined as "up to 1,024 tokens".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkloadRequest:
    """One request, before it meets an engine.

    `arrival_step` counts engine steps from the start of the run. `follows` is the index of an earlier request of the
    same workload: this one is then the next turn of that conversation, is sent once that one has finished, and its
    prompt is that request's whole prompt, then its output, then `prompt_token_ids`.
    """

    prompt_token_ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = True
    n: int = 1
    arrival_step: int = 0
    follows: int | None = None


@dataclass(frozen=True)
class Workload:
    """A named list of requests; `description` is one line for tables and captions."""

    name: str
    description: str
    requests: list[WorkloadRequest]

    @property
    def max_output_tokens(self) -> int:
        """Tokens generated if no request stops early: exact, since every request here ignores EOS."""
        return sum(request.max_tokens * request.n for request in self.requests)

    def lengths(self) -> list[int]:
        """Prompt plus output of each request in tokens, with the whole conversation so far for one that follows."""
        lengths: list[int] = []
        for request in self.requests:
            before = 0 if request.follows is None else lengths[request.follows]
            lengths.append(before + len(request.prompt_token_ids) + request.max_tokens)
        return lengths


@dataclass(frozen=True)
class _Draw:
    """What a workload may depend on, and its one source of randomness."""

    vocab_size: int
    max_model_len: int
    cuda: bool
    rng: random.Random
    num_requests: int | None

    def tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(length)]

    def size(self, cpu: int, cuda: int) -> int:
        return cuda if self.cuda else cpu


def _single(draw: _Draw) -> Workload:
    return Workload("single", "one request, prompt 128, output 128", [WorkloadRequest(draw.tokens(128), 128)])


def _decode_growth(draw: _Draw) -> Workload:
    prompt = draw.tokens(16)
    output = max(1, min(1024, draw.max_model_len - len(prompt)))
    return Workload("decode_growth", f"one request, prompt 16, output {output:,}", [WorkloadRequest(prompt, output)])


def _uniform(draw: _Draw) -> Workload:
    count = draw.num_requests or draw.size(cpu=16, cuda=256)
    requests = [WorkloadRequest(draw.tokens(128), 128) for _ in range(count)]
    return Workload("uniform", f"{count} requests, prompt 128, output 128", requests)


def _mixed(draw: _Draw) -> Workload:
    """The throughput benchmark that small engines publish. Its order of draws is part of its definition: all prompts
    first (each its length, then its ids, drawn from 0…10,000 whatever the vocabulary), then all output lengths. With
    seed 0 that makes 142,827 prompt tokens and 133,966 output tokens."""
    return _mixed_lengths(draw, "mixed", count=256, prompt=(100, 1024), output=(100, 1024))


def _mixed_cpu(draw: _Draw) -> Workload:
    return _mixed_lengths(draw, "mixed_cpu", count=64, prompt=(32, 256), output=(16, 128))


def _mixed_lengths(draw: _Draw, name: str, count: int, prompt: tuple[int, int], output: tuple[int, int]) -> Workload:
    rng = draw.rng
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(*prompt))] for _ in range(count)]
    outputs = [rng.randint(*output) for _ in range(count)]
    requests = [
        WorkloadRequest([token % draw.vocab_size for token in tokens], max_tokens, temperature=0.6)
        for tokens, max_tokens in zip(prompts, outputs, strict=True)
    ]
    spans = f"prompts {prompt[0]}–{prompt[1]:,}, outputs {output[0]}–{output[1]:,}"
    return Workload(name, f"{count} requests, {spans}, temperature 0.6", requests)


def _long_arrivals(draw: _Draw) -> Workload:
    decodes, long_prompt = draw.size(cpu=16, cuda=64), draw.size(cpu=1500, cuda=8192)
    arrivals, every = draw.size(cpu=4, cuda=8), 50
    steady = (arrivals + 1) * every  # the decodes outlive the last long prompt
    requests = [WorkloadRequest(draw.tokens(64), steady) for _ in range(decodes)]
    for step in range(every, steady, every):
        requests.append(WorkloadRequest(draw.tokens(long_prompt), 16, arrival_step=step))
        requests += [WorkloadRequest(draw.tokens(32), 16, arrival_step=step) for _ in range(2)]
    description = (
        f"{decodes} decodes; every {every} steps a prompt of {long_prompt:,} and two short ones right behind it"
    )
    return Workload("long_arrivals", description, requests)


def _shared_prefix(draw: _Draw) -> Workload:
    prefix = draw.tokens(draw.size(cpu=2048, cuda=32_768))
    requests = [WorkloadRequest(prefix + draw.tokens(32), 16) for _ in range(8)]
    return Workload("shared_prefix", f"8 requests: {len(prefix):,} tokens in common, 32 of their own", requests)


def _few_shot(draw: _Draw) -> Workload:
    """A tree of prefixes, three deep: one instruction, a set of examples for each task, a question for each request."""
    instruction = draw.tokens(64)
    tasks = [draw.tokens(8 * 48) for _ in range(4)]
    requests = [WorkloadRequest(instruction + tasks[i % 4] + draw.tokens(32), 16) for i in range(32)]
    description = "32 questions of 32 tokens over 4 tasks: 64 tokens in common, then 8 examples of 48 for each task"
    return Workload("few_shot", description, requests)


def _multi_turn(draw: _Draw) -> Workload:
    conversations, turns = draw.size(cpu=4, cuda=32), 4
    system = draw.tokens(128)
    requests = [WorkloadRequest(system + draw.tokens(32), 32) for _ in range(conversations)]
    for index in range(conversations * (turns - 1)):
        requests.append(WorkloadRequest(draw.tokens(32), 32, follows=index))
    description = f"{conversations} conversations of {turns} turns: 128 tokens in common, 32 in and 32 out a turn"
    return Workload("multi_turn", description, requests)


def _parallel(draw: _Draw) -> Workload:
    request = WorkloadRequest(draw.tokens(512), 32, temperature=1.0, seed=0, n=8)
    return Workload("parallel", "8 samples of one prompt of 512, 32 tokens each", [request])


_BUILDERS: dict[str, Callable[[_Draw], Workload]] = {
    "single": _single,
    "decode_growth": _decode_growth,
    "uniform": _uniform,
    "mixed": _mixed,
    "mixed_cpu": _mixed_cpu,
    "long_arrivals": _long_arrivals,
    "shared_prefix": _shared_prefix,
    "few_shot": _few_shot,
    "multi_turn": _multi_turn,
    "parallel": _parallel,
}

WORKLOADS: tuple[str, ...] = tuple(_BUILDERS)


def make_workload(
    name: str, *, vocab_size: int, max_model_len: int, device: str = "cpu", num_requests: int | None = None
) -> Workload:
    """Draws the workload `name`; equal arguments give equal requests.

    `device` chooses between the sizes for a CPU and those for a GPU ("cuda", "cuda:0", …); of `uniform` another number
    of requests can be asked for. Raises ValueError for an unknown name, for a number of requests where it is fixed, and
    for a model whose `max_model_len` (in tokens) is shorter than the longest request.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown workload {name!r}: choose one of {', '.join(WORKLOADS)}")
    if num_requests is not None and (name != "uniform" or num_requests < 1):
        raise ValueError(f"a number of requests, 1 or more, goes with the workload uniform; got {num_requests}, {name}")
    cuda = device.startswith("cuda")
    workload = _BUILDERS[name](_Draw(vocab_size, max_model_len, cuda, random.Random(0), num_requests))
    longest = max(workload.lengths())
    if longest > max_model_len:
        raise ValueError(
            f"workload {name!r} needs max_model_len >= {longest:,}, and this model has {max_model_len:,}: "
            "choose a shorter workload or a model with more positions"
        )
    return workload
