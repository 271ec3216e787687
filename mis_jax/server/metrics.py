"""The metrics at /metrics, in Prometheus' format."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from mis_jax.inference.async_engine import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
CLIENT_GONE = 499  # the status under which a request is counted whose client went away
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one server; the gauges look at its service."""

    def __init__(self, service: Service):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, open files, processor time

        def gauge(name: str, text: str, value) -> None:
            Gauge(name, text, registry=registry).set_function(value)

        gauge(
            "mis_jax_requests_running", "Requests that the engine is answering.",
            lambda: service.running,
        )  # fmt: skip
        gauge(
            "mis_jax_requests_waiting", "Requests accepted and not yet running.",
            lambda: service.waiting,
        )  # fmt: skip
        self._requests = Counter(
            "mis_jax_requests", "Chat completions by HTTP status.", ["status"], registry=registry
        )
        self._prompt = Counter(
            "mis_jax_prompt_tokens", "Tokens of prompts, images included.", registry=registry
        )
        self._generated = Counter(
            "mis_jax_generated_tokens", "Tokens of answers.", registry=registry
        )
        self._latency = Histogram(
            "mis_jax_request_seconds", "From arrival to the end of an answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "mis_jax_first_token_seconds", "From arrival to the first piece of a streamed answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip

    def prompt(self, tokens: int) -> None:
        """A prompt was accepted."""
        self._prompt.inc(tokens)

    def generated(self, tokens: int) -> None:
        """Count newly generated tokens."""
        self._generated.inc(tokens)

    def first_piece(self, seconds: float) -> None:
        """Observe the time to an answer's first piece."""
        self._first.observe(seconds)

    def ended(self, status: int, seconds: float) -> None:
        """A request ended; only those with an answer count in the latency."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._latency.observe(seconds)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
