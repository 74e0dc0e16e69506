"""The harness: which stages the suite runs against, and what tests share.

Every test is written once and takes the stage as a fixture; `--milestone` chooses what stands behind it. Tests never
name a stage's module: they reach into it with `submodule(stage, "sample.sampler")`. Tests without that fixture are of
the repository, and a run of one milestone leaves them out unless their file is named. Everything expensive (engines,
checkpoints, oracles) is made at most once a session, and only when a test asks for it.
"""

from __future__ import annotations

import os

# Before torch or transformers can be imported: no network, and no threads that tiny models would only trip over.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ctypes
import gc
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from folovllm.stages import LedgerError, known_stages, resolve_stage

if TYPE_CHECKING:
    from .oracle import Oracle


def _has_gpu() -> bool:
    """Whether the driver knows of a GPU. It is asked directly, since torch takes seconds to import."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False


if not _has_gpu():  # Triton wants to know before it is imported: its kernels then run on the CPU, step by step
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "folovllm" / "models" / "tiny"

MakeLLM = Callable[..., Any]
CheckpointPath = Callable[[str], Path]
GetOracle = Callable[[str], "Oracle"]

settings.register_profile(
    "ci",
    max_examples=15,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", settings.get_profile("ci"), max_examples=300, derandomize=False)


# ---------------------------------------------------------------------- which stages


@dataclass(frozen=True)
class Milestone:
    """What `stage` stands for in one run of a test.

    Attributes:
        number: what `since` is compared with; 3 for m3_paged, and for a practice folder run `--as m3`.
        folder: of the package; its name is the package's.
    """

    number: int
    folder: Path

    def load(self) -> ModuleType:
        """Import the package.

        Raises:
            ImportError: Python finds another package of that name first.
        """
        parent = str(self.folder.parent)
        if sys.path[0] != parent:
            sys.path.insert(0, parent)
        package = importlib.import_module(self.folder.name)
        if Path(str(package.__file__)).parent.resolve() != self.folder:
            raise ImportError(f"{self.folder.name} is {package.__file__}, not {self.folder}; rename the folder")
        return package


def parse_milestones(text: str | None, practice_as: str | None, names: list[str], cwd: Path) -> list[Milestone]:
    """What `--milestone TEXT --as PRACTICE_AS` asks for, out of the ledger's `names`; None is every stage.

    Raises:
        pytest.UsageError: with what to type instead.
    """
    milestones = []
    for wanted in text.split(",") if text is not None else names:
        try:
            name = resolve_stage(wanted, names)
            milestones.append(Milestone(stage_number(name), ROOT / name))
        except LedgerError as error:
            folder = (cwd / wanted).resolve()
            if not wanted or not folder.is_dir():
                raise pytest.UsageError(f"--milestone: {error}, and there is no folder {folder}") from None
            milestones.append(_practice(folder, practice_as, names))
    if practice_as and all(milestone.folder.name in names for milestone in milestones):
        raise pytest.UsageError("--as says what a practice folder counts as: give --milestone a folder")
    return milestones


def _practice(folder: Path, practice_as: str | None, names: list[str]) -> Milestone:
    if not (folder / "__init__.py").is_file() or not folder.name.isidentifier():
        raise pytest.UsageError(f"--milestone: {folder} is not a Python package")
    if practice_as is None:
        raise pytest.UsageError(f"--milestone {folder.name}: add --as and the stage that it should do the work of")
    try:
        return Milestone(stage_number(resolve_stage(practice_as, names)), folder)
    except LedgerError as error:
        raise pytest.UsageError(f"--as: {error}") from None


def stage_number(name: str) -> int:
    """3 for "m3" and for "m3_paged"."""
    match = re.fullmatch(r"m(\d+)(_\w+)?", name)
    if match is None:
        raise pytest.UsageError(f"{name!r} is not the name of a stage")
    return int(match[1])


def submodule(stage: ModuleType, name: str) -> ModuleType:
    """A module of the stage, for example `submodule(stage, "sample.sampler")`."""
    return importlib.import_module(f"{stage.__name__}.{name}")


def phases_apart(stage: ModuleType) -> dict[str, Any]:
    """Options with which no step mixes prompts and decodes, as before m5: prompts whole, in steps of their own."""
    has_chunks = "enable_chunked_prefill" in stage.EngineConfig.__annotations__
    return {"enable_chunked_prefill": False} if has_chunks else {}


def no_prefix_cache(stage: ModuleType) -> dict[str, Any]:
    """Options with which every prompt is computed whole, as before m6, whoever has computed it before."""
    has_cache = "enable_prefix_caching" in stage.EngineConfig.__annotations__
    return {"enable_prefix_caching": False} if has_cache else {}


def forget_prefixes(llm: Any) -> None:
    """What is computed from now on is not found from before: for who counts tokens, or spoils the cache on purpose."""
    if hasattr(llm, "reset_prefix_cache"):
        assert llm.reset_prefix_cache(), "somebody holds blocks"


# ---------------------------------------------------------------------- pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("folovllm")
    group.addoption("--milestone", help="stages to test: m0, or m0,m1, or a practice folder; default: all")
    group.addoption("--as", dest="practice_as", help="the stage that a practice folder counts as")
    group.addoption("--deep", action="store_true", help="many more examples, and the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        'since(stage): the first stage that must satisfy this test, as in since("m2")',
        'until(stage): the last stage whose internals this test knows, as in until("m0")',
        "gpu: needs CUDA, and is skipped without it",
        "exclusive: looks at the memory of the whole GPU, so that nothing else may run on it",
        "slow: runs with --deep only",
    ):
        config.addinivalue_line("markers", marker)
    if os.environ.get("HYPOTHESIS_PROFILE") == "deep":
        config.option.deep = True
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("deep" if config.option.deep else "ci")
    options = config.option.milestone, config.option.practice_as
    config.stash[_MILESTONES] = parse_milestones(*options, known_stages(), config.invocation_params.dir)
    if config.option.practice_as and config.option.tbstyle == "auto":
        config.option.tbstyle = "short"  # most of what is not built yet fails to be imported, deep in importlib


_MILESTONES = pytest.StashKey[list[Milestone]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stage" in metafunc.fixturenames:
        milestones = metafunc.config.stash[_MILESTONES]
        ids = [f"m{milestone.number}" for milestone in milestones]
        metafunc.parametrize("stage", milestones, ids=ids, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    one_stage = config.option.milestone is not None and len(config.stash[_MILESTONES]) == 1
    named = {(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args}
    for item in items:
        milestone = getattr(item, "callspec", None) and item.callspec.params.get("stage")  # type: ignore[attr-defined]
        # A test without a stage is of the repository: whoever asks for one stage gets it only by naming its file.
        wanted = _concerns(item, milestone) if milestone else not one_stage or item.path in named
        (selected if wanted else deselected).append(item)
        if item.get_closest_marker("slow") and not config.option.deep:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --deep"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if config.pluginmanager.hasplugin("xdist"):  # engines are shared within a file, for one stage
            item.add_marker(pytest.mark.xdist_group(f"{milestone.number if milestone else ''}:{item.path.stem}"))
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = selected


def _concerns(item: pytest.Item, milestone: Milestone) -> bool:
    since, until = item.get_closest_marker("since"), item.get_closest_marker("until")
    first = stage_number(since.args[0]) if since else 0
    last = stage_number(until.args[0]) if until else milestone.number
    return first <= milestone.number <= last


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> ModuleType:
    """The package under test."""
    package = request.param.load()
    gc.freeze()  # an engine collects garbage when it closes: without this, all of torch and transformers each time
    return package


def open_llm(stage: ModuleType, folder: Path, **options: Any) -> Any:
    """A new engine as tests want it, float32 on the CPU; whoever opens it closes it."""
    return stage.LLM(folder, **{"dtype": "float32", "device": "cpu", "log_level": "WARNING", **options})


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> CheckpointPath:
    """Folder of a checkpoint by name: one of `checkpoints.SPECS`, "scripted", or "tiny" (the embedded model)."""
    from .checkpoints import save_checkpoint

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name == "tiny":
            return _embedded_model()
        if name not in made:
            made[name] = save_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The embedded model's folder. A repository without it is broken, so its absence is a failure."""
    return _embedded_model()


def _embedded_model() -> Path:
    if not (TINY / "config.json").is_file():
        pytest.fail(f"the embedded model is missing: {TINY} holds no config.json")
    return TINY


@pytest.fixture(scope="session")
def make_llm(stage: ModuleType, checkpoint_path: CheckpointPath) -> Iterator[MakeLLM]:
    """`make_llm("qwen3", max_model_len=32)`: an engine in float32 on the CPU, shared by all who ask for the same.

    Its first argument is what `checkpoint_path` knows, or the Path of a checkpoint. Do not close or change it.
    Where a cache would take all the memory that it can get, it gets little, unless the test says how much.
    """
    engines: dict[str, Any] = {}
    sizes = {"kv_cache_memory_bytes", "num_kv_blocks"}
    is_paged = "num_kv_blocks" in stage.EngineConfig.__annotations__

    def make(checkpoint: str | Path = "qwen3", **options: Any) -> Any:
        key = repr((checkpoint, sorted(options.items())))
        if key not in engines:
            folder = checkpoint if isinstance(checkpoint, Path) else checkpoint_path(checkpoint)
            if is_paged and not sizes & options.keys():
                options["kv_cache_memory_bytes"] = 64 * 2**20 if checkpoint == "tiny" else 4 * 2**20
            engines[key] = open_llm(stage, folder, **options)
        return engines[key]

    yield make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)  # each of them would, and once is enough
        for engine in engines.values():
            engine.close()
    gc.collect()


@pytest.fixture(scope="session")
def get_oracle(checkpoint_path: CheckpointPath) -> GetOracle:
    """`get_oracle("qwen3")`: transformers on the weights of that checkpoint."""
    from .oracle import Oracle

    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = Oracle(checkpoint_path(name))
        return made[name]

    return get
