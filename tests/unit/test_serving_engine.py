"""The engine: what each row gets is what its adapter alone writes, whoever else is served meanwhile."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from adapters_to_serve import PROMPTS, answers_alone, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.serving.adapters import Adapters
from diablo.serving.batch import Ask, Batch, Row, check_decoding
from diablo.serving.engine import ClosedError, Engine, Fault, QueueFullError
from diablo.serving.sampling import Sampling
from diablo.serving.scheduling import Limits
from diablo.serving.text import TextStream
from diablo.serving.weights import Weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny_model, root / name, seed, num_blocks)
        for seed, (name, num_blocks) in enumerate({"a": 4, "b": 4, "c": 8}.items())
    }


class Served:
    """An engine over a model and adapters, and what its rows were told."""

    def __init__(
        self, model: Path, folders: dict[str, Path], memory: int = 1 << 30, watched: Path | None = None, **limits: Any
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.weights = Weights(self.model, "tiny")
        self.adapters = Adapters(self.weights, memory, folder=watched)
        self.engine = Engine(self.weights, self.adapters, self.tokenizer, Limits(**limits), queue=64)
        self.base = copy.deepcopy(self.model.state_dict())
        for name, folder in folders.items():
            self.adapters.add(name, folder)

    def ask(self, prompt: str, most: int = 12, **options: object) -> Ask:
        tokens = tuple(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        return Ask(tokens, most, frozenset([self.tokenizer.eos_token_id]), **options)

    def submit(self, name: str | None, ask: Ask) -> tuple[SimpleQueue, list[int]]:
        told: SimpleQueue = SimpleQueue()
        return told, self.engine.submit(None if name is None else self.adapters.get(name), [(ask, told.put)])

    @staticmethod
    def pieces(told: SimpleQueue) -> list:
        """What a row was told, up to its end."""
        found = [told.get(timeout=60)]
        while not isinstance(found[-1], Fault) and found[-1].end is None:
            found.append(told.get(timeout=60))
        return found

    def text(self, told: SimpleQueue) -> str:
        return "".join(piece.text for piece in self.pieces(told))


@pytest.fixture
def served(tiny_model, folders):
    served = Served(tiny_model, folders, rows=3, steps=2, mixed="never")
    yield served
    served.engine.stop()


@pytest.fixture(scope="module")
def alone(tiny_model, folders) -> dict[tuple[str | None, str], str]:
    return answers_alone(tiny_model, folders, most=12)


def test_every_answer_is_that_of_its_adapter_alone_whoever_is_served_beside_it(served, alone):
    told = {(name, prompt): served.submit(name, served.ask(prompt))[0] for prompt in PROMPTS for name in (None, *"abc")}
    served.engine.start()
    assert {key: served.text(queue) for key, queue in told.items()} == alone
    # The adapters do differ, and took turns.
    assert len({alone[name, PROMPTS[0]] for name in (None, *"abc")}) == 4
    assert served.weights.switches > 8
    served.engine.stop()
    for name, value in served.model.state_dict().items():
        assert torch.equal(value, served.base[name]), name


def test_adapters_that_do_not_fit_into_memory_are_read_again(tiny_model, folders, alone):
    served = Served(tiny_model, folders, memory=1)
    assert served.adapters.in_memory[0] == 1
    served.engine.start()
    for prompt in PROMPTS[:2]:
        for name in "abc":
            assert served.text(served.submit(name, served.ask(prompt))[0]) == alone[name, prompt]
    assert served.adapters.loads == 9
    served.engine.stop()


def test_a_row_samples_by_its_seed_and_not_by_its_neighbours(served):
    def ask(seed: int) -> Ask:
        return served.ask("The quick", sampling=Sampling(temperature=1.0, top_p=0.9, seed=seed))

    served.engine.start()
    by_itself = served.text(served.submit("a", ask(7))[0])
    others = [served.submit("a", ask(seed))[0] for seed in (1, 7, 2)]
    texts = [served.text(told) for told in others]
    assert texts[1] == by_itself
    assert len(set(texts)) == 3


def test_logprobs_are_those_of_the_model_with_the_adapter(served, folders):
    served.engine.start()
    ask = served.ask("The quick", most=3, logprobs=2)
    pieces = served.pieces(served.submit("b", ask)[0])
    model, _ = load_adapter(folders["b"], dtype=torch.float32)
    ids = torch.tensor([[*ask.prompt, *(piece.likely.token for piece in pieces)]])
    with torch.no_grad():
        expected = model(ids).logits[0, len(ask.prompt) - 1 : -1].log_softmax(-1)
    for row, piece in zip(expected, pieces, strict=True):
        assert piece.likely.logprob == pytest.approx(float(row[piece.likely.token]), abs=1e-4)
        assert [token for token, _ in piece.likely.top] == row.topk(2).indices.tolist()
        assert piece.likely.top[0][1] == pytest.approx(piece.likely.logprob)


def test_a_row_ends_before_a_stop_string_and_tells_nothing_of_it(served, alone):
    whole = alone["a", PROMPTS[0]]
    stop = whole[5:8]
    served.engine.start()
    pieces = served.pieces(served.submit("a", served.ask(PROMPTS[0], stop_strings=(stop, "never there")))[0])
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].end == "stop"


def test_a_row_that_is_cancelled_leaves_its_place_and_is_told_nothing(served, alone):
    told, keys = served.submit("a", served.ask(PROMPTS[0], most=200))
    served.engine.start()
    told.get(timeout=60)
    served.engine.cancel(keys)
    assert served.text(served.submit("b", served.ask(PROMPTS[1]))[0]) == alone["b", PROMPTS[1]]
    assert (served.engine.begun, served.engine.waiting, served.engine.kept_tokens) == (0, 0, 0)


def test_a_broken_adapter_fails_its_own_rows_alone(tiny_model, folders, alone, tmp_path):
    served = Served(tiny_model, folders, watched=tmp_path)
    broken = shutil.copytree(folders["a"], tmp_path / "broken")
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="cannot be read"):
        served.adapters.add("broken", broken)
    # One of a watched folder is read when it is first asked for.
    assert [served.adapters.look() for _ in range(2)][1][0][0].name == "broken"
    told = served.submit("broken", served.ask("x"))[0]
    good = served.submit("a", served.ask(PROMPTS[0]))[0]
    served.engine.start()
    (fault,) = served.pieces(told)
    assert fault.kind == "adapter"
    assert "cannot be read" in fault.message
    assert served.text(good) == alone["a", PROMPTS[0]]
    served.engine.stop()


def test_adapters_come_change_and_go_with_the_files_of_a_folder(tiny_model, folders, alone, tmp_path):
    served = Served(tiny_model, {"fixed": folders["c"]}, watched=tmp_path)
    served.engine.start()

    def look() -> tuple[list[str], list[str]]:
        came, gone = served.adapters.look()
        return [adapter.name for adapter in came], gone

    shutil.copytree(folders["a"], tmp_path / "one")
    shutil.copytree(folders["a"], tmp_path / "fixed")
    (tmp_path / "no-adapter").mkdir()
    # In the first look it could still be under way, and a name that was given by hand stays what it is.
    assert look() == ([], [])
    assert look() == (["one"], [])
    assert look() == ([], [])
    assert served.text(served.submit("one", served.ask(PROMPTS[0]))[0]) == alone["a", PROMPTS[0]]
    assert served.text(served.submit("fixed", served.ask(PROMPTS[0]))[0]) == alone["c", PROMPTS[0]]
    shutil.copytree(folders["b"], tmp_path / "one", dirs_exist_ok=True)
    assert [look(), look()] == [([], []), (["one"], [])]
    assert served.text(served.submit("one", served.ask(PROMPTS[0]))[0]) == alone["b", PROMPTS[0]]
    shutil.rmtree(tmp_path / "one")
    assert look() == ([], ["one"])
    assert [adapter.name for adapter in served.adapters.known()] == ["fixed"]
    served.engine.stop()


def test_an_adapter_that_is_replaced_answers_later_requests_alone(served, folders, alone):
    before = served.submit("a", served.ask(PROMPTS[0]))[0]
    served.adapters.add("a", folders["b"], replace=True)
    after = served.submit("a", served.ask(PROMPTS[0]))[0]
    served.engine.start()
    assert served.text(before) == alone["a", PROMPTS[0]]
    assert served.text(after) == alone["b", PROMPTS[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "is one of LORA, and diablo serve takes DiaBlo's alone"),
        ({"bias": "all"}, "has bias, and diablo serve takes adapters of blocks alone"),
        ({"target_modules": ["q_proj", "nothing"]}, "does not fit 'tiny'"),
        ({"num_blocks": 8}, "should be"),
        ({"target_modules": ["q_proj"]}, "too many"),
        ({"base_digest": "float32:00"}, "was made for base weights that differ"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(served, folders, tmp_path, change, message):
    wrong = shutil.copytree(folders["a"], tmp_path / "wrong")
    settings = json.loads((wrong / "adapter_config.json").read_text())
    if "base_digest" not in change:
        settings["base_digest"] = None
    (wrong / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        served.adapters.add("wrong", wrong)


def test_a_full_queue_and_a_closed_engine_take_nothing(served):
    for _ in range(64):
        served.submit("a", served.ask("x"))
    with pytest.raises(QueueFullError):
        served.submit("a", served.ask("x"))
    served.engine.close()
    with pytest.raises(ClosedError):
        served.submit("b", served.ask("x"))
    served.engine.start()
    served.engine.stop()
    assert served.engine.waiting == 0


def test_rows_that_are_left_at_the_end_are_told_so(served):
    told = served.submit("a", served.ask("x", most=10_000))[0]
    served.engine.start()
    told.get(timeout=60)
    served.engine.stop()
    assert served.pieces(told)[-1] == Fault("The server has ended.", "closed")


def test_rows_join_and_leave_a_batch_without_changing_the_others(served):
    """The longest row leaves first, so that the padding of the others is cut."""
    served.weights.put(served.adapters.place(served.adapters.get("a")))
    most = dict(zip(PROMPTS, (2, 9, 5, 7, 9, 3), strict=True))
    asks = {prompt: served.ask(prompt, most=most[prompt], logprobs=0) for prompt in PROMPTS}

    def decoded(groups: list[list[str]]) -> dict[str, list[float]]:
        batch, tokens = Batch(served.model), {prompt: [] for group in groups for prompt in group}
        with torch.no_grad():
            while groups or batch.rows:
                if groups:
                    pieces = batch.join([Row(prompt, asks[prompt], served.tokenizer) for prompt in groups.pop(0)])
                else:
                    pieces = batch.step()
                for row, piece in pieces:
                    tokens[row.key] += [row.last, piece.likely.logprob]
                width = batch._mask.shape[1]
                assert not batch.rows or width == max(len(row.ask.prompt) + row.written - 1 for row in batch.rows)
        return tokens

    by_themselves = {prompt: decoded([[prompt]])[prompt] for prompt in PROMPTS}
    together = decoded([list(PROMPTS[:3]), list(PROMPTS[3:5]), [PROMPTS[5]]])
    for prompt in PROMPTS:
        assert together[prompt] == pytest.approx(by_themselves[prompt], abs=1e-5)


def test_text_comes_in_whole_characters_and_as_it_is_decoded_at_once(served):
    for text in ("naïve €5 — 日本語 👍🏽 ok", " leading and trailing ", "\n\nlines\n"):
        tokens = served.tokenizer(text, add_special_tokens=False).input_ids
        stream = TextStream(served.tokenizer, [served.tokenizer.bos_token_id])
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.end() == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_is_found_across_tokens_and_what_only_begins_like_it_is_told(served):
    tokens = served.tokenizer("aab aabc", add_special_tokens=False).input_ids
    stream = TextStream(served.tokenizer, [served.tokenizer.bos_token_id], ["aabc", "zz"])
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    assert "".join(pieces) == "aab "
    assert stream.is_stopped


def test_a_model_that_keeps_more_than_attention_is_refused():
    config = MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="keeps something else than keys and values"):
        check_decoding(MambaForCausalLM(config).eval(), "mamba")
