"""Processes of one job, as torchrun starts them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import socket
import warnings
from pathlib import Path

import torch

from forked import forked


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def as_by_torchrun(rank, port, size=2):
    """Return the environment of one of the processes; slow tests use torchrun itself."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def on_two_ranks(program, where, *arguments):
    return on_ranks(2, program, where, *arguments)


def on_ranks(size, program, where, *arguments):
    """Run a program in so many processes, and return the results that each rank has saved."""
    outputs_of_ranks(size, program, where, *arguments)
    return results(where, size)


def outputs_of_ranks(size, program, *arguments):
    """Run a program in so many processes, and return the output of each."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        ranks = [
            stack.enter_context(forked(program, *arguments, env=as_by_torchrun(rank, port, size)))
            for rank in range(size)
        ]
        ended = [finish() for finish in ranks]
    assert {each.returncode for each in ended} == {0}, [each.stderr for each in ended]
    return [each.stdout for each in ended]


def results(directory, size=2):
    return [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def save_results(directory, names, run):
    """In one of the processes: run each case, and save the results of this rank."""
    warnings.simplefilter("ignore")
    importlib.import_module("torch._dynamo")  # or else the first step imports it
    gc.freeze()  # keep imported objects out of the garbage collections of a search
    for package in ("pytorch_lightning", "lightning.pytorch", "autobatch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    torch.save({name: run(name) for name in names}, Path(directory) / f"rank-{rank}.pt")
