"""Run a program in a fork of this process: it does not import torch and Lightning again."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings


def run_forked(path, *arguments, cwd=None):
    """Run a Python file as a program, and return its exit status and output."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of the threads of pytest-xdist
            process = os.fork()
        if process == 0:
            _run_and_exit([str(path), *map(str, arguments)], cwd, out.fileno(), err.fileno())
        status = _exit_status(process)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(
            [path, *arguments], status, out.read().decode(), err.read().decode()
        )


def _exit_status(process):
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise


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
