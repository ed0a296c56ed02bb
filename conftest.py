"""Settings and fixtures of the tests: a project of one app, and a server that is not there."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import os
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
    config.addinivalue_line("markers", "by_hand: a long test for a machine at rest")
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

# Seconds after which what a test waits for is taken to hang.
HANG = 20


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
    """What must hold after each test that runs jobs in this process, whatever it did."""

    def __init__(self):
        self.before = django_simple_task.stats()
        self.told = collections.Counter()
        self.failures = []  # of asyncio: "never retrieved", "exception in callback"

    def watch(self, monkeypatch):
        # Where records are made: what a test does to levels of handlers, to filters and
        # to handlers is none of our business, and nothing that a record has is kept.
        for name in ("django_simple_task", "asyncio", *TASKS_LOGGERS):
            logger = logging.getLogger(name)
            listen = functools.partial(self.listen, logger.makeRecord)
            monkeypatch.setattr(logger, "makeRecord", listen)

    def listen(self, make_record, name, level, *args, **kwargs):
        record = make_record(name, level, *args, **kwargs)
        message = record.getMessage()
        if name == "asyncio" and level >= logging.ERROR:
            self.failures.append(message)
        elif name in TASKS_LOGGERS:
            self.told["of a Task"] += level >= logging.ERROR
        elif message.startswith("lost="):
            self.told["lost"] += record.lost
        elif level >= logging.WARNING and hasattr(record, "job"):
            self.told[message.partition(" job=")[0]] += 1
        return record

    def check(self):
        if self.before["pending"] or self.before["in_flight"]:
            return  # what an earlier test has mislaid is not for this one to answer for
        assert django_simple_task.join(HANG), django_simple_task.stats()
        self.check_accounts()
        self.check_lines()
        self.check_threads()
        assert self.failures == []

    def check_accounts(self):
        """Nothing is unfinished, nothing mislaid, nothing counted twice."""
        accounts = django_simple_task.stats()
        pools = django_simple_task._process.pools
        assert accounts["pending"] == accounts["in_flight"] == 0
        assert accounts["scheduled"] == sum(pool.queue.qsize() for pool in pools)
        assert all(accounts[key] >= self.before[key] for key in COUNTED), accounts

    def check_lines(self):
        """Each loss and each retry was told of; and each failure, but for Tasks'."""
        accounts = django_simple_task.stats()
        since = {key: accounts[key] - self.before[key] for key in COUNTED}
        assert self.told["lost"] + self.told["lost in flight"] == since["lost"]
        assert self.told["will be retried"] == since["retried"]
        told = self.told["failed"]
        assert told <= since["failed"] <= told + self.told["of a Task"]

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
COUNTED = (
    "accepted",
    "rejected",
    "succeeded",
    "failed",
    "lost",
    "handed_over",
    "retried",
)


@pytest.fixture(autouse=True)
def oracles(monkeypatch):
    oracles = Oracles()
    oracles.watch(monkeypatch)
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


def run_script(body, *, timeout=HANG, dev=True, **settings):
    """Run a script in a process of its own, after django.setup(); kill it if it hangs."""
    code = PREAMBLE.replace("{settings!r}", repr(settings)) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, *(["-X", "dev"] if dev else []), "-c", code],
        capture_output=True,
        cwd=Path(__file__).parent,
        text=True,
        timeout=timeout,
    )


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
