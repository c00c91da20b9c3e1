# SPDX-License-Identifier: Apache-2.0
"""A scheduler for real threads on simulated time, and what stands for ``time`` and ``threading``.

A task runs until it asks for the time, takes a lock, waits or starts another: there the scheduler
may let another one run. Time passes when no task can run. Each task belongs to a process, which has
clocks of its own and can be suspended or killed.
"""

from __future__ import annotations

import _thread
import heapq
import itertools
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

FOREVER = float("inf")
_START = 1_700_000_000.0
# How often a task that could go on lets another one run first.
_PREEMPTION = 0.15


class Killed(BaseException):
    """Ends a task from outside."""


class Process:
    """The clocks of one machine."""

    def __init__(self, name: str, skew: float) -> None:
        self.name = name
        self.skew = skew  # of the wall clock
        self.lost = 0.0  # seconds for which the monotonic clock stood still
        self.lost_boot = 0.0  # the same for the clock that should have gone on
        self.alive = True
        self.sleeps_until = 0.0


class Task:
    """One thread."""

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.turn = _thread.allocate_lock()
        self.turn.acquire()
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.wakes_at = 0.0
        self.done = False
        self.thread: _Thread | None = None


class World:
    """Time, tasks and chance."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.current: Task | None = None
        self.problems: list[str] = []
        self._tasks: list[Task] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._over = threading.Event()
        self._ending = False
        self.time: Any = SimpleNamespace(
            monotonic=self.monotonic, perf_counter=self.monotonic, time=self.wall
        )
        self.threading: Any = SimpleNamespace(
            Lock=lambda: _Lock(self),
            RLock=lambda: _RLock(self),
            Event=lambda: _Event(self),
            Thread=lambda **options: _Thread(self, **options),
            current_thread=lambda: self._running().thread,
        )

    def process(self, name: str) -> Process:
        return Process(name, skew=0.0)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Do something at a moment when every task waits."""
        heapq.heappush(self._timers, (moment, next(self._number), action))

    def spawn(self, process: Process, work: Callable[..., object], *args: object) -> Task:
        task = Task(process, getattr(work, "__name__", "task"))
        self._tasks.append(task)

        def run() -> None:
            task.turn.acquire()
            try:
                if not self._ending:
                    work(*args)
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 (told by the schedule)
                self.problems.append(f"{task.name} ended with {error!r}")
            task.done = True
            self._tasks.remove(task)
            self._hand_over(task)

        _thread.start_new_thread(run, ())
        return task

    def run(self) -> None:
        """Run until no task is left, then return; a hang is a problem."""
        self._hand_over(None)
        self._over.wait()

    def sleep(self, seconds: float) -> None:
        self.block(lambda: False, seconds)

    def block(self, ready: Callable[[], bool], seconds: float | None) -> bool:
        """Wait for a condition, at most so many seconds of this process's own."""
        task = self._running()
        if not ready():
            task.ready = ready
            task.wakes_at = FOREVER if seconds is None else self.now + max(seconds, 0.0)
            self._hand_over(task)
            task.ready = None
        else:
            self.perhaps_another()
        return ready()

    def perhaps_another(self) -> None:
        """Let another task run, or not."""
        task = self._running()
        if len(self._tasks) > 1 and self.chance.random() < _PREEMPTION:
            self._hand_over(task)

    def monotonic(self) -> float:
        self.perhaps_another()
        return 1000.0 + self.now - self._running().process.lost

    def boottime(self) -> float:
        self.perhaps_another()
        return 5000.0 + self.now - self._running().process.lost_boot

    def wall(self) -> float:
        self.perhaps_another()
        return _START + self.now + self._running().process.skew

    @property
    def true_wall(self) -> float:
        return _START + self.now

    def suspend(self, process: Process, seconds: float, *, boot_notices: bool) -> None:
        """Stop a machine for a while; called by a timer, when all its tasks wait."""
        process.sleeps_until = self.now + seconds
        process.lost += seconds
        process.lost_boot += 0.0 if boot_notices else seconds
        for task in self._tasks:
            if task.process is process:
                task.wakes_at += seconds  # time-outs count the monotonic clock

    def _running(self) -> Task:
        assert self.current is not None
        return self.current

    def _hand_over(self, task: Task | None) -> None:
        following = self._choose()
        self.current = following
        if following is None:
            self._over.set()
        elif following is not task:
            following.turn.release()
        if task is not None and not task.done and following is not task:
            task.turn.acquire()
        if task is not None and not task.done and (self._ending or not task.process.alive):
            raise Killed

    def _choose(self) -> Task | None:
        while self._tasks:
            if self._ending:
                return self._tasks[0]
            runnable = [task for task in self._tasks if self._can_run(task)]
            if runnable:
                return self.chance.choice(runnable)
            self._let_time_pass()
        return None

    def _can_run(self, task: Task) -> bool:
        if not task.process.alive:
            return True  # to its end
        if self.now < task.process.sleeps_until:
            return False
        return task.ready is None or self.now >= task.wakes_at or task.ready()

    def _let_time_pass(self) -> None:
        wakes = [max(task.wakes_at, task.process.sleeps_until) for task in self._tasks]
        moment = min([*wakes, *(timer[0] for timer in self._timers[:1])])
        if moment == FOREVER:
            names = sorted(f"{task.process.name}:{task.name}" for task in self._tasks)
            self.problems.append(f"hang: {names} wait for ever")
            self._ending = True
            return
        self.now = max(self.now, moment)
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()


class _Lock:
    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT002 (as in threading)
        self._world.perhaps_another()
        if self._held and not blocking:
            return False
        while self._held:
            self._world.block(lambda: not self._held, None)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _RLock(_Lock):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._holder: Task | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT002 (as in threading)
        me = self._world._running()
        if self._holder is not me and not super().acquire(blocking):
            return False
        self._holder, self._depth = me, self._depth + 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
            super().release()


class _Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        return self._world.block(self.is_set, timeout)


class _Thread:
    def __init__(
        self,
        world: World,
        *,
        target: Callable[..., object],
        args: tuple[object, ...] = (),
        name: str = "",
        daemon: bool = False,
    ) -> None:
        del name, daemon
        self._world = world
        self._target = target
        self._args = args
        self._task: Task | None = None

    def start(self) -> None:
        process = self._world._running().process
        self._task = self._world.spawn(process, self._target, *self._args)
        self._task.thread = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        assert task is not None
        self._world.block(lambda: task.done, timeout)
