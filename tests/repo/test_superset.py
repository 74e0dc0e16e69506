"""Every stage does everything that the one before it does: the public surface only grows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from folovllm.stages import find_root, known_stages
from tests.superset import compare, public_classes, public_names

ROOT = find_root()
STAGES = known_stages()

# A stage in small, with everything that the checker looks at.
SURFACE = {
    "__init__.py": '__all__ = ["LLM", "EngineConfig"]\n',
    "config.py": """
from dataclasses import dataclass
@dataclass(frozen=True)
class EngineConfig:
    model: str | None = None
    seed: int = 0
""",
    "outputs.py": """
from dataclasses import dataclass, field
@dataclass
class RequestOutput:
    request_id: str
    metrics: object = field(repr=False)
    @property
    def text(self) -> str:
        return ""
    def fill_in(self, text): ...
    def _hidden(self) -> None: ...
""",
    "llm.py": """
class LLM:
    def __init__(self, model=None, engine_config=None, **overrides): ...
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True): ...
    def close(self) -> None: ...
    def _run(self, request): ...
""",
    "engine/llm_engine.py": """
class LLMEngine:
    def step(self): ...
""",
}


def make_stage(folder: Path, **changes: tuple[str, str]) -> Path:
    """The small stage, with (old, new) replaced in the files named by their stem."""
    for path, text in SURFACE.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        old, new = changes.get(target.stem.strip("_"), ("", ""))
        assert old in text
        target.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("old", "new"), list(pairwise(STAGES)) or [(STAGES[0], STAGES[0])])
def test_the_surface_only_grows(old: str, new: str) -> None:
    assert compare(ROOT / old, ROOT / new) == []


@pytest.mark.parametrize("name", STAGES)
def test_the_checker_sees_the_surface(name: str) -> None:
    """If a class moved out of the checker's sight, comparing it would find nothing for ever."""
    classes = public_classes(ROOT / name)
    assert {"LLM", "EngineConfig", "SamplingParams", "RequestOutput", "CompletionOutput"} <= public_names(ROOT / name)
    assert {"model", "max_model_len"} <= classes["EngineConfig"].fields.keys()
    assert classes["SamplingParams"].fields["max_tokens"] == "16"
    assert {"__init__", "generate", "stream", "chat", "close"} <= classes["LLM"].methods.keys()
    assert classes["LLM"].methods["generate"].positional[1:] == [("prompts", None), ("sampling_params", "None")]
    assert {"outputs", "metrics"} <= classes["RequestOutput"].fields.keys()
    assert {"text", "token_ids"} <= classes["RequestOutput"].methods.keys()
    assert {"text", "finish_reason"} <= classes["CompletionOutput"].fields.keys()
    assert {"ttft", "tpot", "e2e_latency"} <= classes["RequestMetrics"].methods.keys()


ALLOWED = {
    "nothing": {},
    "a new name": {"init": ('"LLM"', '"LLM", "Request"')},
    "a new field with a default": {"config": ("seed: int = 0", "seed: int = 0\n    block_size: int | None = None")},
    "a field of another type": {"config": ("seed: int = 0", "seed: int | None = 0")},
    "a property that became a field": {
        "outputs": ('    @property\n    def text(self) -> str:\n        return ""', '    text: str = ""')
    },
    "a new keyword": {"llm": ("use_tqdm=True", "use_tqdm=True, priority=None")},
    "a new parameter at the end": {"llm": ("sampling_params=None,", "sampling_params=None, extra=None,")},
    "a new method": {"llm": ("def close", "def stream(self, prompts): ...\n    def close")},
    "another way to fill in an output": {"outputs": ("def fill_in(self, text)", "def fill_in(self, index, text)")},
    "another internal": {"llm": ("def _run(self, request)", "def _work(self)")},
}


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED.keys())
def test_growth_is_allowed(tmp_path: Path, change: dict[str, tuple[str, str]]) -> None:
    assert compare(make_stage(tmp_path / "old"), make_stage(tmp_path / "new", **change)) == []


BREACHES = {
    "LLM is gone from __all__": {"init": ('"LLM", ', "")},
    "class EngineConfig is gone": {"config": ("class EngineConfig", "class Config")},
    "EngineConfig.seed: the field is gone": {"config": ("    seed: int = 0\n", "")},
    "EngineConfig.seed: the default was 0 and is None": {"config": ("seed: int = 0", "seed: int | None = None")},
    "EngineConfig.must: a new field needs a default": {
        "config": ("    model: str", "    must: int\n    model: str"),
    },
    "RequestOutput.metrics: the field is gone": {"outputs": ("    metrics: object = field(repr=False)\n", "")},
    "RequestOutput.text: a property has become a method, or the reverse": {"outputs": ("    @property\n", "")},
    "LLM.close: the method is gone": {"llm": ("def close", "def _close")},
    "LLM.generate: the keyword use_tqdm is gone": {"llm": ("use_tqdm=True", "progress=True")},
    "LLM.generate: the default of use_tqdm was True and is False": {"llm": ("use_tqdm=True", "use_tqdm=False")},
    "LLM.generate: the new parameter priority needs a default": {"llm": ("use_tqdm=True", "use_tqdm=True, priority")},
    "LLM.generate: the positional parameters (self, prompts, sampling_params=None) are no prefix of "
    "(self, prompts, extra=None, sampling_params=None)": {
        "llm": ("prompts, sampling_params=None", "prompts, extra=None, sampling_params=None")
    },
    "LLM.__init__: it took any arguments and no longer does": {"llm": (", **overrides", "")},
    "LLMEngine.step: the method is gone": {"llm_engine": ("def step", "def tick")},
}


@pytest.mark.parametrize(("problem", "change"), BREACHES.items(), ids=BREACHES.keys())
def test_a_breach_is_named(tmp_path: Path, problem: str, change: dict[str, tuple[str, str]]) -> None:
    assert compare(make_stage(tmp_path / "old"), make_stage(tmp_path / "new", **change)) == [problem]


def test_all_breaches_are_reported_together(tmp_path: Path) -> None:
    new = make_stage(tmp_path / "new", init=('"LLM", ', ""), llm=("def close", "def _close"))
    assert compare(make_stage(tmp_path / "old"), new) == ["LLM is gone from __all__", "LLM.close: the method is gone"]
