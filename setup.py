"""Package the single module; setup.py is the only file that packaging needs."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent

# What travels in the sdist beside the module, so that its tests run from there.
BESIDE = [
    "bench.py",
    "bench.svg",
    "conftest.py",
    "demo.py",
    "test_django_simple_task.py",
]

EXTRAS = {
    "bench": [
        "aiojobs",
        "django-tasks-local; python_version >= '3.12'",
        "uvicorn",
        "uvloop",
    ],
    "demo": ["uvicorn"],
    "test": [
        "coverage>=7.10",
        "daphne",
        "django-structlog",
        "django-tasks-db",
        # Django 5.2 has no django.tasks, and Python 3.11 gets no newer Django. Under 3.12
        # and 3.13 it is tested without Tasks: django-tasks-rq requires the backport.
        "django-tasks>=0.12; python_version < '3.12'",
        "django-tasks-rq; python_version < '3.12' or python_version >= '3.14'",
        "django-tenants",
        "dynaconf",
        "ecs-logging",
        "granian",
        "gunicorn>=25",
        "hypercorn",
        "hypothesis",
        "nest_asyncio",
        "numpy",
        "prometheus_client",
        "psycopg[binary,pool]",
        "pytest-xdist",
        "pytest>=9",
        "selenium",
        "sentry-sdk",
        "structlog",
        "uvicorn",
        "uvicorn-worker",
        "uvloop",
    ],
}


def version() -> str:
    """Read `__version__` from the module, which cannot be imported without Django."""
    module = ast.parse((HERE / "django_simple_task.py").read_text(encoding="utf-8"))
    for statement in module.body:
        match statement:
            case ast.Assign([ast.Name("__version__")], ast.Constant(str(value))):
                return value
    raise RuntimeError("django_simple_task.py assigns no __version__.")


class SourceDistribution(sdist):
    """An sdist with the files of `BESIDE`."""

    def make_distribution(self) -> None:
        self.filelist.extend(name for name in BESIDE if (HERE / name).exists())
        super().make_distribution()


setup(
    name="django-simple-task",
    version=version(),
    description="Background tasks for Django inside the ASGI process",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The django-simple-task developers",
    license="MIT",
    keywords=["django", "asgi", "background tasks", "django.tasks", "queue"],
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Web Environment",
        "Framework :: AsyncIO",
        "Framework :: Django",
        "Framework :: Django :: 5.2",
        "Framework :: Django :: 6.0",
        "Framework :: Django :: 6.1",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: 3.15",
        "Topic :: Internet :: WWW/HTTP",
        "Topic :: System :: Distributed Computing",
    ],
    py_modules=["django_simple_task"],
    python_requires=">=3.11",
    # Django has no upper bound: beside a newer one pip would take release 0.1.2, which
    # asks for no Django and is another program.
    install_requires=["Django>=5.2", "asgiref>=3.8.1,<4"],
    extras_require=EXTRAS,
    cmdclass={"sdist": SourceDistribution},
)
