"""Workloads are the yardstick: the same for everyone, every time, and in the sizes that the design states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.bench.workloads import WORKLOADS, Workload, make_workload

DEVICES = ("cpu", "cuda")


def make(name: str, device: str = "cpu", vocab_size: int = 2048, max_model_len: int = 40_960) -> Workload:
    return make_workload(name, vocab_size=vocab_size, max_model_len=max_model_len, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_seeded_and_in_bounds(name: str, device: str) -> None:
    workload = make(name, device)
    assert workload == make(name, device)
    assert workload.name == name
    for index, request in enumerate(workload.requests):
        assert request.prompt_token_ids and request.max_tokens >= 1 and request.n >= 1
        assert all(0 <= token < 2048 for token in request.prompt_token_ids)
        assert request.follows is None or 0 <= request.follows < index
    arrivals = [request.arrival_step for request in workload.requests]
    assert arrivals == sorted(arrivals)


@given(
    name=st.sampled_from(WORKLOADS),
    vocab_size=st.integers(1, 200_000),
    max_model_len=st.integers(2, 5_000),
)
def test_fits_or_is_refused(name: str, vocab_size: int, max_model_len: int) -> None:
    try:
        workload = make(name, "cpu", vocab_size, max_model_len)
    except ValueError as error:
        needed = max(make(name, "cpu", vocab_size).lengths())
        assert max_model_len < needed
        # decode_growth shrinks, and gives up only where not even its prompt fits.
        assert name != "decode_growth" or max_model_len <= 16
        assert name in str(error) and "max_model_len" in str(error)
    else:
        assert max(workload.lengths()) <= max_model_len
        assert all(token < vocab_size for request in workload.requests for token in request.prompt_token_ids)


@pytest.mark.parametrize("name", WORKLOADS)
def test_cpu_sizes_fit_the_embedded_model(name: str) -> None:
    assert max(make(name, max_model_len=4096).lengths()) <= 4096


def test_mixed_is_the_published_benchmark() -> None:
    workload = make("mixed", vocab_size=151_936)
    prompts = [request.prompt_token_ids for request in workload.requests]
    assert len(prompts) == 256
    assert workload.max_output_tokens == 133_966
    assert sum(map(len, prompts)) == 142_827
    assert all(100 <= len(prompt) <= 1024 for prompt in prompts)
    assert all(100 <= request.max_tokens <= 1024 for request in workload.requests)
    assert max(map(max, prompts)) <= 10_000
    assert {(request.temperature, request.ignore_eos) for request in workload.requests} == {(0.6, True)}
    assert make("mixed", "cuda", vocab_size=151_936) == workload
    # A smaller vocabulary changes ids, and nothing else.
    small = make("mixed", vocab_size=512)
    assert [[token % 512 for token in prompt] for prompt in prompts] == [r.prompt_token_ids for r in small.requests]
    assert [r.max_tokens for r in small.requests] == [r.max_tokens for r in workload.requests]


def test_mixed_cpu_lengths() -> None:
    requests = make("mixed_cpu").requests
    assert len(requests) == 64
    assert all(32 <= len(request.prompt_token_ids) <= 256 and 16 <= request.max_tokens <= 128 for request in requests)


@pytest.mark.parametrize(("device", "count"), [("cpu", 16), ("cuda:1", 256)])
def test_uniform_and_single(device: str, count: int) -> None:
    shapes = [(len(request.prompt_token_ids), request.max_tokens) for request in make("uniform", device).requests]
    assert shapes == [(128, 128)] * count
    assert len({tuple(request.prompt_token_ids) for request in make("uniform", device).requests}) == count
    (single,) = make("single", device).requests
    assert (len(single.prompt_token_ids), single.max_tokens) == (128, 128)


@pytest.mark.parametrize(("max_model_len", "output"), [(40_960, 1024), (4096, 1024), (528, 512), (17, 1)])
def test_decode_growth_goes_as_far_as_the_model(max_model_len: int, output: int) -> None:
    (request,) = make("decode_growth", max_model_len=max_model_len).requests
    assert request.max_tokens == output


@pytest.mark.parametrize(("device", "decodes", "long"), [("cpu", 16, 1500), ("cuda", 64, 8192)])
def test_long_prompts_arrive_into_running_decodes(device: str, decodes: int, long: int) -> None:
    requests = make("long_arrivals", device).requests
    steady = [request for request in requests if request.arrival_step == 0]
    late = [request for request in requests if len(request.prompt_token_ids) == long]
    short = [request for request in requests if request not in steady and request not in late]
    assert len(steady) == decodes and len(requests) == len(steady) + len(late) + len(short)
    assert [request.arrival_step for request in late] == [50 * (i + 1) for i in range(len(late))]
    assert [request.arrival_step for request in short] == [request.arrival_step for request in late for _ in range(2)]
    # Each decode yields at most a token a step, so all of them still run when the last long prompt arrives.
    assert min(request.max_tokens for request in steady) > late[-1].arrival_step


def test_prefixes_are_shared_as_described() -> None:
    shared = [request.prompt_token_ids for request in make("shared_prefix").requests]
    assert len({tuple(prompt[:2048]) for prompt in shared}) == 1
    assert len({tuple(prompt[2048:]) for prompt in shared}) == len(shared)
    few_shot = [request.prompt_token_ids for request in make("few_shot").requests]
    assert [len({tuple(prompt[:length]) for prompt in few_shot}) for length in (64, 64 + 8 * 48, 480)] == [1, 4, 32]
    (parallel,) = make("parallel").requests
    assert parallel.n == 8 and parallel.temperature > 0 and parallel.seed is not None


def test_conversations_grow_turn_by_turn() -> None:
    workload = make("multi_turn")
    assert [request.follows for request in workload.requests] == [None] * 4 + list(range(12))
    assert workload.lengths()[0] == 192
    assert workload.lengths()[-1] == 192 + 3 * 64
    assert len({tuple(request.prompt_token_ids[:128]) for request in workload.requests[:4]}) == 1


def test_counts_every_sample() -> None:
    assert make("parallel").max_output_tokens == 8 * 32
    assert make("uniform").max_output_tokens == 16 * 128


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="choose one of single, decode_growth"):
        make("singel")


def test_a_number_of_requests() -> None:
    many = make_workload("uniform", vocab_size=2048, max_model_len=4096, num_requests=40)
    assert len(many.requests) == 40 and many.description.startswith("40 requests")
    assert many.requests[:16] == make("uniform").requests  # more of the same work
    for name, count in (("uniform", 0), ("mixed_cpu", 8)):
        with pytest.raises(ValueError, match=f"goes with the workload uniform; got {count}, {name}"):
            make_workload(name, vocab_size=2048, max_model_len=4096, num_requests=count)
