"""What every benchmark reports, and how it is timed: interleaved repeats, medians, ratios to the plain way."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clifflab.errors import ClifflabError


class UnequalResultsError(ClifflabError):
    """A fast way found something else than the plain way: a bug, and no benchmark."""

    exit_code = 1


@dataclass(frozen=True)
class Record:
    """One method's figures.

    Attributes:
        bench: Name of the benchmark.
        model: What ran.
        dtype: Of its weights.
        method: Which way.
        tokens: Tokens of one trace; of a training the mean over its examples.
        repeats: Timed runs, after an untimed one.
        seconds_median: Median seconds of a run.
        tokens_per_second: Tokens of all traces, once for every swept head and once unchanged, per second; of a
            training, tokens of all its examples.
        ratio_to_plain: Seconds that the plain way needs for the same, over this method's.
        max_abs_diff: Largest difference from the plain way's results.
        peak_memory_bytes: Peak memory during the runs: the device's, or on a CPU this process's.
    """

    bench: str
    model: str
    dtype: str
    method: str
    tokens: int
    repeats: int
    seconds_median: float
    tokens_per_second: float
    ratio_to_plain: float
    max_abs_diff: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, and the highest peak of memory."""

    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def timed(
    methods: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, note: Callable[[str], None]
) -> dict[str, Timing]:
    """Time methods in turns, so that a slow moment of the machine strikes all of them.

    Args:
        methods: What to run, by name; each was run once before.
        repeats: Rounds.
        device: Where the work is done.
        note: Told of every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks = dict.fromkeys(methods, 0)
    for number in range(repeats):
        for name, run in methods.items():
            gc.collect()
            reset_peak(device)
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks[name], peak_memory(device))
        round_ = ", ".join(f"{name} {took[-1]:.2f} s" for name, took in seconds.items())
        note(f"repeat {number + 1} of {repeats}: {round_}")
    return {name: Timing(tuple(took), peaks[name]) for name, took in seconds.items()}


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # elsewhere the peak is the process's highest so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since :func:`reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) << 10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
