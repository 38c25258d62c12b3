"""Rows of several adapters in one batch: each answer is its adapter's own, whoever stands beside it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from adapters_to_serve import PROMPTS, answers_alone, make_adapter
from references import LAYOUTS
from test_serving_engine import Served
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from diablo import BlockLayout, DiabloConfig, block_diagonal_linear_reference
from diablo.ops.rows import add_row_products
from diablo.serving.batch import Ask
from diablo.serving.beside import can_stand_beside
from diablo.serving.sampling import Sampling
from diablo.serving.weights import Weights
from diablo.tuner.targets import resolve_targets
from diablo.web.metrics import Metrics

MOST = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """Adapters that can share a batch, and two that are cut in another way: "u" and "v", by edges through a block."""
    root = tmp_path_factory.mktemp("adapters")
    counts = {"a": 4, "b": 4, "c": 4, "d": 4, "u": 5, "v": 5}
    return {
        name: make_adapter(tiny_model, root / name, seed, count) for seed, (name, count) in enumerate(counts.items())
    }


@pytest.fixture(scope="module")
def alone(tiny_model, folders) -> dict[tuple[str | None, str], str]:
    return answers_alone(tiny_model, folders, MOST)


@pytest.fixture
def served(tiny_model, folders):
    served = Served(tiny_model, folders, rows=6, steps=4)
    yield served
    served.engine.stop()


def groups_together(served: Served) -> set[frozenset[str]]:
    """The names of the adapters that have stood in one forward, as they are found while the engine runs."""
    found: set[frozenset[str]] = set()
    forward = served.engine._forward

    def watched(batch, whose) -> bool:
        found.add(frozenset(row.adapter.name for row in batch.rows if row.adapter is not None))
        return forward(batch, whose)

    served.engine._forward = watched
    return found


@pytest.mark.parametrize("size", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("tokens", [1, 3])
def test_each_row_is_multiplied_by_its_own_blocks(size, tokens):
    layout, generator = BlockLayout(*size), torch.Generator().manual_seed(0)
    x, y, blocks = (
        torch.randn(4, *shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, layout.in_features), (tokens, layout.out_features), layout.blocks_shape)
    )
    expected = torch.stack(
        [block_diagonal_linear_reference(*row, layout, before) for *row, before in zip(x, blocks, y, strict=True)]
    )
    add_row_products(y, x, layout.tiles, [torch.stack(list(map(tile.of_blocks, blocks))) for tile in layout.tiles])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixed", ["auto", "always", "never"])
def test_every_answer_is_that_of_its_adapter_alone_whoever_stands_in_its_batch(tiny_model, folders, alone, mixed):
    served = Served(tiny_model, folders, rows=6, steps=4, mixed=mixed)
    together = groups_together(served)
    # Rows of different lengths join and leave at different forwards, in the middle of turns.
    asks = list(itertools.product((None, *folders), PROMPTS))
    told = {}
    for index, (name, prompt) in enumerate(asks):
        told[name, prompt] = served.submit(name, served.ask(prompt, most=1 + index * 5 % MOST))[0]
        if index == 10:
            served.engine.start()
    for index, (name, prompt) in enumerate(asks):
        pieces = served.pieces(told[name, prompt])
        assert pieces[-1].written <= 1 + index * 5 % MOST
        text = "".join(piece.text for piece in pieces)
        assert alone[name, prompt].startswith(text.rstrip("\ufffd")), (name, prompt)
    counts = served.engine.counts
    if mixed == "never":
        assert max(map(len, together)) == 1
        assert counts.mixed_forwards == 0
    else:
        assert max(map(len, together)) > 2
        # Those that are cut alike stand together, and no others.
        assert all(group <= set("abcd") or group <= set("uv") for group in together)
        assert counts.mixed_rows > counts.mixed_forwards > 0
    metrics = Metrics(served.engine).text().splitlines()
    assert f"diablo_mixed_forwards_total {counts.mixed_forwards}" in metrics
    assert f"diablo_mixed_forward_rows_total {counts.mixed_rows}" in metrics
    served.engine.stop()
    for name, value in served.model.state_dict().items():
        assert torch.equal(value, served.base[name]), name
    assert not any(module._forward_hooks for module in served.model.modules())


def test_a_seed_decides_an_answer_also_in_a_batch_of_several_adapters(served):
    def ask(seed: int) -> Ask:
        return served.ask("The quick", sampling=Sampling(temperature=1.0, top_p=0.9, seed=seed))

    served.engine.start()
    by_themselves = {name: served.text(served.submit(name, ask(7))[0]) for name in "abc"}
    assert served.engine.counts.mixed_forwards == 0
    told = {(name, seed): served.submit(name, ask(seed))[0] for seed in (7, 1) for name in "abc"}
    texts = {key: served.text(queue) for key, queue in told.items()}
    assert served.engine.counts.mixed_forwards > 0
    assert {name: texts[name, 7] for name in "abc"} == by_themselves
    assert len(set(texts.values())) == 6


def test_an_adapter_that_is_replaced_or_removed_in_the_middle_answers_what_was_asked_before(served, folders, alone):
    before = {name: served.submit(name, served.ask(PROMPTS[0]))[0] for name in "abc"}
    served.engine.start()
    first = before["a"].get(timeout=60)
    served.engine.call(lambda: served.adapters.add("a", folders["d"], replace=True)).result(timeout=60)
    served.adapters.remove("b")
    after = {name: served.submit(name, served.ask(PROMPTS[1]))[0] for name in "ac"}
    assert first.text + served.text(before["a"]) == alone["a", PROMPTS[0]]
    assert {name: served.text(before[name]) for name in "bc"} == {name: alone[name, PROMPTS[0]] for name in "bc"}
    assert {name: served.text(told) for name, told in after.items()} == {
        "a": alone["d", PROMPTS[1]],
        "c": alone["c", PROMPTS[1]],
    }
    assert served.engine.counts.mixed_forwards > 0


def test_a_broken_adapter_in_a_batch_of_several_fails_its_own_rows_alone(tiny_model, folders, alone, tmp_path):
    served = Served(tiny_model, {name: folders[name] for name in "ab"}, watched=tmp_path, rows=6)
    broken = shutil.copytree(folders["c"], tmp_path / "broken")
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    served.adapters.look()
    served.adapters.look()
    told = {name: served.submit(name, served.ask(PROMPTS[0]))[0] for name in ("a", "broken", "b")}
    served.engine.start()
    (fault,) = served.pieces(told["broken"])
    assert "cannot be read" in fault.message
    assert {name: served.text(told[name]) for name in "ab"} == {name: alone[name, PROMPTS[0]] for name in "ab"}
    assert served.engine.counts.mixed_forwards > 0
    assert (served.engine.begun, served.engine.waiting, served.engine.kept_tokens) == (0, 0, 0)
    served.engine.stop()


def test_adapters_that_do_not_fit_into_memory_together_share_a_batch_all_the_same(tiny_model, folders, alone):
    served = Served(tiny_model, folders, memory=1, rows=6)
    told = {name: served.submit(name, served.ask(PROMPTS[2]))[0] for name in "abcd"}
    served.engine.start()
    assert {name: served.text(queue) for name, queue in told.items()} == {
        name: alone[name, PROMPTS[2]] for name in "abcd"
    }
    assert served.adapters.in_memory[0] == 1
    # Each was read when it was added and, but for the last one, once more.
    assert served.adapters.loads <= 2 * len(folders)
    served.engine.stop()


def test_rows_that_are_cancelled_in_a_batch_of_several_leave_it(served, alone):
    told, keys = served.submit("a", served.ask(PROMPTS[0], most=200))
    other = served.submit("b", served.ask(PROMPTS[1]))[0]
    served.engine.start()
    told.get(timeout=60)
    served.engine.cancel(keys)
    assert served.text(other) == alone["b", PROMPTS[1]]
    served.engine.call(lambda: None).result(timeout=60)
    assert (served.engine.begun, served.engine.waiting, served.engine.kept_tokens) == (0, 0, 0)


def targets(model, **settings):
    return tuple(resolve_targets(model, DiabloConfig(num_blocks=4, **settings)))


def test_linear_layers_can_have_blocks_beside_them_where_they_see_rows_as_rows(tiny_model):
    llama = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    weights = Weights(llama, "tiny")
    linear = targets(llama, target_modules=["q_proj", "down_proj"])
    assert can_stand_beside(weights, linear)
    assert not can_stand_beside(weights, targets(llama, target_modules=["embed_tokens"]))
    mlp, forward = llama.model.layers[1].mlp, llama.model.layers[1].mlp.forward
    # As the experts of some mixtures do.
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view(x.shape)
    assert not can_stand_beside(weights, linear)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    assert can_stand_beside(Weights(gpt2, "gpt2"), targets(gpt2, target_modules=["c_attn", "c_fc"]))
