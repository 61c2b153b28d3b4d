"""Sessions: lint, typing, tests and docs by default; `nox --list` shows the others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typing", "tests", "docs"]

# Tests of one file run in one process, because they share expensive fixtures.
TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")
TESTED = ("-c", "constraints.txt")
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
# The extra `demo` installs pytorch-lightning, which not every session may have.
TEST = [requirement for requirement in EXTRAS["test"] if "[demo]" not in requirement]
DEMO = [requirement for requirement in EXTRAS["demo"] if "lightning" not in requirement]


@nox.session
@nox.parametrize(
    "lightning",
    [
        nox.param(None, id="none"),
        nox.param("lightning", id="lightning"),
        nox.param("pytorch-lightning", id="pytorch-lightning"),
        nox.param("pytorch-lightning==2.6.0", id="oldest"),
    ],
)
def tests(session: nox.Session, lightning: str | None) -> None:
    """Run the default tests with a Lightning package, with the oldest one, or with none."""
    name, _, version = (lightning or "").partition("==")
    package = f".[{name}]" if name else "."
    tested = TESTED
    if version:
        tested = ("-c", _constraints_without(name, Path(session.create_tmp())))
    pinned = [lightning] if version else []
    session.install(*tested, "-e", package, *pinned, *TEST, *DEMO)
    if lightning == "lightning":
        # It depends on the other package, but never imports it.
        session.run_install("pip", "uninstall", "--yes", "pytorch-lightning", silent=True)
    session.run("pytest", *TWO_PROCESSES, *session.posargs)


def _constraints_without(name: str, folder: Path) -> str:
    """Write the tested versions of all packages but one; return the path."""
    pins = Path(TESTED[1]).read_text(encoding="utf-8").splitlines()
    kept = folder / "constraints.txt"
    kept.write_text(
        "\n".join(pin for pin in pins if not pin.startswith(f"{name}==")),
        encoding="utf-8",
    )
    return str(kept)


@nox.session
def cases(session: nox.Session) -> None:
    """Run the tests of batches, configurations and loaders of other packages."""
    session.install(*TESTED, "-e", ".[pytorch-lightning]", *TEST, *DEMO, *EXTRAS["cases"])
    session.run("pytest", "-m", "cases", *session.posargs)


@nox.session
def transformers(session: nox.Session) -> None:
    """Run the tests of Trainers of transformers, TRL and PEFT, and of loops of accelerate."""
    session.install(*TESTED, "-e", ".[transformers]", *TEST, *DEMO, *EXTRAS["trainers"])
    files = sorted(map(str, Path("tests").glob("test_transformers*.py")))
    loops = ("tests/test_accelerate.py", "tests/test_library_ranks.py")
    session.run("pytest", *TWO_PROCESSES, *loops, *files, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules of ruff and its format."""
    session.install(*TESTED, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package, and of calls as users write them."""
    session.install(*TESTED, "-e", ".[demo]", "mypy")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages of docs/ as HTML into docs/_build; warnings are errors."""
    session.install(*TESTED, "-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build")


@nox.session
def wheel(session: nox.Session) -> None:
    """Run the default tests against the built wheel."""
    built = session.create_tmp()
    session.install(*TESTED, "build")
    session.run("python", "-m", "build", "--wheel", "--outdir", built)
    (file,) = Path(built).glob("*.whl")
    session.install(*TESTED, f"{file}[test]")
    session.run("pytest", *TWO_PROCESSES, *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure the searches and the cost of tuning, and write the results into their pages."""
    session.install(*TESTED, "-e", ".[benchmarks]")
    page = ("--markdown", "benchmarks/README.md")
    more = ("--figure", "benchmarks/search.png", "--summary", "docs/comparison.md")
    session.run("python", "benchmarks/search.py", *page, *more, *session.posargs)
    session.run("python", "benchmarks/overhead.py", *page)
    session.run("python", "benchmarks/auto_find.py", *page, "--summary", "docs/comparison.md")


@nox.session(python=False)
def measure(session: nox.Session) -> None:
    """Print the size of the code, the length of its call paths and the state of its prose."""
    session.run(sys.executable, "benchmarks/measure.py", *session.posargs)


@nox.session(python=False)
def readme(session: nox.Session) -> None:
    """Renew the quoted demo output and the figure, in the environment that nox runs in."""
    command = (sys.executable, "-m", "autobatch", "demo")
    # Without the lines of progress on standard error
    options = {"env": {"PYTHONIOENCODING": "utf-8"}, "stderr": subprocess.DEVNULL}
    report = session.run(*command, silent=True, **options).strip()
    shutil.copy("autobatch-demo/tradeoff.png", "docs/tradeoff.png")
    first_block = report.partition("\n\n  Effective batch")[0]
    _quote(Path("README.md"), first_block)
    _quote(Path("docs/report.md"), report)


def _quote(page: Path, text: str) -> None:
    """Replace the demo output that a page quotes."""
    begin, end = "<!-- the demo prints -->\n", "<!-- and ends -->\n"
    above, _, rest = page.read_text(encoding="utf-8").partition(begin)
    below = rest.partition(end)[2]
    page.write_text(f"{above}{begin}```text\n{text}\n```\n{end}{below}", encoding="utf-8")
