"""Latency of single calls: every candidate in turn, round after round, with the processor time and energy of each call.

In each round a candidate is called several times in a row. Before that the machine rests and two calls aren't counted,
since the candidate before it may have left threads spinning, as ONNX Runtime does, and caches full of its own.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
REST = 0.1  # seconds before a candidate's turn


@dataclass
class Latency:
    """Seconds of each call, and processor seconds and joules of a call in each round."""

    calls: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)  # the median of each round, for ratios within a round

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def p95(self) -> float:
        """The value that 95 % of the calls don't exceed."""
        ordered = sorted(self.calls)
        return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of a call, over all threads, median of the rounds."""
        return statistics.median(self.cpu)

    @property
    def energy(self) -> float | None:
        """Joules of a call, median of the rounds; None where the machine doesn't tell."""
        return statistics.median(self.joules) if self.joules else None


class EnergyMeter:
    """Joules of all processor packages together, from the counters of RAPL; None where they cannot be read."""

    def __init__(self, folder: Path = POWERCAP):
        self._zones = []
        try:
            # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 is a part of it, and would count twice.
            for zone in sorted(folder.glob("intel-rapl:*")):
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    (zone / "energy_uj").read_text()
                    self._zones.append(zone)
        except OSError:
            self._zones = []

    @property
    def available(self) -> bool:
        return bool(self._zones)

    def read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def joules_since(self, before: list[int]) -> float:
        total = 0
        for zone, start, end in zip(self._zones, before, self.read(), strict=True):
            if end < start:  # the counter went round
                end += int((zone / "max_energy_range_uj").read_text())
            total += end - start
        return total / 1e6


def measure_latencies(
    candidates: dict[str, Callable[[], object]], rounds: int, calls: int = 5, meter: EnergyMeter | None = None
) -> dict[str, Latency]:
    """Latencies of every candidate; each round calls each ``calls`` times, the order of candidates turning."""
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds is {rounds} and calls is {calls}, expected at least 1 of each")
    meter = meter or EnergyMeter()
    results = {name: Latency() for name in candidates}
    for call in candidates.values():
        call(), call()
    names = list(candidates)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                _measure_burst(candidates[name], calls, meter, results[name])
    finally:
        gc.enable()
    return results


def _measure_burst(call: Callable[[], object], calls: int, meter: EnergyMeter, result: Latency) -> None:
    time.sleep(REST)
    call(), call()
    seconds = []
    energy = meter.read()
    cpu = time.process_time()
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    result.cpu.append((time.process_time() - cpu) / calls)
    if meter.available:
        result.joules.append(meter.joules_since(energy) / calls)
    result.calls += seconds
    result.rounds.append(statistics.median(seconds))


def median_ratio(one: Latency, other: Latency) -> float:
    """The median over the rounds of one / other."""
    return statistics.median(x / y for x, y in zip(one.rounds, other.rounds, strict=True))
