"""The training loop: what happens when, in a run. No maths."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxpar.attention import choice_lines
from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.checkpoint.pace import Pace
from jaxpar.checkpoint.run_state import RunState
from jaxpar.checkpoint.same_run import describe
from jaxpar.config import ConfigError
from jaxpar.data.loader import Batch
from jaxpar.program import Program
from jaxpar.run.datasets import open_evaluation, open_training_data
from jaxpar.run.evaluation import EvalBatches
from jaxpar.run.folder_lock import FolderLock, FolderLost
from jaxpar.run.hooks import Hook, Hooks
from jaxpar.run.metrics import metrics_writers
from jaxpar.run.processes import highest
from jaxpar.run.profile import Profiler, Steps
from jaxpar.run.progress import progress
from jaxpar.run.replicas import ReplicaError, check_replicas
from jaxpar.run.signals import Interrupted, Signals
from jaxpar.run.sources import BatchSource, UserBatches, go_on, open_batches, position_to_save
from jaxpar.run.step_log import NonFiniteError, StepLog
from jaxpar.run.watchdog import Watchdog


class TrainingRun:
    """One call of `Trainer.fit`, from opening the data to the last checkpoint; a `jaxpar.run.hooks.Run`.

    Args:
      trainer: the `jaxpar.Trainer`, for hooks.
      lock: of the experiment's folder.
      batches, eval_batches, hooks, profile: as in `Trainer.fit`.

    Attributes:
      step: the last step that was dispatched.
      last_step: the step at which the run ends; None if only its batches end it.
    """

    def __init__(
        self,
        trainer: Any,
        program: Program,
        state: RunState,
        watchdog: Watchdog,
        lock: FolderLock,
        *,
        batches: UserBatches | None,
        eval_batches: EvalBatches | None,
        hooks: Sequence[Hook],
        profile: Steps | None,
    ):
        self.trainer, self.config, self._program, self._state = trainer, program.blueprint.config, program, state
        self._lock = lock
        self._watchdog, self._runner, first_process = watchdog, self.config.runner, jax.process_index() == 0
        self._progress = progress(first_process, self._runner.log_interval)
        profiler = [Profiler(profile)] if profile else []
        writers = metrics_writers(self.config) if first_process else []
        self._hooks = Hooks(self, [*hooks, *profiler, self._progress, *writers], self._fail)
        self._stops, self._error, self._signal = False, None, 0  # type: bool, Exception | None, int
        watchdog.enter(0, "opening the data")
        self._source: BatchSource = (
            open_training_data(program, self.say)
            if batches is None
            else open_batches(program, batches, lambda: self.step + 1)
        )
        self._evaluation = open_evaluation(program, eval_batches, self.say)
        described = describe(program.blueprint.architecture, self._source.fingerprint)
        self.checkpoints = Checkpoints(self.config, described)
        watchdog.enter(0, "restoring")
        self._resume()
        self.step: int = int(state.get()["step"])
        self._first_step = self.step + 1
        limits = [self._runner.max_steps, self._source.num_batches or 0]
        self.last_step = min((limit for limit in limits if limit > 0), default=None)
        self._log = StepLog(program, lambda row: self._hooks.call("step", row), self.say)
        self._val_loss: float | None = None  # of the parameters after `step`, if they were evaluated
        self._pace = Pace(self._runner.save_interval)

    def stop(self, reason: str) -> None:
        if not self._stops:
            self.say(f"the run stops: {reason}")
        self._stops = True

    def say(self, text: str) -> None:
        try:
            self._progress.say(text)
        except OSError as error:  # of standard output, such as a full disk
            self._fail(error)

    def train(self) -> None:
        """Trains to the last step, or until a signal, a hook, an error or the end of the batches stops the run; then saves."""
        with Signals() as signals:
            try:
                self._hooks.start()
                while self.last_step is None or self.step < self.last_step:
                    self._watchdog.enter(self.step + 1, "reading the batch")
                    batch = self._read()
                    self._watchdog.enter(self.step + 1, "checking for signals")
                    if self._agree_to_stop(signals.number) or batch is None:
                        break
                    self._train_step(batch)
                    self._evaluate_if_due()
                    self._check_replicas_if_due()
                    self._save_if_due()
                self._save()
                self.checkpoints.wait()
            except (NonFiniteError, ReplicaError):
                self.checkpoints.wait()  # let an earlier save finish
                raise
            except FolderLost:
                self.checkpoints.give_up()  # the other run waits until this one writes no more
                raise
            finally:
                self._source.close()
                self._hooks.call("end")

    def finish(self) -> None:
        """Says that the run is done.

        Raises:
          Interrupted: a signal has stopped it.
          Exception: what has stopped it; `HookError` if it was a hook.
        """
        if self._error:
            raise self._error
        if self._signal:
            raise Interrupted(self.step, self.last_step, self._signal)
        self._progress.say(f"done: step {self.step}, checkpoint in {self.checkpoints.folder}")

    def _fail(self, error: Exception) -> None:
        """Lets the run end with this error, when it has been saved."""
        self._error = self._error or error

    def _agree_to_stop(self, signal: int) -> bool:
        """Whether any process must stop; the same in all of them. Raises FolderLost."""
        failed, lost = jax.process_index() + 1 if self._error else 0, self._lock.problem()
        self._signal, stops, failed, any_lost = highest(signal, self._stops, failed, bool(lost))
        if any_lost:
            raise FolderLost(lost or "process 0 stopped with an error: see its output")
        if failed and not self._error:
            self._error = ConfigError(f"process {failed - 1} ended the run with an error: see its output")
        return bool(self._signal or stops or failed)

    def _resume(self) -> None:
        position, notes = self._state.start_training(self.checkpoints)
        for note in [*notes, *self._source.notes]:
            self.say(note)
        if position:
            self._watchdog.enter(0, "going on in the data")
            for note in go_on(self._source, position):
                self.say(note)
        self._position = self._source.get_state()  # after the batches of the steps that are done
        position_to_save(self._position)
        self.checkpoints.open_to_write()

    def _read(self) -> Batch | None:
        """This process's rows of the next batch; None if there is none."""
        try:
            return next(self._source)
        except StopIteration:
            self.stop("its batches have ended")
        except Exception as error:  # whatever a user's iterator raises: the run is saved before it ends
            self._fail(error)
        return None

    def _train_step(self, batch: Batch) -> None:
        """Dispatches the next step and reports the one before it."""
        number = self.step + 1
        self._hooks.call("begin", number)
        self._watchdog.enter(number, "training")
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            metrics = self._state.train_step(self._program.batch_layout.put_on_mesh(batch))
            if number == self._first_step:  # the step has just been traced
                for line in choice_lines(self._program.attention_choices):
                    self.say(line)
            self._log.enter(number, metrics, batch, self._source.figures)
        self.step, self._val_loss, self._position = number, None, self._source.get_state()
        self._hooks.call("dispatched", number)

    def _evaluate_if_due(self) -> None:
        if self._evaluation and self._is_due(self._runner.val_check_interval):
            self._watchdog.enter(self.step, "evaluating")
            seconds = self._log.wait()  # so that the step's time does not include the evaluation
            self._val_loss = self._evaluation.loss(self._state.get()["params"])
            self._log.flush(seconds, val_loss=self._val_loss)
            self._hooks.call("evaluation", self.step, self._val_loss)

    def _check_replicas_if_due(self) -> None:
        if self._is_due(self._runner.check_replicas_interval):
            self._watchdog.enter(self.step, "comparing replicas")
            check_replicas(self._state.get()["params"])

    def _save_if_due(self) -> None:
        """Saves at `save_interval` and, with `keep_best_checkpoint`, after the lowest validation loss so far."""
        self.checkpoints.check()
        best = (
            self._val_loss is not None
            and self._runner.keep_best_checkpoint
            and self.checkpoints.is_best(self._val_loss)
        )
        if best or self._is_due(self._runner.save_interval):
            self._save()

    def _save(self) -> None:
        self._log.flush()  # before saving, so that metrics.jsonl never lacks a step that a checkpoint has
        self._watchdog.enter(self.step, "checking for signals")
        self._agree_to_stop(self._signal)  # which also asks whether the folder is still there
        position = position_to_save(self._position)
        self._watchdog.enter(self.step, "waiting until the earlier checkpoint is written")
        with self._log.between_steps("checkpoint_wait_seconds"):
            self.checkpoints.wait_until_written()
        note = self._pace.next_save(self.step, self._log.between["checkpoint_wait_seconds"])
        self._watchdog.enter(self.step, "saving")
        with self._log.between_steps("checkpoint_seconds"):
            folder = self.checkpoints.save(self.step, self._state.get(), position, self._val_loss)
        if note:
            self.say(note)
        if folder:
            self._hooks.call("save", self.step, folder)

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0
