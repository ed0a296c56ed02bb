"""
Measure django_simple_task beside bare tools and other libraries: python bench.py

Jobs per second are the machine's, so what counts are ratios: ours to a rival's, which
takes turns with it in the same run. For most of them the project promises a bar. The
jobs do nothing, one worker runs them, and all that a project has is switched on: the
lifespan, contexts, connections, accounts, default logging.

The rows stand in the order in which one asks:

1. What does a job cost, from defer() to its end? Coroutine and sync functions, from
   the loop and from a thread, beside what one would use instead: bare asyncio, a bare
   thread pool, aiojobs, release 0.1.2.
2. What does defer() itself take of its caller's CPU time?
3. What does a Task cost, beside other backends in the process? (From Django 6.0 on.)
4. What do many jobs at once do: the bytes that a waiting one takes, the longest that
   they hold up the loop, and whether one costs more because a million others wait?
5. What does a visitor notice? Requests to a view that defers a job, beside the same
   view without it.

Each side of a row has a process of its own. All start three times; each time the first
turn warms them up, and the next five count. A view with and without its job shares a
server, and takes nine turns. Printed are the median, and the spread without the outer
tenths. All rows together take about five minutes.

    python bench.py                             all; status 1 where a bar is missed
    python bench.py --quick                     a taste of all, which never fails
    python bench.py --only "sync jobs" Tasks    rows with these words in their names
    python bench.py --plot bench.svg            draw the ratios, too
    python bench.py --loop uvloop               on another event loop

The module measured is the one on PYTHONPATH, or else the one beside this file. The
extra `bench` installs the rivals; pip puts release 0.1.2 into a folder of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import itertools
import math
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Row(NamedTuple):
    name: str
    unit: str
    kind: str  # of the jobs
    place: str  # where they are handed over
    bars: dict[str, float | None]  # for the ratio to each rival
    jobs: int = 100_000


ALONE = ""  # in a rival's place: the bar is for our own figure
AT_MOST = {"bytes", "ms", "µs"}  # the bars of these are not to be exceeded
ON_LOOP = {"create_task": 1, "aiojobs": None, "release 0.1.2": None}  # None: no bar
FROM_THREAD = {"call_soon_threadsafe(create_task)": 2.5}
POOL = {"ThreadPoolExecutor": 1.5, "release 0.1.2": 20}
CALL = {"call_soon_threadsafe": 3}
BACKENDS = {"django-tasks-local": 1, "ImmediateBackend": 1.2}
FEW = {"1,000 waiting": 1.25}
VIEW = {"the view alone": 0.95}
ROWS = [
    Row("coroutine jobs, on the loop", "jobs/s", "coroutine", "loop", ON_LOOP),
    Row("coroutine jobs, from a thread", "jobs/s", "coroutine", "thread", FROM_THREAD),
    Row("sync jobs, on the loop", "jobs/s", "sync", "loop", POOL),
    Row("sync jobs, from a thread", "jobs/s", "sync", "thread", POOL),
    Row("defer() itself", "calls/s", "coroutine", "thread", CALL),
    Row("Tasks, from a thread", "jobs/s", "task", "thread", BACKENDS, 5_000),
    Row("memory of a waiting job", "bytes", "coroutine", "loop", {ALONE: 256}),
    Row("longest stall, coroutine jobs", "ms", "coroutine", "loop", {ALONE: 5}),
    Row("longest stall, sync jobs", "ms", "sync", "loop", {ALONE: 5}),
    Row("1,000,000 waiting", "µs", "coroutine", "loop", FEW, 1_000_000),
    Row("async view that defers", "requests/s", "coroutine", "loop", VIEW),
    Row("sync view that defers", "requests/s", "sync", "thread", VIEW),
]
JOBS_OF_RIVALS = {  # about as many as take as long as ours
    "release 0.1.2": 2_000,
    "1,000 waiting": 1_000,
    "aiojobs": 20_000,
    "call_soon_threadsafe": 50_000,
    "call_soon_threadsafe(create_task)": 20_000,
    "ThreadPoolExecutor": 50_000,
}


# In the process of one side: jobs, and what they are given to

clock: Any = types.SimpleNamespace()  # from the first job handed over to the last end


def noop() -> None:
    pass


async def anoop() -> None:
    pass


def finish() -> None:
    clock.ended = time.perf_counter()
    clock.loop.call_soon_threadsafe(clock.over.set)


async def afinish() -> None:
    finish()


class Side(NamedTuple):
    """What takes jobs, and the jobs: functions or, `called`, coroutines."""

    give: Any
    job: Any
    last: Any
    place: str
    called: bool = False

    def hand_over(self, n: int) -> None:
        jobs, last, give = itertools.repeat(self.job, n - 1), self.last, self.give
        if self.called:
            jobs, last = map(operator.call, jobs), last()
        clock.over = asyncio.Event()
        clock.started, cpu = time.perf_counter(), time.thread_time()
        for job in jobs:
            give(job)
        clock.cpu = time.thread_time() - cpu
        give(last)

    async def run(self, n: int) -> float:
        """Hand over n jobs; return how many seconds passed until the last one ended."""
        if self.place == "thread":
            await asyncio.to_thread(self.hand_over, n)
        else:
            self.hand_over(n)
        await clock.over.wait()
        return clock.ended - clock.started


class AiojobsSide(Side):
    async def run(self, n: int) -> float:
        from aiojobs import Scheduler

        clock.over = asyncio.Event()
        async with Scheduler(limit=1, pending_limit=0) as scheduler:
            clock.started = time.perf_counter()
            for _ in range(n - 1):
                await scheduler.spawn(self.job())
            await scheduler.spawn(self.last())
            await clock.over.wait()
        return clock.ended - clock.started


def side(tool: str, kind: str, place: str) -> Side:
    loop = clock.loop = asyncio.get_running_loop()
    if kind == "task":
        from django.tasks import task

        enqueue = operator.methodcaller("enqueue")
        return Side(enqueue, task(noop), task(finish), place)
    jobs = (anoop, afinish) if kind == "coroutine" else (noop, finish)
    match tool:
        case "aiojobs":
            return AiojobsSide(None, *jobs, place)
        case "create_task":
            return Side(loop.create_task, *jobs, place, called=True)
        case "call_soon_threadsafe(create_task)":
            give = functools.partial(loop.call_soon_threadsafe, loop.create_task)
            return Side(give, *jobs, place, called=True)
        case "call_soon_threadsafe":
            return Side(loop.call_soon_threadsafe, noop, finish, place)
        case "ThreadPoolExecutor":
            return Side(ThreadPoolExecutor(1).submit, *jobs, place)
    return Side(importlib.import_module("django_simple_task").defer, *jobs, place)


# In the process of one side: what is measured


async def rate(side: Side, n: int) -> float:
    return n / await side.run(n)


async def calls(side: Side, n: int) -> float:
    """Return how many calls the thread makes in a second of its CPU time."""
    await side.run(n)
    return n / clock.cpu


async def memory(side: Side, n: int) -> float:
    """Return the bytes that a waiting job takes."""
    await side.run(100)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    side.hand_over(n)  # on the loop: nothing runs meanwhile
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await clock.over.wait()
    return (after - before) / n


async def stall(side: Side, n: int) -> float:
    """Return by how many milliseconds a ticker was late at most while jobs were run."""
    running = asyncio.ensure_future(side.run(n))
    await asyncio.sleep(0)  # all are handed over then
    latest, tick = 0.0, 0.001
    while not running.done():
        due = time.perf_counter() + tick
        await asyncio.sleep(tick)
        latest = max(latest, time.perf_counter() - due)
    return latest * 1000


async def cost(side: Side, n: int) -> float:
    """Return the microseconds that a job takes, with n of them waiting at first."""
    runs = max(1, 20_000 // n)
    return statistics.fmean([await side.run(n) / n * 1e6 for _ in range(runs)])


async def serve(side: Side, _: int) -> float:
    """Serve a view that gives as many jobs as its path says; return the port."""
    import uvicorn
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse
    from django.urls import path

    from django_simple_task import django_simple_task_middleware

    def view(request: Any, jobs: int) -> HttpResponse:
        for _ in range(jobs):
            side.give(side.job)
        return HttpResponse(b"ok", headers={"Content-Length": "2"})

    async def async_view(request: Any, jobs: int) -> HttpResponse:
        return view(request, jobs)

    urlpatterns.append(path("<int:jobs>", async_view if side.job is anoop else view))
    application = django_simple_task_middleware(get_asgi_application())
    config = uvicorn.Config(application, port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    serving.append(asyncio.ensure_future(server.serve()))
    while not server.started:
        await asyncio.sleep(0.01)
    return server.servers[0].sockets[0].getsockname()[1]


serving: list[Any] = []  # what nothing else holds
urlpatterns: list[Any] = []
MEASURES: dict[str, Callable[[Side, int], Awaitable[float]]] = {
    "jobs/s": rate,
    "calls/s": calls,
    "bytes": memory,
    "ms": stall,
    "µs": cost,
    "requests/s": serve,
}


def set_up(tool: str) -> None:
    import django
    from django.conf import settings

    tasks: dict[str, Any] = {"BACKEND": "django_simple_task.SimpleTaskBackend"}
    if tool == "ImmediateBackend":
        tasks = {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"}
    elif tool == "django-tasks-local":
        tasks = {"BACKEND": "django_tasks_local.ThreadPoolBackend"}
        tasks["OPTIONS"] = {"MAX_WORKERS": 1}
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DJANGO_SIMPLE_TASK_QUEUE_MAXSIZE=0,
        DJANGO_SIMPLE_TASK_WORKERS=1,
        INSTALLED_APPS=["django_simple_task"],
        ROOT_URLCONF=__name__,
        TASKS={"default": tasks},
    )
    django.setup()


async def be_side(row: Row, tool: str) -> None:
    """For each number of jobs that comes in, write what was measured."""
    if tool in ("ours", "release 0.1.2", "1,000 waiting"):
        await startup("middlware" if tool == "release 0.1.2" else "middleware")
    measured = side(tool, row.kind, row.place)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(await MEASURES[row.unit](measured, int(line)), flush=True)
    os._exit(0)  # whatever a rival leaves behind


async def startup(suffix: str) -> None:
    """Be the server: have the workers started."""
    from asgiref.testing import ApplicationCommunicator
    from django.core.asgi import get_asgi_application

    module = importlib.import_module("django_simple_task")
    if suffix == "middlware" and hasattr(module, "stats"):
        sys.exit("pip could not fetch release 0.1.2.")
    wrap = getattr(module, f"django_simple_task_{suffix}")
    app = ApplicationCommunicator(wrap(get_asgi_application()), {"type": "lifespan"})
    serving.append(app)
    await app.send_input({"type": "lifespan.startup"})
    await app.receive_output(60)


# In the parent: taking turns


@functools.cache
def old_release() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*pip, folder.name, "django-simple-task==0.1.2"])
    return folder


@contextlib.contextmanager
def process(row: Row, tool: str, loop: str) -> Iterator[Callable[[int], float]]:
    """Start the process of a side; give what has it measure n jobs: NaN if it ended."""
    command = [sys.executable, __file__, "--loop", loop, "--side", row.name, tool]
    environ, pipe = dict(os.environ), subprocess.PIPE
    if tool == "release 0.1.2":
        environ["PYTHONPATH"] = old_release().name
    child = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True)

    def measure(n: int) -> float:
        with contextlib.suppress(BrokenPipeError):
            print(n, file=child.stdin, flush=True)
        return float(child.stdout.readline() or "nan")

    with contextlib.suppress(BrokenPipeError), child:
        yield measure


def take_turns(row: Row, loop: str, quick: bool) -> dict[str, list[float]]:
    """Return what was measured of each side, turn by turn."""
    views = row.unit == "requests/s"
    starts, turns, divisor = (1, 3, 10) if quick else (1, 9, 1) if views else (3, 5, 1)
    figures: dict[str, list[float]] = {t: [] for t in ("ours", *row.bars) if t != ALONE}
    for _ in range(starts):
        with contextlib.ExitStack() as stack:
            if views:
                port = int(stack.enter_context(process(row, "uvicorn", loop))(0))
                seconds = 0.5 if quick else 2
                view = functools.partial(ask, port, seconds=seconds)
                measures = [functools.partial(view, jobs) for jobs in "10"]
            else:
                measures = []
                for tool in figures:
                    jobs = max(JOBS_OF_RIVALS.get(tool, row.jobs) // divisor, 1000)
                    measure = stack.enter_context(process(row, tool, loop))
                    measures.append(functools.partial(measure, jobs))
            for turn in range(turns + 1):
                for measure, taken in zip(measures, figures.values(), strict=True):
                    figure = measure()
                    if turn:  # the first one warms up
                        taken.append(figure)
    return figures


def ask(port: int, jobs: str, seconds: float) -> float:
    """Return how many requests a second are answered on eight connections."""
    request = f"GET /{jobs} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    until = time.perf_counter() + seconds

    async def ask_again_and_again() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for count in itertools.count():
            if time.perf_counter() > until:
                writer.close()
                return count
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(2)

    async def ask_on_eight() -> int:
        return sum(await asyncio.gather(*(ask_again_and_again() for _ in range(8))))

    return asyncio.run(ask_on_eight()) / seconds


# In the parent: what is shown


class Outcome(NamedTuple):
    row: Row
    rival: str
    ratio: float
    met: bool


LINE = "{:<30}{:>9} {:>9} {:>7} {:>7}  {:<15} {}"


def report(row: Row, figures: dict[str, list[float]]) -> Iterator[Outcome]:
    """Print how a row stands beside each rival."""
    for rival, bar in row.bars.items():
        ours, theirs = figures["ours"], figures.get(rival)
        ratios = sorted(map(operator.truediv, ours, theirs) if theirs else ours)
        ratio, tenth = statistics.median(ratios), len(ratios) // 10
        at_most = row.unit in AT_MOST
        met = ratio <= (bar or 0) if at_most else ratio >= (bar or 0)  # NaN is neither
        line = LINE.format(
            row.name,
            shown(statistics.median(ours)),
            shown(statistics.median(theirs)) if theirs else row.unit,
            shown(ratio) if theirs else "",
            f"{'<=' if at_most else '>='} {bar:g}" if bar else "",
            f"{shown(ratios[tenth])} .. {shown(ratios[-1 - tenth])}",
            rival + ("" if met else "  MISSED"),
        )
        print(line, flush=True)
        yield Outcome(row, rival, ratio, met)


def shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure > 999 else f"{figure:.3g}"


STYLE = """text { font: 23px system-ui, sans-serif; fill: #1b2430 }
.small { font-size: 20px; fill: #57606a } path { stroke: #57606a }
.card { fill: #fff; stroke: #d0d7de } .bar { fill: #2f7fc1 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9aa4af }
path { stroke: #9aa4af } .card { fill: #161b22; stroke: #3d444d }
.bar { fill: #4493dd } }"""


def draw(file: str, outcomes: list[Outcome]) -> None:
    """Draw one column of large text, for a phone, with a bar for each ratio."""
    parts, y, name = [], 40, ""
    unit = 340 / math.log(max(outcome.ratio for outcome in outcomes))
    for row, rival, ratio, _ in outcomes:
        if row.name != name:
            y, name = y + 42, row.name
            parts.append(f'<text x="20" y="{y}">{name}</text>')
        end = max(20, 40 + unit * math.log(ratio))
        bar = f'x="{min(end, 40):.0f}" width="{max(abs(end - 40), 2):.0f}" class="bar"'
        parts += [
            f'<text x="20" y="{y + 26}" class="small">beside {rival}</text>',
            f'<rect y="{y + 37}" height="18" {bar}/><path d="M40 {y + 34}v24"/>',
            f'<text x="{max(end, 40) + 8:.0f}" y="{y + 54}">{shown(ratio)}</text>',
        ]
        y += 60
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" width="480"
viewBox="0 0 480 {y + 16}"><style>{STYLE}</style>
<rect width="100%" height="100%" rx="10" class="card"/>
<text x="20" y="40" class="small">Times as fast (bars start at 1, log scale)</text>"""
    with open(file, "w", encoding="utf-8") as svg:
        print(head, *parts, "</svg>", sep="\n", file=svg)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    add = parser.add_argument
    add("--quick", action="store_true", help="a taste of all, which never fails")
    add("--only", nargs="+", default=[""], metavar="WORDS", help="rows with them")
    add("--plot", metavar="FILE.svg", help="draw the ratios, too")
    add("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    add("--side", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if given.side:
        set_up(given.side[1])
        (row,) = (row for row in ROWS if row.name == given.side[0])
        factory = importlib.import_module(given.loop).new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(be_side(row, given.side[1]))
    module = importlib.util.find_spec("django_simple_task")
    rows = [r for r in ROWS if any(w.lower() in r.name.lower() for w in given.only)]
    if importlib.util.find_spec("django.tasks") is None:
        rows = [row for row in rows if row.kind != "task"]
    if not rows:
        parser.error(f"no row has these words; there are: {[r.name for r in ROWS]}")
    print(f"Python {platform.python_version()}, {given.loop}, {os.cpu_count()} CPUs")
    print(module and module.origin, end="\n\n")
    print(LINE.format("", "ours", "rival's", "ratio", "bar", "spread", "beside"))
    turns = ((row, take_turns(row, given.loop, given.quick)) for row in rows)
    outcomes = [outcome for each in turns for outcome in report(*each)]
    if given.plot:
        draw(given.plot, [each for each in outcomes if each.row.unit not in AT_MOST])
    return 0 if given.quick or all(each.met for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
