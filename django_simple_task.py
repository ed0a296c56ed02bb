"""Background tasks for Django inside the ASGI process. No broker, no table, one file.

    # settings.py
    INSTALLED_APPS = [..., "django_simple_task"]

    # asgi.py
    application = django_simple_task_middleware(get_asgi_application())

    # a view, sync or async
    defer(send_welcome, {"args": [user.pk]})

The middleware owns the ASGI lifespan. At startup workers start on the server's own
event loop; `defer()` puts functions and coroutine functions on the queue, from any
thread; at shutdown the queue is drained: what was accepted is finished, or reported by
name. Without a lifespan a background thread does the same.

Each job runs at most once and lives in memory: a crash loses what was waiting. Use it
for work that you would rather lose than run twice: mail, webhooks, thumbnails, caches.
The same queue serves Django's own `django.tasks` (see SimpleTaskBackend), so that a
project that outgrows one machine changes one setting and is on a durable engine.

Three words mean something else elsewhere. `defer()` queues *now*; what Django calls
`supports_defer` is `run_after` here. To *drain* is to run what is left, not to discard
it. A *worker* runs one job at a time within this process; it is not a server process.

The file follows a job through its life:

    Settings             what a project may configure, and what a value must look like
    Exceptions           what a caller may catch
    Deferring            defer(), join(), ajoin(), stats()
    Jobs                 the record of a call: checks, context, one attempt; and the
                         non-public APIs of others that are used
    Reporting            log lines
    Guarantees           what holds, whatever happens
    Queue                where jobs wait, and who may take them
    Workers              threads, connections, and how a job passes through them
    Drain                how serving ends, and what becomes of what is left
    Lifespan middleware  the ASGI side
    Task backend         django.tasks on the same queue
    App and checks       the AppConfig and `manage.py check`

The package is django-simple-task, its licence MIT. Copy the file if you like: it needs
Django, asgiref and the standard library, and does not know its own path.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import math
import numbers
import os
import queue
import random
import sys
import threading
import traceback
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from heapq import heappop, heappush
from importlib import import_module
from time import monotonic, sleep
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import asgiref.local
import django.db.backends.base.base
from asgiref.compatibility import guarantee_single_callable
from asgiref.sync import (
    AsyncToSync,
    SyncToAsync,
    ThreadSensitiveContext,
    async_to_sync,
    iscoroutinefunction,
    sync_to_async,
)
from django.apps import AppConfig
from django.apps import apps as registry
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import setting_changed
from django.db import connections, reset_queries
from django.db.backends.signals import connection_created
from django.urls import set_urlconf
from django.utils import timezone
from django.utils.module_loading import import_string


def _import_tasks() -> Any:
    """Return django.tasks, on Django 5.2 its backport, None where there is neither."""
    for package in "django.tasks", "django_tasks":
        with contextlib.suppress(ImportError):
            for module in "backends.base", "signals":
                import_module(f"{package}.{module}")
            return import_module(package)
    return None


tasks = _import_tasks()
TaskResult: Any = tasks.TaskResult if tasks else object
BaseTaskBackend: Any = tasks.backends.base.BaseTaskBackend if tasks else object

__all__ = [
    "DjangoSimpleTaskConfig",
    "JobLost",
    "QueueFull",
    "SimpleTaskBackend",
    "ajoin",
    "defer",
    "django_simple_task_middleware",
    "join",
    "stats",
]
__version__ = "1.0.0"

_LABEL = "django_simple_task"


# Settings


class _Field(NamedTuple):
    """What is allowed as the value of a setting or an option."""

    default: Any
    allowed: str
    kind: Any
    lowest: float = 0
    highest: float = sys.float_info.max

    def clean(self, value: Any) -> Any:
        """Return the value to use, of a plain type; raise TypeError or ValueError."""
        if value is None and self.default is None:
            return None
        if self.kind is object:
            try:
                value = import_string(value) if isinstance(value, str) else value
            except Exception as error:  # whatever the imported module raises
                raise ValueError from error
            if not callable(value):
                raise TypeError
            return value
        if self.kind is float and isinstance(value, timedelta):
            value = value.total_seconds()
        fits = isinstance(value, _ABSTRACT.get(self.kind, self.kind))
        # bool is a subclass of int, but a boolean is not taken for a number.
        if not fits or isinstance(value, bool) != (self.kind is bool):
            raise TypeError
        if self.kind is not str and not self.lowest <= value <= self.highest:
            raise ValueError  # NaN included, which is nowhere between two numbers
        return self.kind(value)


# The numbers of other libraries are accepted, such as NumPy's.
_ABSTRACT: dict[type, type] = {int: numbers.Integral, float: numbers.Real}


_PREFIX = "DJANGO_SIMPLE_TASK_"
_SETTINGS = {
    # Jobs in flight at once per serving loop; read at startup.
    "WORKERS": _Field(1, "a whole number from 1 to 1000", int, 1, 1000),
    # Jobs waiting at most in the process; read at each call.
    "QUEUE_MAXSIZE": _Field(100_000, "a whole number, 0 for no limit", int),
    # Seconds that a drain may take; read when the drain begins.
    "SHUTDOWN_GRACE_PERIOD": _Field(None, "seconds from 0, None for no limit", float),
    # Whether jobs run before the call returns, for tests; read at each call.
    "IMMEDIATE": _Field(False, "True or False", bool),
    # Returns the context manager to enter around each attempt; read at each attempt.
    "AROUND_JOB": _Field(None, "a callable, the dotted path of one or None", object),
}


def _read_setting(name: str) -> Any:
    wanted = _SETTINGS[name]
    given = value = getattr(settings, _PREFIX + name, wanted.default)
    try:
        # As environment variables give a number.
        if isinstance(value, str) and value.strip().replace(".", "", 1).isdecimal():
            given = float(value) if "." in value else int(value)
        return wanted.clean(given)
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(
            f"{_PREFIX}{name} is {_shown(value)}: it must be {wanted.allowed}."
        ) from error


# A setting of ours by its name, remembered until `setting_changed` is sent.
_setting = functools.cache(_read_setting)


def _forget_settings(**kwargs: Any) -> None:
    global _setting
    # A new cache: a thread that is just reading may put the old value into this one.
    _setting = functools.cache(_read_setting)


def _shown(value: Any) -> str:
    """Show the value of a setting or option in an error."""
    try:
        return _cut(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def _cut(text: str) -> str:
    """Escape and cut text of unknown origin, so that it fits a line of a log."""
    text = text[: _LONGEST_NAME + 1]
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


_LONGEST_NAME = 200


# Exceptions


class QueueFull(queue.Full):
    """The queue holds as many jobs as DJANGO_SIMPLE_TASK_QUEUE_MAXSIZE allows."""

    def __init__(self, *args: Any) -> None:
        why = f"As many jobs wait as {_PREFIX}QUEUE_MAXSIZE allows."
        super().__init__(*(args or [why]))


class JobLost(RuntimeError):
    """The process ended before the job did."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(args or ["The process ended before the job did."]))


# Deferring


def defer(
    func: Callable[..., Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> None:
    """
    Add a function or coroutine function to the queue, to be run by this process.

    Never wait. Safe to call from any thread, event loop, signal handler or `__del__`.
    The job runs in a copy of the caller's context, at most once unless `max_attempts`
    says otherwise: coroutine functions on the serving event loop, sync ones in threads.

    `arguments` may hold "args", a sequence, and "kwargs", a mapping with str keys. Both
    containers are copied, their contents are not. `options` may hold:

    - "thread_sensitive" (bool, False): run a sync function in asgiref's one
      thread-sensitive thread of the process. No meaning for coroutine functions.
    - "priority" (int from -100 to 100, 0): higher first, then first in, first out.
    - "run_after" (aware datetime or timedelta, None): not before then.
    - "timeout" (seconds above 0 or timedelta, None): for coroutine functions. An
      attempt that takes longer is cancelled, and failed with TimeoutError.
    - "max_attempts" (int from 1 to 100, 1): try again on an Exception, until then.
    - "backoff" (seconds from 0 or timedelta, 1.0): the wait before attempt n + 1 is
      `backoff * 2 ** (n - 1)` seconds, give or take 10 %, and one hour at most.

    A Task of `django.tasks` may be passed as well: it is enqueued, and "priority" and
    "run_after" are passed on. Not in signal handlers or `__del__`: see enqueue().

    Raise TypeError or ValueError for a call that could never run, QueueFull when the
    queue is full, ImproperlyConfigured when the app is missing or a setting is bad, and
    RuntimeError when the interpreter is shutting down. Nothing has been queued then.
    """
    if type(func) is not FunctionType and _is_task(func):
        return _defer_task(func, arguments, options)
    on_loop = _is_coroutine_function(func)
    args, kwargs = _NO_ARGUMENTS if arguments is None else _check_arguments(arguments)
    checked, delay = _NO_OPTIONS, None
    if options is not None:
        checked, delay = _check_options(options, on_loop)
        on_loop = on_loop or checked["thread_sensitive"]  # asgiref is called there
    _process.check_room()
    job = _Job(func, args, kwargs, on_loop, checked, _capture_context())
    if _logger().isEnabledFor(logging.DEBUG):
        _log(logging.DEBUG, job, "deferred")
    _process.put(job, delay)


def join(timeout: float | None = None) -> bool:
    """
    Block until no job of this process is pending or in flight, scheduled ones aside.

    Return False if `timeout` seconds pass first. Safe to call from any thread.
    Raise RuntimeError inside a job, and on a running event loop.
    """
    _check_outside_jobs()
    if _running_loop() is not None:
        raise RuntimeError("join() would block the event loop: use `await ajoin()`.")
    deadline = _deadline(timeout)
    _drive(_until_quiet(deadline))
    return monotonic() < deadline or not _process.unfinished()


async def ajoin(timeout: float | None = None) -> bool:
    """Await the same as join(), on any event loop. Inside a job raise RuntimeError."""
    _check_outside_jobs()
    deadline = _deadline(timeout)
    await _adrive(_until_quiet(deadline))
    return monotonic() < deadline or not _process.unfinished()


def stats() -> dict[str, int]:
    """
    Return the counters of this process, as of one moment. Safe to call from any thread.

    The keys are workers, accepted, rejected, pending, scheduled, in_flight, succeeded,
    failed, lost, handed_over and retried (attempts). At any time accepted = succeeded +
    failed + lost + handed_over + pending + scheduled + in_flight.
    """
    return _process.stats()


def _check_outside_jobs() -> None:
    if _inside_job.get():
        raise RuntimeError("A job cannot wait for all jobs to end: it is one of them.")


# Code that waits for jobs is a generator: whenever it has to wait, it yields the latest
# time at which to look again. So one drain serves a thread and an event loop.
_Waiting = Iterator[float]


def _until_quiet(deadline: float) -> _Waiting:
    while _process.unfinished() and monotonic() < deadline:
        yield deadline


def _deadline(seconds: float | None) -> float:
    """Return when, on the monotonic clock, the seconds will be over."""
    return math.inf if seconds is None else monotonic() + seconds


def _drive(waiting: _Waiting) -> None:
    # Not an Event: a signal handler that defers might interrupt us while we hold its
    # lock, and wait for it.
    changes: queue.SimpleQueue[None] = queue.SimpleQueue()
    with _process.watching(functools.partial(changes.put, None)):
        for until in waiting:
            seconds = min(max(until - monotonic(), 0), threading.TIMEOUT_MAX)
            with contextlib.suppress(queue.Empty):
                changes.get(timeout=seconds)


async def _adrive(waiting: _Waiting) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    with _process.watching(functools.partial(_call_on, loop, event.set)):
        for until in waiting:
            seconds = min(until - monotonic(), threading.TIMEOUT_MAX)
            timer = loop.call_later(max(seconds, 0), event.set)
            try:
                await event.wait()
            finally:
                timer.cancel()
            event.clear()


def _run_immediately(job: _Job) -> None:
    """Run a job here and now. Of what it raises, only KeyboardInterrupt gets out."""
    if job.options["thread_sensitive"]:
        job.on_loop = False  # any job is in its caller's thread
    again: float | None = 0.0
    try:
        while again is not None:  # a retry does not wait
            with _process.lock:
                _process.in_flight[job] = None
                job.begin()
                _process.retried += job.attempt > 1
            try:
                if job.to_announce:
                    _off_the_loop(functools.partial(job.announce, "immediate"))
                if not job.on_loop:
                    job.scope.run(job.run)
                if job.on_loop or job.awaitable is not None:
                    _off_the_loop(lambda: job.scope.run(_await_here, job))
            except BaseException as interruption:  # Ctrl-C, or no thread can be started
                job.drop_awaitable()
                job.raised = interruption
            again = _off_the_loop(job.end)
        if isinstance(job.raised, KeyboardInterrupt):
            raise job.raised
    finally:
        with _process.lock:
            _process.claim(job, "failed")  # no effect unless end() was interrupted
            _process.settle(job)
            _process.notify()
        job.forget()


def _await_here(job: _Job) -> None:
    job.enter()
    # Constructed here, off the loop: it may keep the loop that it finds.
    async_to_sync(job.arun)(None)


def _off_the_loop(function: Callable[[], Any]) -> Any:
    """Call a function here; where an event loop runs, in a helper thread, and wait."""
    if _running_loop() is None:
        return function()
    future: Future[Any] = Future()
    _start_thread(functools.partial(_fulfil, future, function))
    return future.result()


def _start_thread(
    target: Callable[[], Any], name: str = f"{_LABEL}-helper"
) -> threading.Thread:
    """Start a daemon thread, with an empty context, whatever threads inherit."""

    def run() -> None:
        target()
        _close_connections()

    thread = threading.Thread(target=run, name=name, daemon=True)
    Context().run(thread.start)
    return thread


def _fulfil(
    future: Future[Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Call a function, and set its result or exception on a future."""
    if future.running():  # it was called before, and interrupted
        future.set_exception(RuntimeError("The call was interrupted."))
    if future.done() or not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*args, **kwargs))
    except StopIteration as error:  # which no asyncio.Future can carry
        carrier = RuntimeError(f"StopIteration was raised: {error}")
        carrier.__cause__ = error
        future.set_exception(carrier)
    except BaseException as error:
        future.set_exception(error)


# Jobs


_OPTIONS = {
    "thread_sensitive": _Field(False, "True or False", bool),
    "priority": _Field(0, "a whole number from -100 to 100", int, -100, 100),
    "timeout": _Field(
        None, "seconds above 0, a timedelta or None", float, math.ulp(0.0)
    ),
    "max_attempts": _Field(1, "a whole number from 1 to 100", int, 1, 100),
    "backoff": _Field(1.0, "seconds from 0, or a timedelta", float),
}
_NO_OPTIONS = {name: wanted.default for name, wanted in _OPTIONS.items()}
_LONGEST_BACKOFF = 3600.0
# Shared by all jobs without arguments: it is only read.
_NO_ARGUMENTS: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass(slots=True, eq=False, repr=False)
class _Job:
    """The record of one call: what to call, in which context, and how that goes."""

    func: Any
    args: Any
    kwargs: Any
    on_loop: bool
    options: Mapping[str, Any]
    context: Any
    number: int = 0
    attempt: int = 0
    # "succeeded", "failed", "lost" or "handed_over", once that is certain.
    outcome: str | None = None
    # Of the attempt:
    started: float = field(init=False)
    scope: Any = field(init=False)  # its context
    entered: bool = field(init=False)  # whether a thread has entered that
    loop_has_it: bool = field(init=False)
    task: asyncio.Task[None] | None = field(init=False)  # on the loop
    awaitable: Any = field(init=False)  # what is still to be awaited
    raised: Any = field(init=False)  # its error, or None if there was none
    to_announce: bool = field(init=False)  # whether task_started is still to be sent

    # Whether Django's signals report it. Their receivers may use the ORM, so such a job
    # begins and ends in a thread.
    observed = False
    # Whether another backend would take it.
    movable = False

    @property
    def id(self) -> str:
        with _process.lock:
            if not self.number:
                _process.numbers += 1
                self.number = _process.numbers
        return str(self.number)

    @property
    def name(self) -> str:
        return _name(self.func)

    def begin(self) -> None:
        """Begin an attempt, under the lock; one of several has a context of its own."""
        self.started = monotonic()
        many = self.options["max_attempts"] > 1
        self.scope = self.context.copy() if many else self.context
        self.awaitable = self.task = None
        self.entered = self.loop_has_it = False
        self.raised = _NOT_ENDED
        self.to_announce = self.observed
        self.attempt += 1  # last, so that what was interrupted begins again

    def enter(self) -> None:
        """In the context of the attempt, whenever a thread enters it."""
        _enter(self.scope, again=self.entered)
        self.entered = True

    def call(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    # run() and arun() let no exception of any kind out: a job's SystemExit is no reason
    # to stop the server, and its CancelledError says nothing about us.

    def run(self) -> None:
        """Make the call in this thread, within the job's context."""
        try:
            self.enter()
            with self.around():
                value = self.call()
                if value is not None:
                    self.take_result(value)
            if self.awaitable is None:
                self.raised = None
        except BaseException as error:
            self.drop_awaitable()
            self.raised = error

    async def arun(self, worker: _Worker | None) -> None:
        """Await it; ORM calls are made in the worker's thread, or in the caller's."""
        try:
            if worker is not None:
                self.enter()
                if self.options["thread_sensitive"] and self.awaitable is None:
                    await self.run_in_shared_thread()
                    if self.awaitable is None:
                        return
                _thread_sensitive_context.set(worker.sensitive)
                _turn.set(worker.turn)
            if self.options["timeout"] is None and _setting("AROUND_JOB") is None:
                await self.await_result()
            else:
                await self.await_within_limits(self.options["timeout"])
            self.raised = None
        except BaseException as error:
            self.raised = error

    async def await_within_limits(self, seconds: float | None) -> None:
        limit = asyncio.timeout(None)
        try:
            async with limit, contextlib.AsyncExitStack() as stack:
                if seconds is not None:
                    now = asyncio.get_running_loop().time()
                    when = now + min(seconds, threading.TIMEOUT_MAX)
                    # In an empty context: a cancelled timer keeps its context alive.
                    Context().run(limit.reschedule, when)
                manager = self.around()
                if hasattr(type(manager), "__aenter__"):
                    await stack.enter_async_context(manager)
                else:
                    stack.enter_context(manager)
                await self.await_result()
        finally:
            if limit.expired():  # though it may have ignored its cancellation
                raise TimeoutError(f"The job took longer than {seconds:g} seconds.")

    def around(self) -> Any:
        """Return the context manager of the project for this attempt."""
        make = _setting("AROUND_JOB")
        if make is None:
            return _NOTHING
        record = SimpleNamespace(
            name=self.name,
            id=self.id,
            attempt=self.attempt,
            is_async=self.on_loop and not self.options["thread_sensitive"],
        )
        return make(record)

    async def await_result(self) -> None:
        awaitable, self.awaitable = self.awaitable, None
        value = await (self.call() if awaitable is None else awaitable)
        while value is not None and inspect.isawaitable(value):
            value = await value
        if value is not None:
            self.take_result(value)

    async def run_in_shared_thread(self) -> None:
        """Make the call of a thread-sensitive job in asgiref's one thread for such."""
        _thread_sensitive_context.set(None)  # not in the worker's thread

        def call() -> None:
            _clean_connections()
            self.run()
            _clean_connections()
            _forget_loops()

        await sync_to_async(call, thread_sensitive=True)()

    def take_result(self, value: Any) -> None:
        """Accept what a call returned: a result, or an awaitable that gives one."""
        if inspect.isawaitable(value):
            self.awaitable = value
        elif isinstance(value, (Generator, AsyncGenerator)):
            raise TypeError(
                f"{self.name} returned a {type(value).__name__}, whose body would "
                "never run. Pass a function that consumes it."
            )
        else:
            self.keep(value)

    def drop_awaitable(self) -> None:
        """Close what nobody will await, or Python would warn."""
        awaitable, self.awaitable = self.awaitable, None
        if inspect.iscoroutine(awaitable):
            awaitable.close()

    def is_for_loop(self) -> bool:
        """Tell whether only the loop can bring its attempt to an end."""
        return self.on_loop or self.awaitable is not None or self.loop_has_it

    def is_silent(self) -> bool:
        """Tell whether nothing is to be said of its end."""
        return (
            self.raised is None
            and not self.observed
            and not _logger().isEnabledFor(logging.INFO)
        )

    def end(self) -> float | None:
        """Record and report how the attempt ended; return the seconds to the next."""
        if self not in _process.in_flight:
            return None  # a drain gave it up
        if self.raised is _NOT_ENDED:
            self.raised = asyncio.CancelledError("It was cancelled before it began.")
        error, delay = self.raised, None
        attempts_left = self.options["max_attempts"] - self.attempt
        # By its type: an object may lie about its __class__.
        if attempts_left > 0 and issubclass(type(error), Exception):
            delay = self.options["backoff"] * 2.0 ** (self.attempt - 1)
            delay = min(delay * random.uniform(0.9, 1.1), _LONGEST_BACKOFF)
        if error is not None:
            self.note(error, again=delay is not None)
        if delay is not None:
            self.report(
                _log,
                logging.WARNING,
                self,
                "will be retried",
                max_attempts=self.options["max_attempts"],
                delay=round(delay, 3),
                reason=_describe(error),
            )
        elif _process.claim(self, "succeeded" if error is None else "failed"):
            self.report(self.report_end, error)
        return delay

    def report(
        self, function: Any, *args: Any, within: Context | None = None, **fields: Any
    ) -> None:
        """Call in a copy of the job's context: what it left may still be inside it."""
        context = within or _entered(self.scope if self.attempt else self.context)
        try:
            context.run(function, *args, **fields)
        except BaseException as error:
            _write_to_stderr("A job could not be reported.", error)
            if threading.current_thread() is threading.main_thread():
                raise  # under IMMEDIATE, by Ctrl-C

    def report_end(self, error: BaseException | None) -> None:
        seconds = _seconds_since(self.started)
        if error is None:
            _log(logging.INFO, self, "finished", seconds=seconds)
        else:
            _log(logging.ERROR, self, "failed", error, seconds=seconds)

    def forget(self) -> None:
        """Let go of all that the caller gave, whoever still holds the record."""
        self.func = self.args = self.kwargs = self.context = self.scope = None
        self.raised = self.task = None

    # Hooks that only observed jobs implement

    def announce(self, worker: str) -> None:
        """Tell that an attempt begins."""

    def keep(self, value: Any) -> None:
        """Keep what it returned, or raise what makes that unacceptable."""

    def note(self, error: BaseException, *, again: bool) -> None:
        """Keep what an attempt has raised, and whether there is another one."""

    def note_outcome(self, outcome: str, reason: str | None) -> None:
        """Note how it has ended, under the lock, and why it was given up."""


_NOT_ENDED = object()
_NOTHING = contextlib.nullcontext()


def _name(func: Any) -> str:
    """Name what a job calls; not by its repr, which may show arguments."""
    try:
        while issubclass(type(func), functools.partial):
            func = func.func
        return _cut(_path(func))
    except BaseException as error:  # of what it looked at
        _let_through(error)
        return _cut(_path(type(func)))


def _path(named: Any) -> str:
    """Return where a function or class is to be found; of an object, its class."""
    try:
        module, name = named.__module__ or "builtins", named.__qualname__
    except BaseException as error:  # it has no name, or a property that fails
        _let_through(error)
        module = name = None
    if isinstance(module, str) and isinstance(name, str):
        return f"{module}.{name}"
    return _path(type(named))


def _describe(error: BaseException) -> str:
    try:
        return _cut(f"{type(error).__name__}: {error}")
    except BaseException as failure:  # of its own __str__
        if isinstance(failure, KeyboardInterrupt):
            _let_through(failure)
        return _name(type(error))


def _let_through(error: BaseException) -> None:
    """Raise again what interrupts a caller, as Ctrl-C does."""
    here = threading.current_thread() is threading.main_thread()
    if here and not isinstance(error, Exception) and _running_loop() is None:
        raise error


def _seconds_since(started: float) -> float:
    return round(monotonic() - started, 3)


def _is_coroutine_function(func: Any) -> bool:
    """
    Tell whether `func` gives a coroutine; raise TypeError for what cannot be a job.

    Three forms that count escape inspect and asgiref: a marked partial, an object whose
    class has an `async def __call__`, and a partial of one.
    """
    if type(func) is FunctionType and not func.__dict__:
        # As nearly all are, in a tenth of the time that asgiref and inspect would take.
        kind = func.__code__.co_flags & _KINDS
        if kind in (0, inspect.CO_COROUTINE):
            return kind != 0
    if not callable(func):
        raise TypeError(_why_not_callable(func))
    inner = func
    while isinstance(inner, functools.partial):
        if iscoroutinefunction(SimpleNamespace(**vars(inner))):  # it is marked itself
            return True
        inner = inner.func
    if iscoroutinefunction(inner):
        return True
    if not inspect.isroutine(inner) and not inspect.isclass(inner):
        inner = type(inner).__call__
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise TypeError(
            f"{_name(func)} is a generator function: its body would never run. Pass a "
            "function that consumes the generator."
        )
    return iscoroutinefunction(inner)


_KINDS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _why_not_callable(func: Any) -> str:
    new = inspect.CORO_CREATED
    if inspect.iscoroutine(func) and inspect.getcoroutinestate(func) == new:
        func.close()  # or Python would warn that it was never awaited
    cure = ", not the coroutine that it returns" if inspect.isawaitable(func) else ""
    kind = type(func).__name__
    return f"A job must be a function, not {kind}: pass the function{cure}."


def _check_arguments(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _check_keys("arguments", arguments, ("args", "kwargs"))
    args, kwargs = arguments.get("args"), arguments.get("kwargs")
    if args is None:
        args = ()
    elif not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
        kind = type(args).__name__
        raise TypeError(f'arguments["args"] must be a list or a tuple, not {kind}.')
    if kwargs is None:
        return tuple(args), _NO_ARGUMENTS[1]
    if not isinstance(kwargs, Mapping):
        kind = type(kwargs).__name__
        raise TypeError(f'arguments["kwargs"] must be a dict, not {kind}.')
    for key in kwargs:
        if not isinstance(key, str):
            kind = type(key).__name__
            raise TypeError(f'arguments["kwargs"] must have str keys, not {kind}.')
    return tuple(args), dict(kwargs)


def _check_keys(what: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a dict, not {type(given).__name__}.")
    for key in given:
        if key not in known:
            shown = repr(_cut(key)) if isinstance(key, str) else type(key).__name__
            names = ", ".join(known)
            raise TypeError(
                f"{what} must not have the key {shown}: it may have {names}."
            )


def _check_options(options: Any, on_loop: bool) -> tuple[Any, float | None]:
    """Return the options, and in how many seconds the job is due, None for now."""
    _check_keys("options", options, (*_OPTIONS, "run_after"))
    checked = {**_NO_OPTIONS, **options}
    delay = _seconds_until(checked.pop("run_after", None))
    for name, wanted in _OPTIONS.items():
        try:
            checked[name] = wanted.clean(checked[name])
        except (TypeError, ValueError) as error:
            kind = type(checked[name]).__name__
            raise type(error)(
                f'options["{name}"] must be {wanted.allowed}; this {kind} is not.'
            ) from None
    if checked["timeout"] is not None and not on_loop:
        raise ValueError(
            'options["timeout"] is for coroutine functions: a thread cannot be '
            "interrupted."
        )
    checked["thread_sensitive"] &= not on_loop  # it has no meaning there
    return checked, delay


def _seconds_until(run_after: Any) -> float | None:
    """Return in how many seconds that is, None for now."""
    if run_after is None:
        return None
    if isinstance(run_after, datetime):
        if run_after.utcoffset() is None and settings.USE_TZ:
            raise ValueError(
                'options["run_after"] must be an aware datetime while USE_TZ is True, '
                "not a naive one: see django.utils.timezone.make_aware()."
            )
        if run_after.utcoffset() is None:
            naive, run_after = run_after, run_after.replace(tzinfo=UTC)
            # At the ends of the calendar a zone makes no difference, and fails.
            with contextlib.suppress(OverflowError, ValueError):
                run_after = naive.astimezone()
        run_after -= datetime.now(UTC)
    if not isinstance(run_after, timedelta):
        raise TypeError(
            'options["run_after"] must be an aware datetime, a timedelta or None, not '
            f"{type(run_after).__name__}."
        )
    seconds = run_after.total_seconds()
    return seconds if seconds > 0 else None


# All non-public API of Django, asgiref, asyncio and threading is used here, but for
# normalize_json() and the fields of a TaskResult. It has a stand-in where there can be
# one, and a test that fails on the day it goes.

# atexit comes too late: executors are closed by then, and with them name look-ups,
# asyncio.to_thread() and sync_to_async().
_call_at_exit: Any = getattr(threading, "_register_atexit", atexit.register)

# As asyncio.get_running_loop(), but for None where that raises.
_running_loop = asyncio._get_running_loop


def _forget_loops() -> None:
    """Leave no event loop to the next job of this thread, neither set nor running."""
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)


# Python 3.14 looks for signals between the entering of a `with` and its body: if a
# handler raises there, a lock stays taken.
_MAY_STAY_TAKEN = sys.version_info[:2] == (3, 14)


class _Lock(type(threading.RLock())):  # type: ignore[misc]
    """An RLock that is released if its entering is interrupted."""

    def __enter__(self) -> Any:
        depth = self._recursion_count()
        try:
            return self.acquire()
        except BaseException:
            while self._recursion_count() > depth:
                self.release()
            raise


def _belong_to(loop: asyncio.AbstractEventLoop) -> None:
    """Have async_to_sync() in this thread run its coroutines on a loop."""
    place: Any = getattr(SyncToAsync, "threadlocal", None)
    if place is not None and getattr(place, "main_event_loop", None) is not loop:
        place.main_event_loop, place.main_event_loop_pid = loop, os.getpid()


def _renew_shared_thread() -> None:
    """Replace asgiref's executor in a forked child, where its thread is gone."""
    if hasattr(SyncToAsync, "single_thread_executor"):
        SyncToAsync.single_thread_executor = ThreadPoolExecutor(max_workers=1)


# The alias of a connection to the server, but to no database of the project.
_NO_DATABASE: Any = getattr(django.db.backends.base.base, "NO_DB_ALIAS", None)


def _connections_here() -> Mapping[str, Any]:
    """Return this thread's connections by alias, with those that failed to be made."""
    try:
        return vars(connections._connections._storage)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # then look into it each time
        return {"unknown": None}


# A job's context is a copy of its caller's. What asgiref keeps there belongs to a
# request and to a thread: ORM calls would run in the request's own, or be refused, and
# what was set in another thread, as the language is, would not be seen.

_thread_sensitive_context: ContextVar[Any] = getattr(
    SyncToAsync, "thread_sensitive_context", ContextVar("absent")
)
_deadlock_context: ContextVar[Any] = getattr(
    SyncToAsync, "deadlock_context", ContextVar("absent")
)
_single_thread_context: ContextVar[Any] = getattr(
    AsyncToSync, "async_single_thread_context", ContextVar("absent")
)
_thread_executors: Any = getattr(
    SyncToAsync, "context_to_thread_executor", weakref.WeakKeyDictionary()
)
# From asgiref 3.12 on a Local keeps its values together with the thread that set them.
# Before, it keeps them in a dict that all copies of a context share.
_Storage: Any = getattr(asgiref.local, "_Storage", None)


def _variable_of(set_value: Callable[..., Any], *args: Any) -> ContextVar[Any]:
    """Find the variable behind a Local, by what setting a value leaves in a context."""
    context = Context()
    context.run(set_value, *args)
    return next(iter(context), ContextVar("absent"))


_executors = getattr(AsyncToSync, "executors", SimpleNamespace())
_NO_VALUES: Any = _Storage(0, {}) if _Storage else {}
# What a job does not inherit, and what it has instead. Not by Locals themselves: those
# lock, and what another thread has locked as the process forks, stays so in the child.
_NOT_INHERITED = {
    _deadlock_context: False,
    _thread_sensitive_context: None,
    _single_thread_context: None,
    _variable_of(setattr, _executors, "current", None): _NO_VALUES,
    _variable_of(set_urlconf, "of.the.request"): _NO_VALUES,
}


# A flag, not the job: the job holds the context, and they would keep each other alive.
_inside_job = ContextVar("inside_job", default=False)
# Which turn of its worker it is, on the loop. What it leaves behind there keeps that.
_turn = ContextVar("turn", default=0)


def _enter(context: Context, *, again: bool = False) -> None:
    """In a job's context: let this thread see its Locals, but not the request's."""
    thread = threading.get_ident()
    for variable, value in context.items():
        wanted = value if again else _NOT_INHERITED.get(variable, value)
        if type(wanted) is _Storage and wanted.thread_id != thread:
            wanted = _Storage(thread, wanted.data)
        elif _Storage is None and variable.name == "asgiref.local":
            wanted = wanted.copy()
        if wanted is not value:
            variable.set(wanted)
    _inside_job.set(True)


def _entered(context: Context) -> Context:
    """Return a copy of a job's context that was entered."""
    context = context.copy()
    context.run(_enter, context)
    return context


_capture_context = copy_context if _Storage else lambda: _entered(copy_context())


# Reporting


@functools.cache
def _logger() -> logging.Logger:
    # Not at import, for Django disables all loggers that are there when it configures
    # logging, unless the project says otherwise.
    return logging.getLogger(_LABEL)


def _log(
    level: int,
    job: _Job,
    event: str,
    exception: BaseException | None = None,
    **fields: Any,
) -> None:
    """Write a line of a job's life."""
    if _logger().isEnabledFor(level):  # else nobody need name it
        named = {"job": job.name, "id": job.id, "attempt": job.attempt}
        _write(level, event, exception, **named, **fields)


def _write(
    level: int, event: str, exception: BaseException | None = None, **fields: Any
) -> None:
    """Write a line to our logger, or to stderr if a handler or filter fails."""
    logger = _logger()
    if not logger.isEnabledFor(level):
        return
    message = " ".join([event, *(f"{key}=%s" for key in fields)]).strip()
    args = tuple(fields.values())
    try:
        record = logger.makeRecord(logger.name, level, __file__, 0, message, args, None)
        # Not as `extra`, which is refused if a record factory has one of the names.
        vars(record).update(fields)
        if exception is not None:
            record.exc_info = (type(exception), exception, exception.__traceback__)
            record.exc_text = _traceback(exception)  # or a formatter would not cut it
        logger.handle(record)
    except BaseException as failure:
        _write_to_stderr(message % args if args else message, exception)
        _write_to_stderr("A logging handler or filter failed.", failure)
        if not isinstance(failure, Exception):
            raise


def _write_to_stderr(line: str, error: BaseException | None) -> None:
    text = line if error is None else f"{line}\n{_traceback(error)}"
    with contextlib.suppress(Exception):  # there is no other place
        sys.stderr.write(text.encode("ascii", "backslashreplace").decode() + "\n")


def _traceback(error: BaseException) -> str:
    """Format a traceback, at a length that a log and a TaskResult can bear."""
    try:
        text = "".join(traceback.format_exception(error)).rstrip("\n")
    except BaseException:  # of its own attributes
        text = _describe(error)
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates


_LONGEST_TRACEBACK = 20_000


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Report whatever is raised, of whatever kind, and go on."""
    try:
        yield
    except BaseException as error:
        _write(logging.ERROR, what, error)


# Guarantees
#
# What holds, whatever happens:
#
# - One queue. What waits stays in it until a worker takes it; who serves is a list
#   beside it. So nothing moves from place to place, and order needs no code.
# - One lock. What threads share of jobs is changed under it, for as long as a few lines
#   take; nothing that may block, or is not ours, is called or released under it. It
#   can be entered again, as a signal handler or a `__del__` may defer in the middle. A
#   loop with an `if` goes into a function that is called inside the `with`: as it jumps
#   back, CPython is briefly outside the `with`, and a signal handler that raised there
#   would leave the lock taken.
# - A job is in one account. It waits, or it is in flight, or it is settled: each change
#   is one step under the lock, and what was accepted is the sum of all. Whoever sets
#   its outcome first, its worker or a drain, reports it; it is in flight until then.
# - No wake-up is missed. A worker that finds nothing joins the idle in the same step;
#   a job that is queued wakes one of them in the same step. One wake-up too many does
#   no harm: a worker that is woken looks for itself.
# - Nothing that carries a job is shared. A coroutine job has an asyncio task, a job of
#   either kind a copy of its caller's context. A thread is passed on clean or replaced.
# - No two jobs in flight share a database connection: a worker has one job and one
#   thread, and a connection belongs to a thread.
# - What is said of a job is said in its context, and off the loop.
# - Nothing that a job, a receiver or a logging handler raises ends a worker.
# - A drain ends in time. What it waits for has a limit, and what may hang runs in a
#   thread that can be left behind.


# Queue

# How many jobs that are due become ready in one step, at most.
_MOST_AT_ONCE = 200


class _Queue:
    """
    Where jobs wait: by priority, then arrival; and by the clock, those that wait for a
    retry or for their `run_after`. All methods but qsize() are called under the lock.
    """

    def __init__(self) -> None:
        self.levels: dict[int, deque[_Job]] = {}
        # Heaps, the first due first; numbers keep the order of equals.
        self.retries: list[tuple[float, int, _Job]] = []
        self.scheduled: list[tuple[float, int, _Job]] = []
        self._arrivals = 0

    def qsize(self) -> int:
        """Return the number of jobs that wait."""
        with _process.lock:
            return self.pending() + len(self.scheduled)

    def pending(self) -> int:
        return sum(map(len, self.levels.values())) + len(self.retries)

    def append(self, job: _Job) -> None:
        self.levels.setdefault(job.options["priority"], deque()).append(job)

    def append_later(self, job: _Job, delay: float) -> bool:
        """Have a job wait for so many seconds. Return whether it is the first due."""
        heap = self.retries if job.attempt else self.scheduled
        self._arrivals += 1
        entry = (monotonic() + delay, self._arrivals, job)
        heappush(heap, entry)
        return heap[0] is entry

    def due(self) -> float:
        return min(
            (heap[0][0] for heap in (self.retries, self.scheduled) if heap),
            default=math.inf,
        )

    def advance(self, now: float, *, retry_at_once: bool = False) -> bool:
        """Make ready what is due, not too much at a stretch. Return whether any is."""
        until, left = math.inf if retry_at_once else now, _MOST_AT_ONCE
        for heap, limit in (self.retries, until), (self.scheduled, now):
            while heap and heap[0][0] <= limit and left > 0:
                left -= 1
                self.append(heap[0][2])  # first this: interrupted now, it is not lost
                heappop(heap)
        return left < _MOST_AT_ONCE

    def ready(self) -> list[deque[_Job]]:
        """Return what may run now, by priority."""
        return [self.levels[priority] for priority in sorted(self.levels, reverse=True)]

    def emptied(self, *, pending: bool = True) -> Iterator[_Job]:
        """
        Yield what waits, or only what is scheduled, in order. A job is taken out only
        when the caller has dealt with it: interrupted before, it is still counted.
        """
        for level in self.ready() if pending else ():
            while level:
                yield level[0]
                level.popleft()
        for heap in (self.retries, self.scheduled) if pending else (self.scheduled,):
            while heap:
                entry = heap[0]
                yield entry[2]
                if heap[0] is entry:  # else one was deferred that is due before
                    heappop(heap)


class _Process:
    """The queue of this process, who serves it, what is in flight, and the accounts."""

    def __init__(self) -> None:
        self.lock = _Lock() if _MAY_STAY_TAKEN else threading.RLock()
        self.queue = _Queue()
        self.pools: tuple[_Pool, ...] = ()  # those that serve, the latest last
        self.idle: dict[_Worker, None] = {}
        self.in_flight: dict[_Job, _Worker | None] = {}
        self.counts = {"succeeded": 0, "failed": 0, "lost": 0, "handed_over": 0}
        self.rejected = self.retried = self.numbers = self.result_ids = 0
        self.secret = b""
        self.watchers: dict[Callable[[], Any], None] = {}
        self.results: dict[str, _TaskJob] = {}
        self.finished: defaultdict[str, deque[str]] = defaultdict(deque)  # by alias
        self.requests_seen = self.lifespan_seen = False
        self.prepared = False
        self.exiting = False

    # Jobs come

    def put(self, job: _Job, delay: float | None) -> None:
        """Queue a job, and wake an idle worker; or run it, if all are immediate."""
        if _setting("IMMEDIATE"):
            self.prepare()
            return _run_immediately(job)
        while True:
            with self.lock:
                if self.someone_serves():
                    if delay is not None:
                        return self.put_later(job, delay)
                    self.queue.append(job)
                    if self.idle:
                        self.wake(job)
                    return
            self.start_background()

    def check_room(self, *, may_overflow: bool = False) -> None:
        """Raise if no job can be queued now, before anything is said of it."""
        maxsize, immediate = _setting("QUEUE_MAXSIZE"), _setting("IMMEDIATE")
        if immediate or not self.pools:
            _check_configuration()
        if not immediate and 0 < maxsize <= self.queue.qsize():
            with self.lock:
                self.rejected += not may_overflow
            if not self.someone_serves():  # as its loop was closed without a shutdown
                self.start_background()
            raise QueueFull

    def put_later(self, job: _Job, delay: float) -> None:
        if self.queue.append_later(job, delay):
            for pool in self.pools:
                _call_on(pool.loop, pool.look_again)
        self.notify()

    def wake(self, job: _Job) -> None:
        """Wake an idle worker, where the job belongs."""
        for worker in [*self.idle]:
            if job.on_loop:
                _call_on(worker.pool.loop, worker.work_on_loop)
            else:
                worker.call_in_thread(worker.work)
            # Only now: interrupted before, the next job wakes it, perhaps once more.
            if self.idle.pop(worker, self) is None:
                return  # else a signal handler has woken it for another job

    def wake_all(self) -> None:
        """Wake every idle worker, if any job is ready."""
        if any(self.queue.levels.values()):
            for worker in [*self.idle]:
                worker.call_in_thread(worker.work)

    # Jobs are taken, and settled

    def take(self, worker: _Worker) -> _Job | None:
        """Give a worker the next job; without any, it joins the idle."""
        if worker.pool.closed:
            worker.pool.worker_left()
            return None
        waits = self.queue.retries or self.queue.scheduled
        if waits and self.queue.advance(monotonic()):
            self.wake_all()
        for level in self.queue.ready():
            while level:
                job = level[0]
                # First this: an exception that is injected before the next step leaves
                # the job in flight, where the worker finds it, and both in the queue.
                fresh = job.outcome is None and job not in self.in_flight
                if fresh:
                    self.in_flight[job] = worker
                level.popleft()
                if fresh:
                    job.begin()
                    return job
        worker.has_no_job = True
        self.idle[worker] = None
        self.wake_all()  # for what a signal handler has deferred as we looked
        self.notify()
        return None

    def take_if_idle(self, worker: _Worker) -> _Job | None:
        """Give a worker that was woken the next job, unless it has one."""
        with self.lock:
            if not worker.has_no_job:
                return None
            worker.has_no_job = False
            self.idle.pop(worker, None)
            return self.take(worker)

    def claim(self, job: _Job, outcome: str, reason: str | None = None) -> bool:
        """Set how a job has ended, if nobody has before. It is reported next."""
        with self.lock:
            if job.outcome is not None or job not in self.in_flight:
                return False
            job.note_outcome(outcome, reason)
            job.outcome = outcome
            return True

    def settle(self, job: _Job) -> bool:
        """Count, under the lock, a job that has ended, unless a drain has done that."""
        if job not in self.in_flight:
            return False
        job.outcome = job.outcome or "succeeded"
        self.counts[job.outcome] += 1
        del self.in_flight[job]
        return True

    def settle_and_take(
        self, worker: _Worker, job: _Job, delay: float | None = None
    ) -> _Job | None:
        """Let go of a job, or have it wait for its next attempt; take the next one."""
        # Dropped after the lock is released: finalizers may wait for a thread.
        settled, left = False, (job.raised, job.scope)
        with self.lock:
            job.raised = None  # or it would keep itself alive, by way of its frames
            if delay is None:
                settled = self.settle(job)
            elif job in self.in_flight:
                self.retried += 1
                job.scope = job.context
                self.put_later(job, delay)
                del self.in_flight[job]
            following = self.take(worker)
        del left
        if settled:
            job.forget()
        return following

    def held_by(self, *workers: _Worker) -> list[_Job]:
        with self.lock:
            flying = [*self.in_flight.items()]
        return [job for job, worker in flying if worker in workers]

    def stats(self) -> dict[str, int]:
        with self.lock:
            accounts = {
                "pending": self.queue.pending(),
                "scheduled": len(self.queue.scheduled),
                "in_flight": len(self.in_flight),
                **self.counts,
            }
            return {
                "workers": sum(len(pool.workers) for pool in self.pools),
                "accepted": sum(accounts.values()),
                "rejected": self.rejected,
                **accounts,
                "retried": self.retried,
            }

    def new_result_id(self) -> str:
        """Return 128 bits that nobody guesses, and no other process has."""
        self.prepare()  # for a fork, after which this is another process
        # Not os.urandom() each time: it releases the GIL, and waits to get it back.
        with self.lock:
            self.secret = self.secret or os.urandom(32)
            self.result_ids += 1
            number = b"%d" % self.result_ids
        return blake2b(number, key=self.secret, digest_size=16).hexdigest()

    def unfinished(self) -> bool:
        with self.lock:
            return bool(self.in_flight or self.queue.pending())

    @contextlib.contextmanager
    def watching(self, callback: Callable[[], Any]) -> Iterator[None]:
        """Have a function called, in whatever thread, when jobs may have ended."""
        try:
            with self.lock:
                self.watchers[callback] = None
            yield
        finally:
            with self.lock:
                self.watchers.pop(callback, None)

    def notify(self) -> None:
        for callback in [*self.watchers]:
            callback()

    # Who serves

    def someone_serves(self) -> bool:
        for pool in self.pools:
            if pool.loop.is_closed():  # without a lifespan.shutdown
                pool.bury()
        return bool(self.pools)

    def serve(self) -> _Pool:
        """Let the running loop serve. What the background has in flight ends there."""
        self.prepare()
        self.lifespan_seen = True
        loop = asyncio.get_running_loop()
        for pool in self.pools:
            if pool.loop is loop and pool.lifespans > 0:  # else it is ending
                pool.lifespans += 1
                return pool
        pool = _Pool(loop)
        pool.start_threads()
        with self.lock:
            self.pools = (*self.pools, pool)
            # Only now: a `__del__` may have started one meanwhile.
            first = self.pools[0]
            if isinstance(first, _Background):
                first.withdraw()
                first.worker_left()
        pool.begin()
        return pool

    def start_background(self) -> None:
        """Serve without a lifespan."""
        self.prepare()
        background = _Background()
        try:
            with self.lock:
                if self.pools:  # another thread was faster
                    background.loop.close()
                    return
                self.pools = (background,)
            background.start()
        except BaseException:  # also a signal handler's
            background.undo_start()
            raise
        said, level = "No lifespan: jobs run in a background thread", logging.INFO
        if self.requests_seen and not self.lifespan_seen:
            level = logging.WARNING
            said += ", though requests come: jobs waiting at SIGTERM may be lost"
        _write(level, f"{said}.")

    def prepare(self) -> None:
        """Register for forks and for the exit, once there is something to lose."""
        if self.prepared:
            return
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start_empty)
        # What is registered last is called first: before executors' processes end.
        with contextlib.suppress(ImportError, RuntimeError):  # there may be none
            import_module("concurrent.futures.process")
        try:
            _call_at_exit(_drain_at_exit)
        except RuntimeError:  # the main thread has ended, or this is its very end
            self.exiting = threading.current_thread() is threading.main_thread()
            atexit.register(_drain_at_exit)
        self.prepared = True  # only now: interrupted before, it is done once more

    def start_empty(self) -> None:
        """In a forked child: the parent's jobs stay the parent's."""
        parents = vars(self).copy()
        vars(self).update(vars(_Process()))
        _inside_job.set(False)  # in which it may have been forked
        _renew_shared_thread()
        del parents  # only now: what goes with it may defer, from its `__del__`


# Workers


class _Worker:
    """
    Takes job after job and runs it, on the loop or in a thread of its own; at any time
    it is in one of the two, or idle. The thread is also for what is said of its jobs,
    and for the ORM calls of those on the loop: to asgiref it is an executor.
    """

    def __init__(self, pool: _Pool, name: str) -> None:
        self.pool = pool
        self.has_no_job = True
        # The thread's connections by alias; Django's dict: a look costs nothing.
        self.connections: Mapping[str, Any] = {}
        # Of the job on the loop: its latest call.
        self.latest: Future[Any] | None = None
        self._latest_call: tuple[Any, ...] | None = None
        # What has ended on the loop, until the thread goes on.
        self.to_finish: _Job | None = None
        self.ended = False
        self._calls: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        # By which asgiref finds it, for the ORM calls of the job on the loop; how many
        # such jobs have ended.
        self.sensitive = ThreadSensitiveContext()
        self.turn = 1
        self.thread = _start_thread(self._serve, name)
        _thread_executors[self.sensitive] = self

    def call_in_thread(self, *call: Any) -> None:
        """Have the thread call a function with arguments. It should not raise."""
        self._calls.put(call)
        if not self.thread.is_alive():  # it has died; or has ended, and is asked again
            died = RuntimeError("The thread of the worker has died.")
            serve = functools.partial(self._serve, None if self.ended else died)
            self.thread = _start_thread(serve, self.thread.name)

    def submit(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """Do what asgiref asks of an executor."""
        future: Future[Any] = Future()
        call = functools.partial(_fulfil, future, function, *args, **kwargs)
        if _turn.get() != self.turn:
            _start_thread(call)  # of what an ended job left behind: it may hang
            return future
        if self.connections and self.latest is None:
            self.call_in_thread(_clean_connections)
        self.latest, self._latest_call = future, (call,)
        self.call_in_thread(call)
        return future

    def has_open_call(self) -> bool:
        """Tell whether a call is open that the job on the loop has made."""
        latest = self.latest
        # Cancelled before it began, it may wait behind one that hangs.
        return latest is not None and (latest.cancelled() or not latest.done())

    def end(self) -> None:
        """Let the thread end when it has done what it was called for."""
        self.ended = True
        _thread_executors.pop(self.sensitive, None)  # or it would live for ever
        self._calls.put(None)

    # In the thread

    def _serve(self, interruption: BaseException | None = None) -> None:
        self.connections = _connections_here()
        _belong_to(self.pool.loop)
        call: tuple[Any, ...] | None = ()
        while call is not None:
            try:
                if interruption is not None:
                    self.recover(interruption)
                interruption = None  # or it would live, with all its frames
                while (call := self._calls.get()) is not None:
                    call[0](*call[1:])
                    call = ()  # or it would keep a job alive while the thread waits
            except BaseException as error:  # injected by a job, or memory that ran out
                interruption, call = error, ()
                if self.has_open_call():  # perhaps its call was hit; twice does no harm
                    self._calls.put(self._latest_call)

    def clean_connections(self) -> None:
        if self.connections:
            _clean_connections()

    def work(self, job: _Job | None = None) -> None:
        """
        Run jobs until one belongs on the loop, or none is left. The first is a given
        one, or what follows the one that leaves the loop, or what waits, if idle.
        """
        if job is None and self.to_finish is not None:
            job = self.finish(self.to_finish)
        elif job is None:
            job = _process.take_if_idle(self)
        self.clean_connections()  # which may have grown too old meanwhile
        until = monotonic() + _SLICE
        while job is not None:
            if job in _process.in_flight:  # else a drain gave it up on its way
                if job.to_announce:
                    job.announce(self.thread.name)
                if not job.on_loop:
                    job.scope.run(job.run)
                if job.on_loop or job.awaitable is not None:
                    return self.carry_to_loop(job)
            job = self.finish(job)
            if monotonic() >= until:
                sleep(_BREATH)
                until = monotonic() + _SLICE

    def finish(self, job: _Job) -> _Job | None:
        """End an attempt, and return the next job; leave nothing for it to find."""
        delay = None
        job.loop_has_it = False
        self.to_finish = self.latest = self._latest_call = None
        self.clean_connections()
        _forget_loops()
        _belong_to(self.pool.loop)  # a job's own loop may have taken that place
        if not job.is_silent():
            delay = job.end()
            self.clean_connections()  # of receivers and handlers
        return _process.settle_and_take(self, job, delay)

    def carry_to_loop(self, job: _Job) -> None:
        with _process.lock:  # or the loop might have let go of it first
            carried = _call_on(self.pool.loop, self.work_on_loop, job)
            job.loop_has_it = carried
        if not carried:
            self.pool.bury()  # with what the job is waiting for still
            job.drop_awaitable()

    def recover(self, error: BaseException) -> None:
        """Go on after an exception injected from outside; the job at hand fails."""
        job, *_ = *_process.held_by(self), None
        if job is None:
            # It may not have noticed its wake-up.
            self.has_no_job = self.to_finish is None
        elif not job.attempt or not job.loop_has_it:  # else the loop has it
            if not job.attempt:
                job.begin()
            if job.outcome is None and self.to_finish is None:
                job.drop_awaitable()
                if job.raised is _NOT_ENDED or job.raised is None:
                    job.raised = error
            self.to_finish = job
        self.work()

    # On the loop

    def work_on_loop(self, job: _Job | None = None, task: Any = None) -> None:
        """As work(), on the loop. Called back by an ended task, go on after its job."""
        try:
            if job is None:
                job = _process.take_if_idle(self)
            elif task is not None:
                job = self.next_on_loop(job)
            self.run_on_loop(job)
        except BaseException as error:  # memory ran out, or a signal handler raised
            for held in _process.held_by(self):
                held.loop_has_it = False
            self.call_in_thread(self.recover, error)
            if not isinstance(error, Exception):
                raise

    def run_on_loop(self, job: _Job | None) -> None:
        """Run jobs until one waits, or belongs in the thread, or none is left."""
        until = monotonic() + _SLICE
        while job is not None:
            if job not in _process.in_flight:
                job.drop_awaitable()
                if job.outcome != "lost":  # it was recovered meanwhile, in the thread
                    return
                job = _process.settle_and_take(self, job)
                continue
            if job.to_announce or not (job.on_loop or job.awaitable is not None):
                return self.call_in_thread(self.work, job)
            job.loop_has_it = True
            job.task = task = asyncio.Task(
                job.arun(self),
                loop=self.pool.loop,
                name=job.name,
                context=job.scope,
                **_EAGERLY,
            )
            if not task.done():
                ended = functools.partial(self.work_on_loop, job)
                return task.add_done_callback(ended, context=Context())
            job = self.next_on_loop(job)
            if job is not None and monotonic() >= until:
                _call_on(self.pool.loop, self.work_on_loop, job)
                return

    def next_on_loop(self, job: _Job) -> _Job | None:
        """Return the next job, if there is nothing to be done in the thread before."""
        self.turn += 1
        if self.latest is None and job.on_loop and job.is_silent():
            return _process.settle_and_take(self, job)
        worker = self.replace(job) if self.has_open_call() else self
        worker.to_finish = job
        worker.call_in_thread(worker.work)
        if self.pool.closed:
            worker.end()  # perhaps once more: a job may outlive the drain
        return None

    def replace(self, job: _Job) -> _Worker:
        """Leave the thread behind, as a call hangs there that nobody waits for."""
        worker = self
        with _reported("No thread can be started in the place of one that hangs."):
            worker = _Worker(self.pool, self.thread.name)
            worker.has_no_job = False
            with _process.lock:
                self.pool.workers[self.pool.workers.index(self)] = worker
                if job in _process.in_flight:
                    _process.in_flight[job] = worker
            self.end()
        return worker


# At once, not at the loop's next turn, which costs more than most jobs.
_EAGERLY: Any = {"eager_start": True} if sys.version_info >= (3, 12) else {}
# Seconds for which jobs may hold the loop, or the GIL, at a stretch; and for how long a
# thread lets the loop have the GIL then.
_SLICE, _BREATH = 0.001, 0.00005


def _close_connections() -> None:
    with _reported("A connection failed to close."):
        connections.close_all()


def _clean_connections() -> None:
    """Do what Django does between requests, and end transactions left open."""
    for connection in connections.all(initialized_only=True):
        try:
            if connection.in_atomic_block:
                connection.close()
                del connections[connection.alias]  # closed, it would refuse to reopen
            else:
                connection.close_if_unusable_or_obsolete()
        except Exception as error:
            del connections[connection.alias]
            _write(logging.ERROR, "A connection failed to close.", error)
    if settings.DEBUG:
        reset_queries()


def _disconnect(connection: Any, **kwargs: Any) -> None:
    """
    Receive connection_created. A connection to no database of the project means that
    one for tests is to be dropped; PostgreSQL refuses that while idle threads are
    connected.
    """
    if connection.alias != _NO_DATABASE:
        return
    with _process.lock:
        for worker in _process.idle:
            worker.call_in_thread(_close_connections)
    with contextlib.suppress(RuntimeError, AttributeError):  # at the end
        SyncToAsync.single_thread_executor.submit(connections.close_all)


def _call_on(loop: asyncio.AbstractEventLoop, function: Any, *args: Any) -> bool:
    """Have a loop call a function, from any thread. Return False if it is closed."""
    try:
        # In an empty context: that of the caller would live until the loop has turned,
        # and one for all cannot be entered by a loop within the loop.
        loop.call_soon_threadsafe(function, *args, context=Context())
    except RuntimeError:
        if not loop.is_closed():
            raise  # it is a RecursionError
        return False
    return True


class _Pool:
    """The workers of one event loop that serves."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.current_thread()
        self.workers: list[_Worker] = []
        self.lifespans = 1  # that share the loop; only there it changes
        self.closed = False
        self.deadline = math.inf
        self.has_reported = False  # a loss at the end of the grace period
        self.timer: asyncio.TimerHandle | None = None

    def start_threads(self) -> None:
        try:
            for number in range(1, _setting("WORKERS") + 1):
                name = f"{_LABEL}-{os.getpid()}-{number}"
                self.workers.append(_Worker(self, name))
        except BaseException:
            self.end_workers()
            raise

    def begin(self) -> None:
        for worker in self.workers:
            worker.call_in_thread(worker.work)
        _call_on(self.loop, self.look_again)

    def look_again(self) -> None:
        """On the loop: wake workers for what is due; come back for what will be."""
        if self.timer is not None:
            self.timer.cancel()
        with _process.lock:
            _process.someone_serves()  # for a worker may be idle whose loop is closed
            _process.queue.advance(monotonic())
            _process.wake_all()
            due = _process.queue.due()
        if due < math.inf and not self.closed:
            seconds = min(max(due - monotonic(), 0), threading.TIMEOUT_MAX)
            call = self.loop.call_later
            self.timer = call(seconds, self.look_again, context=Context())

    def withdraw(self) -> None:
        """Take no more jobs. Under the lock."""
        self.closed = True
        _process.pools = tuple(pool for pool in _process.pools if pool is not self)
        for worker in self.workers:
            _process.idle.pop(worker, None)
        _process.wake_all()  # for jobs for which one of ours was woken

    def worker_left(self) -> None:
        """Note, under the lock, that one of the workers takes no more."""
        _process.notify()

    def bury(self) -> None:
        """Withdraw: the loop was closed without a shutdown. What it has is lost."""
        loss = _Loss()
        with _process.lock:
            self.withdraw()
            loss.take_over([*filter(_Job.is_for_loop, _process.held_by(*self.workers))])
        say = functools.partial(loss.say, math.inf)
        try:
            _start_thread(say)
        except RuntimeError:  # there are too many; not here, under the lock
            self.workers[0].call_in_thread(say)
        self.end_workers()

    def ends_with_process(self) -> bool:
        """Return whether Python exits without waiting for the thread of the loop."""
        return self.thread.daemon or not self.loop.is_running()

    def end_workers(self) -> None:
        for worker in self.workers:
            worker.end()

    def end_threads(self) -> _Waiting:
        """Let the threads end; one in which a job hangs is left behind."""
        _call_on(self.loop, self.look_again)  # without the timer
        self.end_workers()
        until = monotonic() + _PATIENCE
        while monotonic() < until and any(w.thread.is_alive() for w in self.workers):
            yield min(until, monotonic() + 0.005)  # a thread tells nobody of its end


class _Background(_Pool):
    """Serves where there is no lifespan: on a loop of its own, in a daemon thread."""

    def __init__(self) -> None:
        # A loop keeps the context of whoever made it.
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.name = f"{_LABEL}-background-{id(self):x}"
        super().__init__(Context().run(self.runner.get_loop))
        self.stopped = False

    def start(self) -> None:
        """Start the threads, or raise RuntimeError."""
        if _process.exiting:
            raise RuntimeError("The interpreter is shutting down: no job can be run.")
        self.start_threads()
        self.thread = _start_thread(self.serve, self.name)
        self.begin()

    def undo_start(self) -> None:
        """Leave no thread and no loop behind."""
        with _process.lock:
            self.withdraw()
        self.end_workers()
        if any(thread.name == self.name for thread in threading.enumerate()):
            self.stop()  # it was started, though perhaps not noted
        else:
            self.loop.close()

    def serve(self) -> None:
        while not self.stopped:  # a job may have stopped the loop
            # asyncio has a SystemExit get through that a task raises, of a job's own.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()
        self.runner.close()  # which ends the tasks that jobs have left behind

    def worker_left(self) -> None:
        super().worker_left()
        if not _process.held_by(*self.workers):
            self.end_workers()
            self.stop()

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            _call_on(self.loop, self.loop.stop)


# Drain

# Seconds that a cancelled job, or a thread, has to end before it is left to itself.
_PATIENCE = 0.25
# Seconds after the grace period for reporting what is lost.
_LAST_WORDS = 0.5
# Seconds after the grace period for handing Tasks over.
_HAND_OVER = 4.0
# Seconds for either of these the second time.
_MOMENT = 0.15
# Seconds that the wrapped application has for its shutdown in any case.
_INNER_SHUTDOWN = 1.0
# Seconds until a drain says what it waits for, and between two such lines.
_FIRST_REPORT, _NEXT_REPORT = 0.1, 5.0
# How many jobs a line names at most.
_MOST_NAMED = 20


def _drain(pool: _Pool, *, final: bool = False) -> _Waiting:
    """
    Wait until nothing is pending or in flight; past the deadline of the pool, give up
    the rest and report it. While other loops serve, they take what waits: only what is
    in flight here is waited for. If final, give up scheduled jobs, too, and end the
    threads.
    """
    report_at = monotonic() + _FIRST_REPORT
    while True:
        with _process.lock:
            now = monotonic()
            alone = {pool}.issuperset(_process.pools)
            if alone:
                _process.queue.advance(now, retry_at_once=True)
                _process.wake_all()  # as a wake-up may have been interrupted
            else:
                pool.withdraw()
            flying = [*_process.in_flight] if alone else _process.held_by(*pool.workers)
            pending = _process.queue.pending() if alone else 0
            late = now >= pool.deadline
            if late or not (flying or pending):
                loss = _Loss()
                if final:
                    pool.withdraw()
                waiting = _process.queue.emptied(pending=late)
                given_up = alone and (late or final)
                loss.take_over(flying if late else [], waiting if given_up else ())
                break
        if now >= report_at:
            yield from _say_what_a_drain_waits_for(pending, flying)
            report_at = now + _NEXT_REPORT
        yield min(pool.deadline, report_at)
    if loss.jobs() or loss.moving:
        yield from loss.report(again=pool.has_reported)
        pool.has_reported = late
    if final:
        yield from pool.end_threads()
        # Have run what a signal handler deferred amid these last steps.
        if _process.queue.qsize() and not (_process.pools or _process.exiting):
            _process.start_background()


def _grace_period_over_at() -> float:
    try:
        return _deadline(_setting("SHUTDOWN_GRACE_PERIOD"))
    except ImproperlyConfigured as error:
        _write(logging.ERROR, "This drain has no limit.", reason=str(error))
        return math.inf


def _say_what_a_drain_waits_for(pending: int, flying: list[_Job]) -> _Waiting:
    # Not later: a job forgets its function when it has ended.
    begun = [job for job in flying[:_MOST_NAMED] if job.attempt]
    seen = [(job.func, job.id, job.started) for job in begun]

    def say() -> None:
        named = [
            f"{_name(func)} (id {number}, {_seconds_since(started):.1f} s)"
            for func, number, started in seen
        ]
        bound = f"{_PREFIX}SHUTDOWN_GRACE_PERIOD"
        fields = {
            "pending": pending,
            "in_flight": len(flying),
            "jobs": ", ".join(named),
            bound: getattr(settings, bound, None),
        }
        _write(logging.WARNING, "draining", None, **fields)

    return _in_spare_thread(say, monotonic())


def _in_spare_thread(function: Callable[[], None], until: float) -> _Waiting:
    """Call what may hang in a thread of its own, and wait for it until then at most."""
    done = threading.Event()

    def call() -> None:
        with _reported("A drain could not report all jobs."):
            function()
        done.set()
        _process.notify()

    try:
        _start_thread(call)
    except RuntimeError:  # the interpreter is shutting down
        function()  # of which Ctrl-C gets out
        return
    while not done.is_set() and monotonic() < until:
        yield until


class _Loss:
    """
    What is given up together. It is claimed and counted in one step, then reported:
    lines first, signals afterwards, for as long as there is time.
    """

    def __init__(self) -> None:
        self.in_flight: list[_Job] = []
        self.waiting: list[_Job] = []
        self.moving: list[Any] = []  # what another backend would take
        self.unreported: deque[_Job] = deque()

    def take_over(self, in_flight: list[_Job], waiting: Iterable[_Job] = ()) -> None:
        """Under the lock: give up jobs, or have them move where that may be."""
        for job in in_flight:
            self.lose(job)
        for job in waiting:
            if job.movable and not job.attempt and job.outcome is None:
                _process.in_flight[job] = None
                self.moving.append(job)
            else:
                self.lose(job)
        _process.notify()

    def lose(self, job: _Job) -> None:
        """Under the lock: set that a job is lost, unless it has ended, and count it."""
        # In flight without an attempt: another drain is handing it over.
        flying = job.attempt > 0 and job in _process.in_flight
        if job.outcome is None:  # else it has ended, and is perhaps being reported
            _process.in_flight.setdefault(job)  # for the one step that this takes
            when = f"{_seconds_since(job.started)} s after" if flying else "before"
            _process.claim(job, "lost", f"The process ended {when} the job began.")
            (self.in_flight if flying else self.waiting).append(job)
        _process.settle(job)

    def jobs(self) -> list[_Job]:
        moved = [job for job in self.moving if job.outcome == "handed_over"]
        return [*self.in_flight, *self.waiting, *moved]

    def report(self, *, again: bool = False) -> _Waiting:
        """Report it; briefly, if another loss has had most of the time for that."""
        until = monotonic()
        tasks = [job.task for job in self.in_flight if job.task is not None]
        for task in tasks:
            _call_on(task.get_loop(), task.cancel)
        if self.moving:
            until += _MOMENT if again else _HAND_OVER
            yield from _in_spare_thread(self.hand_over, until)
            with _process.lock:
                for job in self.moving:
                    self.lose(job)
        until += _MOMENT if again else _LAST_WORDS
        if self.jobs():
            yield from _in_spare_thread(functools.partial(self.say, until), until)
            if left := len(self.unreported):
                self.unreported.clear()
                what = "No time was left to send task_finished for some Tasks."
                say = functools.partial(_write, logging.ERROR, what, untold=left)
                yield from _in_spare_thread(say, monotonic() + _MOMENT)
        while not all(task.done() for task in tasks) and monotonic() < until:
            yield until

    def hand_over(self) -> None:
        """Have another backend take what it would take."""
        for job in self.moving:
            if job.outcome is not None:
                continue  # the time is up, or another drain was faster
            with _reported(f"{job.name} could not be handed over."):
                where = job.hand_over()
                with _process.lock:
                    if _process.claim(job, "handed_over", where):
                        _process.settle(job)

    def say(self, until: float) -> None:
        given_up = self.jobs()
        self.unreported.extend(job for job in given_up if job.observed)
        for job in self.in_flight:
            seconds = _seconds_since(job.started)
            job.report(_log, logging.ERROR, job, "lost in flight", seconds=seconds)
        by_name: dict[str, list[_Job]] = {}
        for job in self.waiting:
            by_name.setdefault(job.name, []).append(job)
        for name, jobs in by_name.items():
            ids = [job.id for job in jobs[:_MOST_NAMED]]
            _write(logging.ERROR, "", lost=len(jobs), job=name, ids=",".join(ids))
        while self.unreported and monotonic() < until:
            job = self.unreported.popleft()
            job.report(job.report_end, None)
        for job in given_up:
            job.forget()


def _drain_at_exit() -> None:
    """In the main thread, at the very end."""
    over_at = _grace_period_over_at()
    while pool := _pool_to_drain_at_exit():
        pool.deadline = min(pool.deadline, over_at)
        if not pool.loop.is_running() and not isinstance(pool, _Background):
            pool.deadline = monotonic()  # its loop has ended without a shutdown
        _drive_to_the_end(pool, _drain(pool, final=True))
        if isinstance(pool, _Background):
            pool.stop()
            pool.thread.join(_PATIENCE)
            over_at = min(over_at, pool.deadline)  # also for what is still deferred
            _process.exiting = monotonic() >= over_at
    loss = _Loss()
    with _process.lock:
        # If one still serves, a thread goes on for which Python waits.
        waiting = () if _process.pools else _process.queue.emptied()
        loss.take_over(_in_flight_at_exit(), waiting)
    _drive(loss.report())


def _pool_to_drain_at_exit() -> _Pool | None:
    """Return one that ends with the process; without any, let none start any more."""
    with _process.lock:
        pools = [*filter(_Pool.ends_with_process, _process.pools)]
        _process.exiting = _process.exiting or not pools
    return pools[0] if pools else None


def _in_flight_at_exit() -> list[_Job]:
    """Return what is in flight, but where a thread goes on for which Python waits."""
    return [
        job
        for job, worker in [*_process.in_flight.items()]
        if worker is None or worker.pool.ends_with_process()
    ]


def _drive_to_the_end(pool: _Pool, drain: Any) -> None:
    """Wait for a drain. Ctrl-C, or another interruption, ends the grace period."""
    while True:
        try:
            return _drive(drain)
        except BaseException:
            pool.deadline = monotonic()
            if drain.gi_frame is None:  # the interruption ended the generator itself
                drain = _drain(pool, final=True)


# Lifespan middleware


def django_simple_task_middleware(app: Any, *, asgi_version: int = 3) -> Any:
    """
    Wrap an ASGI application, of version 2 or 3, and own the lifespan of the process.

    On `lifespan.startup` workers start on the server's event loop; they drain on
    `lifespan.shutdown`. An `app` that speaks the lifespan protocol is told of the
    startup before the workers start, and of the shutdown after they have drained.

    Return an ASGI 3 application, with `asgi_version=2` an ASGI 2 one. Raise ValueError
    for other versions, and TypeError if `app` is not callable.

    https://asgi.readthedocs.io/en/latest/specs/lifespan.html
    """
    if asgi_version not in (2, 3):
        raise ValueError(f"asgi_version must be 2 or 3, not {asgi_version!r}.")
    if not callable(app):
        raise TypeError(f"app must be an ASGI application, not {type(app).__name__}.")
    app = guarantee_single_callable(app)  # type: ignore[no-untyped-call]

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(app, scope, receive, send).run()
        else:
            _process.requests_seen = True
            await app(scope, receive, send)

    if asgi_version == 3:
        return middleware
    return lambda scope: functools.partial(middleware, scope)


def django_simple_task_middlware(app: Any, *, asgi_version: int = 3) -> Any:
    """The spelling of releases 0.1. Use django_simple_task_middleware()."""
    cure = "It is now spelt django_simple_task_middleware."
    warnings.warn(cure, DeprecationWarning, stacklevel=2)
    return django_simple_task_middleware(app, asgi_version=asgi_version)


class _Lifespan:
    """One lifespan of one process of a server."""

    def __init__(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        self.receive = receive
        self.send = send
        self.inner = _InnerLifespan(app, scope)
        self.pool: _Pool | None = None
        self.drain: Iterator[float] = iter(())

    async def run(self) -> None:
        try:
            while True:
                message = await self.receive()
                kind = message.get("type") if isinstance(message, Mapping) else message
                if kind == "lifespan.startup":
                    failure = await self.startup()
                elif kind == "lifespan.shutdown":
                    failure = await self.shutdown()
                else:
                    shown = _shown(kind)
                    _write(logging.WARNING, "Unknown lifespan message.", kind=shown)
                    continue
                if failure is None:
                    await self.send({"type": f"{kind}.complete"})
                else:
                    await self.send({"type": f"{kind}.failed", "message": failure})
                if failure is not None or kind == "lifespan.shutdown":
                    return
        except BaseException as error:
            # Without a loop, or in a coroutine that is thrown away, nothing is awaited.
            if _running_loop() and not isinstance(error, GeneratorExit):
                await self.break_off(error)
            raise

    async def startup(self) -> str | None:
        """Start the application, then the workers. Return why it failed, or None."""
        if self.pool is not None:
            _write(logging.WARNING, "A second lifespan.startup was ignored.")
            return None
        if _running_loop() is None:
            return "Jobs run on asyncio's event loop; this server has none (trio?)."
        try:
            _check_configuration()
            failure = await self.inner.startup()
            if failure is None:
                self.pool = _process.serve()
        except (ImproperlyConfigured, RuntimeError) as error:  # too many threads
            failure = str(error)
        if failure is not None:
            self.inner.cancel()
        return failure

    async def shutdown(self) -> str | None:
        """Drain; let the application shut down; drain what that has deferred."""
        pool = self.pool
        if pool is None:
            return None
        deadline = _grace_period_over_at()
        pool.lifespans -= 1
        if pool.lifespans > 0:
            self.pool = None
            return await self.inner.shutdown(deadline)
        pool.deadline = deadline
        self.drain = _drain(pool)
        await _adrive(self.drain)
        failure = await self.inner.shutdown(deadline)
        self.drain = _drain(pool, final=True)
        await _adrive(self.drain)
        self.pool = None
        return failure

    async def break_off(self, error: BaseException) -> None:
        """End without an answer; at once, if the server does not wait."""
        try:
            if not isinstance(error, asyncio.CancelledError):
                _write(logging.ERROR, "The lifespan was broken off.", error)
                await self.shutdown()
        finally:  # where that was cancelled, the server does not wait any more
            await self.abandon()

    async def abandon(self) -> None:
        """Give up at once what is unfinished, and report it."""
        self.inner.cancel()
        pool = self.pool
        if pool is None:
            return
        pool.lifespans -= 1
        if pool.lifespans > 0:
            return
        pool.deadline = monotonic()
        # First the drain that was broken off.
        drain = itertools.chain(self.drain, _drain(pool, final=True))
        try:
            await _adrive(drain)
        except asyncio.CancelledError:  # once more: the loop itself may be ending
            _drive(drain)
            raise


class _InnerLifespan:
    """The lifespan of the wrapped application, if it has one. We are its server."""

    def __init__(self, app: Any, scope: Any) -> None:
        self.app = app
        self.scope = scope
        self.questions: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.asked = False

    async def startup(self) -> str | None:
        """Return why it failed; None if it did not, or if there is no lifespan."""
        if type(self.app).__call__ is ASGIHandler.__call__:
            return None  # Django's own handler refuses any lifespan
        return await self.ask("lifespan.startup", math.inf)

    async def shutdown(self, deadline: float) -> str | None:
        """Return why it failed, None if it did not. It has some time in any case."""
        if self.task is None:
            return None
        deadline = max(deadline, monotonic() + _INNER_SHUTDOWN)
        failure = await self.ask("lifespan.shutdown", deadline)
        self.cancel()
        # It may be this middleware once more, and have jobs still to report.
        await asyncio.wait({self.task}, timeout=_PATIENCE)
        return failure

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def serve(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
        except BaseException as error:
            # Else it refused the scope, and has no lifespan; or was told to end.
            if self.asked and not isinstance(error, asyncio.CancelledError):
                what = "The lifespan of the wrapped application failed."
                _write(logging.ERROR, what, error)

    async def receive(self) -> Mapping[str, Any]:
        question = await self.questions.get()
        self.asked = True
        return question

    async def send(self, message: Mapping[str, Any]) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    async def ask(self, kind: str, deadline: float) -> str | None:
        self.answer: asyncio.Future[Mapping[str, Any]] = asyncio.Future()
        self.questions.put_nowait({"type": kind})
        if self.task is None:  # only now: an eager one may answer at once
            self.task = asyncio.create_task(self.serve())
        seconds = None if deadline == math.inf else deadline - monotonic()
        first: Any = {self.answer, self.task}
        await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.answer.done() and self.answer.result().get("type") == f"{kind}.failed":
            return self.answer.result().get("message") or f"{kind} failed."
        return None


# Task backend


def _defer_task(task: Any, arguments: Any, options: Any) -> None:
    args, kwargs = _NO_ARGUMENTS if arguments is None else _check_arguments(arguments)
    if options is not None:
        _check_keys("options of a Task", options, ("priority", "run_after"))
        run_after = options.get("run_after")
        _seconds_until(run_after)  # raises for what is no time
        if isinstance(run_after, timedelta):
            try:
                run_after = timezone.now() + max(run_after, timedelta(0))
            except OverflowError:
                raise ValueError(
                    'options["run_after"] must be before the year 10000.'
                ) from None
        task = task.using(priority=options.get("priority"), run_after=run_after)
    task.enqueue(*args, **kwargs)


def _is_task(func: Any) -> bool:
    """Tell a Task, also one of the backport, which engines may use on any Django."""
    bases = sys.modules.get("django.tasks.base"), sys.modules.get("django_tasks.base")
    return any(base is not None and isinstance(func, base.Task) for base in bases)


class SimpleTaskBackend(BaseTaskBackend):  # type: ignore[misc]
    """
    Runs the Tasks of `django.tasks` in this process, on the same queue as defer().

    Results live in the process that took the Task: elsewhere get_result() raises
    TaskResultDoesNotExist. Any thread or event loop may call any method; instances, of
    which Django makes one per thread and context, keep no state.

    https://docs.djangoproject.com/en/stable/ref/tasks/
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        if tasks is None:
            raise ImproperlyConfigured(
                "SimpleTaskBackend needs Django 6.0 or newer, or django-tasks."
            )
        super().__init__(alias, params)

    def validate_task(self, task: Any) -> None:
        """
        Raise InvalidTask for a Task that cannot be run here, and what the overflow
        backend raises for one that it could not take.
        """
        super().validate_task(task)
        if self.overflow is not None:
            self.made_for_overflow(task)

    def made_for_overflow(self, task: Any) -> Any:
        """Make a Task anew as the overflow backend's own kind, which validates it."""
        there = tasks.task_backends[self.overflow]
        fields = {name: getattr(task, name) for name in _TASK_FIELDS}
        return there.task_class(**{**fields, "backend": self.overflow})

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """
        Queue a Task and return a snapshot of its TaskResult. Wait for nothing but the
        receivers of task_enqueued: on an event loop prefer aenqueue(). Not for signal
        handlers and `__del__`, since Django's signals take a lock: defer() there.

        Raise InvalidTask for a Task that cannot be run here, TypeError or ValueError
        for arguments that JSON cannot hold, and QueueFull when the queue is full and
        there is no OVERFLOW_BACKEND; where there is one, return what that returns.
        """
        job = _TaskJob(self, task, args, kwargs)
        try:
            _process.check_room(may_overflow=job.movable)
        except QueueFull:
            if not job.movable:
                raise
            return self.made_for_overflow(task).enqueue(*args, **kwargs)
        try:
            with _process.lock:
                _process.results[job.id] = job
            _seconds_until(task.run_after)  # raises for what is no time
            result = job.send(tasks.signals.task_enqueued)
            _log(logging.DEBUG, job, "deferred")
            _process.put(job, _seconds_until(task.run_after))
        except BaseException:
            with _process.lock:
                if not job.attempt:  # else it was queued, and has even run
                    _process.results.pop(job.id, None)
            raise
        return job.snapshot() if _setting("IMMEDIATE") else result

    def get_result(self, result_id: str) -> Any:
        """Return a snapshot of a TaskResult, or raise TaskResultDoesNotExist."""
        with _process.lock:
            job = _process.results.get(result_id)
        if job is not None and job.backend.alias == self.alias:
            return job.snapshot()
        if self.overflow is not None:
            return tasks.task_backends[self.overflow].get_result(result_id)
        raise tasks.exceptions.TaskResultDoesNotExist(
            "This process has no such TaskResult: SimpleTaskBackend keeps results in "
            "the process that took the Task, of the finished ones the latest "
            "MAX_RESULTS."
        )

    async def aget_result(self, result_id: str) -> Any:
        """See get_result()."""
        if self.overflow is None:
            return self.get_result(result_id)
        return await super().aget_result(result_id)

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Check OPTIONS, for `manage.py check`."""
        return [*self.faults()]

    def faults(self) -> Iterator[checks.CheckMessage]:
        where = f'TASKS["{self.alias}"]["OPTIONS"]'
        may = f"It may have {', '.join(_BACKEND_OPTIONS)}."
        if not isinstance(self.options, dict):
            yield _error(6, f"{where} is {_shown(self.options)}, not a dict.", may)
            return
        for name, value in self.options.items():
            wanted = _BACKEND_OPTIONS.get(name)
            if wanted is None:
                yield _error(7, f"{where} must not have the key {_shown(name)}.", may)
                continue
            try:
                wanted.clean(value)
            except (TypeError, ValueError):
                fault = f'{where}["{name}"] is {_shown(value)}: it must be'
                hint = f"Set it to {wanted.allowed}."
                yield _error(8, f"{fault} {wanted.allowed}.", hint)
        yield from _check_overflow(self, f'{where}["OVERFLOW_BACKEND"]')

    @functools.cached_property
    def overflow(self) -> str | None:
        """The alias of the overflow backend, if it may be one."""
        alias = isinstance(self.options, dict) and self.options.get("OVERFLOW_BACKEND")
        known = isinstance(alias, str) and alias in tasks.task_backends.settings
        if not known or isinstance(tasks.task_backends[alias], SimpleTaskBackend):
            return None
        return str(alias)

    @functools.cached_property
    def checked_options(self) -> dict[str, Any]:
        for fault in self.faults():
            raise ImproperlyConfigured(fault.msg)
        return {
            name: wanted.clean(self.options.get(name, wanted.default))
            for name, wanted in _BACKEND_OPTIONS.items()
        }

    def job_options(self, task: Any, on_loop: bool) -> Mapping[str, Any]:
        """Return the options of a Task's job."""
        ours = self.checked_options
        if not self.options and not task.priority:
            return _NO_OPTIONS
        return {
            "thread_sensitive": False,
            "priority": int(task.priority),
            "timeout": ours["TIMEOUT"] if on_loop else None,
            "max_attempts": ours["MAX_ATTEMPTS"],
            "backoff": ours["BACKOFF"],
        }


_TASK_FIELDS = "func", "priority", "queue_name", "run_after", "takes_context"
_BACKEND_OPTIONS = {
    "MAX_RESULTS": _Field(1000, "a whole number from 0", int),
    "TIMEOUT": _OPTIONS["timeout"],
    "MAX_ATTEMPTS": _OPTIONS["max_attempts"],
    "BACKOFF": _OPTIONS["backoff"],
    "OVERFLOW_BACKEND": _Field(None, "another alias of TASKS, or None", str),
}


class _TaskJob(_Job):
    """A Task that was enqueued: a job with a result, of whose life signals tell."""

    observed = True

    def __init__(
        self, backend: SimpleTaskBackend, task: Any, args: Any, kwargs: Any
    ) -> None:
        backend.validate_task(task)
        args, kwargs = _copy_json([*args]), _copy_json(kwargs)
        on_loop = _is_coroutine_function(task.func)
        options = backend.job_options(task, on_loop)
        super().__init__(task.func, args, kwargs, on_loop, options, _capture_context())
        self.backend = backend
        self.movable = backend.overflow is not None
        # What its TaskResult has. Under the lock: nobody sees half.
        self.fields: dict[str, Any] = {
            "task": task,
            "id": _process.new_result_id(),
            "status": tasks.TaskResultStatus.READY,
            "enqueued_at": timezone.now(),
            "started_at": None,
            "finished_at": None,
            "last_attempted_at": None,
            "args": args,
            "kwargs": kwargs,
            "backend": backend.alias,
            "errors": [],
            "worker_ids": [],
            "_return_value": None,
        }

    @property
    def id(self) -> str:
        return str(self.fields["id"])

    def snapshot(self) -> Any:
        """Return a TaskResult that shares nothing that changes, with us or another."""
        # Not by the constructor, which takes no return value and six times as long.
        result = object.__new__(_TaskResult)
        with _process.lock:
            values: dict[str, Any] = result.__dict__
            values.update(self.fields)
            for name in "args", "kwargs", "errors", "worker_ids", "_return_value":
                values[name] = _copied(values[name])
        return result

    def change(self, **changes: Any) -> None:
        with _process.lock:
            if self.outcome is None:  # a drain may have lost it just now
                self.fields.update(changes)

    def announce(self, worker: str) -> None:
        self.to_announce = False
        moment = timezone.now()
        self.change(
            status=tasks.TaskResultStatus.RUNNING,
            started_at=self.fields["started_at"] or moment,
            last_attempted_at=moment,
            worker_ids=[*self.fields["worker_ids"], worker],
        )
        # In the attempt's own context: what a receiver sets there, the job sees.
        self.scope.run(self.enter)
        self.report(self.send, tasks.signals.task_started, within=self.scope)

    def call(self) -> Any:
        args, kwargs = _copied(self.args), _copied(self.kwargs)
        if self.fields["task"].takes_context:
            context = tasks.base.TaskContext(task_result=self.snapshot())
            return self.func(context, *args, **kwargs)
        return self.func(*args, **kwargs)

    def keep(self, value: Any) -> None:
        self.change(_return_value=_copy_json(value))

    def note(self, error: BaseException, *, again: bool) -> None:
        noted = tasks.base.TaskError(
            exception_class_path=_path(type(error)), traceback=_traceback(error) + "\n"
        )
        status = tasks.TaskResultStatus.READY if again else self.fields["status"]
        self.change(errors=[*self.fields["errors"], noted], status=status)

    def note_outcome(self, outcome: str, reason: str | None) -> None:
        well, errors = outcome == "succeeded", self.fields["errors"]
        if reason is not None:
            path = _path(JobLost)
            text = f"{path}: {reason}\n"
            lost = tasks.base.TaskError(exception_class_path=path, traceback=text)
            errors = [*errors, lost]
        status = tasks.TaskResultStatus["SUCCESSFUL" if well else "FAILED"]
        self.fields.update(status=status, errors=errors, finished_at=timezone.now())
        finished = _process.finished[self.backend.alias]
        finished.append(self.id)
        while len(finished) > self.backend.checked_options["MAX_RESULTS"]:
            _process.results.pop(finished.popleft(), None)

    def report_end(self, error: BaseException | None) -> None:
        if error is None:
            self.send(tasks.signals.task_finished)
            return
        try:
            # Receivers log the exception that is being handled: Django's do.
            raise error
        except BaseException:
            self.send(tasks.signals.task_finished)
        finally:
            del error  # or it would keep itself alive, by way of this frame

    def send(self, signal: Any) -> Any:
        """Send a signal with a snapshot, and return that."""
        result = self.snapshot()
        try:
            signal.send_robust(type(self.backend), task_result=result)
        except Exception as error:  # as of an async receiver where a loop runs
            _write(logging.ERROR, "A signal of a Task was not delivered.", error)
        return result

    def hand_over(self) -> str:
        """Have the other backend take it; return a sentence that tells where it is."""
        task = self.backend.made_for_overflow(self.fields["task"])
        context = _entered(self.context)
        result = context.run(task.enqueue, *self.args, **self.kwargs)
        return f"Handed over to the backend {task.backend!r}, as {result.id}."


# Far below Python's limit of 1,000 frames: readers of a result need some.
_DEEPEST = 201


def _copied(value: Any, room: int = _DEEPEST) -> Any:
    """Return a copy of what is made of lists and dicts, so deep at most."""
    if room < 0:
        raise RecursionError
    if type(value) is list:
        return [_copied(each, room - 1) for each in value]
    if type(value) is dict:
        return {key: _copied(each, room - 1) for key, each in value.items()}
    return value


def _copy_json(value: Any) -> Any:
    """Return a copy of what JSON can hold, or raise TypeError or ValueError."""
    try:
        return _copied(tasks.base.normalize_json(value))
    except RecursionError:
        raise ValueError(
            "The value is nested too deeply, or contains itself."
        ) from None


class _TaskResult(TaskResult):  # type: ignore[misc, valid-type, unused-ignore]
    """A TaskResult that shows no arguments and no values where it is printed."""

    # Its values are in its dict, not in Django's slots: there they are set in one step.
    task: Any = None
    id = status = enqueued_at = started_at = finished_at = last_attempted_at = None
    args = kwargs = backend = errors = worker_ids = _return_value = None

    def __repr__(self) -> str:
        return f"<TaskResult {self.id} of {_name(self.task.func)}: {self.status}>"


def _check_overflow(
    backend: SimpleTaskBackend, where: str
) -> Iterator[checks.CheckMessage]:
    alias = backend.options.get("OVERFLOW_BACKEND")
    if not isinstance(alias, str):
        return
    if backend.overflow is None:
        fault = f"{where} is {_shown(alias)}, which is not another backend in TASKS."
        yield _error(9, fault, "Name the alias of a durable engine.")
        return
    there = tasks.task_backends[alias].queues
    missing = backend.queues - there if backend.queues else {"any other"}
    if there and missing:
        names = ", ".join(sorted(missing))
        fault = f"{where} is {alias!r}, which lacks these queues: {names}."
        yield _error(10, fault, f'Add to TASKS["{alias}"]["QUEUES"], or set it to [].')


def _error(number: int, message: str, hint: str) -> checks.CheckMessage:
    return checks.Error(message, hint=hint, id=f"{_LABEL}.E{number:03}")


# App and checks


class DjangoSimpleTaskConfig(AppConfig):
    """The app. Any thread may read its properties."""

    name = __name__
    label = _LABEL
    # Not the folder of the file: with a copy in a project's root, the whole project
    # would be taken for this app, its templates, fixtures and commands included.
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"__{_LABEL}__")

    def ready(self) -> None:
        setting_changed.connect(_forget_settings, dispatch_uid=_LABEL)
        connection_created.connect(_disconnect, dispatch_uid=_LABEL)
        checks.register(_check_settings)
        checks.register(_check_deployment, deploy=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that serves, the latest of several; None without one."""
        pools = _process.pools
        return pools[-1].loop if pools else None

    @property
    def queue(self) -> _Queue | None:
        """The queue, in which `queue.qsize()` jobs wait; None while nothing serves."""
        return _process.queue if _process.pools else None


# Django finds an AppConfig only in the submodule `apps` of what INSTALLED_APPS names.
# So this module is its own.
__path__: list[str] = []
sys.modules[f"{__name__}.apps"] = sys.modules[__name__]


def _check_configuration() -> None:
    """Raise ImproperlyConfigured if the app or a setting is not in order."""
    app = registry.app_configs.get(_LABEL)
    if app is None and not registry.apps_ready:
        raise ImproperlyConfigured(
            f"Django's apps are not loaded yet: use {__name__} after django.setup(), "
            "not while modules are being imported."
        )
    if app is None:
        raise ImproperlyConfigured(f'Add "{__name__}" to INSTALLED_APPS.')
    if not isinstance(app, DjangoSimpleTaskConfig):
        raise ImproperlyConfigured(
            f"This file was imported as {__name__} and as {app.name}: import it by the "
            "name that INSTALLED_APPS has."
        )
    for name in _SETTINGS:
        _setting(name)


def _check_settings(**kwargs: Any) -> Iterator[checks.CheckMessage]:
    for number, (name, wanted) in enumerate(_SETTINGS.items(), 1):
        try:
            _setting(name)
        except ImproperlyConfigured as error:
            yield _error(number, str(error), f"Set it to {wanted.allowed}.")
    for name in dir(settings):
        ours = [_PREFIX + each for each in _SETTINGS]
        if name.startswith(_PREFIX) and name not in ours:
            (nearest,) = difflib.get_close_matches(name, ours, n=1, cutoff=0)
            yield checks.Warning(
                f"{_cut(name)} is not a setting of {_LABEL}.",
                hint=f"Did you mean {nearest}?",
                id=f"{_LABEL}.W001",
            )


def _check_deployment(**kwargs: Any) -> Iterator[checks.CheckMessage]:
    grace_period = f"{_PREFIX}SHUTDOWN_GRACE_PERIOD"
    if getattr(settings, grace_period, None) is None:
        yield checks.Warning(
            f"{grace_period} is not set: a job that hangs holds up the "
            "shutdown until the orchestrator kills the process; nothing is reported.",
            hint="set it five seconds under your orchestrator's limit",
            id=f"{_LABEL}.W002",
        )


# Last, as it needs the classes above.
_process = _Process()
