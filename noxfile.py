"""Chores: `nox` runs the tests, the linters and the types; `nox -s readme` renews what README.md quotes, `nox -s benchmarks` two benchmarks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typing", "tests"]

# A file of tests is one process's affair, since its tests share what took long to make.
_TWO_AT_A_TIME = ("-n", "2", "--dist", "loadfile")
_TESTED = ("-c", "constraints.txt")
_PICTURE = "docs/tradeoff.png"  # which README.md shows
_EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
# The extra `demo` brings pytorch-lightning, and not every session is to have it.
_TEST = [wish for wish in _EXTRAS["test"] if "[demo]" not in wish]
_DEMO = [wish for wish in _EXTRAS["demo"] if "lightning" not in wish]


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
    """The default tests, with one of the two Lightning packages, with the oldest that is promised, or with none."""
    name, _, version = (lightning or "").partition("==")
    package = f".[{name}]" if name else "."
    tested = _TESTED
    if version:
        tested = ("-c", _without(name, Path(session.create_tmp())))
    wishes = [lightning] if version else []
    session.install(*tested, "-e", package, *wishes, *_TEST, *_DEMO)
    if lightning == "lightning":
        # It asks for the other one, but never imports it.
        session.run("pip", "uninstall", "--yes", "pytorch-lightning", silent=True)
    session.run("pytest", *_TWO_AT_A_TIME, *session.posargs)


def _without(name: str, folder: Path) -> str:
    """The tested versions of everything but one package."""
    pins = Path(_TESTED[1]).read_text(encoding="utf-8").splitlines()
    kept = folder / "constraints.txt"
    kept.write_text(
        "\n".join(pin for pin in pins if not pin.startswith(f"{name}==")),
        encoding="utf-8",
    )
    return str(kept)


@nox.session
def lint(session: nox.Session) -> None:
    """The rules of ruff, and its format."""
    session.install(*_TESTED, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """The types, of the package and of the calls that users write."""
    session.install(*_TESTED, "-e", ".[demo]", "mypy")
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """The default tests against the built wheel, as a user gets it."""
    built = session.create_tmp()
    session.install(*_TESTED, "build")
    session.run("python", "-m", "build", "--wheel", "--outdir", built)
    (file,) = Path(built).glob("*.whl")
    session.install(*_TESTED, f"{file}[test]")
    session.run("pytest", *_TWO_AT_A_TIME, *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """What searches find and cost, and what tuning costs: measured, and written into the pages that tell of it."""
    session.install(*_TESTED, "-e", ".[benchmarks]")
    page = ("--markdown", "benchmarks/README.md")
    more = ("--figure", "benchmarks/search.png", "--summary", "README.md")
    session.run("python", "benchmarks/search.py", *page, *more, *session.posargs)
    session.run("python", "benchmarks/overhead.py", *page)


@nox.session(python=False)
def readme(session: nox.Session) -> None:
    """Renew what README.md quotes, in the environment nox runs in: the demo's report and picture, each module's sentence."""
    command = (sys.executable, "-m", "autobatch", "demo")
    report = session.run(*command, silent=True, env={"PYTHONIOENCODING": "utf-8"})
    shutil.copy("autobatch-demo/tradeoff.png", _PICTURE)
    begin, end = "<!-- the demo prints -->\n", "<!-- and ends -->\n"
    page = Path("README.md")
    above, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, below = rest.partition(end)
    shown = f"{begin}```text\n{report.strip()}\n```\n{end}"
    page.write_text(above + shown + below, encoding="utf-8")
