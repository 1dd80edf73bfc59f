"""Prometheus text on a port. Values are read when they are scraped, so a step costs nothing."""

import gc
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator

_HELP = {
    "step_seconds": "Seconds of a step: quantiles of the last 1000 timed ones.",
    "steps": "Steps so far.",
    "tokens": "Tokens so far.",
    "seconds": "Seconds that all steps took together.",
    "mfu": "Operations of a step as executed / (its seconds x the peak measured for their dtype).",
    "mfu_dense_equivalent": "The same with every pair of a sparse attention counted; may exceed 1.",
    "flops": "Floating-point operations of a step as executed.",
    "flops_dense_equivalent": "Floating-point operations of a step with every pair of a sparse attention counted.",
    "peak_bytes": "Parameters and what the process has added at most since the monitor began.",
    "memory_ratio": "peak_bytes / bytes of the parameters.",
    "density": "Kept pairs / pairs that the causal mask allows.",
    "half_share": "Share of the gradient elements that are summed in 16 bits.",
    "communication_bytes": "Bytes that this rank gave to collectives and sent in the last step.",
    "overlapped_share": "Share of the last step's communication that went on beside computation.",
    "tokens_per_second": "Tokens of the last step / its seconds.",
    "loss": "Loss of the last step.",
}
# Of what every monitor shows by itself, beside the figures of its last step.
OWN = (
    "steps", "steps_total", "tokens_total", "seconds_total", "step_seconds", "peak_bytes", "memory_ratio",
)  # fmt: skip
_servers: dict[tuple[str, int], "_Server"] = {}
_lock = threading.Lock()


def metric_of(figure: str) -> str:
    """The name under which a figure is shown. Two figures may have the same one."""
    return "torch_sluice_" + re.sub(r"\W", "_", figure, flags=re.ASCII)


class _Server:
    """One port, and the monitors that are shown on it."""

    def __init__(self, host: str, port: int):
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ImportError(
                f"metrics_port is {port}, which needs the package prometheus-client: "
                "pip install 'torch-sluice[monitor]'"
            ) from error
        self.readers: dict[str, weakref.WeakMethod] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._http, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"metrics_port is {port} on metrics_host {host!r}, where nothing can listen: "
                f"{getattr(error, 'strerror', None) or error}; choose another port, or 0 for any free one"
            ) from error
        self.host, self.port, self._process = host, self._http.server_address[1], os.getpid()

    def describe(self) -> list:
        """Names are not known before the first step, and a registry that asks should not wait for one."""
        return []

    def collect(self) -> Iterator:
        """Called by prometheus_client at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, object] = {}
        for name, reference in list(self.readers.items()):
            read = reference()
            if read is None:  # of a monitor that was dropped and never closed
                continue
            counters, gauges = read()
            for kind, values in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
                for (figure, *label), value in values.items():
                    metric = metric_of(figure)
                    if metric not in families:
                        text = _HELP.get(figure, f"The figure {figure} of the last step.")
                        labels = ["monitor", *(["quantile"] if label else [])]
                        families[metric] = kind(metric, text, labels=labels)
                    families[metric].add_metric([name, *label], value)
        yield from families.values()

    def close(self) -> None:
        if self._process == os.getpid():  # the thread that answers is not in a forked process, and can't be waited for
            self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=5)


class Prometheus:
    """A monitor's place on a port. Monitors of a process that name the same port share it, told apart by their names.

    Args:
        port: 0: any free one; ``self.port`` says which.
        host: address to listen on.
        name: value of the label ``monitor``.
        read: a method, called at a scrape; gives counters and gauges, each as {(name,) or (name, quantile): number}.
            It does not keep its object alive.

    Raises:
        ValueError: the port can't be had, or another monitor on it has the name.
        ImportError: the package prometheus-client is missing.
    """

    def __init__(self, port: int, host: str, name: str, read: Callable[[], tuple[dict, dict]]):
        with _lock:
            server = _servers.get((host, port)) or _Server(host, port)
            if name in server.readers:
                gc.collect()  # perhaps of a training that failed, of which nothing is left
            if name in server.readers and server.readers[name]() is not None:
                raise ValueError(
                    f"name is {name!r}, which another monitor on port {port} has; give each its own, as name='teacher'"
                )
            _servers[host, server.port] = server
            self._reader = server.readers[name] = weakref.WeakMethod(read)
        self._server, self._name, self.port = server, name, server.port

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Nothing to do: a scrape reads."""

    def close(self) -> None:
        with _lock:
            if self._server.readers.get(self._name) is not self._reader:
                return  # another monitor has taken the name since
            del self._server.readers[self._name]
            if not self._server.readers:
                del _servers[self._server.host, self._server.port]
                self._server.close()
