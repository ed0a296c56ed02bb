"""The demo of django_simple_task: `python demo.py [port]`, then open the address in its log."""

import asyncio
import contextlib
import csv
import os
import sys
import tempfile
import time
from functools import partial
from urllib.request import urlopen

import django
import uvicorn
from django import forms
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.files.base import ContentFile
from django.core.mail import send_mail
from django.core.management.utils import get_random_secret_key
from django.db import connection, models, transaction
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect
from django.template import engines
from django.urls import path, reverse

from django_simple_task import defer, django_simple_task_middleware, stats

try:
    from django.tasks import task
except ImportError:  # Django 5.2: the mail job is then a partial, which defer() takes as well
    task = partial

FOLDER = tempfile.TemporaryDirectory(prefix="demo-")
FILES = "django.core.mail.backends.filebased.EmailBackend"
MAIL = {"EMAIL_BACKEND": FILES, "EMAIL_FILE_PATH": FOLDER.name}
if django.VERSION >= (6, 1):
    MAIL = {"MAILERS": {"default": {"BACKEND": FILES, "OPTIONS": {"file_path": FOLDER.name}}}}
SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{FOLDER.name}/demo.sqlite3"}
SAMPLE = b"".join(b"%d,Ada,ada%d@example.com\n" % (n, n) for n in range(1, 121))

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    DATABASES={"default": SQLITE},
    DJANGO_SIMPLE_TASK_SHUTDOWN_GRACE_PERIOD=25,
    DJANGO_SIMPLE_TASK_WORKERS=2,
    INSTALLED_APPS=["django_simple_task", __name__],
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "{levelname:8}{name}: {message}", "style": "{"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["console"], "level": "INFO"},
    },
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=get_random_secret_key(),
    TASKS={"default": {"BACKEND": "django_simple_task.SimpleTaskBackend"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
    **MAIL,
)
django.setup()


class Job(models.Model):  # what the page shows of a job; the job itself writes it
    name = models.CharField(max_length=300)
    state = models.CharField(max_length=8, default="waiting")
    attempt = models.PositiveIntegerField(default=0)
    max_attempts = models.PositiveIntegerField(default=1)
    done = models.PositiveIntegerField(default=0)
    total = models.PositiveIntegerField(default=1)
    detail = models.TextField(blank=True)


class Row(models.Model):
    cells = models.JSONField()


@contextlib.contextmanager
def attempt(job_id):
    """Show on the page that an attempt begins, and how it ends."""
    job = Job.objects.get(pk=job_id)
    job.state, job.attempt = "running", job.attempt + 1
    job.save()
    try:
        yield job
        job.state, job.done = "done", job.total
    except Exception as error:
        job.state = "retrying" if job.attempt < job.max_attempts else "failed"
        job.detail = str(error)
        raise  # to be logged, and tried again
    finally:
        job.save()


def import_rows(job_id, rows):
    """A sync job runs in a thread, and uses the ORM as a view does."""
    with attempt(job_id) as job:
        for job.done, cells in enumerate(rows, start=1):
            Row.objects.create(cells=cells)
            job.save()
            time.sleep(min(0.05, 6 / len(rows)))  # or it is over before you look


async def fetch_pages(job_id, urls):
    """An async job runs on the server's event loop: here with all requests at once."""
    job = await Job.objects.aget(pk=job_id)
    job.state, job.attempt = "running", 1
    await job.asave()
    for page in asyncio.as_completed([asyncio.to_thread(urlopen, u, timeout=9) for u in urls]):
        with contextlib.suppress(OSError), await page:  # while it stops, the server refuses
            job.done += 1
            await job.asave()
    job.state = "done" if job.done == job.total else "failed"
    await job.asave()


def call_flaky_service(job_id):
    """A job that fails twice; whoever hands it over says how often it is tried."""
    with attempt(job_id) as job:
        if job.attempt < 3:
            raise ConnectionError(f"The service hung up at attempt {job.attempt}.")


@task
def mail_report(job_id):
    """A task of Django's own kind: same queue, same workers."""
    with attempt(job_id) as job:
        job.detail = f"The table has {Row.objects.count()} rows. Mailed to {FOLDER.name}"
        send_mail("Report", job.detail, "demo@example.com", ["you@example.com"])


class ImportForm(forms.Form):
    file = forms.FileField()

    def clean_file(self):
        """Return the rows: those of a CSV file, or the lines of a text file."""
        file = self.cleaned_data["file"]
        if file.size > 1_000_000:
            raise forms.ValidationError(f"The file is too large: {file.size:,} bytes, not 1 MB.")
        try:
            text = file.read().decode("utf-8-sig")  # Excel begins a file with a mark
            rows = [[line] for line in text.splitlines()]
            if file.name.lower().endswith(".csv"):
                rows = list(csv.reader(text.splitlines(keepends=True)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise forms.ValidationError(f"The file is not text in UTF-8, or not CSV: {error}.")
        if "\0" in text:
            raise forms.ValidationError("The file is not text: it has zero bytes in it.")
        rows = [row for row in rows if any(cell.strip() for cell in row)]
        if not 0 < len(rows) <= 10_000:
            raise forms.ValidationError(f"The file has {len(rows):,} lines, not 1 to 10,000.")
        return rows


def start(name, function, *args, total=1, **options):
    """Show a job on the page, and hand it over: once its row is committed, not before."""
    job = Job.objects.create(name=name, total=total, max_attempts=options.get("max_attempts", 1))
    hand_over = partial(defer, function, {"args": [job.pk, *args]}, options=options)
    transaction.on_commit(hand_over, robust=True)  # of a Task, defer() calls enqueue()


def page(request):
    form = ImportForm()
    match request.POST.get("start"):
        case "import" | "sample" as source:
            sample = {"file": ContentFile(SAMPLE, "sample.csv")}
            form = ImportForm(request.POST, sample if source == "sample" else request.FILES)
            if form.is_valid():
                rows = form.cleaned_data["file"]
                start(f"Import {form.files['file'].name}", import_rows, rows, total=len(rows))
        case "fetch":
            urls = [request.build_absolute_uri(reverse(slow, args=[n])) for n in range(1, 6)]
            start("Fetch five slow pages", fetch_pages, urls, total=len(urls))
        case "flaky":
            start("Call a flaky service", call_flaky_service, max_attempts=4, backoff=1)
        case "mail":
            start("Mail a report", mail_report)
    if request.method == "POST" and not form.errors:
        return redirect("/#jobs")
    html = PAGE.render({"form": form, "stats": stats()}, request)
    return HttpResponse(html, status=400 if form.errors else 200)


def state(request):
    return JsonResponse({"stats": stats(), "jobs": list(Job.objects.order_by("-pk").values()[:20])})


async def slow(request, n):
    await asyncio.sleep(min(n, 5) / 2)
    return HttpResponse(f"Page {n}")


urlpatterns = [path("", page), path("state/", state), path("slow/<int:n>/", slow)]
PAGE = engines["django"].from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>django_simple_task</title><link rel="icon" href="data:,"><style>
* { margin: 0 } html { background: #eff4f1; color: #1c2b25; accent-color: #0c7a50; padding: 1.25rem }
body { font: 1rem/1.45 sans-serif; max-width: 68rem; margin: auto; display: grid; gap: 1.25rem }
@media (min-width: 50rem) { body { grid-template-columns: 21rem 1fr } header { grid-column: 1 / -1 } }
section, form, ul, li { display: grid; gap: .8rem; align-content: start; padding: 0; min-width: 0 }
form, #jobs li, dl { background: #fff; border-radius: .5rem; padding: .8rem 1rem }
button { font: inherit; color: #fff; background: #0c5a3e; border: 0; border-radius: .4rem; padding: .5rem }
.link { background: none; color: #0c5a3e; text-decoration: underline } input, progress { width: 100% }
.errorlist, aside, .failed { background: #fdecec; color: #a01c1c } .errorlist, aside { padding: .6rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.9rem, 1fr)); gap: .5rem }
dt, small { color: #53645c; font-size: .85rem } dd { font-size: 1.4rem } .retrying { color: #950 }
#jobs { scroll-margin-top: 16rem; min-height: 30rem; overflow-wrap: anywhere } .running { color: #05b }
#jobs li { grid-template-columns: 1fr auto; gap: .2rem 1rem } li > :nth-child(n + 3) { grid-column: 1 / 3 }</style>
<header><h1>django_simple_task</h1>Jobs inside the server's own process, from one file: demo.py</header>
<section><form method="post" enctype="multipart/form-data">{% csrf_token %}<h2>Import a file</h2>
{{ form.file.errors }}{{ form.file }}<small>Text or CSV, UTF-8, at most 1 MB and 10,000 lines</small>
<button name="start" value="import">Import, row by row</button>
<button name="start" value="sample" class="link" formnovalidate>use the sample</button></form>
<form method="post">{% csrf_token %}<h2>Other jobs</h2>
<button name="start" value="fetch">Fetch five slow pages at once</button>
<button name="start" value="flaky">Call a flaky service</button>
<button name="start" value="mail">Mail a report</button></form>
<p><b>Ctrl-C</b> in the terminal drains: the server takes no more requests, and finishes the jobs that
wait or run, for at most 25 seconds. The terminal shows it. Try it during an import.</p></section>
<section><aside id="away" hidden>No answer. After Ctrl-C the server finishes its jobs: see its terminal.
</aside><dl>{% for name in stats %}<div><dt>{{ name }}</dt><dd id="{{ name }}"></dd></div>{% endfor %}
</dl><ul id="jobs"></ul></section><script>const get = (id) => document.getElementById(id)
const make = (tag, textContent, more) =>
  Object.assign(document.createElement(tag), { textContent, ...more })
const card = (job) => {
  const item = make("li", "")
  item.append(make("b", job.name), make("span", job.state, { className: job.state }),
    make("progress", "", { max: job.total, value: job.done }), make("small",
    `${job.done} of ${job.total}, attempt ${job.attempt} of ${job.max_attempts}. ${job.detail}`))
  return item
}
setInterval(async () => {
  const now = await fetch("/state/").then((response) => response.json()).catch(() => null)
  get("away").hidden = now !== null
  for (const name in now?.stats) get(name).textContent = now.stats[name]
  if (now) get("jobs").replaceChildren(...now.jobs.map(card))
}, 400)</script>
""")

if __name__ == "__main__":
    port = int(sys.argv[1] if sys.argv[1:] else os.environ.get("PORT", "8000"))
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # the demo fetches from itself alone
    with connection.schema_editor() as editor:  # in a project: migrations
        editor.create_model(Job)
        editor.create_model(Row)
    application = django_simple_task_middleware(get_asgi_application())
    with FOLDER:  # removed at the end; log_config=None: LOGGING shows uvicorn's lines, too
        uvicorn.run(application, port=port, lifespan="on", log_config=None, access_log=False)
    print("At the end:", stats())
