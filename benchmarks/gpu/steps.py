"""A training step of a language model: eager, compiled and as a CUDA graph, and whether it can be repeated exactly."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu.measuring import timed
from benchmarks.gpu.models import COMPILED, EAGER, GRAPH, Training, copies, give_back, load_language
from benchmarks.gpu.recorder import NotThereError, Recorder
from benchmarks.gpu.sizes import Language, Sizes
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE
from diablo.models.loading import count_parameters

CHECKED_STEPS = 3


class Bench:
    """A model, with the frozen model that every method is compared with.

    Args:
        language: the model and its batch.
        sizes: how it is measured.
        device: where it runs.
    """

    def __init__(self, language: Language, sizes: Sizes, device: torch.device) -> None:
        self.language, self.sizes, self.device = language, sizes, device
        self.base, self.weights = load_language(language, device)
        self._frozen: dict[str, Training] = {}
        self._frozen_seconds: dict[str, float] = {}
        self._updates: dict[str, list[torch.Tensor]] = {}

    def measure(self, method: str, mode: str) -> dict[str, Any]:
        """Check whether a method's steps repeat to the bit, and time one in turn with the frozen model's in that mode.

        Raises:
            NotThereError: the mode needs a GPU.
        """
        if mode == GRAPH and self.device.type != "cuda":
            raise NotThereError("not applicable without a GPU")
        if mode == COMPILED:
            self.release()
            counters.clear()
        training = self._trained_twice(method, mode)
        alike = training.pop("alike")
        run: Training = training.pop("run")
        # Compiled models are timed one by one: with several, each call would first check the code that was compiled for
        # the others.
        alone = method == FROZEN or mode == COMPILED
        if method == FROZEN:
            self._frozen = {mode: run}
        figures = timed(run.step, None if alone else self._frozen_step(mode), self.sizes, self.device)
        if method == FROZEN:
            self._frozen_seconds[mode] = figures["seconds"]
        elif alone:
            reference = self._frozen_seconds.get(mode)
            figures["ratio_to_frozen"] = figures["seconds"] / reference if reference else None
        if mode == COMPILED:
            # If all is well, the forward of a layer is one graph without breaks.
            figures["graphs"] = counters["stats"]["unique_graphs"]
            figures["graph_breaks"] = sum(counters["graph_break"].values())
        return {
            "weights": self.weights,
            "parameters": count_parameters(run.adapted)[0],
            **figures,
            "peak_bytes": run.peak,
            "repeats_to_the_bit": alike,
            **training,
        }

    def release(self) -> None:
        """Free the frozen models."""
        self._frozen.clear()
        give_back(self.device)

    def _frozen_step(self, mode: str) -> Any:
        if mode not in self._frozen:
            self.release()
            self._frozen[mode] = Training(self.base, FROZEN, mode, self.language, self.device)
        return self._frozen[mode].step

    def _trained_twice(self, method: str, mode: str) -> dict[str, Any]:
        """Train a few steps twice from one seed. Returns whether the adapters are equal, and the second training.

        On a GPU, the backward of attention forms its sums in no fixed order. So where the two differ, both are repeated
        with torch's deterministic algorithms. If they still differ, the method itself is the cause.
        """
        if method == FROZEN:
            return {"run": Training(self.base, FROZEN, mode, self.language, self.device), "alike": None}
        first, _ = self._steps(method, mode)
        second, run = self._steps(method, mode, keep=True)
        assert run is not None
        found: dict[str, Any] = {"run": run, "alike": equal(first, second)}
        if not found["alike"] and mode != COMPILED:
            with deterministic():
                again = [self._steps(method, mode)[0] for _ in range(2)]
            found["repeats_with_deterministic_algorithms"] = equal(*again)
        update = [end - start for end, start in zip(second, run.start, strict=True)]
        if mode == EAGER:
            self._updates[method] = [values.cpu() for values in update]
        elif method in self._updates:
            found["distance_to_eager"] = distance(update, self._updates[method])
        return found

    def _steps(self, method: str, mode: str, keep: bool = False) -> tuple[list[torch.Tensor], Training | None]:
        """Train a few steps. Returns the trained values, and the training itself where ``keep`` is set."""
        training = Training(self.base, method, mode, self.language, self.device)
        for _ in range(CHECKED_STEPS):
            training.step()
        found = copies(training.trained)
        if keep:
            return found, training
        del training
        give_back(self.device)
        return found, None


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether all values are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def distance(update: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The norm of the difference of two updates, relative to the norm of the expected update."""
    pairs = [(values.double().cpu(), wanted.double()) for values, wanted in zip(update, expected, strict=True)]
    off = sum(float((values - wanted).square().sum()) for values, wanted in pairs)
    return (off / sum(float(wanted.square().sum()) for _, wanted in pairs)) ** 0.5


@contextmanager
def deterministic() -> Generator[None]:
    """A context in which torch uses deterministic algorithms, where it has them."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Steps:
    """The models, for all parts that time steps.

    Args:
        sizes: how large everything is.
        device: where.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self._benches: dict[str, Bench] = {}

    def bench(self, language: Language) -> Bench:
        """The bench of a model. It is made once."""
        if language.name not in self._benches:
            self._benches[language.name] = Bench(language, self.sizes, self.device)
        return self._benches[language.name]

    def measure(self, recorder: Recorder, methods: tuple[str, ...], modes: tuple[str, ...]) -> None:
        """Measure a row for every model, mode and method."""
        for language in self.sizes.languages:
            for mode in modes:
                for method in methods:
                    recorder.row(
                        partial(lambda *args: self.bench(args[0]).measure(*args[1:]), language, method, mode),
                        model=language.name,
                        mode=mode,
                        method=method,
                    )
            if language.name in self._benches:
                self._benches[language.name].release()


def steps(recorder: Recorder, found: Steps) -> None:
    """The part ``steps``: the most important methods, eager and as CUDA graphs."""
    found.measure(recorder, (FROZEN, IN_PLACE, BESIDE, "LoRA", "MiSS"), (EAGER, GRAPH))


def compiled(recorder: Recorder, found: Steps) -> None:
    """The part ``compiled``: the most important methods under torch.compile, which takes long to begin."""
    found.measure(recorder, (FROZEN, IN_PLACE, "LoRA", BESIDE), (COMPILED,))


def others(recorder: Recorder, found: Steps) -> None:
    """The part ``others``: the slower methods of other libraries, eager and as CUDA graphs."""
    found.measure(recorder, ("OFT", "DoRA"), (EAGER, GRAPH))
