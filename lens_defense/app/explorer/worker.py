"""One background thread for long work: one job at a time, with progress, stoppable.

To stop a job is a Ctrl-C for its thread alone: KeyboardInterrupt is raised in it, wherever it is. What the
verbs change in a model survives that anywhere (models/weight_journal.py), so no verb has to ask for a flag.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lens_defense.models.restoring_block import finish
from lens_defense.progress import progress_listener
from lens_defense.shown_text import one_line

STOPPED = "stopped; the model is as it was"


@dataclass(slots=True, eq=False)
class Job:
    """What the thread is doing."""

    name: str
    """In words, as in "planning the edit"."""
    step: str = ""
    """What is counted: the progress bar's own name."""
    done: int = 0
    total: int = 0
    note: str = ""
    """What the work said."""
    started: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    over: bool = False
    stopping: bool = False


class Worker:
    """Runs one job at a time in a thread of its own."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Start with nothing to do.

        Args:
            changed: called whenever `job` has changed: it began, went on, or is over.
        """
        self.job: Job | None = None
        self.changed = changed
        self._lock = threading.Lock()

    def start(self, name: str, action: Callable[[], object], ended: Callable[[str], None]) -> None:
        """Run an action in the background.

        Args:
            name: what it does, in words.
            action: what is done.
            ended: called when it is over, with one sentence where it failed or was stopped, else with "".

        Raises:
            ValueError: another job runs.
        """
        with self._lock:
            if self.job is not None:
                raise ValueError(f"still {self.job.name}; wait, or stop it first")
            self.job = job = Job(name)
        job.thread = threading.Thread(target=self._run, args=(job, action, ended), daemon=True, name=name)
        self.changed()
        job.thread.start()

    def stop(self) -> None:
        """Interrupt the job that runs, if any."""
        with self._lock:
            job = self.job
            if job is None or job.over or job.thread is None or job.thread.ident is None:
                return
            job.stopping = True
            identity = ctypes.c_ulong(job.thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(KeyboardInterrupt))
        self.changed()

    def wait(self, seconds: int | float | None = None) -> bool:
        """Wait for the end of the job that runs; whether it has come."""
        job = self.job
        if job is not None and job.thread is not None:
            job.thread.join(seconds)
        return self.job is None

    def step(self, description: str, done: int, total: int | None) -> None:
        """What a progress bar of the package reports."""
        job = self.job
        if job is not None:
            job.step, job.done, job.total = description, done, total or 0
            self.changed()

    def say(self, sentence: str) -> None:
        """What a verb says while it works; it stands beside the progress until the work is over."""
        job = self.job
        if job is not None:
            job.note = sentence
            self.changed()

    def _run(self, job: Job, action: Callable[[], object], ended: Callable[[str], None]) -> None:
        sentence = ""
        try:
            try:
                with progress_listener(self):
                    action()
            finally:
                finish(lambda: self._close(job))  # from here on it cannot be stopped any more
        except KeyboardInterrupt:
            sentence = STOPPED
        except ValueError as error:
            sentence = str(error)
        except Exception as error:  # nobody would see it in a thread
            sentence = f"{type(error).__name__}: {one_line(error)}"
        while True:  # the last interrupt may come as late as here
            try:
                return self._end(job, sentence, ended)
            except KeyboardInterrupt:
                continue

    def _close(self, job: Job) -> None:
        with self._lock:
            job.over = True

    def _end(self, job: Job, sentence: str, ended: Callable[[str], None]) -> None:
        if self.job is job:
            ended(sentence)
            self.job = None
            self.changed()
