"""Settings and fixtures of the tests: a project of one app, and a server that is not there."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import inspect
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import django
import pytest
from django.conf import settings

import django_simple_task


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "long: takes long; runs in .ci/run only")
    config.addinivalue_line("markers", "alone: wants the machine to itself")
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        },
        INSTALLED_APPS=["django_simple_task"],
        LANGUAGE_CODE="en",
        ROOT_URLCONF="conftest",
        SECRET_KEY="tests",
        USE_I18N=True,
        USE_TZ=True,
    )
    django.setup()


urlpatterns: list[object] = []

# Seconds after which what a test waits for is taken to hang, on a slow machine.
HANG = 60


class Server:
    """A fake ASGI server: it sends lifespan messages and keeps the answers."""

    def __init__(self, app, scope=None):
        self.sent = []
        self._to_app = asyncio.Queue()
        self._answered = asyncio.Event()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, **(scope or {})}
        self.task = asyncio.ensure_future(app(scope, self._to_app.get, self._send))

    async def _send(self, message):
        self.sent.append(message)
        self._answered.set()

    def put(self, message):
        self._to_app.put_nowait(message)

    async def answer(self):
        """Wait for the next answer, or for the end of the lifespan."""
        answered = asyncio.ensure_future(self._answered.wait())
        await asyncio.wait(
            {answered, self.task}, timeout=HANG, return_when=asyncio.FIRST_COMPLETED
        )
        answered.cancel()
        self._answered.clear()
        return self.sent[-1] if self.sent else None

    async def startup(self):
        self.put({"type": "lifespan.startup"})
        return await self.answer()

    async def shutdown(self):
        self.put({"type": "lifespan.shutdown"})
        answer = await self.answer()
        await asyncio.wait_for(self.task, HANG)
        return answer


async def plain_app(scope, receive, send):
    """Stand in for Django, which refuses the lifespan."""
    if scope["type"] == "lifespan":
        raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")


@contextlib.asynccontextmanager
async def serving(app=plain_app):
    """Run the middleware around `app` as a server would, from startup to shutdown."""
    server = Server(django_simple_task.django_simple_task_middleware(app))
    assert await server.startup() == {"type": "lifespan.startup.complete"}
    try:
        yield server
    finally:
        if not server.task.done():
            await server.shutdown()


class Ledger:
    """What the jobs themselves say of their runs."""

    def __init__(self):
        self.runs = []
        self._changed = threading.Condition()

    def note(self, entry=None):
        with self._changed:
            self.runs.append(entry)
            self._changed.notify_all()

    async def anote(self, entry=None):
        self.note(entry)

    def wait(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.runs) >= count, HANG), (
                self.runs
            )


@pytest.fixture
def ledger():
    return Ledger()


class Oracles:
    """
    What must hold after each test that runs jobs in this process, whatever it did.

    The accounts are compared, key by key, with what was seen at the time: with the
    lines of the log, as they are made, with what the callers were refused, and with
    the queues.
    """

    def __init__(self):
        self.before = django_simple_task.stats()
        self.seen = []  # keys of stats(); a list, since all threads add to it
        self.failures = []  # of asyncio: "never retrieved", "exception in callback"

    def watch(self, monkeypatch, module):
        # Where records are made, those included that the levels of a test keep out: what
        # it does to handlers and filters is none of our business, and nothing that a
        # record has is kept.
        for name in ("django_simple_task", "asyncio", *TASKS_LOGGERS):
            logger = logging.getLogger(name)
            listen = functools.partial(self.listen, logger.makeRecord)
            monkeypatch.setattr(logger, "makeRecord", listen)
            handle = functools.partial(handle_if, logger.isEnabledFor, logger.handle)
            monkeypatch.setattr(logger, "handle", handle)
            monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)
        defer = noting_refusals(self.seen, django_simple_task.defer)
        for owner in django_simple_task, module:
            monkeypatch.setattr(owner, "defer", defer, raising=False)
        backend, job = django_simple_task.SimpleTaskBackend, django_simple_task._TaskJob
        for name in "enqueue", "aenqueue":
            method = noting_refusals(self.seen, getattr(backend, name))
            monkeypatch.setattr(backend, name, method)
        hand_over = noting_hand_overs(self.seen, job.hand_over)
        monkeypatch.setattr(job, "hand_over", hand_over)

    def listen(self, make_record, name, level, *args, **kwargs):
        record = make_record(name, level, *args, **kwargs)
        message = record.getMessage()
        if name == "asyncio":
            self.failures += [message] if level >= logging.ERROR else []
        elif message.startswith("lost="):
            self.seen += ["lost"] * record.lost
        elif message.startswith("Task id="):
            self.seen.append(end_of_a_task(message, record))
        elif name == "django_simple_task":
            event = message.partition(" job=")[0]
            self.seen.append(EVENTS.get(event, event))
        return record

    def check(self):
        if self.before["pending"] or self.before["in_flight"]:
            return  # what an earlier test has mislaid is not for this one to answer for
        assert django_simple_task.join(HANG), django_simple_task.stats()
        self.check_accounts()
        self.check_threads()
        assert self.failures == []

    def check_accounts(self):
        """Each key is what was seen, and all together close."""
        accounts = django_simple_task.stats()
        since = {key: accounts[key] - self.before[key] for key in accounts}
        seen = collections.Counter(self.seen)
        for key in "accepted", "rejected", "retried", "lost", "handed_over":
            assert since[key] == seen[key], (key, since, seen)
        for key in "succeeded", "failed":
            untold = seen["A signal of a Task was not delivered."]
            assert seen[key] <= since[key] <= seen[key] + untold, (key, since, seen)
        pools = django_simple_task._process.pools
        scheduled = sum(len(pool.queue.scheduled) for pool in pools)
        waiting = sum(pool.queue.qsize() for pool in pools)
        assert accounts["pending"] == accounts["in_flight"] == 0
        assert accounts["scheduled"] == scheduled == waiting

    def check_threads(self):
        """Of our threads those are left that serve in the background."""
        pools = django_simple_task._process.pools
        serving = {worker.lane.thread for pool in pools for worker in pool.workers}
        serving.update(getattr(pool, "thread", None) for pool in pools)
        for thread in set(threading.enumerate()) - serving:
            if thread.name.startswith("django_simple_task"):
                thread.join(HANG)
                assert not thread.is_alive(), thread


TASKS_LOGGERS = "django.tasks", "django_tasks"
# How the lines of a job begin, and what they say to its accounts.
EVENTS = {
    "deferred": "accepted",
    "finished": "succeeded",
    "lost in flight": "lost",
    "will be retried": "retried",
}


def end_of_a_task(message, record):
    """Tell what Django says of a Task. One that was given up has no exception."""
    if message.endswith("state=SUCCESSFUL"):
        return "succeeded"
    failed = record.exc_info is not None and record.exc_info[0] is not None
    return "failed" if failed else message


def handle_if(enabled, handle, record):
    """Hand a record on that would not have been made without us, if at all."""
    if enabled(record.levelno):
        handle(record)


def noting_refusals(seen, function):
    """Wrap what queues jobs, in order to note each QueueFull that its caller gets."""

    @contextlib.contextmanager
    def noting():
        try:
            yield
        except django_simple_task.QueueFull as error:
            if not hasattr(error, "seen"):  # by a function that this one has called
                error.seen = True
                seen.append("rejected")
            raise

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with noting():
            return function(*args, **kwargs)

    @functools.wraps(function)
    async def async_wrapper(*args, **kwargs):
        with noting():
            return await function(*args, **kwargs)

    return async_wrapper if inspect.iscoroutinefunction(function) else wrapper


def noting_hand_overs(seen, hand_over):
    """Wrap what gives a Task to another backend, in order to note what that took."""

    def wrapper(job):
        where = hand_over(job)
        if not job.snapshot().is_finished:  # else it took too long, and was lost
            seen.append("handed_over")
        return where

    return wrapper


@pytest.fixture(autouse=True)
def oracles(monkeypatch, request):
    oracles = Oracles()
    oracles.watch(monkeypatch, request.module)
    yield
    oracles.check()


PREAMBLE = """
import asyncio, logging, os, signal, sys, threading, time
import django
from django.conf import settings
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
settings.configure(INSTALLED_APPS=["django_simple_task"], USE_TZ=True, **{settings!r})
django.setup()
from django_simple_task import *
"""


def run_script(body, *, before="", timeout=HANG, dev=True, **settings):
    """Run a script in a process of its own, after django.setup(); end it if it hangs."""
    preamble = PREAMBLE.replace("{settings!r}", repr(settings))
    code = before + preamble + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, *(["-X", "dev"] if dev else []), "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent,
        text=True,
    )
    try:
        output = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # then -X dev shows where it hangs
        output = process.communicate(timeout=HANG)
    finally:
        process.kill()
    return subprocess.CompletedProcess(code, process.returncode, *output)


# In CI a skipped test is a failure: there everything that tests need is installed. What
# another Python or Django is needed for says so: `pytest.skip("does not apply: ...")`.


def _not_skipped(report):
    skipped = report.skipped and isinstance(report.longrepr, tuple)
    if skipped and os.environ.get("CI") == "true":
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith("does not apply:"):
            report.outcome = "failed"
            report.longrepr = f"Skipped, which CI takes for a failure: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Look at each test's setup, call and teardown."""
    return _not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """Look at each file, which may skip itself whole."""
    return _not_skipped((yield))
