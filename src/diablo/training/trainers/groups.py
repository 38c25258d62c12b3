"""GRPO: the model completes prompts while it is trained, and completions that got more reward become likelier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from diablo.data.encoding import EncodedRow
from diablo.data.rows import Row
from diablo.errors import shortened
from diablo.models.compiling import as_if_not_compiled
from diablo.planning.plan import Plan
from diablo.records.log import LOGGER
from diablo.records.progress import TokenMeter
from diablo.scoring.generation import evaluating, generate, stops_of, texts_behind
from diablo.scoring.rewards import Reward, Rewards
from diablo.training import saving
from diablo.training.averaging import with_values
from diablo.training.engines import Tensors, trained_parameters
from diablo.training.handover import changed_weights
from diablo.training.tracking import Tracked
from diablo.training.trainers.base import RunTrainer, number_of

_COMPLETIONS = "completions.safetensors"
"""In a checkpoint, the completions that the next step trains on again."""


class TrackedGRPOConfig(Tracked, GRPOConfig):
    """TRL's arguments, with the recipe beside them."""


class GroupTrainer(RunTrainer, GRPOTrainer):  # pyrefly: ignore[inconsistent-inheritance]
    """TRL's trainer of groups of completions; see :class:`diablo.training.trainers.base.RunTrainer` for its arguments.

    Prompts are the tokens that ``diablo generate`` would start from, and completions end where its would.
    """

    config_class = TrackedGRPOConfig
    # Of the class beside it.
    _step: int
    _buffered_inputs: Any
    ref_model: Any
    vllm_generation: Any

    def __init__(self, *, data_collator: Any, **options: Any) -> None:
        plan: Plan = options["plan"]
        assert plan.rewards is not None
        self.rewards: Rewards = plan.rewards
        self._asked: Sequence[Mapping[str, Any]] = []
        self._texts: list[str] = []
        self._extremes: list[str] = []
        # TRL makes the batches itself.
        super().__init__(reward_funcs=[self._as_trl_calls_it(reward) for reward in self.rewards.each], **options)
        self.stop_at_newline = _has_answers_of_one_line(plan)
        self.eos_token_ids = _stops(plan)
        objective: Any = plan.recipe.objective
        if objective.vllm is None:
            self.generation_config.eos_token_id = self.eos_token_ids
        else:
            # TRL would send all weights of the model in each step.
            self.vllm_generation._iter_named_params = lambda: changed_weights(options["model"])
        # TRL would add a copy of the adapter for the reference, or take the base model for it.
        self.beta = options["args"].beta = objective.beta
        self.ref_model = _AT_START if self.beta else None
        trained = trained_parameters(options["model"]) if self.beta else {}
        self.start: Tensors = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        objective: Any = plan.recipe.objective
        assert plan.rewards is not None
        return {
            "num_generations": objective.generations,
            "max_completion_length": plan.recipe.max_new_tokens,
            "temperature": objective.temperature,
            "top_p": objective.top_p,
            "top_k": objective.top_k,
            "loss_type": objective.loss,
            "scale_rewards": objective.scale_rewards,
            "num_iterations": objective.iterations,
            "epsilon": 0.2 if objective.epsilon is None else objective.epsilon,
            "epsilon_high": objective.epsilon_high,
            "reward_weights": [reward.weight for reward in plan.rewards.each],
            # A completion's likelihood is to be the one that it was sampled with.
            "disable_dropout": True,
            **({} if objective.vllm is None else _settings_of_vllm(plan)),
        }

    @staticmethod
    def columns(plan: Plan) -> list[dict[str, Any]]:
        """What a step takes of each prompt. TRL shows the text alone, and to nobody."""
        return [
            {"prompt": plan.encoder.tokenizer.decode(row.input_ids), "prompt_ids": row.input_ids, "index": index}
            for index, row in enumerate(plan.train)
        ]

    @staticmethod
    def collator(plan: Plan, meter: TokenMeter) -> None:
        """Nothing: TRL makes the batches itself."""

    def held_out_figures(self) -> dict[str, float]:
        """The mean ``reward`` of the likeliest completions of the held-out prompts, and of each reward."""
        plan, encoder = self.plan, self.plan.encoder
        texts = generate(
            self.model,
            encoder,
            [row.input_ids for row in plan.held_out],
            max_new_tokens=plan.recipe.max_new_tokens,
            stop_at_newline=self.stop_at_newline,
            batch_size=plan.recipe.evaluation.batch_size,
        )
        tokens = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [_row(encoded) for encoded in plan.held_out]
        return self.rewards.total([self.rewards.written(*each) for each in zip(rows, texts, tokens, strict=True)])

    def _as_trl_calls_it(self, reward: Reward) -> Callable[..., list[float]]:
        """A reward as a function that TRL calls, which has its name."""

        def give(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
            rows = [_row(self.plan.train[each]) for each in index]
            stops = set(self.eos_token_ids)
            tokens = [ids[:-1] if ids and ids[-1] in stops else ids for ids in completion_ids]
            return reward([self.rewards.written(*each) for each in zip(rows, self._texts, tokens, strict=True)])

        give.__name__ = reward.name
        return give

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        meter = self.progress.meter
        # The clock starts with the first completion.
        meter.count(0, 0)
        self._asked = inputs
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        tokens = int(output["prompt_mask"].sum() + output["completion_mask"].sum())
        meter.count(tokens, output["prompt_mask"].numel() + output["completion_mask"].numel())
        order = output["advantages"].argsort().tolist()
        self._extremes = [
            f"{advantage:+.2f} row {number_of(self.plan.train[inputs[index]['index']])} {shortened(self._texts[index])}"
            for index, advantage in ((each, output["advantages"][each].item()) for each in (order[-1], order[0]))
        ]
        # On the host, where the rows are named.
        return {**output, "rows": torch.tensor([each["index"] for each in inputs])}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the best and the worst of the last completions, so that one sees what is rewarded."""
        super().log(logs, start_time)
        # A step may go on with completions that were shown already.
        if "loss" in logs and self._extremes:
            LOGGER.info("step %d: advantage %s", self.state.global_step, "; and ".join(self._extremes))
            self._extremes = []

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(each["prompt_ids"]) for each in self._asked], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any, **options: Any) -> Any:
        # A whole generation is one pass: blocks are written into the weights once and taken out once.
        with evaluating(self.model), as_if_not_compiled():
            tokens, likelihoods = super()._generate_single_turn(prompt_ids, *arguments, **options)
        self._texts = texts_behind(self.plan.encoder.tokenizer, prompt_ids, tokens)
        return tokens, likelihoods

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if model is not _AT_START:
            return super()._get_per_token_logps_and_entropies(model, *arguments, **options)
        with with_values(self.model, self.start):
            return super()._get_per_token_logps_and_entropies(self.model, *arguments, **options)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the completions, over all that make a step."""
        numbers = list(dict.fromkeys(number_of(self.plan.train[index]) for index in inputs["rows"].tolist()))
        bare = self.accelerator.unwrap_model(model)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def again() -> object:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            return bare(input_ids=ids, attention_mask=mask, use_cache=False)

        return self.finite.check(bare, loss, self.state.global_step + 1, numbers, again)

    def take_over(self, checkpoint: Path, last_step: int) -> bool:
        """See :meth:`RunTrainer.take_over`; and take the completions that the next step trains on again."""
        is_over = super().take_over(checkpoint, last_step)
        if is_over:
            return True
        accumulation = self.args.gradient_accumulation_steps
        self._step = saving.about(checkpoint)["steps"] * accumulation
        kept = saving.read_tensors(checkpoint / _COMPLETIONS)
        batches: list[dict[str, torch.Tensor]] = [{} for _ in range(accumulation)] if kept else []
        for name, values in kept.items():
            place, _, key = name.partition(".")
            batches[int(place)][key] = values if key == "rows" else values.to(self.args.device)
        self._buffered_inputs = batches or None
        return False

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "steps": self.state.global_step, "rewards": self.rewards.record()}

    def _write_own(self, staged: Path) -> None:
        if self.state.global_step % self.num_iterations:
            tensors = {
                # Several share their memory, which the file's format does not have.
                f"{place}.{key}": values.clone()
                for place, batch in enumerate(self._buffered_inputs)
                for key, values in batch.items()
            }
            saving.write_tensors(staged / _COMPLETIONS, tensors)


def _has_answers_of_one_line(plan: Plan) -> bool:
    assert plan.rewards is not None
    return all(plan.rewards.asked_by(_row(encoded)).is_of_one_line for encoded in plan.train)


def _stops(plan: Plan) -> list[int]:
    """The tokens that end a completion."""
    return sorted(stops_of(plan.encoder, stop_at_newline=_has_answers_of_one_line(plan)))


def _settings_of_vllm(plan: Plan) -> dict[str, Any]:
    vllm = plan.recipe.objective.vllm  # pyrefly: ignore[missing-attribute]
    assert vllm is not None
    return {
        "use_vllm": True,
        "vllm_mode": "server" if vllm.server else "colocate",
        "vllm_server_base_url": vllm.server,
        "vllm_gpu_memory_utilization": vllm.gpu_memory or 0.3,
        "vllm_max_model_length": plan.recipe.training.max_length,
        "generation_kwargs": {"stop_token_ids": _stops(plan)},
    }


class _AtStart:
    """Stands where TRL has a model for the reference: the model itself, with the values that it starts from."""


_AT_START = _AtStart()


def _row(encoded: EncodedRow) -> Row:
    assert encoded.row is not None
    return encoded.row
