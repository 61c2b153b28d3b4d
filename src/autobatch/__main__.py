"""Command line: autobatch demo | probe | show."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory import MemoryProbe

_PACKAGES = ("torch", "lightning", "pytorch-lightning", "nvidia-ml-py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 2 after one sentence on stderr when it could not."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (AutobatchError, ValueError, OSError) as error:
        print(f"autobatch: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autobatch", description="Memory-aware batch sizes for PyTorch Lightning."
    )
    parser.add_argument("--version", action="version", version=version("lightning-autobatch"))
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="tune and train a small real model on this machine, no GPU needed"
    )
    demo.add_argument(
        "--directory",
        type=Path,
        default=Path("autobatch-demo"),
        help="where the report goes; %(default)s unless told otherwise",
    )
    demo.set_defaults(command=_demo)

    probe = commands.add_parser(
        "probe",
        help="what memory autobatch sees: devices, other processes, budget, and why",
    )
    probe.add_argument(
        "--memory-limit",
        default="0.9",
        help='a share such as 0.9, bytes, or text such as "10GiB"; %(default)s unless told otherwise',
    )
    probe.set_defaults(command=_probe)

    show = commands.add_parser("show", help="print a report, or draw it")
    show.add_argument("report", type=Path, help="the JSON file of a report")
    show.add_argument(
        "--figure",
        type=Path,
        help="a file to draw it into as well: .png, .svg or .pdf",
    )
    show.set_defaults(command=_show)
    return parser


def _demo(options: argparse.Namespace) -> None:
    try:
        import matplotlib as mpl  # noqa: F401 -- asked for before anything is printed
        import pytorch_lightning  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise AutobatchError(
            f'The demo needs {error.name}: pip install "lightning-autobatch[demo]".'
        ) from None
    from autobatch import _demo, sinks

    try:
        options.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutobatchError(
            f"--directory={options.directory} can not be made: {error.strerror}."
        ) from None
    began = time.perf_counter()
    result = _demo.run()  # the callback prints the report
    path = options.directory / "autobatch.json"
    drawn = options.directory / "tradeoff.png"
    sinks.json_file(path)(result.report)
    sinks.figure_file(drawn)(result.report)
    print(
        f"\n{result.accuracy:.1%} of the held-out digits right after {result.updates} updates; "
        f"{time.perf_counter() - began:.0f} s in all. The report is in {path}, its picture in {drawn}."
    )


def _probe(options: argparse.Namespace) -> None:
    import torch

    from autobatch._memory import parse_memory_limit
    from autobatch._memory.detect import detect

    limit = parse_memory_limit(_number_or_text(options.memory_limit))
    _print(_surroundings())
    for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        try:
            probe = detect(name, torch.device(name))
            seen = _seen(probe, limit)
        except AutobatchError as error:
            print(f"\n{name}\n  {error}")
        else:
            print(f"\n{probe.name}")
            _print(seen)


def _show(options: argparse.Namespace) -> None:
    from autobatch import sinks
    from autobatch._report import TuningReport

    report = TuningReport.read(options.report)
    if options.figure is not None:
        sinks.figure_file(options.figure)(report)  # what can not be drawn is said first
    sinks.console(report)


def _surroundings() -> dict[str, str]:
    """What a bug report has to say besides memory."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = f"{torch.cuda.device_count()} seen by torch"
    if torch.version.cuda is None:
        devices = "none: this torch is built without CUDA"
    if visible is not None:
        devices += f", with CUDA_VISIBLE_DEVICES={visible!r}"
    return {
        "autobatch": version("lightning-autobatch"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _version_of(package) for package in _PACKAGES},
        "CUDA devices": devices,
        "NVML": _nvml(),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvml() -> str:
    """The driver that NVML speaks for, or why it does not speak."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}"
    except Exception as error:
        return f"none: {error}"


def _seen(probe: MemoryProbe, limit: float) -> dict[str, str]:
    from autobatch._memory import format_bytes, memory_budget

    reading = probe.read()
    budget = max(0, memory_budget(reading, limit))
    shown = limit if isinstance(limit, float) else format_bytes(limit)
    return {
        "total": format_bytes(reading.total),
        "others hold": format_bytes(reading.foreign),
        "this process": format_bytes(reading.reserved),
        "budget": f"{format_bytes(budget)} at a memory_limit of {shown}",
        "read from": probe.source,
        **_processes(probe),
    }


def _processes(probe: MemoryProbe) -> dict[str, str]:
    """Who holds a GPU's memory, as far as NVML tells; in a container these may be the host's numbers, or none."""
    from autobatch._memory import format_bytes
    from autobatch._memory.cuda import CudaProbe

    found = probe.processes() if isinstance(probe, CudaProbe) else None
    if found is None:
        return {}
    told = [
        f"{process}: {'unknown' if held is None else format_bytes(held)}"
        for process, held in sorted(found.items())
    ]
    return {"processes": ", ".join(told) or "none that NVML tells of"}


def _print(rows: dict[str, str]) -> None:
    for label, value in rows.items():
        print(f"  {label:<19}{value}")


def _number_or_text(text: str) -> float | str:
    """What the same words mean in Python: 0.9 is a share, 10737418240 are bytes, the rest is text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
