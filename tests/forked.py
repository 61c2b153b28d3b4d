"""Run a program in a fork of this process: it does not import torch and Lightning again."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings


def run_forked(path, *arguments, **options):
    """Run a Python file as a program, and return its exit status and output."""
    with forked(path, *arguments, **options) as finish:
        return finish()


@contextlib.contextmanager
def forked(path, *arguments, cwd=None, env=None):
    """Start a Python file as a program; yield a function that waits for it. It ends with the block."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of the threads of pytest-xdist
            process = os.fork()
        if process == 0:
            os.environ.update(env or {})
            _run_and_exit([str(path), *map(str, arguments)], cwd, out.fileno(), err.fileno())
        is_running = True

        def finish():
            nonlocal is_running
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            is_running = False
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
            return subprocess.CompletedProcess([path, *arguments], status, *texts)

        try:
            yield finish
        finally:
            if is_running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _run_and_exit(argv, cwd, out, err):
    """Become the program: pytest is never returned to."""
    status = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(argv[0]))  # noqa: PTH120
        if cwd is not None:
            os.chdir(cwd)
        warnings.resetwarnings()
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
