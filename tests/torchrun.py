"""Two processes of one job, as torchrun starts them."""

from __future__ import annotations

import contextlib
import socket

import torch

from forked import forked


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def as_by_torchrun(rank, port):
    """Return the environment of one of two processes; slow tests use torchrun itself."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def on_two_ranks(program, where, *arguments):
    """Run a program in two processes, and return the results that each rank has saved."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        ranks = [
            stack.enter_context(forked(program, where, *arguments, env=as_by_torchrun(rank, port)))
            for rank in (0, 1)
        ]
        ended = [finish() for finish in ranks]
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    return results(where)


def results(directory):
    return [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
