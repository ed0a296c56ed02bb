"""The harness of the tests: a project of one app, a fake server, a ledger, a log."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import http.client
import importlib
import inspect
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import weakref
from datetime import timedelta
from functools import partial
from html import unescape
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import asgiref.local
import django
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.handlers.asgi import ASGIHandler
from django.db import connections
from django.db.backends.sqlite3.base import DatabaseWrapper
from django.http import HttpResponse
from django.test import override_settings
from django.urls import get_script_prefix, get_urlconf, path, set_urlconf
from django.urls.base import set_script_prefix
from django.utils import timezone, translation
from django.utils.asyncio import async_unsafe
from django.utils.decorators import sync_only_middleware

import django_simple_task
from django_simple_task import (
    SimpleTaskBackend,
    ajoin,
    defer,
    django_simple_task_middleware,
    join,
    stats,
)


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


def long(*values):
    """Have a case of a test run in .ci/run only."""
    return pytest.param(*values, marks=pytest.mark.long)


STARTED = {"type": "lifespan.startup.complete"}
ENDED = {"type": "lifespan.shutdown.complete"}

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

    async def shutdown(self, *, within=HANG):
        """Have it shut down within so many seconds, and some more on a slow machine."""
        began = monotonic()
        self.put({"type": "lifespan.shutdown"})
        answer = await self.answer()
        await asyncio.wait_for(self.task, HANG)
        assert monotonic() - began < within + 5
        return answer


async def plain_app(scope, receive, send):
    """Stand in for Django, which refuses the lifespan."""
    if scope["type"] == "lifespan":
        raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")


def app_with_a_lifespan(*, startup=None, shutdown=None):
    """Make an application of two phases; what an act returns is its last answer."""

    async def app(scope, receive, send):
        for phase, act in {"startup": startup, "shutdown": shutdown}.items():
            assert await receive() == {"type": f"lifespan.{phase}"}
            answer = act and await act(scope)
            await send(answer or {"type": f"lifespan.{phase}.complete"})
            if answer:
                return

    return app


@contextlib.asynccontextmanager
async def serving(app=plain_app, scope=None, **ours):
    """
    Run the middleware around `app` as a server would, from startup to shutdown, with
    settings of ours by their names without the prefix: serving(WORKERS=2).
    """
    server = Server(django_simple_task_middleware(app), scope)
    with configured(**ours):
        assert await server.startup() == STARTED
        try:
            yield server
        finally:
            if not server.task.done():
                assert await server.shutdown() == ENDED


async def refused_startup(app=plain_app, wrap=django_simple_task_middleware):
    """Return the only answer of a lifespan that ends with its startup."""
    server = Server(wrap(app))
    answer = await server.startup()
    await asyncio.wait_for(server.task, HANG)
    assert server.sent == [answer]
    return answer


def stopped_loop(act=None):
    """Return a loop that turns no more, after a startup and an act of a coroutine."""

    async def begin():
        await Server(django_simple_task_middleware(plain_app)).startup()
        await (act() if act else asyncio.sleep(0))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    return loop


@contextlib.contextmanager
def serving_in_a_thread():
    """Serve on a loop of another thread; give the loop, and what shuts it down."""
    with loop_in_a_thread() as loop:
        lifespan = Lifespan(loop)
        server, call = lifespan.server, lifespan.call
        try:
            yield loop, lambda **within: call(server.shutdown(**within))
        finally:
            if not server.task.done():
                call(server.shutdown())
            call(loop.shutdown_default_executor())


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
    """What must hold after each test that runs jobs in this process, come what may."""

    def __init__(self):
        self.before = stats()
        self.complaints = []  # of asyncio: "never retrieved", "exception in callback"
        self.handler = logging.Handler(logging.ERROR)
        self.handler.emit = lambda record: self.complaints.append(record.getMessage())
        logging.getLogger("asyncio").addHandler(self.handler)

    def check(self):
        logging.getLogger("asyncio").removeHandler(self.handler)
        if self.before["pending"] or self.before["in_flight"]:
            return  # what an earlier test has mislaid is not for this one to answer for
        assert join(HANG), stats()
        accounts = stats()
        assert accounts["pending"] == accounts["in_flight"] == 0
        assert_closed(accounts)
        assert self.complaints == []


def assert_closed(accounts):
    """Each accepted job is in one account."""
    parts = "succeeded failed lost handed_over pending scheduled in_flight".split()
    assert accounts["accepted"] == sum(accounts[part] for part in parts), accounts


@pytest.fixture(autouse=True)
def oracles():
    oracles = Oracles()
    yield
    oracles.check()


@pytest.fixture
def lines():
    """Collect the records of our logger that are about a job, from DEBUG on."""
    ledger = Ledger()
    with heard(
        lambda record: hasattr(record, "job") and ledger.note(record), logging.DEBUG
    ):
        yield ledger


@contextlib.contextmanager
def heard(note, level):
    """Have a function called with the records of our logger, from a level on."""
    handler = logging.Handler()
    handler.emit = note
    logger = logging.getLogger("django_simple_task")
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class Said(Ledger):
    """What our logger says."""

    def until(self, text, times=1):
        def told():
            return sum(text in record.getMessage() for record in self.runs) >= times

        with self._changed:
            return self._changed.wait_for(told, HANG)

    def at(self, level):
        return [record for record in self.runs if record.levelname == level]

    def raised(self):
        return [record.exc_info[0] for record in self.at("ERROR")]

    def lost(self):
        """Return how many were lost before they began, and the ids shown, by name."""
        lost = {}
        for record in self.at("ERROR"):
            line = re.fullmatch(r"lost=(\d+) job=(\S+) ids=(\S+)", record.getMessage())
            if line:
                assert line[2] not in lost
                lost[line[2]] = int(line[1]), line[3].split(",")
                assert (record.lost, record.job) == (int(line[1]), line[2])
        return lost


@pytest.fixture
def said():
    """Collect what our logger says, from INFO on."""
    said = Said()
    with heard(said.note, logging.INFO):
        yield said


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a coroutine function as a test, on a loop of its own; it may not hang."""
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):

        def run(**kwargs):
            asyncio.run(asyncio.wait_for(test(**kwargs), 3 * HANG))

        pyfuncitem.obj = run


@pytest.fixture
def immediate():
    with override_settings(DJANGO_SIMPLE_TASK_IMMEDIATE=True):
        yield


def since(before):
    """Return what stats() counts now and did not then."""
    now = stats()
    keys = [key for key in now if key != "workers" and now[key] != before[key]]
    return {key: now[key] - before[key] for key in keys}


@contextlib.contextmanager
def busy_worker():
    """Keep the only worker at work, so that what is deferred meanwhile waits."""
    started, release = threading.Event(), threading.Event()

    def work():
        started.set()
        release.wait(HANG)

    defer(work)
    assert started.wait(HANG)
    try:
        yield release
    finally:
        release.set()


def tasks_package():
    """Return django.tasks, or its backport; skip the test where there is neither."""
    if TASKS_NAME is None:
        pytest.skip("does not apply: needs Django 6.0 or the package django-tasks")
    return tasks_api


def do_nothing():
    pass


def until(true, *, pause=0.05, tell=lambda: None):
    """Look again and again; return what is true in the end."""
    hung_at = monotonic() + HANG
    while not (value := true()):
        assert monotonic() < hung_at, tell()
        sleep(pause)
    return value


class Hung:
    """Jobs, and things in the way of a shutdown, that hang until the end of a test."""

    def __init__(self, stack):
        self.began, self.release, self.stack = Ledger(), threading.Event(), stack

    def job(self, *args, **kwargs):
        self.began.note()
        assert self.release.wait(HANG)

    async def coroutine(self):
        self.began.note()
        await asyncio.Event().wait()

    async def stubborn(self):
        self.began.note()
        until = monotonic() + HANG
        while not self.release.is_set() and monotonic() < until:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def link(self):
        self.began.note()
        defer(self.link)
        await asyncio.sleep(0)

    async def begin(self, *jobs, at_once=0, **options):
        """Defer jobs that hang, and wait until they are in flight, or some at once."""
        for job in jobs:
            defer(job, options=options)
        await off_the_loop(self.began.wait, at_once or len(jobs))

    def line(self, text, job=lambda: None, **options):
        """Let a logging handler hang; it holds its lock, as handlers do."""
        handler = logging.Handler()
        handler.emit = lambda record: text in record.getMessage() and self.job()
        logger = logging.getLogger("django_simple_task")
        logger.addHandler(handler)
        self.stack.callback(logger.removeHandler, handler)
        defer(job, options=options)

    def receiver(self, name):
        """Let a receiver of one of the signals of Tasks hang."""
        tasks, signal = tasks_package(), getattr(task_signals, name)
        signal.connect(self.job)
        self.stack.callback(signal.disconnect, self.job)
        tasks.task(do_nothing).enqueue()

    def connection(self, method):
        """Let a connection hang as it is looked at after a job."""

        def job():
            wrapper = DatabaseWrapper(connections["default"].settings_dict, "default")
            setattr(wrapper, method, self.job)
            connections["default"] = wrapper

        defer(job)

    def chain(self, of_what):
        """Let jobs defer the next one for ever."""
        defer(self.link)


@pytest.fixture
def hung():
    backend = {"BACKEND": "django_simple_task.SimpleTaskBackend"}
    with contextlib.ExitStack() as stack, override_settings(TASKS={"default": backend}):
        hung = Hung(stack)
        stack.callback(hung.release.set)
        yield hung
        hung.release.set()


async def off_the_loop(wait, *args):
    """Wait in a thread for something that must happen."""
    assert await asyncio.to_thread(wait, *args) is not False


def in_a_thread(function, *args):
    """Return what a function returns in a thread and a context of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args).result(HANG)


# What a job inherits.
customer = contextvars.ContextVar("customer", default="nobody's")


def configured(**ours):
    """Override settings of ours by their names without the prefix."""
    named = {f"DJANGO_SIMPLE_TASK_{name}": value for name, value in ours.items()}
    return override_settings(**named)


def our_checks(**kwargs):
    found = checks.run_checks(**kwargs)
    return [check for check in found if check.id.startswith("django_simple_task.")]


@contextlib.contextmanager
def loop_in_a_thread():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANG)
        loop.close()


class Lifespan:
    """One that has started, on the loop of another thread."""

    def __init__(self, loop):
        self.loop = loop
        self.server = self.call(self.start())

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(HANG)

    async def start(self):
        server = Server(django_simple_task_middleware(plain_app))
        assert await server.startup() == STARTED
        return server

    async def begin_to_shut_down(self):
        self.server.put({"type": "lifespan.shutdown"})
        for _ in range(9):
            await asyncio.sleep(0)  # until the drain has begun

    def shut_down(self):
        self.call(self.begin_to_shut_down())

    def cancel(self):
        self.loop.call_soon_threadsafe(self.server.task.cancel)

    def end(self):
        self.shut_down()
        self.wait()

    def wait(self):
        self.call(asyncio.wait([self.server.task], timeout=HANG))
        assert ENDED in self.server.sent or self.server.task.cancelled()


@pytest.fixture
def nothing_serves():
    """End the background thread that may serve, before the test and after it."""

    async def serve_briefly():
        async with serving():
            assert await ajoin(HANG)

    asyncio.run(serve_briefly())
    yield
    asyncio.run(serve_briefly())


@pytest.fixture
def background():
    """Have the background thread serve, and have said so."""
    defer(int)
    assert join(HANG)


async def in_flight():
    """Let the only worker wait; return what lets it go on."""
    release = asyncio.Event()
    defer(release.wait)
    while not stats()["in_flight"]:
        await asyncio.sleep(0)
    return release


def fail():
    raise ValueError


async def afail():
    raise ValueError


def raises(error):
    raise error


class Untellable(Exception):
    """Raises what it is made with when it is to be shown."""

    __str__ = __repr__ = lambda self: raises(self.args[0])


@contextlib.contextmanager
def ctrl_c_raising(error):
    handler = signal.signal(signal.SIGINT, lambda *args: raises(error))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


EACH_KIND = ["sync", "async", "thread_sensitive", "orm", "awaitable"]


def defer_as(kind, function, *args, **options):
    """Defer a sync function, or in its place a job of another kind that calls it."""

    async def job():
        return function(*args)

    async def orm():
        return await sync_to_async(function)(*args)

    deferred = {"async": job, "orm": orm, "awaitable": lambda: job()}.get(kind)
    options |= {"thread_sensitive": True} if kind == "thread_sensitive" else {}
    defer(deferred or partial(function, *args), options=options)


ONCE_AROUND = ["enter 1", "around 1", "exit 1", "enter 2", "around 2", "exit 2"]


def note_around(ledger, kind, form="sync", **ours):
    """Run a job that fails once; return who was in which thread or asyncio task."""

    def note(what):
        on_loop = asyncio._get_running_loop() is not None
        here = asyncio.current_task() if on_loop else threading.get_ident()
        ledger.note((what, here))

    @contextlib.contextmanager
    def around(job):
        note(f"enter {job.attempt}")
        customer.set(f"around {job.attempt}")
        try:
            yield
        finally:
            note(f"exit {job.attempt}")

    @contextlib.asynccontextmanager
    async def aaround(job):
        await asyncio.sleep(0)
        with around(job):
            yield

    def job():
        note(customer.get())
        if customer.get() == "around 1":
            fail()

    before = stats()
    with configured(AROUND_JOB=aaround if form == "async" else around, **ours):
        in_a_thread(partial(defer_as, kind, job, max_attempts=2, backoff=0))
        assert join(HANG)
    assert since(before) == {"accepted": 1, "succeeded": 1, "retried": 1}
    return zip(*ledger.runs, strict=True)


def run_in_project(folder, code, *flags, name="django_simple_task"):
    """Copy the module into a project under a name, and run a script there."""
    target = folder.joinpath(*name.split(".")).with_suffix(".py")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(django_simple_task.__file__, target)
    done = subprocess.run(
        [sys.executable, *(flags or ("-Xdev", "-Werror")), "-c", code],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "DJANGO_SETTINGS_MODULE": ""},
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def run_served(main, **ours):
    """Run a coroutine function beside a lifespan, in a thread of its own."""

    async def bounded():
        async with serving(**ours):
            return await asyncio.wait_for(main(), HANG)

    return in_a_thread(lambda: asyncio.run(bounded()))


@pytest.fixture(params=["lifespan", "background"])
def where(request):
    """Give what runs a function in a thread, while this or that serves."""
    if request.param == "background":
        return in_a_thread
    return lambda play: run_served(partial(asyncio.to_thread, play))


def called(on_a_loop, function):
    """Call a function where a loop runs, or where none does."""

    async def main():
        function()

    asyncio.run(main()) if on_a_loop else function()


of_project = asgiref.local.Local()

CALLERS = ("caller's", "caller's", "de", "Asia/Tokyo", "/caller's/", None)

NOTHING_SET = ("nobody's", None, "en", "America/Chicago", "/", None)


def seen():
    """Return what the context says, to Django and to a project."""
    own = customer.get(), getattr(of_project, "value", None)
    localised = translation.get_language(), timezone.get_current_timezone_name()
    return (*own, *localised, get_script_prefix(), get_urlconf())


def set_all(whose, language="fr", zone="Europe/Paris"):
    customer.set(whose)
    of_project.value = whose
    translation.activate(language)
    timezone.activate(zone)
    set_script_prefix(f"/{whose}/")
    set_urlconf(f"{whose}.urls")


set_callers = partial(set_all, "caller's", "de", "Asia/Tokyo")


def serving_loop():
    return apps.get_app_config("django_simple_task").loop


def place():
    """Tell whether the caller is on the loop that serves."""
    loop = asyncio._get_running_loop()
    return "thread" if loop is None else "loop" if loop is serving_loop() else "other"


async def running_loop():
    return asyncio.get_running_loop()


@sync_only_middleware
def sync_middleware(get_response):
    return lambda request: get_response(request)


PLACES = ["thread", "coroutine", "sync_to_async", "async_to_sync"]

PLACES += ["sync view", "async view", "sync view, middleware", "async view, middleware"]


async def call_in(place, call):
    """Call a function in a place such as projects have, each with its own context."""

    async def acall(request=None):
        call()
        return HttpResponse()

    if place == "thread":
        await asyncio.to_thread(in_a_thread, call)
    elif place == "coroutine":
        await asyncio.create_task(acall())
    elif place == "sync_to_async":
        await asyncio.create_task(sync_to_async(call)())
    elif place == "async_to_sync":
        await asyncio.to_thread(in_a_thread, async_to_sync(acall))
    else:
        middleware = [f"{__name__}.sync_middleware"] * place.endswith("middleware")
        view = (
            acall if place.startswith("async") else lambda _: call() or HttpResponse()
        )
        with override_settings(MIDDLEWARE=middleware, ROOT_URLCONF=(path("", view),)):
            scope = {"type": "http", "http_version": "1.1", "method": "GET"}
            scope |= {"path": "/", "query_string": b"", "headers": []}
            request = ApplicationCommunicator(ASGIHandler(), scope)
            await request.send_input({"type": "http.request", "body": b""})
            assert (await request.receive_output(HANG))["status"] == 200
            await request.receive_output(HANG)
            await request.wait(HANG)


@pytest.fixture
def no_log():
    """Log nothing, of which pytest would keep the tracebacks."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class Mortal(ValueError):
    """What must die with a job."""


@pytest.fixture
def deaths():
    """Collect what is set when a mortal dies; Python collects nothing meanwhile."""
    logger, formatter = logging.getLogger("django_simple_task"), logging.Formatter()

    def kept_from_pytest(record):  # which keeps all records, with their exceptions
        return not formatter.format(record)

    logger.addFilter(kept_from_pytest)
    gc.collect()
    gc.disable()
    yield []
    gc.enable()
    logger.removeFilter(kept_from_pytest)


def mortal(deaths):
    thing = Mortal()
    deaths.append(threading.Event())
    weakref.finalize(thing, deaths[-1].set)
    return thing


def each_line(take):
    """Have a function called with each record of ours that is about a job."""
    return heard(lambda line: hasattr(line, "job") and take(line), logging.DEBUG)


def event_of(record):
    return record.getMessage().split(" job=")[0]


PREAMBLE = """
import asyncio, atexit, contextlib, contextvars, gc, itertools, logging, os, queue
import random, signal, sys, threading, time, warnings, weakref
from collections import Counter
from datetime import timedelta
import django
from asgiref.sync import sync_to_async
from django.conf import settings
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
settings.configure(
    **{"INSTALLED_APPS": ["django_simple_task"], "USE_TZ": True, **{settings!r}}
)
django.setup()
from django_simple_task import *
"""


def run_script(body, *, before="", timeout=HANG, dev=True, **settings):
    """Run a script in its own process, after django.setup(), and end it if it hangs."""
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


AMID_THE_DRAIN = """
class AmidTheDrain(logging.Handler):
    begun = threading.Event()

    def emit(self, record):
        if "draining" in record.getMessage() and not self.begun.is_set():
            self.begun.set()
            act()

def act():
    pass

logging.getLogger("django_simple_task").addHandler(AmidTheDrain())
"""


def run_to_its_end(body, *preambles, **options):
    """Run a script that ends by itself, with nothing to complain of."""
    script = run_script("".join(preambles) + textwrap.dedent(body), **options)
    assert script.returncode == 0, script.stderr
    assert "Traceback" not in script.stderr, script.stderr
    return script


class Interrupt(BaseException):
    """Raised by a signal handler, at any step of our code."""


def is_a_step(frame, event, arg):
    """Tell whether Python, profiling, is where it looks for signals, in our code."""
    if getattr(arg, "__name__", "") == "__enter__":
        return False  # between this and its `with` nobody looks
    if event == "call" and frame.f_back:
        frame = frame.f_back
    ours = frame.f_code.co_filename == django_simple_task.__file__
    return ours and event in ("call", "c_return")


class Raising:
    """A profiler that raises an error at the n-th of our steps."""

    def __init__(self, step, error):
        self.step, self.error, self.seen = step, error, 0

    def __call__(self, *event):
        self.seen += is_a_step(*event)
        if self.seen == self.step and is_a_step(*event):
            raise self.error


def at_each_step(call, error):
    """Make a call again and again, each time with an error at a later step."""
    for step in itertools.count(1):
        hook, got_out = Raising(step, error), False
        sys.setprofile(hook)
        try:
            call()
        except error:
            got_out = True
        finally:
            sys.setprofile(None)
        assert got_out is (hook.seen >= step), (step, "it did not get out")
        yield step
        if not got_out:
            break
    assert step > 5


# Where Python looks for signals in our code: as a function begins, and as a builtin has
# returned. Finalizers run there, too, and there the stack ends, and memory.
STEPS = """
import django_simple_task
from conftest import Interrupt, Raising, at_each_step, is_a_step, serving

def check(*what):
    now = stats()
    assert len(ran) == now["accepted"] == now["succeeded"], (*what, len(ran), now)

logging.disable()
ran = []
"""
NO_HANG = {"DJANGO_SIMPLE_TASK_SHUTDOWN_GRACE_PERIOD": 1}  # when an assertion fails


def need_threads_at_exit():
    if (3, 12) <= sys.version_info < (3, 12, 2):
        pytest.skip("does not apply: this Python starts no thread at its end")


def lines_at(level, script):
    start = f"{level} django_simple_task "
    return [line for line in script.stderr.splitlines() if line.startswith(start)]


# django.tasks

for TASKS_NAME in ("django.tasks", "django_tasks"):
    with contextlib.suppress(ImportError):
        tasks_api = importlib.import_module(TASKS_NAME)
        importlib.import_module(f"{TASKS_NAME}.checks")
        task_errors = importlib.import_module(f"{TASKS_NAME}.exceptions")
        task_signals = importlib.import_module(f"{TASKS_NAME}.signals")
        dummy = importlib.import_module(f"{TASKS_NAME}.backends.dummy")
        DummyBackend = dummy.DummyBackend
        task, Task = tasks_api.task, tasks_api.base.Task
        names = vars(task_errors)
        InvalidTask = names.get("InvalidTask") or names["InvalidTaskError"]
        break
else:  # Django 5.2 without the backport: what needs Tasks is skipped
    TASKS_NAME, Task, DummyBackend, InvalidTask = None, object, object, Exception
    tasks_api = task_errors = task_signals = None

    def task(function=None, **kwargs):
        return function or task


def simple_tasks(**options):
    backend = "django_simple_task.SimpleTaskBackend"
    return {"BACKEND": backend, "QUEUES": ["default", "low"], "OPTIONS": options}


TASKS = {
    "default": simple_tasks(),
    "other": {**simple_tasks(), "QUEUES": ["default"]},
    "few": simple_tasks(MAX_RESULTS=2),
    "none": simple_tasks(MAX_RESULTS=0),
    "hasty": simple_tasks(TIMEOUT=0.05),
    "retrying": simple_tasks(MAX_ATTEMPTS=3, BACKOFF=0),
    "patient": simple_tasks(MAX_ATTEMPTS=2, BACKOFF=timedelta(minutes=10)),
    "over": simple_tasks(OVERFLOW_BACKEND="elsewhere", MAX_ATTEMPTS=2, BACKOFF=600),
    "elsewhere": {"BACKEND": f"{__name__}.Elsewhere", "QUEUES": ["default", "low"]},
}


IS_READY, IS_RUNNING, IS_DONE, HAS_FAILED = "READY", "RUNNING", "SUCCESSFUL", "FAILED"
SIGNALS = ["task_enqueued", "task_started", "task_finished"]


# What Tasks, whose arguments are JSON, share with the test that enqueues them.
scene = types.SimpleNamespace()


def set_the_scene():
    scene.ledger = Ledger()
    scene.started, scene.release = threading.Event(), threading.Event()
    scene.taken, scene.made_there = [], []
    scene.as_it_takes = lambda: None


@pytest.fixture
def no_server():
    """Set TASKS, and the scene for one test; skip it where there are no Tasks."""
    tasks_package()
    set_the_scene()
    with override_settings(TASKS=TASKS):
        yield
    scene.release.set()


@contextlib.contextmanager
def tasks_served(*, within=HANG, **ours):
    """Serve in another thread, with settings of ours; drain within so many seconds."""
    with configured(**ours), serving_in_a_thread() as (scene.loop, shut_down):
        try:
            yield
        finally:
            assert shut_down(within=within) == ENDED


@pytest.fixture
def tasks(no_server):
    """Serve with one worker, for one test."""
    with tasks_served():
        yield
        scene.release.set()


@async_unsafe
def use_orm():
    """Do what Django, as of the ORM, allows in no thread in which a loop runs."""


@contextlib.contextmanager
def hearing(*names, receiver=None):
    """Connect a receiver to signals of Tasks, or one that collects what they tell."""
    told = []

    def collect(sender, signal, task_result, **kwargs):
        assert sender is SimpleTaskBackend
        if signal is not task_signals.task_enqueued:
            use_orm()
        told.append(task_result)

    for name in names:
        getattr(task_signals, name).connect(receiver or collect, weak=False)
    try:
        yield told
    finally:
        for name in names:
            getattr(task_signals, name).disconnect(receiver or collect)


def done(result):
    """Wait until all is done; return the result as it is then."""
    assert join(HANG)
    result.refresh()
    return result


def run_there(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, scene.loop).result(HANG)


async def enqueue_on_loop(one, *args):
    return one.enqueue(*args)


WAYS = {
    "thread": lambda one, *args: one.enqueue(*args),
    "loop": lambda one, *args: asyncio.run(enqueue_on_loop(one, *args)),
    "aenqueue": lambda one, *args: asyncio.run(one.aenqueue(*args)),
    "serving loop": lambda one, *args: run_there(enqueue_on_loop(one, *args)),
    "aenqueue there": lambda one, *args: run_there(one.aenqueue(*args)),
}


class TaskOfElsewhere(Task):
    """The kind of Task that Elsewhere knows, from when it is made."""

    __slots__ = ()

    def __post_init__(self):
        super().__post_init__()
        scene.made_there.append(self)


class Elsewhere(DummyBackend):
    """Stand in for a durable engine: it takes a Task, and a test says what happens."""

    task_class = TaskOfElsewhere
    supports_get_result = True

    def __init__(self, alias, params):
        super().__init__(alias, params)
        self.results = scene.taken

    def validate_task(self, task):
        super().validate_task(task)
        if not isinstance(task, TaskOfElsewhere) or task.name == "without_context":
            raise InvalidTask(f"{task.name} is of no use here.")

    def enqueue(self, task, args, kwargs):
        use_orm()
        scene.as_it_takes()
        return super().enqueue(task, args, kwargs)


# Databases: a file of SQLite, or one on a PostgreSQL that is started for the tests

DATABASE = """
from functools import partial
from asgiref.sync import sync_to_async
from conftest import HANG, Ledger, serving, until
from django.db import connection, transaction
from django.db.backends.signals import connection_created

made = []  # connections, in the order in which they were opened
note_made = lambda connection, **kwargs: made.append(connection)
connection_created.connect(note_made)

def query(statement="SELECT 1"):
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []

def administer(statement):
    import psycopg
    address = f"host={connection.settings_dict['HOST']} user=postgres dbname=postgres"
    with psycopg.connect(address, autocommit=True) as postgres:
        cursor = postgres.execute(statement)
        return cursor.fetchall() if cursor.description else []

def sessions(condition="true", what="pid"):
    if connection.vendor == "sqlite":
        return {each for each in made if each.connection is not None}
    here = f"datname = '{connection.settings_dict['NAME']}'"
    where = f"FROM pg_stat_activity WHERE {here} AND {condition}"
    return {*administer(f"SELECT {what} {where}")}

until = partial(until, pause=0, tell=lambda: (stats(), sessions()))

def come_to(number, condition="true"):
    # A session that its client has closed takes a moment to end.
    until(lambda: len(sessions(condition)) <= number)

def none_is_left():
    come_to(0)

def defer_as(kind, function, *args, **options):
    call = partial(function, *args)

    async def acall():
        await sync_to_async(call)()

    def awaitable():
        call()
        return asyncio.sleep(0)

    func = [call, acall, call, awaitable, lambda: acall()][KINDS.index(kind)]
    defer(func, options={"thread_sensitive": "sensitive" in kind, **options})

def work(*functions, then=bool):
    # Whether something is said of a job must make no difference.
    for level in "WARNING", "INFO":
        logging.getLogger("django_simple_task").setLevel(level)
        for kind in KINDS:
            for function in functions:
                defer_as(kind, function)
            assert join(HANG), (kind, stats())
            then()

KINDS = ["sync", "async", "sensitive", "awaitable", "sensitive awaitable"]

if connection.vendor == "postgresql":
    administer(f"CREATE DATABASE {connection.settings_dict['NAME']}")
"""


def run_with_database(database, body, *, workers=1, kept=None, **settings):
    """Run a script with a database, well; `kept` says how connections are kept."""
    result = run_script(
        DATABASE + textwrap.dedent(body),
        timeout=5 * HANG,
        DATABASES={"default": {**database, **(kept or {})}},
        DJANGO_SIMPLE_TASK_WORKERS=workers,
        **settings,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def cluster():
    """Start a PostgreSQL, which listens on a socket in a temporary folder."""
    pytest.importorskip("psycopg_pool")
    # Debian keeps its programs where no PATH leads.
    folders = map(str, Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    initdb, pg_ctl = (shutil.which(name, path=path) for name in ("initdb", "pg_ctl"))
    if not initdb or not pg_ctl:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    # It does not run as root; the path of a socket must be short.
    user = "postgres" if os.geteuid() == 0 else None
    folder = tempfile.mkdtemp(prefix="pg-")
    if user:
        shutil.chown(folder, user)
    how = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL, "user": user}
    initialise = f"{initdb} -D {folder}/data -A trust -U postgres --no-sync"
    control = [pg_ctl, "-D", f"{folder}/data", "-w", "-l", f"{folder}/log"]
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    try:
        subprocess.run(initialise.split(), **how)
        subprocess.run([*control, "-o", options, "start"], **how)
        names = map("shop_{}".format, itertools.count(1))
        yield types.SimpleNamespace(folder=folder, names=names)
    finally:
        if os.path.exists(f"{folder}/data/postmaster.pid"):
            subprocess.run([*control, "-m", "immediate", "stop"], **how)
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(cluster):
    engine, name = "django.db.backends.postgresql", next(cluster.names)
    settings = {"HOST": cluster.folder, "NAME": name, "USER": "postgres"}
    return partial(run_with_database, {"ENGINE": engine, **settings})


@pytest.fixture
def sqlite(tmp_path):
    engine, name = "django.db.backends.sqlite3", str(tmp_path / "db.sqlite3")
    return partial(run_with_database, {"ENGINE": engine, "NAME": name})


@pytest.fixture(params=["sqlite", "postgresql"])
def run_with_either(request):
    return request.getfixturevalue(request.param)


# Real servers, each in processes of its own

UVICORN = "uvicorn --port {port} shop:application"
GRANIAN = "granian --port {port} shop:application --interface"
GUNICORN = "gunicorn --bind 127.0.0.1:{port}"


SERVERS = {
    "uvicorn": f"{UVICORN} --loop asyncio",
    "uvicorn-uvloop": f"{UVICORN} --loop uvloop",
    "uvicorn-2": f"{UVICORN} --workers 2",
    "uvicorn-off": f"{UVICORN} --lifespan off",
    "hypercorn": "hypercorn --bind 127.0.0.1:{port} shop:application",
    "granian": f"{GRANIAN} asgi",
    "granian-asginl": f"{GRANIAN} asginl",
    "gunicorn": f"{GUNICORN} -k uvicorn_worker.UvicornWorker shop:application",
    "gunicorn-asgi": f"{GUNICORN} -k asgi shop:application",
    "gunicorn-wsgi": f"{GUNICORN} --threads 2 shop:wsgi",
    "daphne": "daphne --port {port} shop:application",
    "runserver": "django runserver --noreload {port}",
    "runserver-daphne": "django runserver --noreload {port}",
}


SHOP = {
    "settings.py": """
        import os

        ALLOWED_HOSTS = ["*"]
        ASGI_APPLICATION = "shop.application"
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db"}}
        DJANGO_SIMPLE_TASK_SHUTDOWN_GRACE_PERIOD = os.environ.get("GRACE_PERIOD")
        DJANGO_SIMPLE_TASK_WORKERS = os.environ.get("WORKERS", "1")
        INSTALLED_APPS = [*os.environ["FIRST_APP"].split(), "django_simple_task"]
        OURS = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
        LOGGING = {
            "version": 1,
            "handlers": {"stderr": {"class": "logging.StreamHandler"}},
            "loggers": {"django_simple_task": OURS},
        }
        ROOT_URLCONF = "shop"
        SECRET_KEY = "tests"
        USE_TZ = True
    """,
    "version.py": "VERSION = 'old'",
    "shop.py": """
        import asyncio, contextlib, os, socket, sys
        from asgiref.sync import sync_to_async
        from django.core.asgi import get_asgi_application
        from django.core.wsgi import get_wsgi_application
        from django.db import connection
        from django.http import HttpResponse
        from django.urls import path
        from django_simple_task import defer, django_simple_task_middleware, stats
        from version import VERSION

        application = django_simple_task_middleware(get_asgi_application())
        wsgi = get_wsgi_application()
        GATE = "127.0.0.1", int(os.environ["GATE"])

        def note(name):
            with connection.cursor() as cursor, open("ledger", "a") as ledger:
                cursor.execute("SELECT 1")
                ledger.write(name + "\\n")

        async def anote(name):
            # In a thread, as HTTP clients do; 3.12.0 to 3.12.2 start none at exit.
            if not (3, 12) <= sys.version_info < (3, 12, 3):
                await asyncio.to_thread(socket.gethostbyname, "localhost")
            await sync_to_async(note)(name)

        def stand_at_gate(name):
            with contextlib.suppress(OSError), socket.create_connection(GATE) as gate:
                gate.recv(1)
            note(name)

        def gate(request):
            if not stats()["accepted"]:
                defer(stand_at_gate, {"args": [f"{os.getpid()} at gate"]})
            return HttpResponse(os.getpid())

        def sync_view(request, name):
            defer(note, {"args": [f"{name}, sync"]})
            defer(anote, {"args": [f"{name}, async"]})
            return HttpResponse()

        async def async_view(request, name):
            return sync_view(request, name)

        async def flood(request):
            for n in range(1000):
                name = f"{n} of {os.getpid()}"
                defer(anote if n % 2 else note, {"args": [name]})
            return HttpResponse()

        async def slow_view(request):
            reader, writer = await asyncio.open_connection(*GATE)
            await reader.read(1)
            writer.close()
            return HttpResponse()

        urlpatterns = [
            path("version", lambda request: HttpResponse(VERSION)),
            path("gate", gate),
            path("sync/<name>", sync_view),
            path("async/<name>", async_view),
            path("flood", flood),
            path("slow", slow_view),
        ]
    """,
}


class Site:
    """A Django project in a folder of its own, its gate, and its server."""

    def __init__(self, folder, command, environ):
        self.processes = 2 if "--workers 2" in command else 1
        self.log_file, self.ledger = folder / "log", folder / "ledger"
        self.ledger.touch()
        for name, source in SHOP.items():
            (folder / name).write_text(textwrap.dedent(source))
        self.gate = socket.create_server(("127.0.0.1", 0))
        self.gate.settimeout(HANG)
        self.at_gate = []
        self.bound = socket.socket()  # so that its port is given to no one else
        self.bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bound.bind(("127.0.0.1", 0))
        self.port = self.bound.getsockname()[1]
        ours = str(Path(django_simple_task.__file__).parent)
        environ = {**os.environ, **environ, "DJANGO_SETTINGS_MODULE": "settings"}
        environ["GATE"] = str(self.gate.getsockname()[1])
        environ["PYTHONPATH"] = ours + os.pathsep + os.getenv("PYTHONPATH", "")
        command = [sys.executable, "-m", *command.format(port=self.port).split()]
        how = {"cwd": folder, "env": environ, "start_new_session": True}
        with open(self.log_file, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, **how)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.open_gate()
        self.bound.close()

    def open_gate(self):
        for each in self.gate, *self.at_gate:
            each.close()

    @property
    def log(self):
        return self.log_file.read_text()

    def runs(self):
        """Return the jobs that ran, as they noted themselves."""
        return sorted(self.ledger.read_text().splitlines())

    def until(self, true):
        """Look again and again: other processes tell no one what they do."""
        hung_at = monotonic() + HANG
        while not true():
            assert self.process.poll() is None or true(), self.log
            assert monotonic() < hung_at, self.log
            sleep(0.02)

    def drains(self):
        self.until(lambda: self.log.count("draining pending=") >= self.processes)

    def until_gone(self):
        self.until(lambda: self.process.poll() is not None)

    def request(self, path):
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        client.request("GET", path)
        return contextlib.closing(client)

    def get(self, path):
        # granian's first process tries the port, and hangs up again.
        refused = contextlib.suppress(ConnectionRefusedError, ConnectionResetError)
        with refused, self.request(path) as client:
            return client.getresponse().read().decode()

    def defer_jobs(self):
        """Have a job at the gate in each process; sync and async views defer others."""
        pids = set()
        while len(pids) < self.processes:
            pids.add(self.get("/gate"))
        self.at_gate = [self.gate.accept()[0] for _ in pids]
        names = ["sync/1", "async/2", "sync/3", "async/4", "sync/5", "async/6"]
        assert [self.get(f"/{name}") for name in names] == [""] * 6, self.log
        jobs = [f"{n}, {kind}" for n in range(1, 7) for kind in ("sync", "async")]
        self.deferred = sorted([*jobs, *(f"{pid} at gate" for pid in pids)])

    def ends(self, outcome, number=None, *, within=3 * HANG):
        """Send a signal; see that each job runs once, or that all of them are lost."""
        began = monotonic()
        if number:
            self.process.send_signal(number)
        if outcome == "run":
            self.drains()
            self.open_gate()
        self.until_gone()
        assert monotonic() - began < within + 5, self.log
        log = self.log.replace("may be lost", "")
        assert self.runs() == (self.deferred if outcome == "run" else []), log
        assert ("lost" in log) is (outcome == "reported"), log
        if outcome == "reported":
            lost = re.findall(r"lost=(\d+) job=shop\.(note|anote) ", log)
            for job in "note", "anote":
                assert sum(int(count) for count, name in lost if name == job) == 6, log
            in_flight = log.count("lost in flight job=shop.stand_at_gate")
            assert in_flight == self.processes, log


@contextlib.contextmanager
def started(folder, name, more="", **environ):
    """Start a server, with `more` on its command line."""
    command = f"{SERVERS[name]} {more}"
    if "--noreload" in command and more:
        command = re.sub("--(no)?reload", "", command)  # runserver's default
    optional = re.findall("uvicorn_worker|uvloop|daphne", f"{name} {command}")
    for module in command.split()[0], *optional:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environ["FIRST_APP"] = "daphne" if name == "runserver-daphne" else ""
    with contextlib.closing(Site(folder, command, environ)) as site:
        site.until(lambda: site.get("/version"))
        yield site


@contextlib.contextmanager
def served(*args, **kwargs):
    """Start a server, and have jobs wait in it."""
    with started(*args, **kwargs) as site:
        site.defer_jobs()
        yield site


def under_fire(folder, name, more, draw, signals, **environ):
    """Give a server 1,000 jobs, then signals; return what ran, and the log."""
    with started(folder, name, more, WORKERS="4", **environ) as site:
        assert site.get("/flood") == "", site.log
        for number in signals:
            sleep(draw.uniform(0, draw.choice([0.03, 0.3])))
            site.process.send_signal(number)
        site.until_gone()
        runs = site.runs()
        assert len({*runs}) == len(runs)
        return sum(f"of {site.process.pid}" in each for each in runs), site.log


@contextlib.contextmanager
def redis_server(folder):
    if not shutil.which("redis-server"):
        pytest.skip("needs Debian's redis-server")
    command = ["redis-server", "--port", "0", "--unixsocket", f"{folder}/redis"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as server:
        try:
            while b"accept connections at" not in server.stdout.readline():
                assert server.poll() is None
            yield
        finally:
            server.terminate()


# What lines of the ends of jobs begin with, and the accounts that tell of the same.
ENDS = {"finished": "succeeded", "failed": "failed", "lost": "lost"}


def tally(told, record):
    """Count the lines of the log that are about jobs, by their beginning."""
    event = re.match("finished|failed|lost|will be retried", record.getMessage())
    if event and hasattr(record, "job"):
        told[event[0]] += getattr(record, "lost", 1)


@contextlib.contextmanager
def stumbling(draw):
    """
    Have threads pause before some lines of the module: any other may overtake them
    wherever nothing keeps it off.
    """
    over = threading.Event()
    source = inspect.getsourcefile(inspect.unwrap(defer))
    lines = range(len(Path(source).read_text().splitlines()))
    pauses = {line: draw.uniform(0, 0.001) for line in lines if draw.random() < 0.1}
    outer = sys.gettrace(), threading.gettrace()

    def trace(frame, event, arg):
        if over.is_set() or frame.f_code.co_filename != source:
            return None
        if event == "line" and frame.f_lineno in pauses:
            over.wait(pauses[frame.f_lineno])
        return trace

    sys.settrace(trace)
    threading.settrace(trace)
    try:
        yield
    finally:
        over.set()
        sys.settrace(outer[0])
        threading.settrace(outer[1])


# Load

LOAD = """
import tracemalloc
from conftest import in_flight, serving
logging.disable(logging.ERROR)
gc.disable()
runs, ran, refused = bytearray(10**6), itertools.count(), itertools.count()

def memory():
    "In MB, at most until now."
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10

def job(*args):
    next(ran)

def failing(number):
    runs[number] += 1
    if number // 2 % 100 < 3:
        raise ValueError if number // 2 % 100 else GeneratorExit

async def ajob(*args):
    job()

async def afailing(number):
    failing(number)

def defer_all(calls):
    "Defer each of the calls; while the queue is full, wait until all are done."
    for function, *args in calls:
        while True:
            try:
                defer(function, {"args": args})
                break
            except QueueFull:
                next(refused)
                assert join(300)
    assert join(300)

"""


def run_load(body, **named):
    """Run the body of a coroutine function, while a lifespan serves."""
    if not Path("/proc/self/status").exists():
        pytest.skip("does not apply: no /proc here")
    named = {f"DJANGO_SIMPLE_TASK_{name}": named[name] for name in named}
    body = textwrap.indent(textwrap.dedent(body), " " * 8)
    head = "async def main():\n    async with serving():"
    script = f"{LOAD}{head}{body}\nasyncio.run(main())"
    result = run_script(script, dev=False, timeout=6 * HANG, **named)
    assert result.returncode == 0, result.stderr


# Release 0.1.2

OLD_AND_NEW = """
import asyncio, os, threading, traceback, django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_simple_task"], USE_TZ=True)
django.setup()
from django.test import override_settings
import django_simple_task
from django_simple_task import defer, django_simple_task_middlware
vars(django_simple_task).setdefault("__getattr__", bool)  # for what conftest asks for
import conftest

conftest.HANG = int(os.environ["HANG"])
ledger = conftest.Ledger()

async def link(left):
    ledger.note()
    if left > 1:
        defer(link, {"args": [left - 1]})

def hang():
    ledger.note()
    threading.Event().wait()

async def main():
    server = conftest.Server(django_simple_task_middlware(conftest.plain_app))
    ran = lambda count: asyncio.to_thread(ledger.wait, count)
    ROW

try:
    asyncio.new_event_loop().run_until_complete(main())
except BaseException:
    traceback.print_exc()
    os._exit(1)  # whatever hangs
os._exit(0)
"""


def run_row(row, folder, *path, hang):
    """Run a script with the module of the first folder in which there is one."""
    body = textwrap.indent(textwrap.dedent(row), "    ").strip()
    return subprocess.run(
        [sys.executable, "-c", OLD_AND_NEW.replace("ROW", body)],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "HANG": str(hang), "PYTHONPATH": os.pathsep.join(path)},
        text=True,
        timeout=4 * hang,
    )


@pytest.fixture(scope="module")
def release_0_1_2(tmp_path_factory):
    """Have pip put it into a folder of its own, for it has the same name."""
    folder = str(tmp_path_factory.mktemp("release-0.1.2"))
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    pip += ["--no-deps", "--target", folder, "django-simple-task==0.1.2"]
    subprocess.run(pip, check=True, capture_output=True, timeout=5 * HANG)
    return folder


# The demo

DEMO = Path(__file__).with_name("demo.py")


class Demo(NamedTuple):
    """The running demo, as a browser without JavaScript sees it."""

    port: int
    folder: Path

    def ask(self, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, "/", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def post(self, job, name="", content=b"", *, token=None, **headers):
        """Press a button, with a file chosen if `name` is given: status and page."""
        _, page, got = self.ask()
        token = token or re.search(r'csrfmiddlewaretoken" value="(\w+)"', page)[1]
        fields = {'csrfmiddlewaretoken"': token, 'job"': job}
        if name:
            fields[f'file"; filename="{name}"'] = content.decode("latin-1")
        part = '--part\r\nContent-Disposition: form-data; name="{}\r\n\r\n{}\r\n'
        body = "".join(part.format(*field) for field in fields.items()) + "--part--"
        headers["Content-Type"] = "multipart/form-data; boundary=part"
        headers["Cookie"] = got["Set-Cookie"].partition(";")[0]
        return self.ask("POST", body, **headers)[:2]

    def accepted(self):
        return re.search(r'id="accepted">(\d+)', self.ask()[1])[1]

    def wait(self, name):
        """Wait until the newest job of a name is done; return what is said of it."""
        job = r'<li class="job (\w+)">\s*<b title="(.*?)">.*?<small>(.*?)</small>'

        def detail():
            jobs = re.findall(job, unescape(self.ask()[1]), re.DOTALL)
            state, text = next((s, text) for s, title, text in jobs if title == name)
            return state == "done" and text

        return until(detail)


@contextlib.contextmanager
def running_demo(folder):
    """Run the demo, and at the end press Ctrl-C. What it says is in folder/"log"."""
    pytest.importorskip("uvicorn", reason="the demo is served by uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-X", "dev", "-W", "error", str(DEMO), str(port)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:

        def is_up():
            assert process.poll() is None
            return b"Uvicorn running" in (folder / "log").read_bytes()

        until(is_up)
        yield Demo(port, folder)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(HANG)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder, other = tmp_path_factory.mktemp("demo"), socket.create_server(("", 0))
    with other, running_demo(folder) as demo:
        other.setblocking(False)
        for job in "fetch", "flaky":  # which take three seconds, while other tests run
            demo.post(job, Host=f"127.0.0.1:{other.getsockname()[1]}")
        yield demo
        with pytest.raises(BlockingIOError):
            other.accept()  # nothing is fetched from where a request says


# README

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def readme_blocks(language):
    """Return the blocks of code in a language, each with the section it stands in."""
    section, blocks = "", []
    pattern = r"^#+ (.+)$|^ *```(\w+)\n((?:.*\n)*?) *```$"
    for heading, marked, code in re.findall(pattern, README, re.MULTILINE):
        section = heading or section
        if marked == language:
            blocks.append((section, textwrap.dedent(code)))
    return blocks


SHOWN = readme_blocks("python")

# The backend and the command of django-tasks-db, as README's table has them.
WAY_OUT = re.search(r"\| `(django_tasks_db\.\w+)` \|.*`manage.py (.+?)` \|", README)
DURABLE = f"""
call_command("migrate", verbosity=0)
result = add.enqueue(1, 2)
worker = [*{shlex.split(WAY_OUT[2])}, "--backend", result.backend]
call_command(*worker, batch=True, startup_delay=False, verbosity=0)
result.refresh()
assert result.return_value == 3
"""

AS_SHOP = """
import sys, warnings
from importlib.machinery import ModuleSpec
warnings.simplefilter("error")
__name__, __spec__ = "shop", ModuleSpec("shop", None, origin="shop.py")
sys.modules["shop"] = sys.modules["__main__"]
urlpatterns = []
"""

STUBS = """
from types import SimpleNamespace
from django.core.management import call_command
from django.tasks import task
from django.test import override_settings
from conftest import Server, busy_worker, do_nothing
# README's blocks import what they use.
del Counter, atexit, contextlib, contextvars, gc, itertools, queue, random, warnings
def use(**ours):
    override_settings(**{f"DJANGO_SIMPLE_TASK_{n}": ours[n] for n in ours}).enable()
@task
def add(first, second): return first + second
create_user = lambda request: SimpleNamespace(pk=7)
redirect = lambda *where: where[-1]
runs = []
call_command("check", fail_level="WARNING", verbosity=0)
"""


def run_as_shop(run, script, folder, **shown):
    """Run a script as the module shop, with the settings that README shows."""
    package = tasks_package().__name__
    apps = {"django_simple_task", *shown.pop("INSTALLED_APPS", [])} - {...}
    apps |= {package} - {"django.tasks"}
    if "DURABLE" in script:
        if not importlib.util.find_spec("django_tasks_db"):
            pytest.skip("django-tasks-db is not installed")
        apps.add("django_tasks_db")
    file, for_tests = (str(folder / file) for file in ("db.sqlite3", "test.sqlite3"))
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": file}
    given = {
        "DATABASES": {"default": {**sqlite, "TEST": {"NAME": for_tests}}},
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "INSTALLED_APPS": sorted(apps),
        "ROOT_URLCONF": "shop",
        "TASKS": {"default": {"BACKEND": "django_simple_task.SimpleTaskBackend"}},
        **shown,
    }
    script = STUBS + script.replace("# DURABLE", DURABLE)
    return run(script.replace("django.tasks", package), before=AS_SHOP, **given)


def staged(stage, block):
    """Return the script with the block in its place, and the settings it shows."""
    if place := re.search(r"(?m)^( *)# BLOCK$", stage):
        return stage.replace(place[0], textwrap.indent(block, place[1])), {}
    first = next(code for section, code in SHOWN if section == "Install")
    shown = (first + block).replace("django.tasks", tasks_package().__name__)
    exec(shown, namespace := {})
    return stage, {name: namespace[name] for name in namespace if name.isupper()}


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
