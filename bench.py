"""
Measure how fast this is, beside bare asyncio, a bare thread pool and others: python bench.py

Every figure is a ratio of one run on one machine. The candidate and its rival live in a
process each; they work in turn, round by round, and the median of the rounds counts. What is
measured has all switched on: the lifespan, contexts, connections, accounts, default logging.

    python bench.py                    the table; exit status 1 where a bar is missed
    python bench.py --quick            a short form, that never fails
    python bench.py --peers --scale    other libraries; the cost of a long queue
    python bench.py --plot bench.svg   draw it
    python bench.py --loop uvloop      on another event loop

The extra `bench` installs the rivals. Release 0.1.2 is fetched by pip into a folder of its
own, because it has the same name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A ratio, candidate to rival; without a rival, what the candidate measures itself."""

    name: str
    bar: float
    candidate: str
    jobs: int
    rival: str | None = None
    rival_jobs: int = 0
    at_most: bool = False


# What is at stake: the ratios that the contract promises.
ROWS = [
    Row("coroutine, on the loop", 1.4, "defer-async-loop", 10**5, "create_task", 10**5),
    Row(
        "coroutine, from a thread", 3, "defer-async-thread", 10**5, "threadsafe", 20_000
    ),
    Row("sync, from the loop", 2, "defer-sync-loop", 10**5, "submit-loop", 50_000),
    Row("sync, from the loop", 35, "defer-sync-loop", 10**5, "0.1.2-sync-loop", 2_000),
    Row(
        "sync, from a thread", 2.3, "defer-sync-thread", 10**5, "submit-thread", 50_000
    ),
    Row(
        "sync, from a thread",
        35,
        "defer-sync-thread",
        10**5,
        "0.1.2-sync-thread",
        2_000,
    ),
    Row("defer(), CPU of the caller", 4, "defer-cpu", 10**5, "threadsafe-cpu", 50_000),
    Row("Task, enqueue to done", 1.2, "task-ours", 5_000, "task-local", 5_000),
    Row("Task, enqueue to done", 1.2, "task-ours", 5_000, "task-immediate", 5_000),
    Row("bytes per waiting job", 320, "memory", 10**5, at_most=True),
    Row("longest stall, coroutines, ms", 15, "stall-async", 10**5, at_most=True),
    Row("longest stall, sync, ms", 15, "stall-sync", 10**5, at_most=True),
    Row("async view, requests/s", 0.95, "/async/defer", 0, "/async/plain"),
    Row("sync view, requests/s", 0.95, "/sync/defer", 0, "/sync/plain"),
    Row(
        "cost of 10^6 jobs : 10^3, µs", 1.5, "cost", 10**6, "cost", 10**3, at_most=True
    ),
]

PEERS = [
    ("coroutine, on the loop", "jobs/s", 10_000),
    (
        "defer-async-loop",
        "create_task",
        "0.1.2-async-loop",
        "starlette-async",
        "aiojobs",
    ),
    ("sync, from the loop", "jobs/s", 2_000),
    ("defer-sync-loop", "submit-loop", "0.1.2-sync-loop", "starlette-sync"),
    ("Task, enqueue to done, from a thread", "Tasks/s", 2_000),
    ("task-ours", "task-local", "task-immediate"),
]
SCALE = [10**3, 10**4, 10**5, 10**6]


# In a candidate's process: what is measured


def noop() -> None:
    pass


async def anoop() -> None:
    pass


class Clock:
    """From the first job handed over to the last one run."""

    started = 0.0
    ended = 0.0
    over = threading.Event()
    tell: Callable[[], Any] = over.set


def finish() -> None:
    Clock.ended = time.perf_counter()
    Clock.over.set()
    Clock.tell()


async def afinish() -> None:
    finish()


def hand_over(
    put_all: Callable[[int], None], put_last: Callable[[], Any], n: int
) -> None:
    Clock.over.clear()
    Clock.started = time.perf_counter()
    put_all(n - 1)
    put_last()


async def rate(put_all: Any, put_last: Any, n: int, *, thread: bool = False) -> float:
    """Return how many of n jobs were done in a second, handed over here or in a thread."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    Clock.tell = functools.partial(loop.call_soon_threadsafe, done.set)
    if thread:
        args = (put_all, put_last, n)
        caller = threading.Thread(target=hand_over, args=args)
        caller.start()
        await done.wait()
        caller.join()
    else:
        hand_over(put_all, put_last, n)
        await done.wait()
    return n / (Clock.ended - Clock.started)


def deferring(job: Any, last: Any) -> tuple[Any, Any]:
    from django_simple_task import defer

    def put_all(n: int) -> None:
        for _ in range(n):
            defer(job)

    return put_all, functools.partial(defer, last)


def creating_tasks() -> tuple[Any, Any]:
    loop = asyncio.get_running_loop()

    def put_all(n: int) -> None:
        for _ in range(n):
            loop.create_task(anoop())

    return put_all, lambda: loop.create_task(afinish())


def creating_tasks_threadsafe() -> tuple[Any, Any]:
    loop = asyncio.get_running_loop()

    def put_all(n: int) -> None:
        for _ in range(n):
            loop.call_soon_threadsafe(loop.create_task, anoop())

    return put_all, lambda: loop.call_soon_threadsafe(loop.create_task, afinish())


def submitting() -> tuple[Any, Any]:
    def put_all(n: int) -> None:
        for _ in range(n):
            executor.submit(noop)

    executor = one_thread()
    return put_all, functools.partial(executor.submit, finish)


@functools.cache
def one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def enqueuing() -> tuple[Any, Any]:
    from django.tasks import task

    noop_task, finish_task = task(noop), task(finish)

    def put_all(n: int) -> None:
        for _ in range(n):
            noop_task.enqueue()

    return put_all, finish_task.enqueue


async def cpu_of_caller(n: int, *, ours: bool) -> float:
    """Return how many calls a thread makes in a second of its CPU time."""
    loop = asyncio.get_running_loop()
    if ours:
        put_all, put_last = deferring(anoop, afinish)
    else:

        def put_all(n: int) -> None:
            for _ in range(n):
                loop.call_soon_threadsafe(noop)

        put_last = functools.partial(loop.call_soon_threadsafe, finish)
    seconds = 0.0

    def put_all_timed(n: int) -> None:
        nonlocal seconds
        started = time.thread_time()
        put_all(n)
        seconds = time.thread_time() - started

    await rate(put_all_timed, put_last, n, thread=True)
    return n / seconds


async def memory(n: int) -> float:
    """Return the bytes that a waiting job takes."""
    put_all, put_last = deferring(anoop, afinish)
    await rate(put_all, put_last, 100)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    put_all(n)  # on the loop: nothing runs meanwhile
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await rate(put_all, put_last, 1)
    return (after - before) / n


async def stall(job: Any, last: Any, n: int) -> float:
    """Return the milliseconds by which a ticker was late at most while jobs were run."""
    put_all, put_last = deferring(job, last)
    running = asyncio.ensure_future(rate(put_all, put_last, n))
    await asyncio.sleep(0)  # all are handed over then
    latest, tick = 0.0, 0.001
    while not running.done():
        due = time.perf_counter() + tick
        await asyncio.sleep(tick)
        latest = max(latest, time.perf_counter() - due)
    return latest * 1000


async def cost(n: int) -> float:
    """Return the microseconds from handing over a job to its end, with n of them waiting."""
    put_all, put_last = deferring(anoop, afinish)
    rounds = max(1, 20_000 // n)
    return statistics.fmean(
        [1e6 / await rate(put_all, put_last, n) for _ in range(rounds)]
    )


async def starlette(job: Any, last: Any, n: int) -> float:
    from starlette.background import BackgroundTasks

    background = BackgroundTasks()

    def put_all(n: int) -> None:
        for _ in range(n):
            background.add_task(job)

    def put_last() -> None:
        background.add_task(last)
        running.append(asyncio.ensure_future(background()))

    running: list[Any] = []
    return await rate(put_all, put_last, n)


async def aiojobs(n: int) -> float:
    from aiojobs import Scheduler

    async with Scheduler(limit=1, pending_limit=0) as scheduler:
        Clock.started = time.perf_counter()
        for _ in range(n - 1):
            await scheduler.spawn(anoop())
        last = await scheduler.spawn(afinish())
        await last.wait()
        return n / (Clock.ended - Clock.started)


async def serve(_: int) -> int:
    """Serve views with uvicorn, and return the port."""
    import uvicorn
    from django.core.asgi import get_asgi_application

    from django_simple_task import django_simple_task_middleware

    application = django_simple_task_middleware(get_asgi_application())
    config = uvicorn.Config(application, port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    serving.append(asyncio.ensure_future(server.serve()))
    while not server.started:
        await asyncio.sleep(0.01)
    return server.servers[0].sockets[0].getsockname()[1]


serving: list[Any] = []  # or nothing would hold the task
urlpatterns: list[Any] = []


def route_views() -> None:
    from django.http import HttpResponse
    from django.urls import path

    from django_simple_task import defer

    def ok() -> HttpResponse:
        return HttpResponse(b"ok", headers={"Content-Length": "2"})

    def plain(request: Any) -> HttpResponse:
        return ok()

    def deferring(request: Any) -> HttpResponse:
        defer(noop)
        return ok()

    async def plain_async(request: Any) -> HttpResponse:
        return ok()

    async def deferring_async(request: Any) -> HttpResponse:
        defer(anoop)
        return ok()

    urlpatterns[:] = [
        path("sync/plain", plain),
        path("sync/defer", deferring),
        path("async/plain", plain_async),
        path("async/defer", deferring_async),
    ]


CANDIDATES: dict[str, Callable[[int], Any]] = {
    "defer-async-loop": lambda n: rate(*deferring(anoop, afinish), n),
    "defer-async-thread": lambda n: rate(*deferring(anoop, afinish), n, thread=True),
    "defer-sync-loop": lambda n: rate(*deferring(noop, finish), n),
    "defer-sync-thread": lambda n: rate(*deferring(noop, finish), n, thread=True),
    "defer-cpu": lambda n: cpu_of_caller(n, ours=True),
    "create_task": lambda n: rate(*creating_tasks(), n),
    "threadsafe": lambda n: rate(*creating_tasks_threadsafe(), n, thread=True),
    "threadsafe-cpu": lambda n: cpu_of_caller(n, ours=False),
    "submit-loop": lambda n: rate(*submitting(), n),
    "submit-thread": lambda n: rate(*submitting(), n, thread=True),
    "0.1.2-async-loop": lambda n: rate(*deferring(anoop, afinish), n),
    "0.1.2-sync-loop": lambda n: rate(*deferring(noop, finish), n),
    "0.1.2-sync-thread": lambda n: rate(*deferring(noop, finish), n, thread=True),
    "task-ours": lambda n: rate(*enqueuing(), n, thread=True),
    "task-local": lambda n: rate(*enqueuing(), n, thread=True),
    "task-immediate": lambda n: rate(*enqueuing(), n, thread=True),
    "memory": memory,
    "stall-async": lambda n: stall(anoop, afinish, n),
    "stall-sync": lambda n: stall(noop, finish, n),
    "cost": cost,
    "starlette-async": lambda n: starlette(anoop, afinish, n),
    "starlette-sync": lambda n: starlette(noop, finish, n),
    "aiojobs": aiojobs,
    "serve": serve,
}
TASK_BACKENDS = {
    "task-ours": {"BACKEND": "django_simple_task.SimpleTaskBackend"},
    "task-local": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1},
    },
    "task-immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
}


def set_up(name: str) -> None:
    import django
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        },
        DJANGO_SIMPLE_TASK_QUEUE_MAXSIZE=0,
        DJANGO_SIMPLE_TASK_WORKERS=1,
        INSTALLED_APPS=["django_simple_task"],
        ROOT_URLCONF=__name__,
        TASKS={"default": TASK_BACKENDS.get(name, TASK_BACKENDS["task-ours"])},
        USE_TZ=True,
    )
    django.setup()


@contextlib.asynccontextmanager
async def lifespan() -> Any:
    """Be the server: drive the middleware from startup to shutdown."""
    module = importlib.import_module("django_simple_task")
    wrap = getattr(module, "django_simple_task_middleware", None)
    if wrap is None:  # release 0.1.2
        wrap = module.django_simple_task_middlware

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("There is no lifespan.")

    async def send(message: Any) -> None:
        answered.set()

    answered, messages = asyncio.Event(), asyncio.Queue()
    running = asyncio.ensure_future(wrap(app)({"type": "lifespan"}, messages.get, send))
    messages.put_nowait({"type": "lifespan.startup"})
    await answered.wait()
    yield
    messages.put_nowait({"type": "lifespan.shutdown"})
    await running


async def measure(name: str) -> None:
    """For each number of jobs that comes in, give out what was measured."""
    loop = asyncio.get_running_loop()
    alone = name in ("serve", "create_task", "task-local", "task-immediate")
    async with contextlib.nullcontext() if alone else lifespan():
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            value = await CANDIDATES[name](int(line))
            print(json.dumps({"candidate": name, "value": value}), flush=True)
    os._exit(0)  # whatever a rival leaves behind


def be_candidate(name: str, loop: str) -> None:
    set_up(name)
    if name == "serve":
        route_views()
    if loop == "uvloop":
        import uvloop

        uvloop.run(measure(name))
    else:
        asyncio.run(measure(name))


# In the parent: taking turns


class Candidate:
    """A process that measures when asked."""

    def __init__(self, name: str, context: Context) -> None:
        command = [
            sys.executable,
            __file__,
            "--loop",
            context.loop,
            "--candidate",
            name,
        ]
        if name.startswith("0.1.2"):
            command += ["--path", context.old_release()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def measure(self, jobs: int) -> float:
        print(jobs, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise NotMeasured("its process ended")
        return json.loads(line)["value"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class NotMeasured(Exception):
    pass


class Context:
    """How much to measure, on which loop; and where release 0.1.2 is."""

    def __init__(self, loop: str, quick: bool, folder: str) -> None:
        self.loop = loop
        self.quick = quick
        self.folder = folder
        # Fresh pairs of processes, and turns that each pair takes.
        self.pairs, self.turns = (1, 3) if quick else (3, 5)
        self.divisor = 10 if quick else 1

    @functools.cache
    def old_release(self) -> str:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        pip += [self.folder, "django-simple-task==0.1.2"]
        if subprocess.run(pip, capture_output=True).returncode:
            raise NotMeasured("pip could not fetch release 0.1.2")
        return self.folder

    def take_turns(self, *sides: tuple[str, int]) -> list[list[float]]:
        """Return what each candidate measured, turn by turn; the first turns warm up."""
        figures: list[list[float]] = [[] for _ in sides]
        for _ in range(self.pairs):
            candidates = [Candidate(name, self) for name, _ in sides]
            try:
                for turn in range(self.turns + 1):
                    for i, (_, jobs) in enumerate(sides):
                        value = candidates[i].measure(max(jobs // self.divisor, 1000))
                        if turn:
                            figures[i].append(value)
            finally:
                for candidate in candidates:
                    candidate.end()
        return figures

    def take_turns_asking(self, *paths: str) -> list[list[float]]:
        """Return the requests per second that each path bears, round by round."""
        server = Candidate("serve", self)
        try:
            port = int(server.measure(0))
            rounds, seconds = (3, 0.5) if self.quick else (9, 2.0)
            for path in paths:
                asyncio.run(requests_per_second(port, path, 0.5))
            figures = [
                [
                    asyncio.run(requests_per_second(port, path, seconds))
                    for path in paths
                ]
                for _ in range(rounds)
            ]
        finally:
            server.end()
        return [list(figure) for figure in zip(*figures)]


async def requests_per_second(port: int, path: str, seconds: float) -> float:
    """Ask over eight connections that are kept alive."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    until = time.perf_counter() + seconds

    async def ask_again_and_again() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        count = 0
        while time.perf_counter() < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise NotMeasured(f"{path} answered {head.splitlines()[0]!r}")
            await reader.readexactly(2)
            count += 1
        writer.close()
        return count

    return (
        sum(await asyncio.gather(*(ask_again_and_again() for _ in range(8)))) / seconds
    )


class Outcome(NamedTuple):
    row: Row
    ours: float
    rivals: float | None
    score: float  # what the bar is for
    low: float
    high: float

    def met(self) -> bool:
        if self.row.at_most:
            return self.score <= self.row.bar
        return self.score >= self.row.bar


def judge(row: Row, context: Context) -> Outcome:
    if row.rival is None:
        (scores,) = context.take_turns((row.candidate, row.jobs))
        ours, rivals = scores, None
    else:
        if row.candidate.startswith("/"):
            ours, rivals = context.take_turns_asking(row.candidate, row.rival)
        else:
            sides = (row.candidate, row.jobs), (row.rival, row.rival_jobs)
            ours, rivals = context.take_turns(*sides)
        scores = [mine / other for mine, other in zip(ours, rivals)]
    median = statistics.median
    spread = sorted(scores)[len(scores) // 10], sorted(scores)[-1 - len(scores) // 10]
    theirs = None if rivals is None else median(rivals)
    return Outcome(row, median(ours), theirs, median(scores), *spread)


def print_table(context: Context) -> tuple[list[Outcome], bool]:
    """Measure row after row; return the outcomes, and whether all bars are met."""
    line = "{:<30} {:>9} {:>9} {:>7} {:>7}  {:<14} {}"
    print(
        line.format("per second", "ours", "rival's", "ratio", "bar", "spread", "rival")
    )
    outcomes, all_met = [], True
    for row in ROWS:
        if row.candidate.startswith("task") and sys.version_info < (3, 12):
            print(f"{row.name:<30} needs Django 6.0, and so Python 3.12")
            continue
        try:
            outcome = judge(row, context)
        except NotMeasured as error:
            print(f"{row.name:<30} not measured beside {row.rival}: {error}")
            all_met = False
            continue
        outcomes.append(outcome)
        all_met = all_met and outcome.met()
        print(
            line.format(
                row.name,
                shown(outcome.ours),
                "" if outcome.rivals is None else shown(outcome.rivals),
                shown(outcome.score),
                f"{'<=' if row.at_most else '>='} {row.bar:g}",
                f"{shown(outcome.low)} .. {shown(outcome.high)}",
                (row.rival or "") + ("" if outcome.met() else "  FALLS SHORT"),
            ),
            flush=True,
        )
    return outcomes, all_met


def shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure > 999 else f"{figure:.3g}"


def print_peers(context: Context) -> None:
    for (title, unit, jobs), names in zip(PEERS[::2], PEERS[1::2]):
        print(f"\n{title}, {unit}")
        for name in names:
            try:
                (figures,) = context.take_turns((name, jobs))
                print(f"  {name:<20} {statistics.median(figures):>10,.0f}", flush=True)
            except NotMeasured as error:
                print(f"  {name:<20} not measured: {error}")


def print_scale(context: Context) -> dict[int, float]:
    print("\njobs waiting, and the cost of each, from defer() to done, in µs")
    costs = {}
    for jobs in SCALE:
        (figures,) = context.take_turns(("cost", jobs))
        costs[jobs] = statistics.median(figures)
        print(f"  {jobs:>10,} {costs[jobs]:>8.2f}", flush=True)
    return costs


def plot(file: str, outcomes: list[Outcome], costs: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("svg")
    grey, blue = "#808080", "#3b82c4"  # legible on white and on black
    names = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
    )
    matplotlib.rcParams.update(dict.fromkeys(names, grey))
    from matplotlib import pyplot

    shown = [o for o in outcomes if o.rivals is not None and not o.row.at_most][::-1]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.5), width_ratios=(2, 1)
    )
    labels = [f"{o.row.name}\nbeside {o.row.rival}" for o in shown]
    bars = left.barh(labels, [o.score for o in shown], color=blue)
    left.bar_label(bars, [f"{o.score:.3g} ×" for o in shown], padding=3)
    left.axvline(1, color=grey, linewidth=1)
    left.set(xscale="log", title="times as fast as the rival")
    right.plot(list(costs), list(costs.values()), "o-", color=blue)
    right.set(xscale="log", ylim=0, xlabel="jobs waiting", title="µs per job")
    for axes in left, right:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(file, transparent=True, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument(
        "--quick", action="store_true", help="a short form, never fails"
    )
    parser.add_argument("--peers", action="store_true", help="other libraries, too")
    parser.add_argument("--scale", action="store_true", help="the cost of a long queue")
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="draw the table and the scale"
    )
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.candidate:
        if given.path:
            sys.path.insert(0, given.path)
        be_candidate(given.candidate, given.loop)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(given.loop, given.quick, folder)
        print(
            f"Python {platform.python_version()}, {given.loop}, {os.cpu_count()} CPUs\n"
        )
        outcomes, all_met = print_table(context)
        if given.peers:
            print_peers(context)
        costs = print_scale(context) if given.scale or given.plot else {}
    if given.plot:
        plot(given.plot, outcomes, costs)
    return 0 if all_met or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
