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
from ..worker.model_runner import AsyncModelRunnerOutput


class EngineCore:
    """Scheduler and model, taking turns.

    Attributes:
        config: with every None settled.
        ahead: a step that is under way, to be taken in by the next `step`.

    Raises:
        ValueError: the model or the cache that was asked for cannot be had.
    """

    def __init__(self, config: EngineConfig, folder: Path, hf_config: PretrainedConfig) -> None:
        self.worker = GPUWorker(config, folder, hf_config)
        self.config = self.worker.config
        self.scheduler = Scheduler(self.config)
        self.ahead: tuple[SchedulerOutput, AsyncModelRunnerOutput] | None = None

    def step(self) -> tuple[SchedulerOutput, list[SequenceOutput]]:
        """One iteration: choose who runs, run them, take in what they said.

        With async_scheduling the next step is launched before that, if it can be: the device has work while the host
        takes in this one's tokens, makes text of them, and does what its user does between two steps.
        """
        started = time.perf_counter()
        scheduled, output = self.ahead or self._launch(self.scheduler.schedule())
        self.ahead = None
        try:
            if self.config.async_scheduling and (ahead := self.scheduler.schedule_ahead(scheduled)) is not None:
                self.ahead = self._launch(ahead)
            sampled = output.get_output()
            self.scheduler.record_step_time(scheduled, time.perf_counter() - started)
            return scheduled, self.scheduler.update_from_output(scheduled, sampled)
        except BaseException:
            if self.ahead is not None:
                self.scheduler.undo(self.ahead[0])
            self.ahead = None
            self.scheduler.undo(scheduled)
            raise

    def _launch(self, scheduled: SchedulerOutput) -> tuple[SchedulerOutput, AsyncModelRunnerOutput]:
        try:
            return scheduled, self.worker.model_runner.execute_model(scheduled)
        except BaseException:
            self.scheduler.undo(scheduled)
            raise
