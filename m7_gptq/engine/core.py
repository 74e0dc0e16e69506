"""EngineCore: the loop's one step. In here everything is token ids; text begins and ends outside."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import PretrainedConfig

from ..config import EngineConfig
from ..core.sched.output import SchedulerOutput
from ..core.sched.scheduler import Scheduler
from ..outputs import SequenceOutput
from ..worker.gpu_worker import GPUWorker


class EngineCore:
    """Scheduler and model, taking turns.

    Attributes:
        config: with every None settled.

    Raises:
        ValueError: the model or the cache that was asked for cannot be had.
    """

    def __init__(self, config: EngineConfig, folder: Path, hf_config: PretrainedConfig) -> None:
        self.worker = GPUWorker(config, folder, hf_config)
        self.config = self.worker.config
        self.scheduler = Scheduler(self.config)

    def step(self) -> tuple[SchedulerOutput, list[SequenceOutput]]:
        """One iteration: choose who runs, run them, take in what they said."""
        started = time.perf_counter()
        scheduled = self.scheduler.schedule()
        try:
            sampled = self.worker.model_runner.execute_model(scheduled)
            self.scheduler.record_step_time(scheduled, time.perf_counter() - started)
            return scheduled, self.scheduler.update_from_output(scheduled, sampled)
        except BaseException:
            self.scheduler.undo(scheduled)
            raise
