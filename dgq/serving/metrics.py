"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from .drawing import Drawer

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server."""

    def __init__(self, drawer: Drawer) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("dgq_model", "The model that draws.", registry=self.registry).info(
            {"model": drawer.id, "quantization": drawer.model.label}
        )
        self._answers = Counter(
            "dgq_answers", "Answers by route and HTTP status.", ["route", "status"], registry=self.registry
        )
        self._pictures = Histogram(
            "dgq_picture_seconds", "Time to draw a picture.", buckets=SECONDS, registry=self.registry
        )
        drawing = Gauge("dgq_drawing", "Orders in hand, 0 or 1.", registry=self.registry)
        drawing.set_function(lambda: float(drawer.current is not None))
        waiting = Gauge("dgq_waiting", "Orders that wait.", registry=self.registry)
        waiting.set_function(lambda: float(drawer.queued))
        drawer.on_picture = self._pictures.observe

    def told(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
