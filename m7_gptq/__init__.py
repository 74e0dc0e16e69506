"""An inference engine for language models. Start reading at `llm.py`."""

from .config import EngineConfig
from .llm import LLM
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .request import Request, Sequence, SequenceStatus
from .sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
    "SequenceStatus",
]
