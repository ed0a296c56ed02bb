"""The demo of django_simple_task: `python demo.py [port]`, then open the address in its log."""

import asyncio
import contextlib
import csv
import io
import logging
import os
import sys
import tempfile
import time
from urllib.request import urlopen

import django
import uvicorn
from django import forms
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.files.base import ContentFile
from django.core.mail import send_mail
from django.db import connection, models, transaction
from django.http import HttpResponse
from django.shortcuts import redirect
from django.template import engines
from django.urls import path, reverse
from django.views.decorators.http import require_POST

from django_simple_task import defer, django_simple_task_middleware, stats

FOLDER = tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True)
FILES = "django.core.mail.backends.filebased.EmailBackend"
MAIL = {"MAILERS": {"default": {"BACKEND": FILES, "OPTIONS": {"file_path": FOLDER.name}}}}
if django.VERSION < (6, 1):
    MAIL = {"EMAIL_BACKEND": FILES, "EMAIL_FILE_PATH": FOLDER.name}
SAMPLE = b"".join(b"%d,Ada,ada%d@example.com\n" % (n, n) for n in range(1, 121))

logging.basicConfig(level="INFO", format="%(levelname)-8s%(name)s: %(message)s")
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{FOLDER.name}/db"}},
    DJANGO_SIMPLE_TASK_SHUTDOWN_GRACE_PERIOD=25,
    DJANGO_SIMPLE_TASK_WORKERS=2,
    INSTALLED_APPS=["django_simple_task", __name__],
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
    ROOT_URLCONF=__name__,
    TASKS={"default": {"BACKEND": "django_simple_task.SimpleTaskBackend"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
    **MAIL,
)
django.setup()

try:
    from django.tasks import task
except ImportError:  # Django 5.2 has no Tasks; defer() takes the function, too
    task = lambda function: function


class Job(models.Model):  # what the page shows of a job; the job itself writes it
    name = models.CharField(max_length=300)
    state = models.CharField(max_length=8, default="waiting")
    detail = models.TextField(default="for a free worker")
    done = models.PositiveIntegerField(default=0)
    total = models.PositiveIntegerField(default=0)
    attempt = models.PositiveIntegerField(default=0)
    max_attempts = models.PositiveIntegerField(default=1)


class Row(models.Model):
    cells = models.JSONField()


@contextlib.contextmanager
def attempt(job_id):
    """Show on the page that an attempt begins, and how it ends."""
    job = Job.objects.get(pk=job_id)
    job.state = "running"
    job.attempt += 1
    job.save()
    try:
        yield job
        job.state = "done"
    except Exception as error:
        job.state = "retrying" if job.attempt < job.max_attempts else "failed"
        job.detail = f"attempt {job.attempt} of {job.max_attempts}: {error}"
        raise  # to be logged, and tried again
    finally:
        job.save()


def import_rows(job_id, rows):
    """A sync job runs in a thread, and uses the ORM as a view does."""
    with attempt(job_id) as job:
        for cells in rows:
            Row.objects.create(cells=cells)
            job.done += 1
            job.detail = f"{job.done} of {job.total} rows"
            job.save()
            time.sleep(min(0.05, 6 / job.total))  # or it is over before you look


async def fetch_pages(job_id, urls):
    """An async job runs on the server's event loop: here it has all requests out at once."""
    job = await Job.objects.aget(pk=job_id)
    job.state = "running"
    await job.asave()
    requests = [asyncio.to_thread(urlopen, url, timeout=10) for url in urls]
    for request in asyncio.as_completed(requests):
        with contextlib.suppress(OSError), await request:  # refused after Ctrl-C
            job.done += 1
            job.detail = f"{job.done} of {job.total} pages"
            await job.asave()
    job.state = "done" if job.done == job.total else "failed"
    await job.asave()


def call_flaky_service(job_id):
    """A job that fails is tried again, as often as who defers it asks for."""
    with attempt(job_id) as job:
        if job.attempt < 3:
            raise ConnectionError("the service hung up")
        job.detail = f"attempt {job.attempt} of {job.max_attempts}: the service answered"


@task
def mail_report(job_id):
    """A Task of Django's own kind: the same queue, the same workers."""
    with attempt(job_id) as job:
        report = f"The table has {Row.objects.count()} rows."
        send_mail("Report", report, "demo@example.com", ["you@example.com"])
        job.detail = f"{report} The mail is in {FOLDER.name}"


@transaction.atomic
def start(name, function, *args, total=0, **options):
    """Show a job on the page, and defer it when its row is committed, not before."""
    job = Job.objects.create(name=name, total=total, max_attempts=options.get("max_attempts", 1))
    arguments = {"args": [job.pk, *args]}
    transaction.on_commit(lambda: defer(function, arguments, options=options), robust=True)


class ImportForm(forms.Form):
    file = forms.FileField()

    def clean_file(self):
        file = self.cleaned_data["file"]
        if file.size > 1_000_000:
            raise forms.ValidationError(f"This file has {file.size:,} bytes, more than 1 MB.")
        try:
            text = file.read().decode("utf-8-sig")
            lines = [[line] for line in text.splitlines()]
            if file.name.lower().endswith(".csv"):
                lines = csv.reader(io.StringIO(text, newline=""))
            self.rows = [cells for cells in lines if any(cell.strip() for cell in cells)]
        except (UnicodeDecodeError, csv.Error):
            raise forms.ValidationError("This is not a text or CSV file in UTF-8.")
        if "\0" in text:
            raise forms.ValidationError("This is not a text file: it has zero bytes in it.")
        if not 1 <= len(self.rows) <= 10_000:
            raise forms.ValidationError(f"This file has {len(self.rows):,} lines, not 1 to 10,000.")
        return file


def index(request):
    files = request.FILES
    if "sample" in request.POST:
        files = {"file": ContentFile(SAMPLE, "sample.csv")}
    form = ImportForm(request.POST or None, files or None)
    if form.is_valid():
        name = f"Import {form.cleaned_data['file'].name}"
        start(name, import_rows, form.rows, total=len(form.rows))
        return redirect("index")
    context = {"form": form, "stats": stats(), "jobs": Job.objects.order_by("-pk")[:10]}
    return HttpResponse(PAGE.render(context, request), status=400 if form.errors else 200)


@require_POST
def start_job(request, kind):
    if kind == "fetch":
        urls = [request.build_absolute_uri(reverse("slow", args=[n])) for n in range(1, 6)]
        start("Fetch five slow pages", fetch_pages, urls, total=len(urls))
    elif kind == "flaky":
        start("Call a flaky service", call_flaky_service, max_attempts=4, backoff=1)
    elif kind == "mail":
        start("Mail a report", mail_report)
    return redirect("index")


async def slow(request, n):
    await asyncio.sleep(min(n, 5) / 2)
    return HttpResponse(f"Page {n}")


urlpatterns = [
    path("", index, name="index"),
    path("start/<kind>/", start_job, name="start"),
    path("slow/<int:n>/", slow, name="slow"),
]
PAGE = engines["django"].from_string("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>django-simple-task</title><style>
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit } b, h1, h2, dd { font-weight: bold }
html { font: 1rem/1.45 system-ui, sans-serif; background: #ecf1ee; color: #1c2b25; padding: 1.25rem }
body { max-width: 72rem; margin: auto; align-items: start } h1 { font-size: 1.7rem } h2, dd { font-size: 1.15rem }
body, section, form, ul { display: grid; gap: .8rem; list-style: none } small, dt { font-size: .85rem; color: #53645c }
form, li, dl, p { background: #fff; border: 1px solid #d5dfd9; border-radius: .6rem; padding: .9rem 1rem }
button, ::file-selector-button { background: #fff; color: #0c5a3e; border: 1px solid; border-radius: .4rem;
  padding: .45rem .8rem; cursor: pointer; text-align: left } ::file-selector-button { margin-right: .6rem }
button small { display: block } .main { background: #0c5a3e; color: #fff } input, progress { width: 100% }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .4rem; order: 1 }
.job { display: grid; grid-template-columns: 1fr auto; gap: .3rem 1rem; overflow-wrap: anywhere; accent-color: var(--tone);
  box-shadow: inset .3rem 0 var(--tone) } .job :nth-child(n + 3) { grid-column: 1 / 3 } .job span { color: var(--tone) }
.waiting { --tone: #5d6d65 } .running { --tone: #0b5cad } .retrying { --tone: #965a00 } .done { --tone: #0c7a50 }
.failed { --tone: #b02020 } .errorlist li, #away { background: #8c1d1d; color: #fff } .away #away { display: block }
#away { display: none; position: fixed; inset: auto 0 0 } .away form, .away #live { opacity: .4; pointer-events: none }
@media (min-width: 50rem) { body { grid: auto auto 1fr / 22rem 1fr } header { grid-column: 1 / 3 }
  #live { grid-area: 2 / 2 / 4 } dl { order: 0 } }</style><link rel="icon" href="data:,">
<header><h1>django-simple-task</h1>Jobs inside the server's own process, from one file: demo.py</header>
<section><form method="post" enctype="multipart/form-data">{% csrf_token %}<h2>Import a file</h2>
{{ form.file.errors }}{{ form.file }}<small>Text or CSV in UTF-8, up to 1 MB, 10,000 lines</small>
<button class="main">Import it, row by row</button>
<button name="sample" formnovalidate>Import a sample instead</button></form>
<form method="post">{% csrf_token %}<h2>Other jobs</h2>
<button formaction="{% url 'start' 'fetch' %}">Fetch five slow pages<small>async, all at once</small></button>
<button formaction="{% url 'start' 'flaky' %}">Call a flaky service<small>fails twice, is tried again</small></button>
<button formaction="{% url 'start' 'mail' %}">Mail a report<small>a Task of django.tasks</small></button></form>
</section><section id="live"><dl>{% for name, number in stats.items %}
<div><dt>{{ name }}</dt><dd id="{{ name }}">{{ number }}</dd></div>{% endfor %}</dl>
<ul>{% for job in jobs %}<li class="job {{ job.state }}"><b>{{ job.name }}</b><span>{{ job.state }}</span>
{% if job.total %}<progress value="{{ job.done }}" max="{{ job.total }}"></progress>{% endif %}
<small>{{ job.detail }}</small></li>{% empty %}<li>No job yet: import the sample.</li>{% endfor %}</ul>
</section><p><b>Ctrl-C</b> in the terminal drains: the server takes no more requests, and finishes the
jobs that wait or run, for at most 25 seconds. The terminal shows it. Try it during an import.</p>
<p id="away">The server does not answer. After Ctrl-C it finishes its jobs: watch the terminal.</p><script>
setInterval(async () => {
  const text = await fetch("/").then((response) => response.text()).catch(() => "")
  const page = new DOMParser().parseFromString(text, "text/html")
  document.body.className = text ? "" : "away"
  if (text) document.querySelector("#live").replaceWith(page.querySelector("#live"))
}, 400)</script>
""")

if __name__ == "__main__":
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # the demo fetches from itself alone
    with connection.schema_editor() as editor:  # in a project: migrations
        editor.create_model(Job)
        editor.create_model(Row)
    application = django_simple_task_middleware(get_asgi_application())
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with FOLDER:  # removed at the end; log_config=None: uvicorn logs as all others do
        uvicorn.run(application, port=port, lifespan="on", log_config=None, access_log=False)
    print("At the end:", stats())
