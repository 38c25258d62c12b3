"""Metrics in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

from diablo.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """How often values came, by upper bounds in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(_BOUNDS, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of this histogram under a name."""
        total = 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server has done, for Prometheus.

    Args:
        engine: the engine, which counts for itself.

    Attributes:
        requests: the number of answers by path and status.
        limited: the number of requests that exceeded a limit on what a client may take, by what is limited.
        first_token: seconds from a request to its first token.
        whole: seconds from a request to its end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests: Counter[tuple[str, int]] = Counter()
        self.limited: Counter[str] = Counter(requests=0, tokens=0)
        self.first_token = Histogram()
        self.whole = Histogram()

    def text(self) -> str:
        """All metrics as they are now."""
        engine = self._engine
        counts, weights, adapters = engine.counts, engine.weights, engine.adapters
        in_memory, size = adapters.in_memory
        gauges = {
            "diablo_rows_waiting": ("Rows that wait for their first forward.", engine.waiting),
            "diablo_rows_running": ("Rows that are being decoded.", engine.begun),
            "diablo_cache_tokens": ("Tokens for which keys and values are reserved.", engine.kept_tokens),
            "diablo_adapters": ("Adapters that can be asked for.", len(adapters.known())),
            "diablo_adapters_in_memory": ("Adapters whose blocks are in the host's memory.", in_memory),
            "diablo_adapter_memory_bytes": ("Bytes of these blocks.", size),
        }
        counters = {
            "diablo_forwards_total": ("Forwards of the model.", counts.forwards),
            "diablo_forward_rows_total": ("Rows of all forwards.", counts.rows_forwarded),
            "diablo_mixed_forwards_total": ("Forwards of rows of several adapters.", counts.mixed_forwards),
            "diablo_mixed_forward_rows_total": ("Rows of these forwards.", counts.mixed_rows),
            "diablo_prompt_tokens_total": ("Tokens of prompts that were read.", counts.prompt_tokens),
            "diablo_completion_tokens_total": ("Tokens that were written.", counts.written_tokens),
            "diablo_turns_total": ("Turns of adapters.", counts.turns),
            "diablo_switches_total": ("Changes of the adapter in the weights.", weights.switches),
            "diablo_switch_seconds_total": ("Seconds that these took, with reading.", round(counts.switching, 6)),
            "diablo_busy_seconds_total": ("Seconds in which there was something to do.", round(counts.busy, 6)),
            "diablo_adapter_reads_total": ("Adapters that were read from disk.", adapters.loads),
            "diablo_row_faults_total": ("Rows that ended with an error.", counts.faults),
        }
        lines = [*_lines(gauges, "gauge"), *_lines(counters, "counter")]
        lines += ["# HELP diablo_requests_total Answers by path and status.", "# TYPE diablo_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'diablo_requests_total{{path="{path}",status="{status}"}} {count}')
        name = "diablo_rate_limited_total"
        lines += [f"# HELP {name} Requests that exceeded a client's limit.", f"# TYPE {name} counter"]
        lines += [f'{name}{{limit="{what}"}} {count}' for what, count in sorted(self.limited.items())]
        for name, what, histogram in (
            ("diablo_first_token_seconds", "From a request to its first token.", self.first_token),
            ("diablo_request_seconds", "From a request to its end.", self.whole),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, tuple[str, float]], kind: str) -> Iterator[str]:
    for name, (what, value) in values.items():
        yield f"# HELP {name} {what}"
        yield f"# TYPE {name} {kind}"
        yield f"{name} {value}"
