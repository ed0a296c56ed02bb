"""Background tasks for Django inside the ASGI process. No broker, no table, one file.

    # settings.py
    INSTALLED_APPS = [..., "django_simple_task"]

    # asgi.py
    application = django_simple_task_middleware(get_asgi_application())

    # a view, sync or async
    defer(send_welcome, {"args": [user.pk]})

The middleware owns the ASGI lifespan. At startup it makes a queue and starts workers
on the server's own event loop; `defer()` puts functions and coroutine functions on the
queue, from any thread; at shutdown it drains: what was accepted is finished, or
reported by name.

Each job runs at most once and lives in memory: a crash loses what was waiting. Use it
for work that you would rather lose than run twice: mail, webhooks, thumbnails, caches.
The same queue serves Django's own `django.tasks` (see SimpleTaskBackend), so that a
project that outgrows one machine changes one setting and is on a durable engine.

Three words mean something else elsewhere. `defer()` hands over *now*; what Django calls
`supports_defer` is `run_after` here. To *drain* is to run what is left, not to discard
it. A *worker* runs one job at a time within this process; it is no process of a server.

The file follows a job through its life:

    Settings             what a project may configure, and what a value must look like
    Exceptions           what a caller may catch
    Handing over         defer(), join(), ajoin(), stats()
    Jobs                 the record of a call: checks, context, one attempt, its outcome
    Queue                where jobs wait: by priority, by arrival, by the clock
    Workers              the guarantees; threads and connections; the drain
    Process              who serves: lifespans or a background thread; fork and exit
    Lifespan middleware  the ASGI side
    Task backend         django.tasks on the same queue
    App and checks       the AppConfig and `manage.py check`

The package is django-simple-task, its licence MIT. Copy the file if you like: it needs
Django, asgiref and the standard library, and does not know its own path.
"""

from __future__ import annotations

import asyncio
import atexit
import codecs
import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import math
import os
import queue
import random
import secrets
import sys
import threading
import traceback
import warnings
import weakref
from bisect import insort
from collections import defaultdict, deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from contextvars import Context, ContextVar, copy_context
from datetime import datetime, timedelta, timezone
from heapq import heappop, heappush
from importlib import import_module
from operator import itemgetter
from threading import get_ident
from time import monotonic, time
from types import CoroutineType, FunctionType, SimpleNamespace
from types import coroutine as awaitable_generator
from typing import TYPE_CHECKING, Any, NamedTuple

import asgiref.local
import django.db.backends.base.base
from asgiref.compatibility import guarantee_single_callable
from asgiref.sync import (
    AsyncToSync,
    SyncToAsync,
    ThreadSensitiveContext,
    async_to_sync,
    iscoroutinefunction,
    markcoroutinefunction,
    sync_to_async,
)
from django.apps import AppConfig
from django.apps import apps as registry
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, reset_queries
from django.db.backends.signals import connection_created
from django.urls import set_urlconf


def _import_tasks() -> Any:
    """Return django.tasks, on Django 5.2 its backport, None where there is neither."""
    for package in "django.tasks", "django_tasks":
        with contextlib.suppress(ImportError):
            for module in "backends.base", "signals":
                import_module(f"{package}.{module}")
            return import_module(package)
    return None


tasks = _import_tasks()
if TYPE_CHECKING:
    from django.tasks.backends.base import BaseTaskBackend

    TaskResult = object
else:
    TaskResult = tasks.TaskResult if tasks else object
    BaseTaskBackend = tasks.backends.base.BaseTaskBackend if tasks else object

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
logger = logging.getLogger(_LABEL)

_Coroutine = Coroutine[Any, Any, Any]


# Settings


class _Field(NamedTuple):
    """What a value must look like that a user may give."""

    default: Any
    allowed: str
    kind: type
    lowest: float = 0
    highest: float = sys.float_info.max

    def clean(self, value: Any) -> Any:
        """Return the value to use, or raise TypeError or ValueError."""
        if value is None and self.default is None:
            return None
        if self.kind is float and isinstance(value, timedelta):
            value = value.total_seconds()
        # To Python a boolean is a number, and a whole number is no float.
        given = float if self.kind is float and type(value) is int else type(value)
        if not issubclass(given, self.kind) or (given is bool) != (self.kind is bool):
            raise TypeError
        if self.kind is not str and not self.lowest <= value <= self.highest:
            raise ValueError  # NaN included, which is nowhere between two numbers
        return value


_PREFIX = "DJANGO_SIMPLE_TASK_"
_WORKERS = _PREFIX + "WORKERS"
_QUEUE_MAXSIZE = _PREFIX + "QUEUE_MAXSIZE"
_SHUTDOWN_GRACE_PERIOD = _PREFIX + "SHUTDOWN_GRACE_PERIOD"
_IMMEDIATE = _PREFIX + "IMMEDIATE"
_SETTINGS = {
    # Jobs in flight at once per serving loop; read at startup.
    _WORKERS: _Field(1, "a whole number from 1 to 1000", int, 1, 1000),
    # Jobs waiting at most, per queue; read at each call.
    _QUEUE_MAXSIZE: _Field(100_000, "a whole number from 0 (which sets no limit)", int),
    # Seconds that a drain may take; read when the drain begins.
    _SHUTDOWN_GRACE_PERIOD: _Field(
        None, "a number of seconds from 0, or None to wait until all is done", float
    ),
    # Whether jobs run before the call returns, for tests; read at each call.
    _IMMEDIATE: _Field(False, "True or False", bool),
}


def _setting(name: str) -> Any:
    """Return a setting of ours, or raise ImproperlyConfigured."""
    field = _SETTINGS[name]
    value = _looked_up.setdefault(name, getattr(settings, name, field.default))
    try:
        return field.clean(_number_in(value))
    except (TypeError, ValueError):
        raise ImproperlyConfigured(
            f"{name} is {_cut(repr(value))}: it must be {field.allowed}."
        ) from None


def _number_in(value: Any) -> Any:
    """Take digits in a string, as environment variables give them, as a number."""
    if isinstance(value, str) and value.strip().replace(".", "", 1).isdecimal():
        return float(value) if "." in value else int(value)
    return value


def _cut(text: str) -> str:
    """Make text of unknown origin fit for a line of a log."""
    text = _escape(text[: _LONGEST_NAME + 1])[0].decode()
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


_LONGEST_NAME = 200
# Here, as str.encode() imports its codec when it first needs it: in a defer(), perhaps,
# that a signal handler interrupts to defer, too.
_escape = codecs.getencoder("unicode_escape")


# Exceptions


class _SelfExplanatory(Exception):
    """Has its docstring as its message, if it is raised bare."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(args or [self.__doc__]))


class QueueFull(_SelfExplanatory, queue.Full):
    """The queue holds as many jobs as DJANGO_SIMPLE_TASK_QUEUE_MAXSIZE allows."""


class JobLost(_SelfExplanatory, RuntimeError):
    """The process ended before the job did."""


# Handing over


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
    - "priority" (int from -100 to 100, 0): higher first, equal ones first in, first
      out.
    - "run_after" (aware datetime or timedelta, None): not before then.
    - "timeout" (seconds above 0 or timedelta, None): for coroutine functions. An
      attempt that takes longer is cancelled, and failed with TimeoutError.
    - "max_attempts" (int from 1 to 100, 1): try again on an Exception, until then.
    - "backoff" (seconds from 0 or timedelta, 1.0): the wait before attempt n + 1 is
      `backoff * 2 ** (n - 1)` seconds, give or take 10 %, and one hour at most.

    A Task of `django.tasks` may be passed as well: it is enqueued, and "priority" and
    "run_after" are passed on. Not from signal handlers and `__del__`: see enqueue().

    Raise TypeError or ValueError for what could not be run, QueueFull when the queue is
    full, ImproperlyConfigured when the app or a setting is not in order, and
    RuntimeError when the interpreter is shutting down. Nothing was queued then.
    """
    kind = func.__code__.co_flags & _KINDS if type(func) is FunctionType else None
    if kind == _COROUTINE:
        on_loop = True
    elif kind == 0 and not func.__dict__:
        on_loop = False
    elif tasks is not None and isinstance(func, tasks.base.Task):
        return _defer_task(func, arguments, options)
    else:
        on_loop = _is_coroutine_function(func)
    args, kwargs = _NO_ARGUMENTS if arguments is None else _check_arguments(arguments)
    checked, delay = _NO_OPTIONS, None
    if options is not None:
        checked, delay = _check_options(options, on_loop)
        on_loop = on_loop or checked.thread_sensitive  # asgiref is called from there
    pool = _pool_with_room()
    number = _process.accepted.step()
    call = (func, args, kwargs, on_loop, checked, _capture_context(), number)
    if pool is None or delay is not None or logger.isEnabledFor(logging.DEBUG):
        _put(_Job(call), pool, delay)
    else:
        pool.put(call, checked.priority)


# What the flags of a function tell of its kind, at a glance.
_COROUTINE = inspect.CO_COROUTINE
_KINDS = (
    _COROUTINE
    | inspect.CO_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)


def _pool_with_room(flows_over: bool = False) -> _Pool | None:
    """Return where a job may wait, None under IMMEDIATE; or raise why it may not."""
    try:
        immediate, maxsize = _looked_up[_IMMEDIATE], _looked_up[_QUEUE_MAXSIZE]
    except KeyError:
        immediate = maxsize = None
    if immediate is not False and _setting(_IMMEDIATE):
        _check_configuration()
        return None
    try:
        (pool,) = _process.pools  # in one step, since other threads change it
    except ValueError:
        pool = _process.serving_pool()
    if type(maxsize) is not int or maxsize < 0:
        maxsize = _setting(_QUEUE_MAXSIZE)
    if maxsize and pool.queue.qsize() >= maxsize:
        if not flows_over:
            _process.rejected.step()
        raise QueueFull(f"As many jobs wait as {_QUEUE_MAXSIZE} allows: {maxsize}.")
    return pool


def _put(job: _Job, pool: _Pool | None, delay: float | None) -> None:
    """Queue a job for now or for `delay` seconds later; or run it, under IMMEDIATE."""
    if logger.isEnabledFor(logging.DEBUG):
        _log(logging.DEBUG, job, "deferred")
    if pool is None:
        _run_immediately(job)
    elif delay is None:
        pool.put(job, job.options.priority)
    else:
        pool.put_later(job, monotonic() + delay)


def join(timeout: float | None = None) -> bool:
    """
    Block until no job of this process is pending or in flight. Scheduled ones may be.

    Return False when `timeout` seconds passed first. Safe to call from any thread.
    Raise RuntimeError inside a job, and on a running event loop.
    """
    _check_outside_jobs()
    if _running_loop() is not None:
        raise RuntimeError("join() would block the event loop: use `await ajoin()`.")
    deadline = _deadline(timeout)
    # No Event: a signal handler that defers would wait for the lock that we hold in it.
    changes: queue.SimpleQueue[None] = queue.SimpleQueue()
    with _process.watching(functools.partial(changes.put, None)):
        while _process.unfinished():
            seconds = deadline - monotonic()
            if seconds <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                changes.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    return True


async def ajoin(timeout: float | None = None) -> bool:
    """See join(). Any event loop may await it; a job may not: RuntimeError."""
    _check_outside_jobs()
    deadline = _deadline(timeout)
    changed = _LoopEvent()
    with _process.watching(changed.set):
        while _process.unfinished():
            if monotonic() >= deadline:
                return False
            await changed.wait(deadline)
    return True


def stats() -> dict[str, int]:
    """
    Return the accounts of this process, as they are now. Safe to call from any thread.

    The keys are workers, accepted, rejected, pending, scheduled, in_flight, succeeded,
    failed, lost, handed_over and retried (attempts). At any time accepted = succeeded +
    failed + lost + handed_over + pending + scheduled + in_flight.
    """
    return _process.stats()


def _check_outside_jobs() -> None:
    # One variable more for a coroutine to set would take a tenth of its time.
    if _inside_job.get() or type(_thread_sensitive_context.get(None)) is _Sensitive:
        raise RuntimeError("A job cannot wait until all jobs are done: it is one.")


def _deadline(seconds: float | None) -> float:
    """Return when, on the monotonic clock, the seconds will be over."""
    return math.inf if seconds is None else monotonic() + seconds


# As asyncio.get_running_loop(), but for None where that raises.
_running_loop = asyncio._get_running_loop


class _LoopEvent:
    """An event that any thread may set, and a loop awaits until a deadline."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # on a closed loop nobody waits
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, deadline: float) -> None:
        # Not asyncio.wait_for(): Python 3.10's and 3.11's may swallow a cancellation.
        seconds = min(deadline - monotonic(), threading.TIMEOUT_MAX)
        timer = self._loop.call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            timer.cancel()
        self._event.clear()


def _run_immediately(job: _Job) -> None:
    """Run a job here and now. Of all that it may raise, KeyboardInterrupt is raised."""
    worker = _Immediate()
    while True:
        _process.in_flight[job] = worker
        worker.started = monotonic()
        try:
            job.begin(worker.name)
            error = _run_in_thread(job)
            if job.coroutine is not None:
                error = _off_the_loop(lambda: job.context.run(_await_here, job))
        except BaseException as interruption:  # Ctrl-C, or no thread can be started
            job.drop_coroutine()
            error = interruption
        if _record(job, error) is None:  # else it is tried again, without a wait
            break
    _process.notify()
    if isinstance(error, KeyboardInterrupt):
        raise error


class _Immediate:
    """Stands in for the worker of a job that its caller runs."""

    name = "immediate"
    pool = None
    overdue = False
    started = 0.0


@async_to_sync
async def _await_here(job: _Job) -> BaseException | None:
    try:
        value = await job.call_on_loop()
        if job.observed:
            job.keep(value)
    except BaseException as error:
        return error
    return None


def _off_the_loop(function: Callable[[], Any]) -> Any:
    """Call a function here, or in a helper thread where an event loop runs; wait."""
    return function() if _running_loop() is None else _in_helper(function).result()


def _in_helper(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a thread of its own."""
    future: Future[Any] = Future()

    def call() -> None:
        _fulfil(future, function)
        _close_connections()

    threading.Thread(target=call, name=f"{_LABEL}-helper", daemon=True).start()
    return future


def _fulfil(
    future: Future[Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    if not future.set_running_or_notify_cancel():
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


class _Options(NamedTuple):
    thread_sensitive: bool
    priority: int
    timeout: float | None
    max_attempts: int
    backoff: float


_OPTIONS = {
    "thread_sensitive": _Field(False, "True or False", bool),
    "priority": _Field(0, "a whole number from -100 to 100", int, -100, 100),
    "timeout": _Field(
        None, "seconds above 0, a timedelta or None", float, math.ulp(0.0)
    ),
    "max_attempts": _Field(1, "a whole number from 1 to 100", int, 1, 100),
    "backoff": _Field(1.0, "seconds from 0, or a timedelta", float),
}
_NO_OPTIONS = _Options(**{name: field.default for name, field in _OPTIONS.items()})
_LONGEST_BACKOFF = 3600.0
# One for all jobs without: the dict is only read.
_NO_ARGUMENTS: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


class _Job:
    """The record of one call: what to call, in which context, how often tried."""

    # No __slots__: making a job would take half as much time again.

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    on_loop: bool
    options: _Options
    context: Context
    number: int
    attempt: int
    # What its call has given and is to be awaited still.
    coroutine: _Coroutine | None
    # Its context as it was, if there may be several attempts.
    pristine: Context | None = None
    # Whether signals tell of its life. Their receivers may use the ORM, so that such a
    # job begins and ends in a thread.
    observed = False
    # Whether another backend would take it.
    movable = False

    def __init__(self, call: _Call) -> None:
        (
            self.func,
            self.args,
            self.kwargs,
            self.on_loop,
            self.options,
            self.context,
            self.number,
        ) = call
        self.attempt = 0
        self.coroutine = None

    @property
    def id(self) -> int | str:
        return self.number

    @property
    def name(self) -> str:
        return _name(self.func)

    def begin(self, worker: str) -> bool:
        """Begin an attempt. Return False if a drain has given the job up."""
        # First this, then a look; seize() takes the job, then looks at this.
        self.attempt += 1
        if self not in _process.in_flight:
            return False
        if self.options is not _NO_OPTIONS and self.options.max_attempts > 1:
            self.renew_context()
        if self.observed:
            self.start(worker)
        return True

    def renew_context(self) -> None:
        """Hide from this attempt what the one before has set."""
        if self.pristine is None:  # an empty one would be false
            self.pristine = self.context
        self.context = self.pristine.copy()

    def call(self) -> Any:
        if self.kwargs:
            return self.func(*self.args, **self.kwargs)
        return self.func(*self.args)  # or Python would make another dict

    def call_on_loop(self) -> Any:
        """Return what is to be awaited on the loop."""
        if self.options.thread_sensitive and self.coroutine is None:
            return _in_shared_thread(self)
        coroutine, self.coroutine = self.coroutine or self.call(), None
        if self.options.timeout is None:
            return coroutine
        return _within_timeout(self, coroutine)

    def drop_coroutine(self) -> bool:
        """Close what nobody will await, or Python would warn. Tell if it was there."""
        if self.coroutine is None:
            return False
        self.coroutine.close()
        self.coroutine = None
        return True

    def succeed(self, started: float) -> None:
        if logger.isEnabledFor(logging.INFO):
            _log(logging.INFO, self, "finished", seconds=_seconds_since(started))

    def fail(self, started: float, error: BaseException) -> None:
        seconds = _seconds_since(started)
        _log(logging.ERROR, self, "failed", error, seconds=seconds)

    def retry(self, error: BaseException, delay: float) -> None:
        _log(
            logging.WARNING,
            self,
            "will be retried",
            max_attempts=self.options.max_attempts,
            delay=round(delay, 3),
            error=_describe(error),
        )

    # What only an observed job does something about

    def start(self, worker: str) -> None:
        """Tell that an attempt begins."""

    def keep(self, value: Any) -> None:
        """Take what it returned, or raise what makes that unacceptable."""

    def lose(self, reason: str) -> None:
        """Be told that the process gave it up."""

    def tell_end(self) -> None:
        """Tell that it has ended."""


# What makes a _Job. Calls wait as such tuples: to make one takes half the time, and so
# it does to look at it whenever garbage is collected.
_Call = tuple[Any, ...]


def _name(func: Any) -> str:
    """Name what a job calls; not by its repr, which may show arguments."""
    while isinstance(func, functools.partial):
        func = func.func
    return _cut(_path(func))


def _path(named: Any) -> str:
    """Return where a function or class is to be found; of an object, its class."""
    try:
        module, name = named.__module__ or "builtins", named.__qualname__
    except BaseException:  # it has no name, or a property that fails
        module = name = None
    if isinstance(module, str) and isinstance(name, str):
        return f"{module}.{name}"
    return _path(type(named))


def _describe(error: BaseException) -> str:
    try:
        return _cut(f"{type(error).__name__}: {error}")
    except BaseException:  # of its own __str__
        return _name(type(error))


def _seconds_since(started: float) -> float:
    return round(monotonic() - started, 3)


def _is_coroutine_function(func: Any) -> bool:
    """
    Tell whether `func` gives a coroutine; raise TypeError for what cannot be a job.

    Three forms that count escape inspect and asgiref: a marked partial, an object whose
    class has an `async def __call__`, and a partial of one.
    """
    if not callable(func):
        raise TypeError(_why_not_callable(func))
    inner = func
    while True:
        if iscoroutinefunction(inner) or getattr(inner, _MARK_NAME, None) is _MARK:
            return True
        if not isinstance(inner, functools.partial):
            break
        inner = inner.func
    if not inspect.isroutine(inner) and not inspect.isclass(inner):
        inner = type(inner).__call__
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise TypeError(
            f"{_name(func)} is a generator function: its body would never run. Pass a "
            "function that consumes the generator."
        )
    return iscoroutinefunction(inner)


def _why_not_callable(func: Any) -> str:
    fault = f"A job must be a function or coroutine function, not {type(func).__name__}"
    if not inspect.isawaitable(func):
        return f"{fault}: pass the function itself."
    new = inspect.CORO_CREATED
    if inspect.iscoroutine(func) and inspect.getcoroutinestate(func) == new:
        func.close()  # or Python would warn that it was never awaited
    return f"{fault}: pass the function, not the coroutine that it returns."


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


def _check_options(options: Any, on_loop: bool) -> tuple[_Options, float | None]:
    """Return the options, and in how many seconds the job is due, None for now."""
    _check_keys("options", options, (*_OPTIONS, "run_after"))
    given = dict(options)
    delay = _seconds_until(given.pop("run_after", None))
    cleaned = {name: _check_option(name, given[name]) for name in given}
    checked = _NO_OPTIONS._replace(**cleaned)
    if checked.timeout is not None and not on_loop:
        raise ValueError(
            'options["timeout"] is for coroutine functions: a thread cannot be '
            "interrupted."
        )
    if on_loop:
        checked = checked._replace(thread_sensitive=False)  # it has no meaning there
    return checked, delay


def _check_option(name: str, value: Any) -> Any:
    field = _OPTIONS[name]
    try:
        return field.clean(value)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f'options["{name}"] must be {field.allowed}; this {type(value).__name__} '
            "is not."
        ) from None


def _datetime(seconds: float) -> datetime:
    """Return what django.utils.timezone.now() was when time() was that."""
    return datetime.fromtimestamp(seconds, timezone.utc if settings.USE_TZ else None)


def _seconds_until(run_after: Any) -> float | None:
    if run_after is None:
        return None
    if isinstance(run_after, datetime):
        if run_after.utcoffset() is not None:
            run_after -= datetime.now(timezone.utc)
        elif not settings.USE_TZ:
            run_after -= _datetime(time())
        else:
            raise ValueError(
                'options["run_after"] must be an aware datetime while USE_TZ is True, '
                "not a naive one: see django.utils.timezone.make_aware()."
            )
    if not isinstance(run_after, timedelta):
        raise TypeError(
            'options["run_after"] must be an aware datetime, a timedelta or None, not '
            f"{type(run_after).__name__}."
        )
    seconds = run_after.total_seconds()
    return seconds if seconds > 0 else None


# What is not public in Django, asgiref and threading. All of it stands here, with what
# stands in for it, and has tests for the day on which it goes.

# Where LazySettings keeps what it has looked up: it forgets a name that is set, and all
# of them under override_settings(). A look here takes a tenth of the time that an
# attribute of `settings` takes, and a hundredth if the setting is not there.
_looked_up: dict[str, Any] = vars(settings)

# atexit comes too late: executors are closed by then, and with them name look-ups,
# asyncio.to_thread() and sync_to_async().
_call_at_exit: Any = getattr(threading, "_register_atexit", atexit.register)

# Where thread-sensitive work is done outside of requests, a thread for all of it.
_shared_thread: Any = getattr(SyncToAsync, "single_thread_executor", None)
# markcoroutinefunction() leaves an attribute; which, depends on the version of Python.
_MARK_NAME, _MARK = next(
    iter(vars(markcoroutinefunction(lambda: None)).items()), ("", object())
)
# The alias of a connection to the server, but to no database of the project.
_NO_DATABASE: Any = getattr(django.db.backends.base.base, "NO_DB_ALIAS", None)


def _connections_here() -> Mapping[str, Any]:
    """
    Return where Django keeps this thread's connections by alias: also those that failed
    while they were made, of which connection_created does not tell.
    """
    try:
        return vars(connections._connections._storage)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # then look into it each time
        return {"unknown": None}


# A job's context is a copy of its caller's. What asgiref keeps there belongs to a
# request and to a thread, and would do harm: ORM calls would run in the request's own
# thread, or in one that is gone, or be refused; and what was set in another thread, as
# the language is, would not be seen.

_thread_sensitive_context: ContextVar[Any] = getattr(
    SyncToAsync, "thread_sensitive_context", ContextVar("absent")
)
_deadlock_context: ContextVar[Any] = getattr(
    SyncToAsync, "deadlock_context", ContextVar("absent")
)
_thread_executors: Any = getattr(
    SyncToAsync, "context_to_thread_executor", weakref.WeakKeyDictionary()
)
# From 3.12 on a Local keeps its values together with the thread that set them. Before,
# it keeps them in a dict that all copies of a context share.
_Storage: Any = getattr(asgiref.local, "_Storage", None)


def _variable_of(set_value: Callable[..., Any], *args: Any) -> ContextVar[Any] | None:
    """Find the variable behind a Local, by what setting a value leaves in a context."""
    context = Context()
    context.run(set_value, *args)
    return next(iter(context), None)


# What a job does not inherit: asgiref's executors of the request, and Django's urlconf.
_executors = _variable_of(
    setattr, getattr(AsyncToSync, "executors", SimpleNamespace()), "current", None
)
_urlconf = _variable_of(set_urlconf, "of.the.request")

# Not the job itself: it has the context, and would keep itself alive by way of it.
_inside_job = ContextVar("inside_job", default=False)


def _leave_request(inherited: Context) -> None:
    """Make the Locals of the current context its own, and this thread's."""
    thread = get_ident()
    for variable, value in inherited.items():
        if type(value) is _Storage:
            if variable is _executors or variable is _urlconf:
                variable.set(_Storage(thread, {}))
            elif value.thread_id != thread:
                variable.set(_Storage(thread, value.data))
        elif variable is _deadlock_context:
            variable.set(False)
        elif variable is _thread_sensitive_context:
            variable.set(None)
        elif _Storage is None and variable.name == "asgiref.local":
            request = variable is _executors or variable is _urlconf
            variable.set({} if request else value.copy())


def _copy_context_and_locals() -> Context:
    context = copy_context()
    context.run(_leave_request, context)
    return context


_capture_context = copy_context if _Storage else _copy_context_and_locals


def _enter_and_call(job: _Job) -> Any:
    if len(job.context):
        _leave_request(job.context)
    _inside_job.set(True)
    return job.call()


def _run_in_thread(job: _Job) -> BaseException | None:
    """
    Call a job in this thread. Return what it raised. If the call gave a coroutine, that
    is left in the job, to be awaited.

    Here and in _Worker.run_steps() exceptions of every kind end: a job's SystemExit is
    no reason to stop the server, and its CancelledError says nothing about us.
    """
    try:
        value = job.context.run(_enter_and_call, job)
        if value is not None:
            if inspect.iscoroutine(value):
                job.coroutine = value
            elif job.observed:
                job.keep(value)
    except BaseException as error:
        return error
    return None


async def _in_shared_thread(job: _Job) -> None:
    # Not in the lane, which a job on the loop has for its thread-sensitive calls.
    token = _thread_sensitive_context.set(None)
    _inside_job.set(True)
    _process.shares_thread = True
    # By way of a box, as the frames of asgiref and of the thread would keep alive what
    # they are given, what they return, and what they raise.
    box: list[Any] = [job]

    def call() -> None:
        _clean_connections()
        try:
            box.append((box.pop().call(), None))
        except BaseException as error:
            box.append((None, error))
        _clean_connections()

    await sync_to_async(call, thread_sensitive=True)()
    value, error = box.pop()
    try:
        if error is not None:
            raise error
    finally:
        del error  # or it would keep itself alive, by way of this frame
    if inspect.iscoroutine(value):
        _thread_sensitive_context.reset(token)  # others have the thread now
        await value


async def _within_timeout(job: _Job, coroutine: _Coroutine) -> Any:
    # Not asyncio.timeout(): Python 3.10 has none, and a job may swallow a cancellation.
    loop = asyncio.get_running_loop()
    task: Any = asyncio.current_task()
    seconds = min(job.options.timeout or 0.0, threading.TIMEOUT_MAX)
    expired = False
    timer: asyncio.TimerHandle

    def expire() -> None:
        nonlocal expired, timer
        expired = True
        task.cancel()
        timer = loop.call_later(_PATIENCE, _give_up, job)

    timer = loop.call_later(seconds, expire)
    try:
        value = await coroutine
    except BaseException as error:
        if expired:
            raise _timeout_of(job) from error
        raise
    finally:
        timer.cancel()
        task = None  # or an exception would keep itself alive, by way of this frame
    if expired:
        raise _timeout_of(job)
    return value


def _timeout_of(job: _Job) -> TimeoutError:
    return TimeoutError(f"The job took longer than {job.options.timeout:g} seconds.")


def _record(
    job: _Job, error: BaseException | None, final: bool = False
) -> float | None:
    """
    Record how an attempt ended. Return the seconds until the next, None without one.

    It is recorded once, by whoever takes the job out of those in flight: the worker
    that ran it, or a drain that gave it up.
    """
    worker = _process.in_flight.pop(job, None)
    if worker is None:
        return None
    if error is None:
        job.succeed(worker.started)
        _process.succeeded.step()
        return None
    options = job.options
    attempts_left = options.max_attempts - job.attempt
    may_go_on = issubclass(type(error), Exception)  # whatever its __class__ says
    if attempts_left > 0 and may_go_on and not final:
        _process.retried.step()
        delay = options.backoff * 2.0 ** (job.attempt - 1) * random.uniform(0.9, 1.1)
        delay = min(delay, _LONGEST_BACKOFF)
        job.retry(error, delay)
        return delay
    job.fail(worker.started, error)
    _process.failed.step()
    return None


def _give_up(job: _Job) -> None:
    """Record as failed a job that ignores its cancellation. It keeps its worker."""
    worker = _process.in_flight.get(job)
    if worker is None:
        return

    def record() -> None:
        _record(job, _timeout_of(job), final=True)
        _process.notify()

    worker.overdue = True
    if job.observed:  # there are receivers to be told of it, off the loop
        _in_helper(record)
    else:
        record()


def _log(
    level: int,
    job: _Job,
    event: str,
    exception: BaseException | None = None,
    **fields: Any,
) -> None:
    """Write a line of a job's life."""
    fields = {"job": job.name, "id": job.id, "attempt": job.attempt, **fields}
    message = event + "".join(f" {key}=%s" for key in fields)
    _write(level, message, *fields.values(), exception=exception, extra=fields)


def _write(
    level: int,
    message: str,
    *args: Any,
    exception: BaseException | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a line to our logger. Nothing that a handler or filter raises gets out."""
    if not logger.isEnabledFor(level):
        return
    with contextlib.suppress(BaseException):
        record = logger.makeRecord(
            logger.name, level, __file__, 0, message, args, None, extra=extra
        )
        if exception is not None:
            record.exc_info = (type(exception), exception, exception.__traceback__)
            record.exc_text = _traceback(exception)  # or a formatter would not cut it
        logger.handle(record)


def _traceback(error: BaseException) -> str:
    """Format a traceback, at a length that a log and a TaskResult can bear."""
    try:
        text = "".join(traceback.format_exception(error)).rstrip("\n")
    except BaseException:  # of its own attributes
        text = _describe(error)
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text


_LONGEST_TRACEBACK = 20_000


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Report whatever is raised, of whatever kind, and go on."""
    try:
        yield
    except BaseException as error:
        _write(logging.ERROR, what, exception=error)


# Queue


# When a job is due, its number, which keeps the order of equals, and the job.
_Entry = tuple[float, int, _Job]


class _Levels(dict[int, deque["_Job | _Call"]]):
    """What waits at each priority, first in, first out. A level comes when needed."""

    def __init__(self, order: list[tuple[int, deque[_Job | _Call]]]) -> None:
        self.order = order

    def __missing__(self, priority: int) -> deque[_Job | _Call]:
        new: deque[_Job | _Call] = deque()
        # First this, so that nothing waits where no worker looks. If another thread
        # has done the same, this one's level stays empty.
        insort(self.order, (-priority, new), key=itemgetter(0))
        return self.setdefault(priority, new)


class _Queue:
    """
    Where the jobs of a loop wait: by priority, then arrival; and by the clock, those
    that wait for a retry or for their `run_after`.

    Any thread, signal handler or `__del__` may call any method. Hence no lock: whatever
    changes is changed in one step of C code, which nothing interrupts.
    """

    def __init__(self) -> None:
        # The highest priority first. Here as well, for a look at what a dict has beside
        # its items takes long.
        self._order: list[tuple[int, deque[_Job | _Call]]] = []
        self.levels = _Levels(self._order)
        # Heaps, the first due first.
        self.retries: list[_Entry] = []
        self.scheduled: list[_Entry] = []

    def qsize(self) -> int:
        """Return the number of jobs that wait."""
        return self.ready() + len(self.retries) + len(self.scheduled)

    def ready(self) -> int:
        """Return the number of jobs that a worker may take."""
        return sum([len(level) for _, level in self._order])

    def put_later(self, job: _Job, due: float) -> bool:
        """Return whether it is the first one due."""
        heap = self.retries if job.attempt else self.scheduled
        entry = (due, job.number, job)
        heappush(heap, entry)
        return entry in heap[:1]

    def get(self) -> _Job | None:
        for _, level in self._order:
            if level:
                try:
                    job = level.popleft()
                except IndexError:  # another worker was faster
                    continue
                return _Job(job) if isinstance(job, tuple) else job
        return None

    def advance(self, now: float, *, retry_at_once: bool) -> float:
        """Make ready what is due. Return when the next job will be."""
        for _, _, job in _pop_until(self.retries, math.inf if retry_at_once else now):
            self.levels[job.options.priority].append(job)
        for _, _, job in _pop_until(self.scheduled, now):
            self.levels[job.options.priority].append(job)
        firsts = self.retries[:1] + self.scheduled[:1]
        return min((due for due, _, _ in firsts), default=math.inf)

    def clear(self) -> Iterator[tuple[float | None, _Job]]:
        """Take out job after job, each with the time when it is due, None for now."""
        while (job := self.get()) is not None:
            yield None, job
        for heap in self.retries, self.scheduled:
            for due, _, job in _pop_until(heap, math.inf):
                yield due, job


def _pop_until(heap: list[_Entry], until: float) -> Iterator[_Entry]:
    while heap:
        try:
            if heap[0][0] > until:
                return
            entry = heappop(heap)
        except IndexError:  # another thread was faster
            return
        if entry[0] > until:  # it is not the one that was looked at
            heappush(heap, entry)
            return
        yield entry


# Workers
#
# What holds, whatever happens:
#
# - A job has one owner. What waits is the queue's until a worker takes it; what is in
#   flight is the worker's until somebody takes it out of `_process.in_flight` to record
#   how it ended. Each is one step: nothing runs twice, nothing is counted twice.
# - A worker is in one place: idle, on the loop, or in its lane. Only the loop ends its
#   idleness. Whoever makes it idle looks at the queue afterwards; whoever queues a job
#   looks for an idle worker afterwards. So no job is left lying.
# - `waking` is set by whoever wants the loop to look, and reset by the loop before it
#   looks. So a flood of jobs costs one wake-up, and none is missed.
# - A pool is closed first and emptied afterwards; whoever has queued a job looks
#   whether the pool is closed, and empties it, too; whoever has taken one looks, and
#   gives it away. So a job that meets the end of a pool is run by the next.
# - defer() takes no lock and waits for nothing: signal handlers and `__del__` may call
#   it in the middle of anything, itself included.
# - A worker is no asyncio task, which a job could cancel, but callbacks of the loop and
#   calls in a thread. Nothing that a job, a receiver or a logging handler raises gets
#   there.
# - No two jobs in flight share a database connection: a worker has one job and one
#   thread, and a connection belongs to a thread.


class _Lane:
    """
    A worker's thread: for its sync jobs, and for the ORM calls of its async ones.

    It is a daemon of our own, for a thread of an executor holds the exit of the process
    while a job hangs in it. To asgiref it is a thread-sensitive context's executor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread: threading.Thread | None = None
        # The thread's connections by alias; Django's dict: a look costs nothing.
        self.connections: Mapping[str, Any] = {}
        # Whether the job on the loop has used the thread.
        self.used = False
        # Whether the connections are to be closed when that job has ended.
        self.letting_go = False
        self.ended = False
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()

    def call(self, function: Callable[[], Any]) -> None:
        """Have the thread call a function that does not raise."""
        self.start()
        self._calls.put(function)
        if self.ended:
            self._calls.put(None)

    def start(self) -> None:
        if self.thread is None:
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            thread.start()
            self.thread = thread

    def submit(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """Do what asgiref asks of an executor."""
        if self.connections and not self.used:
            self.call(_clean_connections)
        self.used = True
        future: Future[Any] = Future()
        self.call(functools.partial(_fulfil, future, function, *args, **kwargs))
        return future

    def clean_after_use(self) -> None:
        self.used = False
        self.call(_clean_connections)
        if self.letting_go:
            self.call(self.let_go)

    def let_go(self) -> None:
        """Close the connections, now or when the job on the loop has ended."""
        self.letting_go = self.used
        if not self.used:
            _close_connections()

    def end(self) -> Future[None]:
        """Let the thread end when it has done what it was called for."""
        ended: Future[None] = Future()
        self.ended = True
        if self.thread is None:
            ended.set_result(None)
        else:
            self._calls.put(functools.partial(_fulfil, ended, connections.close_all))
            self._calls.put(None)
        return ended

    def _run(self) -> None:
        self.connections = _connections_here()
        while True:
            function = self._calls.get()
            if function is None:
                self.connections = {}
                return
            function()
            del function  # or it would keep a job alive while the thread waits


def _disconnect(connection: Any, **kwargs: Any) -> None:
    """
    Receive connection_created. Who connects to the server, but to no database of the
    project, creates, clones or destroys one for tests. PostgreSQL refuses that while
    others are connected to it, after it has waited for five seconds that they go: let
    go of what idle threads keep for CONN_MAX_AGE.
    """
    if connection.alias != _NO_DATABASE:
        return
    for pool in [*_process.pools, *_process.retiring]:
        for worker in pool.workers:
            if worker.lane.connections:
                worker.lane.call(worker.lane.let_go)
    if _process.shares_thread and _shared_thread is not None:
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
            _shared_thread.submit(connections.close_all)


def _close_connections() -> None:
    with _reported("A connection failed to close."):
        connections.close_all()


def _clean_connections() -> None:
    """
    Do to this thread's connections what Django does between two requests, and end the
    transactions that were left open.
    """
    for connection in connections.all(initialized_only=True):
        try:
            if connection.in_atomic_block:
                connection.close()
                del connections[connection.alias]  # closed, it would refuse to reopen
            else:
                connection.close_if_unusable_or_obsolete()
        except Exception as error:
            del connections[connection.alias]
            _write(logging.ERROR, "A connection failed to close.", exception=error)
    if settings.DEBUG:
        reset_queries()


class _Sensitive(ThreadSensitiveContext):
    """Tells asgiref, by its type also us, in whose lane an async job uses the ORM."""


class _Worker:
    """Runs one job at a time, on the loop or in its lane."""

    def __init__(self, pool: _Pool, number: int) -> None:
        self.pool = pool
        self.name = f"{_LABEL}-{os.getpid()}-{number}"
        self.lane = _Lane(self.name)
        self.sensitive = _Sensitive()
        _thread_executors[self.sensitive] = self.lane
        # What goes to the lane: a job, its exception, and whether it has ended. Not as
        # arguments, which the thread would keep alive until the worker rests.
        self.carried: Any = None
        # The task of the job that waits on the loop.
        self.task: asyncio.Task[None] | None = None
        # What is to be done after that task. It is not the task's result, as a task has
        # none that was cancelled on the way.
        self.next: Callable[[], None] | None = None
        self.started = 0.0
        # What its job on the loop has raised.
        self.error: BaseException | None = None
        # Whether its job was given up and goes on all the same.
        self.overdue = False
        self.start_steps()

    def take(self) -> _Job | None:
        """Take the next job from the queue: from here on it is in flight."""
        pool = self.pool
        job = pool.queue.get()
        if job is None:
            return None
        self.started = monotonic()
        self.overdue = False
        _process.in_flight[job] = self
        if pool.closed:  # looked at now, so that a drain or we have it, and not both
            if _process.in_flight.pop(job, None) is not None:
                pool.give_away(job, None)
            return None
        return job

    def run(self, job: _Job | None) -> None:
        """On the loop: run a job where it belongs, and those after it."""
        if job is not None and job not in _process.in_flight:
            job.drop_coroutine()  # a drain gave the job up on its way
            job = self.take()
        if job is None:
            return self.rest()
        if not job.on_loop and job.coroutine is None:
            self.carried = (job, None, False)
            return self.go_to_lane()
        task = _start_task(self.run_in_task(job), loop=self.pool.loop)
        if task.done():
            self.go_on(job, task)
        else:
            done = functools.partial(self.go_on, job)
            task.add_done_callback(done, context=self.pool.context)

    async def run_in_task(self, job: _Job | None) -> None:
        """
        Run jobs in one asyncio task, until one has waited or belongs in the lane; leave
        word what is to be done next.

        A job that never waits needs no task of its own, which would take most of the
        time. One that waits has the task for itself from then on: whoever cancels it
        means this job.
        """
        pool = self.pool
        task = asyncio.current_task()
        while job is not None and (job.on_loop or job.coroutine is not None):
            if job.coroutine is None:
                if self.started >= pool.slice_end:
                    self.next = functools.partial(pool.hand_back, self, job)
                    return
                if not job.begin(self.name):
                    job = self.take()
                    continue
            try:
                awaited = job.context.run(self.send, job)
            except StopIteration:
                awaited = self
                self.start_steps()
            if awaited is not self:
                self.task = task
                await self.other_steps(job, awaited)
            error, self.error = self.error, None
            if job.observed:
                self.carried = (job, error, True)
                error = None
                self.next = self.go_to_lane
                return
            self.finish(job, error)
            error = None  # or it would keep itself alive, by way of this frame
            if self.task is not None or _cancelling(task):
                self.next = functools.partial(pool.hand_back, self, None)
                return
            job = self.take()
        self.next = functools.partial(self.run, job)

    @awaitable_generator
    def run_steps(self) -> Generator[Any, Any, None]:
        """
        Run the coroutine jobs that are sent in, each send() in the context of its job.
        Give out what a job awaits; the worker itself, when a job has ended.

        One generator for many jobs: a coroutine that ends inside of another spares the
        StopIteration, which takes as long as all else.
        """
        while True:
            job = yield self
            try:
                if len(job.context):
                    _leave_request(job.context)
                _thread_sensitive_context.set(self.sensitive)
                if job.options is _NO_OPTIONS and job.coroutine is None:
                    coroutine = job.call()  # spares a call for nearly all jobs
                else:
                    coroutine = job.call_on_loop()
                if type(coroutine) is not CoroutineType:
                    coroutine = _awaiting(coroutine)
                value = yield from coroutine
                if job.observed:
                    job.keep(value)
            except GeneratorExit as error:  # also when this generator is thrown away
                self.error = error
                return
            except BaseException as error:
                self.error = error
            job = coroutine = value = None  # or they would live until the next one

    def start_steps(self) -> None:
        steps = self.run_steps()
        next(steps)
        self.send, self.throw = steps.send, steps.throw

    def advance(self, job: _Job, step: Callable[[Any], Any], value: Any) -> Any:
        """Go on with a job, in its context, as far as it goes without waiting."""
        try:
            return job.context.run(step, value)
        except StopIteration:  # no generator outlives a GeneratorExit
            self.start_steps()
            return self

    @awaitable_generator
    def other_steps(self, job: _Job, awaited: Any) -> Generator[Any, Any, None]:
        """Await what a job awaits, until it has ended."""
        while awaited is not self:
            try:
                answer = yield awaited
            except BaseException as error:
                awaited = self.advance(job, self.throw, error)
            else:
                awaited = self.advance(job, self.send, answer)

    def go_on(self, job: _Job, task: asyncio.Task[None]) -> None:
        """On the loop: do what is next after a task."""
        self.task = None
        go_on, self.next = self.next, None
        if go_on is None:
            job.drop_coroutine()
            self.finish(
                job, asyncio.CancelledError("It was cancelled before it began.")
            )
            go_on = functools.partial(self.pool.hand_back, self, None)
        go_on()

    def go_to_lane(self) -> None:
        try:
            self.lane.call(self.run_in_lane)
        except RuntimeError as error:  # just now no thread can be started
            (job, _, _), self.carried = self.carried, None
            _record(job, error, final=True)
            self.pool.hand_back(self, None)

    def run_in_lane(self) -> None:
        """In the lane: run jobs until one belongs on the loop, or none is left."""
        lane = self.lane
        # The loop waits for one thread after the other: one alone may take longer.
        alone = len(self.pool.workers) == 1
        slice_end = monotonic() + (2 * _SLICE if alone else _SLICE)
        (job, error, ended), self.carried = self.carried, None
        while job is not None:
            if not ended:
                if job.on_loop or self.started >= slice_end:
                    return self.pool.hand_back(self, job)
                if lane.connections:
                    _clean_connections()
                if not job.begin(self.name):
                    job = self.take()
                    continue
                error = _run_in_thread(job)
                if job.coroutine is not None:
                    lane.used = True  # what it has opened it may use until it ends
                    return self.pool.hand_back(self, job)
            self.finish(job, error)
            error = None  # or it would live, with all its frames, until the next one
            ended = False
            if lane.connections:
                _clean_connections()
            job = self.take()
        self.rest()

    def finish(self, job: _Job, error: BaseException | None) -> None:
        if self.lane.used:
            self.lane.clean_after_use()
        delay = _record(job, error)
        if delay is not None:
            self.pool.put_later(job, monotonic() + delay)

    def rest(self) -> None:
        pool = self.pool
        pool.idle.add(self)
        if pool.queue.ready():
            pool.wake()
        if _process.watchers:
            _process.notify()


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


if sys.version_info >= (3, 12):
    # At once, not at the loop's next turn: a job that never waits needs none.
    _start_task = functools.partial(asyncio.Task, eager_start=True)
else:

    def _start_task(
        coroutine: _Coroutine, *, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Task[Any]:
        return loop.create_task(coroutine)


# Whether a task was told to cancel. Python 3.10 does not tell: better to suppose so.
_cancelling: Any = getattr(asyncio.Task, "cancelling", lambda task: 1)


# Seconds for which jobs may hold the loop at a stretch.
_SLICE = 0.001
# Seconds that a cancelled job, or a thread, has to end before it is left to itself.
_PATIENCE = 0.25
# Seconds that overflow backends, receivers and the wrapped application have at shutdown
# when the grace period is over.
_LEAVE, _INNER_SHUTDOWN = 5.0, 1.0
# Seconds until a drain says what it waits for, and between two such lines.
_FIRST_REPORT, _NEXT_REPORT = 0.1, 5.0
# How many jobs a line names at most.
_MOST_NAMED = 20


class _Pool:
    """The workers of one event loop, and the queue that they share."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.current_thread()
        self.queue = _Queue()
        self.workers: list[_Worker] = []
        self.idle: set[_Worker] = set()
        # Workers on their way back to the loop, with what they are to go on with.
        self.returning: deque[tuple[_Worker, _Job | None]] = deque()
        self.waking = False
        self.closed = False
        self.heir: _Pool | None = None
        self.draining = False
        self.deadline = math.inf
        self.slice_end = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.timer_due = math.inf
        # Callbacks would keep the context alive in which the loop was woken.
        self.context = Context()

    # From any thread

    def put(self, job: _Job | _Call, priority: int) -> None:
        self.queue.levels[priority].append(job)
        if self.closed:
            self.evict()
        elif self.loop.is_closed() or (self.idle and not self.waking):
            self.wake()

    def put_later(self, job: _Job, due: float) -> None:
        first = self.queue.put_later(job, due)
        if self.closed:
            self.evict()
        elif first or self.draining or _process.watchers or self.loop.is_closed():
            self.wake()

    def hand_back(self, worker: _Worker, job: _Job | None) -> None:
        """Let a worker go on at the loop's next turn."""
        self.returning.append((worker, job))
        self.wake()

    def wake(self) -> None:
        """Have the loop look at what there is to do."""
        if self.waking and not self.loop.is_closed():
            return
        try:
            self.waking = True
            self.loop.call_soon_threadsafe(self.dispatch, context=self.context)
        except RuntimeError:  # the loop was closed without a word
            self.withdraw()
            self.clear_loop()
            self.evict()
        except BaseException:  # Ctrl-C, just here: then the next one wakes it
            self.waking = False
            raise

    def clear_loop(self) -> None:
        """Give away what was on its way to a dead loop, and lose what is there."""
        while self.returning:
            with contextlib.suppress(IndexError):  # another thread was faster
                worker, job = self.returning.popleft()
                begun = job is not None and job.drop_coroutine()
                if job is None or _process.in_flight.pop(job, None) is None:
                    continue  # there is none, or it was given up before
                if begun:
                    _lose_in_flight(job, worker.started)
                else:
                    self.give_away(job, None)
        for job, worker in self.in_flight():
            waits = worker.task is not None
            if waits and _process.in_flight.pop(job, None) is not None:
                _lose_in_flight(job, worker.started)
        _process.notify()

    def withdraw(self) -> None:
        """Serve no more. What comes from now on goes to whoever serves then."""
        with contextlib.suppress(ValueError):
            _process.pools.remove(self)
        self.closed = True  # only now, as what is evicted must not come back

    def evict(self) -> None:
        """Withdraw, and give what waits to the pool that takes over, or that serves."""
        self.withdraw()
        for due, job in self.queue.clear():
            self.give_away(job, due)

    def give_away(self, job: _Job, due: float | None) -> None:
        try:
            pool = self.heir or _process.serving_pool()
        except Exception:  # just now no thread, or no loop, can be had
            return _lose([job])
        if due is None:
            pool.put(job, job.options.priority)
        else:
            pool.put_later(job, due)

    def in_flight(self) -> list[tuple[_Job, _Worker]]:
        # From a copy, made in one step: the workers go on while it is read.
        flying = _process.in_flight.copy()
        return [(job, worker) for job, worker in flying.items() if worker.pool is self]

    # On the loop

    def startup(self) -> None:
        self.workers = [_Worker(self, n) for n in range(1, _setting(_WORKERS) + 1)]
        self.idle.update(self.workers)
        self.wake()

    def dispatch(self) -> None:
        """Give what is ready to workers that have nothing to do."""
        self.waking = False
        now = monotonic()
        self.slice_end = now + _SLICE
        due = self.queue.advance(now, retry_at_once=self.draining)
        if self.closed:
            self.evict()  # what advance() had in hand while another thread did
        self.set_timer(due)
        for _ in range(len(self.returning)):
            worker, job = self.returning.popleft()
            worker.run(job or worker.take())
        while self.idle and self.queue.ready():
            worker = self.idle.pop()
            worker.run(worker.take())
        if self.queue.scheduled and _process.watchers:
            _process.notify()  # they may have looked before it was scheduled

    def set_timer(self, due: float) -> None:
        """Have the loop look again when the next job is due."""
        if due == self.timer_due:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None
        self.timer_due = due
        if due < math.inf:
            delay = max(0.0, due - monotonic())
            self.timer = self.loop.call_later(delay, self.ring, context=self.context)

    def ring(self) -> None:
        self.timer_due = math.inf
        self.dispatch()

    def quiet(self) -> bool:
        """Tell whether nothing is pending or in flight."""
        return self.at_rest() and not self.queue.ready() and not self.queue.retries

    def at_rest(self) -> bool:
        """Tell whether nothing is in flight, but for what was given up."""
        resting = all(worker in self.idle or worker.overdue for worker in self.workers)
        return resting and not self.predecessors()

    def predecessors(self) -> list[_Background]:
        """Return what served before, and has jobs in flight that end there."""
        return [each for each in _process.retiring.copy() if each.heir is self]

    def begin_shutdown(self) -> None:
        """Let the grace period begin. Retries do not wait any more."""
        self.draining = True
        try:
            self.deadline = _deadline(_setting(_SHUTDOWN_GRACE_PERIOD))
        except ImproperlyConfigured as error:
            _write(logging.ERROR, "%s There is no limit to this drain.", error)
        _process.notify()

    async def drain(self) -> None:
        """Wait until nothing is pending or in flight; past the deadline, give it up."""
        changed = _LoopEvent()
        report_at = monotonic() + _FIRST_REPORT
        self.wake()
        with _process.watching(changed.set):
            while not self.quiet():
                now = monotonic()
                if now >= self.deadline:
                    return await self.abandon()
                if now >= report_at:
                    self.report(now)
                    report_at = now + _NEXT_REPORT
                await changed.wait(min(self.deadline, report_at))

    def report(self, now: float) -> None:
        """Say what a drain waits for, and which setting bounds it."""
        flying = self.in_flight()
        pending = self.queue.ready() + len(self.queue.retries)
        if not flying and not pending:
            return  # it waits for a predecessor, which tells of its own
        named = [
            f"job={job.name} id={job.id} seconds={now - worker.started:.1f}"
            for job, worker in flying[:_MOST_NAMED]
        ]
        _write(
            logging.WARNING,
            "draining pending=%s in_flight=%s %s (bounded by %s=%s)",
            pending,
            len(flying),
            ", ".join(named),
            _SHUTDOWN_GRACE_PERIOD,
            getattr(settings, _SHUTDOWN_GRACE_PERIOD, None),
            extra={"pending": pending, "in_flight": len(flying)},
        )

    async def abandon(self, *, at_once: bool = False) -> None:
        """Give up what is unfinished: cancel it on the loop, leave it in a thread."""
        waiting, begun = self.seize()
        for predecessor in self.predecessors():
            predecessor.deadline = monotonic()
        for _, worker in begun:
            if worker.task is None:
                worker.overdue = True
            else:
                worker.task.cancel()
        if at_once:
            _lose(waiting)
        else:
            await self.part_with(waiting, [job for job, _ in begun])
        await self.come_to_rest()

    async def come_to_rest(self) -> None:
        """Be patient while cancelled jobs end, and threads record what has ended."""
        changed = _LoopEvent()
        until = monotonic() + _PATIENCE
        with _process.watching(changed.set):
            while not self.at_rest() and monotonic() < until:
                await changed.wait(until)
        for worker in self.workers:
            worker.overdue = worker not in self.idle

    async def part_with(self, waiting: list[_Job], begun: list[_Job]) -> None:
        """Hand over the jobs that another backend takes, and lose the others."""
        movable = {job: None for job in waiting if job.movable and not job.attempt}
        lost = [job for job in waiting if job not in movable]
        _lose(lost)
        told = [job for job in [*lost, *begun] if job.observed]
        if movable or told:
            await self.take_leave(movable, told)

    async def take_leave(
        self, unsettled: dict[Any, None], lost: Sequence[_Job]
    ) -> None:
        """Hand jobs over, and tell of the lost: off the loop, and not for long."""
        movable = list(unsettled)
        done = _LoopEvent()

        def call() -> None:
            for job in movable:
                if job not in unsettled:
                    return _close_connections()  # the time is up
                with _reported(f"{job.name} could not be handed over."):
                    where = job.hand_over()
                    if unsettled.pop(job, job) is None:
                        job.lose(where)
                        _process.handed_over.step()
            for job in lost:
                job.tell_end()
            _close_connections()
            done.set()

        try:
            self.call_in_spare_thread(call)
            await done.wait(monotonic() + _LEAVE)
        except RuntimeError as error:  # just now no thread can be started
            _write(logging.ERROR, "No Task could be handed over.", exception=error)
        finally:  # also when the server has cancelled the lifespan
            _lose([job for job in movable if unsettled.pop(job, job) is None])

    def call_in_spare_thread(self, function: Callable[[], Any]) -> None:
        """Call a function in the thread of an idle worker, or in a new one."""
        for worker in self.idle.copy():
            if worker.lane.thread is not None:
                return worker.lane.call(function)
        _in_helper(function)

    def seize(self) -> tuple[list[_Job], list[tuple[_Job, _Worker]]]:
        """Take what is unfinished: jobs not begun, and jobs begun, which are lost."""
        waiting = [job for _, job in self.queue.clear()]
        begun = []
        for job, worker in self.in_flight():
            if _process.in_flight.pop(job, None) is None:
                continue  # it ended just now
            if job.attempt:
                begun.append((job, worker))
                _lose_in_flight(job, worker.started)
            else:
                waiting.append(job)
        return waiting, begun

    async def finish(self, *, at_once: bool = False) -> None:
        """Withdraw after the drain. Scheduled jobs are given up; late ones move on."""
        self.withdraw()
        if at_once or monotonic() >= self.deadline:
            await self.abandon(at_once=at_once)
        else:
            scheduled = []
            for due, job in self.queue.clear():
                if due is None or job.attempt or self.heir is not None:
                    self.give_away(job, due)
                else:
                    scheduled.append(job)
            await self.part_with(scheduled, [])
        await self.end_lanes()

    async def end_lanes(self) -> None:
        """End the threads; one in which a job hangs is left behind."""
        self.set_timer(math.inf)
        ends = {worker: worker.lane.end() for worker in self.workers}
        idle = self.idle.copy()  # in one step: lanes add to it
        resting = [asyncio.wrap_future(ends[worker]) for worker in idle]
        if resting:
            await asyncio.wait(resting, timeout=_PATIENCE)
        for worker in idle:
            if worker.lane.thread is not None:
                worker.lane.thread.join(_PATIENCE)


def _lose(jobs: Sequence[_Job]) -> None:
    """Record jobs as lost that have not begun. Report them by function."""
    by_name: dict[str, list[int | str]] = {}
    for job in jobs:
        job.lose("The process ended before the job began.")
        _process.lost.step()
        by_name.setdefault(job.name, []).append(job.id)
    for name, ids in by_name.items():
        shown = ids[:_MOST_NAMED]
        _write(
            logging.ERROR,
            "lost=%s job=%s ids=%s",
            len(ids),
            name,
            ",".join(map(str, shown)),
            extra={"lost": len(ids), "job": name, "ids": shown},
        )
    _process.notify()


def _lose_in_flight(job: _Job, started: float) -> None:
    seconds = _seconds_since(started)
    job.lose(f"The process ended {seconds} seconds after the job began.")
    _process.lost.step()
    _log(logging.ERROR, job, "lost in flight", seconds=seconds)


# Process


class _Counter:
    """A number that anybody may step at any time, without a lock."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self.step = self._count.__next__

    def value(self) -> int:
        # "count(7)": nothing else tells where a count is without a step.
        return int(repr(self._count)[6:-1]) - 1


class _Process:
    """Who serves in this process, what is in flight, and the accounts."""

    def __init__(self) -> None:
        self.pools: list[_Pool] = []  # those that serve, the latest last
        self.backgrounds: list[_Background] = []  # the first one counts
        self.retiring: list[_Background] = []
        self.in_flight: dict[_Job, _Worker | _Immediate] = {}
        self.results: dict[str, _TaskJob] = {}
        # Ids by alias, the oldest first.
        self.finished: defaultdict[str, deque[str]] = defaultdict(deque)
        self.result_ids: deque[str] = deque()
        self.watchers: dict[Callable[[], None], None] = {}  # in order, unlike a set
        self.requests_seen = False
        self.shares_thread = False
        self.prepared = _Counter()
        self.exiting = False
        self.accepted = _Counter()
        self.rejected = _Counter()
        self.succeeded = _Counter()
        self.failed = _Counter()
        self.lost = _Counter()
        self.handed_over = _Counter()
        self.retried = _Counter()

    def stats(self) -> dict[str, int]:
        # Read against the stream, outcomes first and acceptance last, and heirs before
        # what they take over, so that a job that moves meanwhile is counted once. What
        # was accepted and is nowhere else is pending: were a job ever mislaid, it would
        # stay to be seen there.
        settled = {
            "succeeded": self.succeeded.value(),
            "failed": self.failed.value(),
            "lost": self.lost.value(),
            "handed_over": self.handed_over.value(),
        }
        in_flight = len(self.in_flight)
        pools = self.pools.copy()
        scheduled = sum(len(pool.queue.scheduled) for pool in reversed(pools))
        accepted = self.accepted.value()
        return {
            "workers": sum(len(pool.workers) for pool in pools),
            "accepted": accepted,
            "rejected": self.rejected.value(),
            "pending": accepted - sum(settled.values()) - in_flight - scheduled,
            "scheduled": scheduled,
            "in_flight": in_flight,
            **settled,
            "retried": self.retried.value(),
        }

    def new_result_id(self) -> str:
        """Return 128 bits that nobody guesses."""
        while True:
            try:
                return self.result_ids.pop()
            except IndexError:
                # Many at a time, since each look at the system's source of randomness
                # lets another thread go first. prepare() keeps them from a child.
                self.prepare()
                block = secrets.token_hex(16 * 64)
                starts = range(0, len(block), 32)
                self.result_ids.extend([block[start : start + 32] for start in starts])

    def unfinished(self) -> bool:
        accounts = self.stats()
        return accounts["pending"] > 0 or accounts["in_flight"] > 0

    @contextlib.contextmanager
    def watching(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have a function called, in whatever thread, when all jobs may have ended."""
        self.watchers[callback] = None
        try:
            yield
        finally:
            self.watchers.pop(callback, None)

    def notify(self) -> None:
        for callback in self.watchers.copy():
            callback()

    def serving_pool(self) -> _Pool:
        """Return the running loop's pool, or the latest; without any, start one."""
        pools = self.pools.copy()
        if len(pools) > 1:
            loop = _running_loop()
            for pool in pools:
                if pool.loop is loop:
                    return pool
        return pools[-1] if pools else self.start_background()

    def serve(self, pool: _Pool) -> None:
        """Let a pool serve, on its loop. What waits in the background moves to it."""
        self.prepare()
        pool.startup()
        before = self.take_backgrounds()
        for background in before:
            background.heir = pool
            background.evict()
        self.pools.append(pool)
        # Whoever found that nobody serves has looked again, or its background is here.
        for background in before + self.take_backgrounds():
            background.retire(pool)

    def take_backgrounds(self) -> list[_Background]:
        return [each for each in self.backgrounds.copy() if self.forget(each)]

    def forget(self, background: _Background) -> bool:
        """Take a background out. Return whether it was there: one caller finds it."""
        try:
            self.backgrounds.remove(background)
        except ValueError:
            return False
        return True

    def start_background(self) -> _Pool:
        """Serve without a lifespan."""
        _check_configuration()
        self.prepare()
        background = _Background()
        self.backgrounds.append(background)
        # First this, then a look; a lifespan serves, then looks for this, and so does
        # the end of the process. Or another background counts: of a thread, or of the
        # code that a signal handler has interrupted.
        serving = [*self.backgrounds[:1], *self.pools[-1:]]
        if serving != [background] and self.forget(background):
            background.undo_startup()
            return serving[-1]
        background.start()
        self.pools.append(background)
        background.wake()  # only from now on its scheduled jobs are seen
        if background.closed:  # a lifespan has started meanwhile
            background.withdraw()
        background.say_so()
        return background

    def prepare(self) -> None:
        """Be ready for a fork and for the end, once there is something to lose."""
        if self.prepared.step() > 1:
            return
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start_empty)
        try:
            _call_at_exit(self.drain_at_exit)
        except RuntimeError:  # it is at its end
            self.exiting = True

    def start_empty(self) -> None:
        """In a forked child: the parent's jobs stay the parent's."""
        parents = vars(self).copy()  # what goes with them may defer, from its __del__
        vars(self).update(vars(_Process()))
        self.prepared.step()
        _inside_job.set(False)  # in which it may have been forked
        for pool in [*parents["pools"], *parents["retiring"]]:
            pool.closed = True
            for _ in pool.queue.clear():
                continue

    def drain_at_exit(self) -> None:
        """In the main thread, at the end of the interpreter."""
        self.drain_backgrounds()
        self.exiting = True
        self.drain_backgrounds()  # those that had not been told
        flying = [worker.pool for worker in self.in_flight.copy().values()]
        for pool in [*self.pools, *filter(None, flying)]:
            if pool.loop.is_running() and not pool.thread.daemon:
                continue  # Python waits for a server in another thread
            pool.withdraw()  # its loop has ended without a shutdown, or will
            _lose(pool.seize()[0])

    def drain_backgrounds(self) -> None:
        # In this order, in which they move.
        while backgrounds := [*self.backgrounds, *self.retiring]:
            for background in backgrounds:
                background.drain_at_exit()


# asyncio makes its policy with the first loop, under a lock for which a signal handler
# that defers in that moment would wait for ever. So it is made now, before any handler.
with warnings.catch_warnings(), contextlib.suppress(AttributeError):  # Python 3.16
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.14
    asyncio.get_event_loop_policy()


class _Background(_Pool):
    """Serves where there is no lifespan: on a loop of its own, in a daemon thread."""

    def __init__(self) -> None:
        super().__init__(asyncio.new_event_loop())
        self.thread = threading.Thread(
            target=self.serve_in_thread, name=f"{_LABEL}-background", daemon=True
        )
        self.stopped = False
        self.ended: Future[None] = Future()

    def start(self) -> None:
        """Start the threads, or leave nothing behind."""
        try:
            if _process.exiting:
                raise RuntimeError
            self.startup()
            self.thread.start()
        except BaseException as error:  # also a signal handler's
            if self.thread not in threading.enumerate():  # else it serves
                _process.forget(self)
                self.undo_startup()
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                "The interpreter is shutting down, or the limit of threads is reached: "
                "no thread can be started for jobs."
            ) from error

    def startup(self) -> None:
        super().startup()
        # Now, as Python 3.12.0 to 3.12.2 start none once the main thread has ended.
        for worker in self.workers:
            worker.lane.start()

    def undo_startup(self) -> None:
        """Leave no thread and no loop behind, nor what other threads have queued."""
        self.closed = True
        for worker in self.workers:
            worker.lane.end()
        self.close()
        self.evict()

    def say_so(self) -> None:
        level, reason = logging.INFO, ""
        if _process.requests_seen:
            level = logging.WARNING
            reason = (
                ", although requests are served: jobs waiting at SIGTERM may be lost"
            )
        _write(level, f"No lifespan: jobs run in a background thread{reason}.")

    def serve_in_thread(self) -> None:
        while not self.stopped:  # but by a job
            # asyncio has a SystemExit get through that a task raises, of a job's own.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()
        try:
            self.loop.run_until_complete(self.cancel_what_is_left())
        finally:
            self.close()

    async def cancel_what_is_left(self) -> None:
        """End the tasks and generators that jobs have left behind."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_PATIENCE)
        await self.loop.shutdown_asyncgens()

    def close(self) -> None:
        """Be no more, and let the heir wait no more."""
        self.loop.close()
        self.leave()
        self.ended.set_result(None)

    def leave(self) -> None:
        with contextlib.suppress(ValueError):
            _process.retiring.remove(self)
        _process.notify()

    def withdraw(self) -> None:
        _process.forget(self)
        super().withdraw()

    def retire(self, heir: _Pool) -> None:
        """From any thread: end with what is in flight. All else is given away."""
        self.heir = heir
        _process.retiring.append(self)
        self.evict()
        self.ask_to_end()

    def ask_to_end(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self.end, context=self.context)
        except RuntimeError:  # it could not start, or is no more
            self.leave()

    def end(self) -> None:
        """On the loop: stop it after a drain."""
        self.ending = self.loop.create_task(self.drain_and_finish())
        self.ending.add_done_callback(self.stop)

    async def drain_and_finish(self) -> None:
        await self.drain()
        await self.finish()

    def stop(self, ending: asyncio.Task[None]) -> None:
        if ending.cancelled():  # by a job, which cancels every task that it finds
            return self.end()
        self.stopped = True
        self.loop.stop()

    def drain_at_exit(self) -> None:
        """In the main thread: wait for the drain. Ctrl-C ends the grace period."""
        self.begin_shutdown()
        if self.heir is None:
            self.ask_to_end()
        while True:
            try:
                self.ended.result()
                break
            except KeyboardInterrupt:
                self.deadline = monotonic()
                _process.notify()
        if self.thread.is_alive():  # else it has ended, or could not start
            self.thread.join(_PATIENCE)


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
    middleware = _Middleware(app)
    return middleware if asgi_version == 3 else middleware.as_asgi_2


def django_simple_task_middlware(app: Any, *, asgi_version: int = 3) -> Any:
    """The spelling of releases 0.1. Use django_simple_task_middleware()."""
    warnings.warn(
        "django_simple_task_middlware is now spelt django_simple_task_middleware.",
        DeprecationWarning,
        stacklevel=2,
    )
    return django_simple_task_middleware(app, asgi_version=asgi_version)


class _Middleware:
    def __init__(self, app: Any) -> None:
        self.app: Any = guarantee_single_callable(app)  # type: ignore[no-untyped-call]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(self.app, scope, receive, send).run()
        else:
            _process.requests_seen = True
            await self.app(scope, receive, send)

    def as_asgi_2(self, scope: Any) -> Any:
        return functools.partial(self, scope)


class _Lifespan:
    """One lifespan of one process of a server."""

    def __init__(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        self.receive = receive
        self.send = send
        self.inner = _InnerLifespan(app, scope)
        self.pool: _Pool | None = None

    async def run(self) -> None:
        try:
            while True:
                message = await self.receive()
                kind = message.get("type") if isinstance(message, Mapping) else message
                if kind == "lifespan.startup":
                    if not await self.startup():
                        return
                elif kind == "lifespan.shutdown":
                    return await self.shutdown()
                else:
                    shown = _cut(repr(kind))
                    _write(logging.WARNING, "Unknown lifespan message: %s.", shown)
        except BaseException as error:
            # Without a loop, or in a coroutine that is thrown away, nothing is awaited.
            if _running_loop() and not isinstance(error, GeneratorExit):
                await self.break_off(error)
            raise

    async def startup(self) -> bool:
        """Answer lifespan.startup. Return whether the lifespan goes on."""
        if self.pool is not None:
            _write(logging.WARNING, "A second lifespan.startup was ignored.")
        else:
            failure = _why_not_to_start() or await self.inner.startup()
            if failure is not None:
                await self.send({"type": "lifespan.startup.failed", "message": failure})
                return False
            self.pool = _Pool(asyncio.get_running_loop())
            _process.serve(self.pool)
        await self.send({"type": "lifespan.startup.complete"})
        return True

    async def shutdown(self) -> None:
        """Answer lifespan.shutdown, when all is done and reported."""
        failure = await self.end()
        if failure is None:
            await self.send({"type": "lifespan.shutdown.complete"})
        else:
            await self.send({"type": "lifespan.shutdown.failed", "message": failure})

    async def end(self) -> str | None:
        """Drain; let the application shut down; drain what that has deferred."""
        pool = self.pool
        if pool is None:
            return None
        pool.begin_shutdown()
        await pool.drain()
        failure = await self.inner.shutdown(pool.deadline)
        await pool.drain()
        await pool.finish()
        self.pool = None
        return failure

    async def break_off(self, error: BaseException) -> None:
        """End without an answer; at once, if the server does not wait."""
        if isinstance(error, asyncio.CancelledError):
            return await self.abandon()
        _write(logging.ERROR, "The lifespan was broken off.", exception=error)
        try:
            await self.end()
        except asyncio.CancelledError:  # now the server does not wait any more
            await self.abandon()
            raise

    async def abandon(self) -> None:
        """Give up at once what is unfinished, and report it."""
        self.inner.cancel()
        if self.pool is not None:
            await self.pool.finish(at_once=True)


class _InnerLifespan:
    """The lifespan of the wrapped application, if it has one. We are its server."""

    def __init__(self, app: Any, scope: Any) -> None:
        self.app = app
        self.scope = scope
        self.task: asyncio.Task[None] | None = None
        self.asked = False

    async def startup(self) -> str | None:
        """Return why it failed; None if it did not, or if there is no lifespan."""
        self.questions: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self.task = asyncio.create_task(self.serve())
        return await self.ask("lifespan.startup", math.inf)

    async def shutdown(self, deadline: float) -> str | None:
        """Return why it failed, None if it did not. It has some time in any case."""
        deadline = max(deadline, monotonic() + _INNER_SHUTDOWN)
        failure = await self.ask("lifespan.shutdown", deadline)
        self.cancel()
        return failure

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def serve(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if self.asked:  # else it refused the scope, and has no lifespan
                what = "The lifespan of the wrapped application failed."
                _write(logging.ERROR, what, exception=error)

    async def receive(self) -> Mapping[str, Any]:
        question = await self.questions.get()
        self.asked = True
        return question

    async def send(self, message: Mapping[str, Any]) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    async def ask(self, kind: str, deadline: float) -> str | None:
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Mapping[str, Any]] = loop.create_future()
        self.questions.put_nowait({"type": kind})
        seconds = None if deadline == math.inf else deadline - monotonic()
        first: Any = {self.answer, self.task}
        await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.answer.done() and self.answer.result().get("type") == f"{kind}.failed":
            return self.answer.result().get("message") or f"{kind} failed."
        return None


def _why_not_to_start() -> str | None:
    if _running_loop() is None:
        return (
            "Jobs run on asyncio's event loop; this server's worker has none (trio?)."
        )
    try:
        _check_configuration()
    except ImproperlyConfigured as error:
        return str(error)
    return None


# Task backend


def _defer_task(task: Any, arguments: Any, options: Any) -> None:
    args, kwargs = _NO_ARGUMENTS
    if arguments is not None:
        args, kwargs = _check_arguments(arguments)
    if options is not None:
        _check_keys("options of a Task", options, ("priority", "run_after"))
        run_after = options.get("run_after")
        _seconds_until(run_after)  # which refuses what is no time
        if isinstance(run_after, timedelta):
            try:
                run_after = _datetime(time()) + run_after
            except OverflowError:
                raise ValueError(
                    'options["run_after"] must be before the year 10000.'
                ) from None
        task = task.using(priority=options.get("priority"), run_after=run_after)
    task.enqueue(*args, **kwargs)


class SimpleTaskBackend(BaseTaskBackend):
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
        """Raise InvalidTask for a Task that cannot be run here."""
        found = (task, self.queues, self.supports_async_task, self.supports_priority)
        if _valid_tasks.get(id(task)) == found:
            return
        super().validate_task(task)
        if task.run_after is None:  # else supports_defer and USE_TZ have a say, too
            if len(_valid_tasks) >= _MOST_VALID_TASKS:
                _valid_tasks.clear()
            _valid_tasks[id(task)] = found

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
        pool, moved_task = job.find_room()
        if moved_task is not None:
            return moved_task.enqueue(*args, **kwargs)
        result = job.register()
        job.tell(tasks.signals.task_enqueued, result)
        job.accept(pool)
        return job.snapshot() if pool is None else result

    async def aenqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """See enqueue()."""
        if _setting(_IMMEDIATE):
            return await sync_to_async(self.enqueue)(task, args, kwargs)
        job = _TaskJob(self, task, args, kwargs)
        pool, moved_task = job.find_room()
        if moved_task is not None:
            return await moved_task.aenqueue(*args, **kwargs)
        result = job.register()
        try:
            await job.announce(result)
        finally:  # also when the caller was cancelled meanwhile: it has been announced
            job.accept(pool)
        return result

    def get_result(self, result_id: str) -> Any:
        """Return a snapshot of a TaskResult, or raise TaskResultDoesNotExist."""
        job = self.job(result_id)
        if job is not None:
            return job.snapshot()
        return self.overflow_backend().get_result(result_id)

    async def aget_result(self, result_id: str) -> Any:
        """See get_result()."""
        job = self.job(result_id)
        if job is not None:
            return job.snapshot()
        return await self.overflow_backend().aget_result(result_id)

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Check OPTIONS, for `manage.py check`."""
        return list(_check_backend(self))

    @functools.cached_property
    def checked_options(self) -> dict[str, Any]:
        for fault in _check_backend(self):
            raise ImproperlyConfigured(fault.msg)
        return {
            name: field.clean(self.options.get(name, field.default))
            for name, field in _BACKEND_OPTIONS.items()
        }

    def job_options(self, task: Any) -> _Options:
        """Return the options of a Task's job."""
        ours = self.checked_options
        if not self.options and not task.priority:
            return _NO_OPTIONS
        return _NO_OPTIONS._replace(
            priority=task.priority,
            timeout=ours["TIMEOUT"] if iscoroutinefunction(task.func) else None,
            max_attempts=ours["MAX_ATTEMPTS"],
            backoff=ours["BACKOFF"],
        )

    def job(self, result_id: str) -> _TaskJob | None:
        job = _process.results.get(result_id)
        return job if job is not None and job.backend.alias == self.alias else None

    def overflow_backend(self) -> Any:
        """Return the backend to ask for a result that is not here, or raise."""
        alias = self.options.get("OVERFLOW_BACKEND")
        if alias is None:
            raise tasks.exceptions.TaskResultDoesNotExist(
                "This process has no such TaskResult: SimpleTaskBackend keeps results "
                "in the process that took the Task, of the finished ones the latest "
                "MAX_RESULTS."
            )
        return tasks.task_backends[alias]


# Tasks that were found valid, by id, with all that this depends on. A Task never
# changes and is enqueued again and again; to look takes a twentieth of its whole time.
_valid_tasks: dict[int, tuple[Any, ...]] = {}
_MOST_VALID_TASKS = 1000  # as using() makes one for a single call

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
        no_args, no_kwargs = _NO_ARGUMENTS
        try:
            args = _copy_json(args) if args else no_args
            kwargs = _copy_json(kwargs) if kwargs else no_kwargs
        except RecursionError:
            raise ValueError(
                "The arguments are nested too deep, or in a circle."
            ) from None
        options = backend.job_options(task)
        call = (task.func, args, kwargs, False, options, _capture_context(), 0)
        super().__init__(call)
        self.backend = backend
        self.task = task
        self.movable = backend.options.get("OVERFLOW_BACKEND") is not None
        # What its TaskResult has. Read and changed as a whole: nobody sees half.
        self.state = {
            "task": task,
            "id": _process.new_result_id(),
            "status": tasks.TaskResultStatus.READY,
            "backend": backend.alias,
            "_enqueued": time(),
            "_started": None,
            "_finished": None,
            "_last_attempted": None,
            "_args": args,
            "_kwargs": kwargs,
            "_errors": (),
            "_worker_ids": (),
            "_returned": None,
        }

    @property
    def id(self) -> Any:
        return self.state["id"]

    def snapshot(self) -> Any:
        """Return a TaskResult that shares nothing that changes, with us or another."""
        # Not by the constructor, which takes no return value and ten times as long.
        result = object.__new__(_TaskResult)
        object.__setattr__(result, "__dict__", self.state.copy())
        return result

    def change(self, **changes: Any) -> None:
        state = self.state
        if state["_finished"] is None:  # a drain may have lost it just now
            state.update(changes)

    def tell(
        self, signal: Any, result: Any, error: BaseException | None = None
    ) -> None:
        """Send a signal, off the loop, since receivers may use the ORM."""
        try:
            if error is None and _running_loop() is None:  # nearly always: no detour
                signal.send_robust(type(self.backend), task_result=result)
            else:
                _off_the_loop(functools.partial(self.send, signal, result, error))
        except BaseException as failure:  # a receiver's, or no thread can be started
            _write(logging.ERROR, _NOT_DELIVERED, exception=failure)

    def send(self, signal: Any, result: Any, error: BaseException | None) -> None:
        try:
            if error is not None:
                raise error  # receivers log what is being handled: Django's do
        except BaseException:
            signal.send_robust(type(self.backend), task_result=result)
        else:
            signal.send_robust(type(self.backend), task_result=result)
        finally:
            del error  # or it would keep itself alive, by way of this frame

    def find_room(self) -> tuple[_Pool | None, Any]:
        """Return where it may wait; or, with None, the Task to enqueue elsewhere."""
        try:
            return _pool_with_room(flows_over=self.movable), None
        except QueueFull:
            if not self.movable:
                raise
            return None, self.moved_task()

    def accept(self, pool: _Pool | None) -> None:
        self.number = _process.accepted.step()
        _put(self, pool, _seconds_until(self.task.run_after))

    def register(self) -> Any:
        """Make the result known, and return it."""
        _process.results[self.id] = self
        return self.snapshot()

    async def announce(self, result: Any) -> None:
        """Tell that it is queued, without blocking the loop."""
        # Not by sync_to_async() nor asend(), with which the SystemExit of an async
        # receiver would end the caller's loop.
        tell = functools.partial(self.tell, tasks.signals.task_enqueued, result)
        try:
            told = _in_helper(tell)
        except RuntimeError as error:  # no thread can be started
            return _write(logging.ERROR, _NOT_DELIVERED, exception=error)
        await asyncio.wait({asyncio.wrap_future(told)})

    def start(self, worker: str) -> None:
        seconds = time()
        self.change(
            status=tasks.TaskResultStatus.RUNNING,
            _started=self.state["_started"] or seconds,
            _last_attempted=seconds,
            _worker_ids=(*self.state["_worker_ids"], worker),
        )
        self.tell(tasks.signals.task_started, self.snapshot())

    def call(self) -> Any:
        args = _copy_json(self.args) if self.args else ()
        if self.task.takes_context:
            args = (tasks.base.TaskContext(task_result=self.snapshot()), *args)
        if self.kwargs:
            return self.func(*args, **_copy_json(self.kwargs))
        return self.func(*args)

    def keep(self, value: Any) -> None:
        self.change(_returned=_copy_json(value))

    def succeed(self, started: float) -> None:
        self.settle(tasks.TaskResultStatus.SUCCESSFUL)
        self.tell_end()

    def retry(self, error: BaseException, delay: float) -> None:
        self.note(error)
        self.change(status=tasks.TaskResultStatus.READY)
        super().retry(error, delay)

    def fail(self, started: float, error: BaseException) -> None:
        self.note(error)
        self.settle(tasks.TaskResultStatus.FAILED)
        self.tell_end(error)

    def lose(self, reason: str) -> None:
        self.note(JobLost(reason))
        self.settle(tasks.TaskResultStatus.FAILED)

    def tell_end(self, error: BaseException | None = None) -> None:
        self.tell(tasks.signals.task_finished, self.snapshot(), error)

    def note(self, error: BaseException) -> None:
        noted = tasks.base.TaskError(
            exception_class_path=_path(type(error)), traceback=_traceback(error) + "\n"
        )
        self.change(_errors=(*self.state["_errors"], noted))

    def settle(self, status: Any) -> None:
        # In another dict: whoever changes the one before changes nothing that counts.
        self.state = {**self.state, "status": status, "_finished": time()}
        self.context = _NO_CONTEXT  # or it would be kept for as long as the result
        finished = _process.finished[self.backend.alias]
        finished.append(self.id)
        while len(finished) > self.backend.checked_options["MAX_RESULTS"]:
            try:
                oldest = finished.popleft()
            except IndexError:  # another thread was faster
                break
            _process.results.pop(oldest, None)

    def moved_task(self) -> Any:
        return self.task.using(backend=self.backend.options["OVERFLOW_BACKEND"])

    def hand_over(self) -> str:
        """Have another backend take it; return a sentence that tells where it is."""
        task = self.moved_task()
        result = task.enqueue(*self.args, **self.kwargs)
        return f"Handed over to the backend {task.backend!r}, as {result.id}."


def _copy_json(value: Any, depth: int = 0) -> Any:
    """Return a copy of what JSON can hold, or raise TypeError or ValueError."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if depth > _DEEPEST:
        raise ValueError("The value is nested too deep, or in a circle.")
    if kind is list or kind is tuple:
        return [_copy_json(each, depth + 1) for each in value]
    if kind is dict:
        return {
            _copy_json(key, depth + 1): _copy_json(each, depth + 1)
            for key, each in value.items()
        }
    return tasks.base.normalize_json(value)


_SCALARS = frozenset({str, int, float, bool, type(None)})
# Python's stack bears a thousand calls, of which the readers of a result need some.
_DEEPEST = 200


def _when_looked_at(name: str, make: Callable[[Any], Any]) -> Any:
    """Describe a field that is made of what the snapshot has under another name."""

    def look(result: Any) -> Any:
        value = vars(result).get(name)
        return None if value is None else make(value)

    return functools.cached_property(look)


class _TaskResult(TaskResult):
    """
    A snapshot of a Task. What its reader might change is copied for it when it is first
    looked at, and times are made then: three snapshots are made of each Task, and
    mostly nobody looks.
    """

    # In the instance's dict, which is filled in one step, not in Django's slots; so are
    # those from which the others are made, which never change, and are shared.
    task = id = status = backend = None
    enqueued_at = _when_looked_at("_enqueued", _datetime)
    started_at = _when_looked_at("_started", _datetime)
    finished_at = _when_looked_at("_finished", _datetime)
    last_attempted_at = _when_looked_at("_last_attempted", _datetime)
    args = _when_looked_at("_args", _copy_json)
    kwargs = _when_looked_at("_kwargs", _copy_json)
    errors = _when_looked_at("_errors", list)
    worker_ids = _when_looked_at("_worker_ids", list)
    _return_value = _when_looked_at("_returned", _copy_json)


_NOT_DELIVERED = "A signal of a Task was not delivered."
_NO_CONTEXT = Context()


def _check_backend(backend: SimpleTaskBackend) -> Iterator[checks.CheckMessage]:
    where = f'TASKS["{backend.alias}"]["OPTIONS"]'
    for name, value in backend.options.items():
        field = _BACKEND_OPTIONS.get(name)
        if field is None:
            fault = f"{where} must not have the key {_cut(str(name))!r}."
            yield _error(5, fault, f"It may have {', '.join(_BACKEND_OPTIONS)}.")
            continue
        try:
            field.clean(value)
        except (TypeError, ValueError):
            fault = (
                f'{where}["{name}"] is {_cut(repr(value))}: it must be {field.allowed}.'
            )
            yield _error(6, fault, f"Set it to {field.allowed}.")
            return
    yield from _check_overflow(backend, f'{where}["OVERFLOW_BACKEND"]')


def _check_overflow(
    backend: SimpleTaskBackend, where: str
) -> Iterator[checks.CheckMessage]:
    alias = backend.options.get("OVERFLOW_BACKEND")
    if alias is None:
        return
    if alias == backend.alias or alias not in tasks.task_backends.settings:
        others = ", ".join(sorted(set(tasks.task_backends.settings) - {backend.alias}))
        fault = f"{where} is {_cut(repr(alias))}: it must be another alias of TASKS."
        yield _error(7, fault, f"There are: {others or 'no others'}.")
        return
    other = tasks.task_backends[alias]
    if isinstance(other, SimpleTaskBackend):
        fault = f"{where} is {alias!r}, which is in this process, too."
        yield _error(7, fault, "Name an alias with a durable engine.")
    there = other.queues
    missing = backend.queues - there if backend.queues else {"any other"}
    if there and missing:
        names = ", ".join(sorted(missing))
        fault = f"{where} is {alias!r}, which has not every queue: {names}."
        yield _error(8, fault, f'Add to TASKS["{alias}"]["QUEUES"], or set it to [].')


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
        connection_created.connect(_disconnect, dispatch_uid=_LABEL)
        checks.register(_check_settings)
        checks.register(_check_deployment, deploy=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that serves, the latest of several; None without one."""
        pools = _process.pools.copy()
        return pools[-1].loop if pools else None

    @property
    def queue(self) -> _Queue | None:
        """The queue of that loop, in which `queue.qsize()` jobs wait."""
        pools = _process.pools.copy()
        return pools[-1].queue if pools else None


# Django finds an AppConfig only in the submodule `apps` of what INSTALLED_APPS names.
# So this module is its own.
__path__: list[str] = []
if __name__ != "__main__":
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
    for number, (name, field) in enumerate(_SETTINGS.items(), 1):
        try:
            _setting(name)
        except ImproperlyConfigured as error:
            yield _error(number, str(error), f"Set it to {field.allowed}.")
    for name in dir(settings):
        if name.startswith(_PREFIX) and name not in _SETTINGS:
            (nearest,) = difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0)
            yield checks.Warning(
                f"{_cut(name)} is no setting of {_LABEL}.",
                hint=f"Did you mean {nearest}?",
                id=f"{_LABEL}.W001",
            )


def _check_deployment(**kwargs: Any) -> Iterator[checks.CheckMessage]:
    if getattr(settings, _SHUTDOWN_GRACE_PERIOD, None) is None:
        yield checks.Warning(
            f"{_SHUTDOWN_GRACE_PERIOD} is not set: a job that hangs holds up the "
            "shutdown until the orchestrator kills the process; nothing is reported.",
            hint="set it five seconds under your orchestrator's limit",
            id=f"{_LABEL}.W002",
        )


_process = _Process()
