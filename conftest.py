"""The harness of the tests: a project of one app, a fake server, a ledger, a log."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import importlib
import inspect
import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from functools import partial
from pathlib import Path
from time import monotonic

import asgiref.local
import django
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.db import connections
from django.db.backends.sqlite3.base import DatabaseWrapper
from django.http import HttpResponse
from django.test import override_settings
from django.urls import get_script_prefix, get_urlconf, path, set_urlconf
from django.urls.base import set_script_prefix
from django.utils import timezone, translation
from django.utils.decorators import sync_only_middleware

import django_simple_task
from django_simple_task import (
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
async def serving(app=plain_app, **ours):
    """
    Run the middleware around `app` as a server would, from startup to shutdown, with
    settings of ours by their names without the prefix: serving(WORKERS=2).
    """
    server = Server(django_simple_task_middleware(app))
    with configured(**ours):
        assert await server.startup() == STARTED
        try:
            yield server
        finally:
            if not server.task.done():
                await server.shutdown()


@contextlib.contextmanager
def serving_in_a_thread():
    """Serve on a loop of another thread; give the loop, and a function that ends it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(HANG)

    async def start():
        server = Server(django_simple_task_middleware(plain_app))
        assert await server.startup() == STARTED
        return server

    server = call(start())
    try:
        yield loop, lambda: call(server.shutdown())
    finally:
        if not server.task.done():
            call(server.shutdown())
        call(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANG)
        loop.close()


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
    """Return django.tasks, or its backport."""
    for name in "django.tasks", "django_tasks":
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    pytest.skip("does not apply: needs Django 6.0 or the package django-tasks")


def do_nothing():
    pass


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
        tasks = tasks_package()
        signal = getattr(importlib.import_module(f"{tasks.__name__}.signals"), name)
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


@pytest.fixture
def nothing_serves():
    """End the background thread that may serve, before the test and after it."""

    async def serve_briefly():
        async with serving():
            assert await ajoin(HANG)

    asyncio.run(serve_briefly())
    yield
    asyncio.run(serve_briefly())


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
import asyncio, logging, os, signal, sys, threading, time
import django
from django.conf import settings
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
settings.configure(
    **{"INSTALLED_APPS": ["django_simple_task"], "USE_TZ": True, **{settings!r}}
)
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


def lines_at(level, script):
    start = f"{level} django_simple_task "
    return [line for line in script.stderr.splitlines() if line.startswith(start)]


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
