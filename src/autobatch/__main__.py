"""Command line: autobatch demo | estimate | probe | show."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory import MemoryProbe

_PACKAGES: Final = ("torch", "lightning", "pytorch-lightning", "nvidia-ml-py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error in one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # an error now is told; Python's own flush at exit tells it badly
    except BrokenPipeError:
        _discard_output()
        return 1
    except (AutobatchError, ValueError, OSError) as error:
        from autobatch._report.units import plain

        # Names of files, and of fields in them, may hold escape sequences
        print(f"autobatch: {plain(str(error))}", file=sys.stderr)
        _discard_output()
        return 2
    return 0


def _discard_output() -> None:
    """Let standard output take what is left in its buffer, at exit, if its reader cannot."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autobatch", description="Memory-aware batch sizes for PyTorch."
    )
    parser.add_argument("--version", action="version", version=version("lightning-autobatch"))
    commands = parser.add_subparsers(required=True, metavar="command")

    about = "tune and train a small real model on this machine; no GPU needed"
    demo = commands.add_parser("demo", help=about)
    about = "directory of the report (default: %(default)s)"
    demo.add_argument("--directory", type=Path, default=Path("autobatch-demo"), help=about)
    demo.set_defaults(command=_demo)

    about = "estimate the batch that fits on a GPU that is not here; runs no step"
    estimate = commands.add_parser("estimate", help=about)
    about = "package.module:function that returns model, step and batch, and maybe an optimizer"
    estimate.add_argument("make", help=about)
    about = "a GPU such as H100, or its memory such as 24GiB; may be given several times"
    estimate.add_argument("--device", action="append", help=about)
    about = 'as in a Trainer: "bf16-mixed" (default: %(default)s)'
    estimate.add_argument("--precision", default="32-true", help=about)
    about = 'a share such as 0.9, bytes, or text such as "10GiB" (default: %(default)s)'
    estimate.add_argument("--memory-limit", default="0.9", help=about)
    about = "micro-batches per update (default: %(default)s)"
    estimate.add_argument("--accumulate", type=int, default=1, help=about)
    about = "a report of the same step on a GPU, whose measured peaks correct the estimate"
    estimate.add_argument("--calibrate", type=Path, help=about)
    about = "also estimate the step with other precision, optimizer, checkpointing, accumulation"
    estimate.add_argument("--changes", action="store_true", help=about)
    about = "also write the estimates into this file, as a JSON list; makes its folders"
    estimate.add_argument("--json", type=Path, help=about)
    estimate.set_defaults(command=_estimate)

    about = "print the memory that autobatch sees: devices, other processes, budget"
    probe = commands.add_parser("probe", help=about)
    about = 'a share such as 0.9, bytes, or text such as "10GiB" (default: %(default)s)'
    probe.add_argument("--memory-limit", default="0.9", help=about)
    probe.set_defaults(command=_probe)

    show = commands.add_parser("show", help="print a report, or draw it")
    show.add_argument("report", type=Path, help="the JSON file of a report")
    about = "also draw the report into this file: .png, .svg or .pdf; makes its folders"
    show.add_argument("--figure", type=Path, help=about)
    show.set_defaults(command=_show)
    return parser


def _demo(options: argparse.Namespace) -> None:
    try:
        from autobatch._demo import demo
    except ModuleNotFoundError as error:
        raise AutobatchError(
            f'The demo needs {error.name}: pip install "lightning-autobatch[demo]".'
        ) from None
    demo(options.directory)


def _show(options: argparse.Namespace) -> None:
    from autobatch import sinks
    from autobatch._report import TuningReport

    report = TuningReport.read(options.report)
    if options.figure is not None:
        sinks.figure_file(options.figure)(report)  # first: an error leaves nothing printed
    sinks.console(report)


# estimate


def _estimate(options: argparse.Namespace) -> None:
    from autobatch._estimate import estimate
    from autobatch._report import files
    from autobatch._report.layout import glyphs_for

    made = _made_by(options.make)
    found = []
    for device in options.device or [None]:
        of_device = estimate(
            *made[:3],
            **({"optimizer": made[3]} if made[3:] else {}),
            precision=options.precision,
            device=int(device) if device and device.isdigit() else device,
            memory_limit=_number_or_text(options.memory_limit),
            accumulate=options.accumulate,
            calibrate=options.calibrate,
        )
        changes = of_device.changes() if options.changes else ()
        glyphs = glyphs_for(getattr(sys.stdout, "encoding", None))
        print(of_device.text(glyphs, changes), end="\n\n")
        found.append(json.loads(of_device.to_json(changes)))
    if options.json is not None:
        text = json.dumps(found, indent=2, ensure_ascii=False)
        files.write(options.json, text.encode())


def _made_by(name: str) -> tuple[Any, ...]:
    """Return what a function of the user makes, imported from the current directory too."""
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(f"{name} names a module and no function in it; {_MAKE}.")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import of the user's own module
        raise ValueError(f"{name} cannot be imported ({error}); {_MAKE}.") from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a function ({error}); {_MAKE}.") from error
    finally:
        sys.path.remove("")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{name} cannot be called without arguments ({error}); {_MAKE}.") from None
    made = function()
    if not isinstance(made, tuple) or len(made) not in _PARTS:
        raise ValueError(f"{name} returned {type(made).__name__}; {_MAKE}.")
    return made


_PARTS: Final = (3, 4)
_MAKE: Final = (
    "give package.module:function, which returns a tuple of model, step and batch, and maybe an "
    "optimizer"
)

# probe


def _probe(options: argparse.Namespace) -> None:
    import torch

    from autobatch._memory import parse_memory_limit
    from autobatch._memory.detect import detect

    limit = parse_memory_limit(_number_or_text(options.memory_limit))
    _print(_environment())
    for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        try:
            probe = detect(name, torch.device(name))
            rows = _memory_rows(probe, limit)
        except AutobatchError as error:
            print(f"\n{name}\n  {error}")
        else:
            print(f"\n{probe.name}")
            _print(rows)


def _environment() -> dict[str, str]:
    """Versions and devices, as a bug report needs them."""
    import torch

    from autobatch._subject import version_of

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = f"{torch.cuda.device_count()} seen by torch"
    if torch.version.cuda is None:
        devices = "none: this torch is built without CUDA"
    if visible is not None:
        devices += f", with CUDA_VISIBLE_DEVICES={visible!r}"
    return {
        "autobatch": version("lightning-autobatch"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: version_of(package) for package in _PACKAGES},
        "CUDA devices": devices,
        "NVML": _nvml_driver(),
    }


def _nvml_driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}"
    except Exception as error:
        return f"none: {error}"


def _memory_rows(probe: MemoryProbe, limit: float) -> dict[str, str]:
    from autobatch._memory import format_bytes, memory_budget

    reading = probe.read()
    budget = max(0, memory_budget(reading, limit))
    shown = limit if isinstance(limit, float) else format_bytes(limit)
    return {
        "total": format_bytes(reading.total),
        "other processes": format_bytes(reading.foreign),
        "this process": format_bytes(reading.reserved),
        "budget": f"{format_bytes(budget)} at a memory_limit of {shown}",
        "read from": probe.source,
        **_process_row(probe),
    }


def _process_row(probe: MemoryProbe) -> dict[str, str]:
    """Memory of each process on a GPU; in a container, IDs may be those of the host or missing."""
    from autobatch._memory import format_bytes
    from autobatch._memory.cuda import CudaProbe

    processes = probe.processes() if isinstance(probe, CudaProbe) else None
    if processes is None:
        return {}
    texts = (
        f"{process}: {'unknown' if used is None else format_bytes(used)}"
        for process, used in sorted(processes.items())
    )
    return {"processes": ", ".join(texts) or "none listed by NVML"}


def _print(rows: dict[str, str]) -> None:
    for label, value in rows.items():
        print(f"  {label:<19}{value}")


def _number_or_text(text: str) -> float | str:
    """Read a number as Python does: 0.9 is a share, 10737418240 are bytes, the rest is text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
