"""The benchmark of prefix caching: what it counts, on work that one can count along."""

import json
from pathlib import Path

import pytest

from folovllm import TINY, lab
from folovllm.bench import prefix
from folovllm.bench.workloads import Workload, WorkloadRequest

OPTIONS = {"max_model_len": 256, "log_level": "WARNING", "device": "cpu", "block_size": 16, "num_kv_blocks": 200}


def small_workload() -> Workload:
    common = list(range(100, 164))
    first = [WorkloadRequest(common + [200 + index] * 16, 4) for index in range(2)]
    second = WorkloadRequest([7] * 30, 2, follows=0)
    return Workload("small", "two that share 64 tokens, and a second turn", [*first, second])


@pytest.mark.parametrize("mode", prefix.MODES)
def test_hits_are_those_that_one_can_count(mode: str) -> None:
    """64 tokens by the second, which waits for the first; and of a second turn all whole blocks of the first one."""
    hits = 64 + 80
    with lab.load_stage("m6").LLM(TINY, **OPTIONS) as llm:
        for _ in range(2):  # from an empty cache each time
            run = prefix.run_once(llm, small_workload(), mode)
            assert run.counts == (80 + 80 + 114, hits)
            config = llm.config
            sizes = (config.block_size, config.max_num_batched_tokens, config.max_chunk_size)
            assert prefix.expected_hits(run.groups, *sizes) == hits
    assert [len(group) for group in run.groups] == ([2, 1] if mode == "at_once" else [1, 1, 1])


def test_the_model_of_steps() -> None:
    """Who is there in which step, and what has been computed by then."""
    a, b, c = list(range(100, 110)), [*range(100, 108), 7, 7], [50, 51]
    assert prefix.expected_hits([[(a, [1]), (b, [1])]], 4, 100, 100) == 8, "b waits for the whole prompt"
    assert prefix.expected_hits([[(a, [1]), (b, [1])]], 4, 100, 4) == 8, "b waits for two chunks"
    assert prefix.expected_hits([[(a, [1]), (b, [1])]], 16, 100, 100) == 0, "no block to wait for"
    assert prefix.expected_hits([[(a, [1, 2, 3]), (c, [1]), (a[:9], [1])], [(c, [1])]], 4, 100, 100) == 8


def test_a_stage_without_a_cache_has_no_counts() -> None:
    with lab.load_stage("m5").LLM(TINY, **OPTIONS) as llm:
        run = prefix.run_once(llm, small_workload(), "at_once")
        assert run.counts is None and run.seconds > 0
        assert "hits" not in prefix.workload_figures([run], [run], llm.config)


def test_the_model_of_the_cache() -> None:
    known: dict[tuple[int, ...], object] = {(1, 2, 3, 4): {(5, 6, 7, 8): {}}}
    assert prefix.longest_match(known, [1, 2, 3, 4, 5, 6, 9], 4) == 6
    assert prefix.longest_match(known, [1, 2, 3, 4, 5, 6, 7, 8], 4) == 8
    assert prefix.longest_match(known, [2, 2, 3, 4], 4) == 0
    assert prefix.longest_match({tuple(range(32)): {}}, [0, 1, 2, 99], 32) == 0  # less than an eighth of a block


def test_first_tokens_hashes_and_short_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--prefix", "64", "--workloads", "", "--repeats", "1", "--device", "cpu", "--max-model-len", "512"]
    assert prefix.main([*options, "--hash-blocks", "16", "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["ttft"]["rows"]["64"]["cached_tokens"] == 64
    assert figures["hashing"]["us_per_token"]["16"] > 0
    assert figures["sub_block"]["with"]["share"] >= 1 and figures["sub_block"]["without"]["hits"] == 0


def test_figures_of_pairs() -> None:
    figures = prefix.ttft_figures([(100.0, 10.0, 64), (90.0, 30.0, 64), (400.0, 20.0, 65)])
    assert figures["miss_ms"] == 100 and figures["hit_ms"] == 20 and figures["miss_over_hit"] == 10
    assert figures["cached_tokens"] == 64


def test_a_run_of_the_laboratory_empties_the_cache() -> None:
    with lab.load_stage("m6").LLM(TINY, **OPTIONS) as llm:
        stats = llm.engine.core.scheduler.kv_cache_manager.prefix_cache_stats
        for _ in range(2):
            lab.run(llm, Workload("one", "one", [WorkloadRequest(list(range(40)), 2)]), warmup=False)
        assert stats.hits == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--prefix", "", "--workloads", "", "--hash-blocks", "", "--sub-block", "0"],
        ["--prefix", "soon"],
        ["--prefix", "5000"],
        ["--stage", "m5"],
        ["--repeats", "0"],
        ["--prefix", "", "--milestones", "m5,m5"],
    ],
)
def test_what_cannot_be_measured(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prefix.main([*options, "--device", "cpu"]) == 2
    assert "error:" in capsys.readouterr().err
