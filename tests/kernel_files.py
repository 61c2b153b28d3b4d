"""Files of the Linux kernel about memory, as a made-up tree; amounts in KiB."""

from __future__ import annotations


def machine(root, *, total=1000, available=600, anonymous=50, shared=10, groups="", files=()):
    """A made-up tree of kernel files; amounts in KiB, as the kernel writes them there."""
    contents = {
        "proc/meminfo": f"MemTotal: {total} kB\nMemFree: 5 kB\nMemAvailable:    {available} kB\n",
        "proc/self/status": f"VmRSS:\t900 kB\nRssAnon:\t {anonymous} kB\nRssFile:\t 840 kB\nRssShmem:\t {shared} kB\n",
        "proc/self/cgroup": groups,
        **dict(files),
    }
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def group(path, *, limit, usage, cache=0):
    """A control group of version 2, in KiB."""
    directory = f"sys/fs/cgroup/{path}".rstrip("/")
    limit = limit if limit == "max" else limit * 1024
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{usage * 1024}\n",
        f"{directory}/memory.stat": f"anon 1\ninactive_file {cache * 1024}\nactive_file 77\n",
    }


def old_group(path, *, limit, usage, cache=0):
    """A control group of version 1, in KiB."""
    directory = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit * 1024}\n",
        f"{directory}/memory.usage_in_bytes": f"{usage * 1024}\n",
        f"{directory}/memory.stat": f"inactive_file 99\ntotal_inactive_file {cache * 1024}\n",
    }
