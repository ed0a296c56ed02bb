"""The demo of django_simple_task: `python demo.py [port]`, then open what it prints."""

import asyncio
import contextlib
import csv
import io
import logging
import sys
import tempfile
import time

import uvicorn
from django import setup
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection, models, transaction
from django.forms import FileField, Form, ValidationError
from django.http import HttpResponse, HttpResponseRedirect
from django.template import engines
from django.urls import path

from django_simple_task import defer, django_simple_task_middleware, stats

PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
FOLDER = tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True)
SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{FOLDER.name}/db"}
MIDDLEWARE = ["common.CommonMiddleware", "csrf.CsrfViewMiddleware"]

logging.basicConfig(level="INFO", format="%(levelname)-8s%(name)s: %(message)s")
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],  # CommonMiddleware refuses all others
    DATABASES={"default": SQLITE},
    DJANGO_SIMPLE_TASK_SHUTDOWN_GRACE_PERIOD=25,
    DJANGO_SIMPLE_TASK_WORKERS=2,
    INSTALLED_APPS=["django_simple_task", __name__],
    MEDIA_ROOT=FOLDER.name,
    MIDDLEWARE=[f"django.middleware.{name}" for name in MIDDLEWARE],
    ROOT_URLCONF=__name__,
    TASKS={"default": {"BACKEND": "django_simple_task.SimpleTaskBackend"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
setup()

task = lambda function: function  # Django 5.2 has no Tasks; defer() takes both
with contextlib.suppress(ImportError):
    from django.tasks import task


class Job(models.Model):  # what the page shows of a job; the job itself writes it
    name = models.CharField(max_length=300)
    state = models.CharField(max_length=8, default="waiting")
    detail = models.TextField()
    attempt = models.PositiveIntegerField(default=0)
    done = models.PositiveIntegerField(default=0)
    total = models.PositiveIntegerField(default=0)


class Row(models.Model):
    cells = models.JSONField()


@transaction.atomic
def start(name, function, *args, **options):
    """Show a job on the page, and defer it when its row is committed, not before."""
    job = Job.objects.create(name=name)
    call = lambda: defer(function, {"args": [job.pk, *args]}, options=options)
    transaction.on_commit(call, robust=True)


@contextlib.contextmanager
def attempt(job_id, *, of=1):
    """Show on the page that an attempt begins, and how it ends."""
    job = Job.objects.get(pk=job_id)
    job.state, job.attempt = "running", job.attempt + 1
    job.save()
    try:
        yield job
        job.state = "done"
    except Exception as error:
        job.state = "retrying" if job.attempt < of else "failed"
        job.detail = f"attempt {job.attempt} of {of}: {error}"
        raise  # to be logged, and tried again
    finally:
        job.save()


def import_rows(job_id, key):
    """A sync job runs in a thread, and uses the ORM as a view does."""
    with attempt(job_id) as job:
        with default_storage.open(key) as file:
            rows = read_rows(file)
        job.total = len(rows)
        for cells in rows:
            Row.objects.create(cells=cells)
            job.done += 1
            job.detail = f"{job.done} of {job.total} rows"
            job.save()
            time.sleep(min(0.05, 6 / job.total))  # or it is over before you look
        default_storage.delete(key)


async def fetch_pages(job_id, seconds):
    """An async job runs on the server's event loop: all its requests are out at once."""
    job = await Job.objects.aget(pk=job_id)
    job.state, job.total = "running", len(seconds)
    await job.asave()
    for page in asyncio.as_completed(map(fetch, seconds)):
        with contextlib.suppress(OSError):  # refused after Ctrl-C
            await page
            job.done += 1
            job.detail = f"{job.done} of {job.total} pages"
            await job.asave()
    job.state = "done" if job.done == job.total else "failed"
    await job.asave()


async def fetch(seconds):
    # From the server's own address. The request's Host is what its sender wrote there.
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    with contextlib.closing(writer):
        writer.write(b"GET /slow/%d/ HTTP/1.0\r\nHost: localhost\r\n\r\n" % seconds)
        return await reader.read()


def call_flaky_service(job_id):
    """A job that fails is tried again, as often as who defers it asks for."""
    with attempt(job_id, of=4) as job:
        if job.attempt < 3:
            raise ConnectionError("the service hung up")
        job.detail = "attempt 3 of 4: the service answered"


@task
def write_report(job_id):
    """A Task of Django's own kind: the same queue, the same workers."""
    with attempt(job_id) as job:
        report = f"The table has {Row.objects.count()} rows."
        key = default_storage.save("report.txt", ContentFile(report.encode()))
        job.detail = f"{report} See {default_storage.path(key)}"


def read_rows(file):
    text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
    return [cells for cells in csv.reader(text) if any(map(str.strip, cells))]


class ImportForm(Form):
    file = FileField()

    def clean_file(self):
        file = self.cleaned_data["file"]
        if file.size > 1_000_000:
            raise ValidationError(f"This file has {file.size:,} bytes, more than 1 MB.")
        try:
            count = len(read_rows(file))
        except (UnicodeError, csv.Error):
            raise ValidationError("This is not a text or CSV file in UTF-8.")
        if not 1 <= count <= 10_000:
            raise ValidationError(f"This file has {count:,} rows, not 1 to 10,000.")
        return file


JOBS = {
    "fetch": lambda: start("Fetch five slow pages", fetch_pages, range(1, 6)),
    "flaky": lambda: start("Call a flaky service", call_flaky_service, max_attempts=4),
    "report": lambda: start("Write a report", write_report),
}


def index(request):
    files, job = request.FILES, request.POST.get("job")
    if job in JOBS:
        JOBS[job]()
        return HttpResponseRedirect("/#live")
    if job == "sample":
        files = {"file": ContentFile(b"Ada,ada@example.com\n" * 120, "sample.csv")}
    form = ImportForm(request.POST or None, files or None)
    if form.is_valid():
        # Django closes an uploaded file with the response: store it, and pass its key.
        file = form.cleaned_data["file"]
        key = default_storage.save("upload", file)
        start(f"Import {file.name}", import_rows, key)
        return HttpResponseRedirect("/#live")
    context = {"form": form, "stats": stats(), "jobs": Job.objects.order_by("-pk")[:10]}
    page = PAGE.render(context, request)
    return HttpResponse(page, status=400 if form.errors else 200)


async def slow(request, seconds):
    await asyncio.sleep(min(seconds, 5) / 2)
    return HttpResponse("At last.")


urlpatterns = [path("", index), path("slow/<int:seconds>/", slow)]
PAGE = engines["django"].from_string("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>django-simple-task</title><style>
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit } b, h1, h2, dd { font-weight: 600 }
html { color-scheme: light dark; --green: light-dark(#0c6a48, #5ccb9a); background: #8882;
  font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere } h1 { font-size: 1.6rem }
body { max-width: 70rem; margin: auto; padding: 1rem } body, section, form, article { display: grid; gap: .7rem }
form, article, p { background: Canvas; border: 1px solid #8885; border-radius: .6rem; padding: .8rem }
button, ::file-selector-button { background: none; color: var(--green); border: 1px solid; border-radius: .4rem;
  padding: .4rem .7rem; text-align: left; cursor: pointer } ::file-selector-button { margin-right: .6rem }
.main { background: var(--green); color: Canvas } input, progress, small { display: block; width: 100% }
small, dt, li span { font-size: .875rem; opacity: .8 } ul { list-style: none } li progress, li small { grid-column: 1 / 3 }
li { display: grid; grid: auto / 1fr auto; align-items: baseline; gap: .1rem .8rem; padding: .45rem .8rem;
  border-left: .3rem solid var(--tone, #8885); accent-color: var(--tone) } li + li { border-top: 1px solid #8885 }
.running { --tone: #3b82f6 } .retrying { --tone: #d08a1d } .done { --tone: #1f9d6b } .failed { --tone: #dc4040 }
.errorlist li, #away { background: #a31f1f; color: #fff; padding: .8rem; border: 0; border-radius: .5rem }
#away { position: fixed; inset: auto .8rem .8rem; max-width: 68rem; margin: auto } .away { padding-bottom: 7rem }
body:not(.away) #away { display: none } .away form, .away #live { opacity: .4; pointer-events: none }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); gap: .3rem }
@media (min-width: 50rem) { body { grid: auto auto 1fr / 21rem 1fr; align-items: start }
  header { grid-column: 1 / 3 } #live { grid-area: 2 / 2 / 4 } } #live { scroll-margin: 6rem }</style><link rel="icon" href="data:,">
<header><h1>django-simple-task</h1>This server runs its jobs itself: async ones on its event loop,
sync ones in threads beside it.</header>
<section><form method="post" enctype="multipart/form-data">{% csrf_token %}<h2>Import a file</h2>
{{ form.file.errors }}{{ form.file }}<small>Text or CSV in UTF-8, 1 MB at most</small>
<button class="main">Import it, row by row<small>sync: in a thread</small></button>
<button name="job" value="sample" formnovalidate>Import a sample instead</button></form>
<form method="post">{% csrf_token %}<h2>Other jobs</h2>
<button name="job" value="fetch">Fetch five slow pages<small>async: on the loop, all at once</small></button>
<button name="job" value="flaky">Call a flaky service<small>sync: fails twice, is tried again</small></button>
<button name="job" value="report">Write a report<small>sync: a Task of django.tasks</small></button></form></section>
<section id="live"><article><h2>The last ten jobs</h2><ul>{% for job in jobs %}<li class="job {{ job.state }}">
<b title="{{ job.name }}">{{ job.name|truncatechars:60 }}</b><span>{{ job.state }}</span>
{% if job.done %}<progress value="{{ job.done }}" max="{{ job.total }}"></progress>{% endif %}
<small>{{ job.detail }}</small></li>{% empty %}<li>None yet: import the sample.</li>{% endfor %}</ul></article>
<article><h2>stats()</h2><dl>{% for name, number in stats.items %}<div><dt>{{ name }}</dt><dd id="{{ name }}">{{ number }}</dd></div>
{% endfor %}</dl></article></section><p><b>Ctrl-C</b> in the terminal drains: the server takes no more requests,
and finishes the jobs that wait or run, for at most 25 seconds. Try it during an import.</p>
<div id="away">The server takes no more requests. After Ctrl-C it finishes its jobs: watch the terminal.</div><script>
setInterval(async () => {
  const text = await fetch("/").then(answer => answer.ok ? answer.text() : "").catch(() => "")
  const page = new DOMParser().parseFromString(text, "text/html")
  document.body.className = text ? "" : "away"
  if (text) document.querySelector("#live").replaceWith(page.querySelector("#live"))
}, 400)</script>
""")

if __name__ == "__main__":
    with connection.schema_editor() as editor:  # in a project: migrations
        editor.create_model(Job)
        editor.create_model(Row)
    application = django_simple_task_middleware(get_asgi_application())
    with FOLDER:  # removed at the end; log_config=None: uvicorn logs as all others do
        uvicorn.run(application, port=PORT, log_config=None, access_log=False)
    print("At the end:", stats())
