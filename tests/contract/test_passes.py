"""Between passes every base weight is the base's, to the bit; in a pass the blocks of all layers are in the weights."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import itertools
import pickle
import sys
import threading
import weakref
from importlib.util import find_spec

import pytest
import test_in_place
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model, inject_adapter_in_model
from test_experts import fill as fill_parameters
from test_in_place import BY_NAME, assert_near, assert_same_gradients, gradients, inputs, loss_of, trainable, twins
from tiny_models import assert_same_bits, base_weights, fill, llama, tuner_layers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from diablo import DiabloConfig
from diablo.ops import sweep
from diablo.tuner import openers, passes, plans
from diablo.tuner.plans import Plan

every_kind_of_checkpointing = pytest.mark.parametrize("use_reentrant", [True, False])


@pytest.fixture
def sweeps(monkeypatch):
    """Counts the sweeps over the weights."""
    counts = {"write": 0, "restore": 0}
    for name in counts:
        original = getattr(sweep.DiagonalSweep, name)

        def counted(self, name=name, original=original):
            counts[name] += 1
            original(self)

        monkeypatch.setattr(sweep.DiagonalSweep, name, counted)
    return counts


def with_other(model, seed=5):
    """The model with a second adapter, and the first one active."""
    settings = next(iter(model.peft_config.values()))
    model.add_adapter("other", DiabloConfig(**{**settings.to_dict(), "num_blocks": 3}))
    fill(model, "other", seed=seed)
    model.set_adapter("default")
    return model


# Every line of the tests of training in place.

CHANGES_WEIGHTS = {
    "test_unloading_after_training_leaves_every_bit_of_the_base": "takes the layers away",
    "test_evaluating_saving_copying_disabling_and_switching_in_mid_training": "merges at its end",
    "test_in_bf16_the_output_is_that_of_the_merged_model_to_the_bit": "merges",
    "test_a_merge_between_forward_and_backward_is_an_error": "merges",
    "test_a_model_that_is_cast_in_mid_training_casts_its_own_weights": "casts",
    "test_bf16_training_does_not_stall_from_rounding": "casts, and takes 400 steps",
}


def cases():
    for name, test in vars(test_in_place).items():
        parameters = inspect.signature(test).parameters if name.startswith("test_") else ()
        if not name.startswith("test_") or name in CHANGES_WEIGHTS or "twins(" not in inspect.getsource(test):
            continue
        if "compiled" in name or "under_the_compiler" in name or "moves_under" in name or "replaced" in str(parameters):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        skips = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "skipif"]
        for values in itertools.product(*(mark.args[1] for mark in marks)):
            arguments = {}
            for mark, value in zip(marks, values, strict=True):
                names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
                arguments |= dict(zip(map(str.strip, names), value if len(names) > 1 else [value], strict=True))
            if set(arguments) == set(parameters):
                label = f"{name}-{'-'.join(map(str, arguments.values()))}"
                yield pytest.param(test, arguments, id=label, marks=skips)


@pytest.mark.parametrize(("test", "arguments"), list(cases()))
def test_after_every_line_of_the_tests_of_training_in_place_the_base_weights_are_the_bases(
    test, arguments, monkeypatch
):
    watched, lines = [], 0

    def watching(*args, **settings):
        models = twins(*args, **settings)
        watched.extend((layer.base_layer, base_of(layer)) for model in models for layer in tuner_layers(model).values())
        return models

    def look(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != test_in_place.__file__:
            return None
        for base_layer, before in watched:
            lines += 1
            for name, value in before.items():
                now = base_layer._parameters[name].detach()
                # Replaced weights are not the base's.
                assert now.shape != value.shape or torch.equal(now.view(torch.uint8), value.view(torch.uint8)), (
                    f"before line {frame.f_lineno}"
                )
        return look

    monkeypatch.setattr(test_in_place, "twins", watching)
    before = sys.gettrace()
    sys.settrace(look)
    try:
        test(**arguments)
    finally:
        sys.settrace(before)
    assert lines > 10, "nothing was watched"


def base_of(layer):
    return {name: weight.detach().clone() for name, weight in layer.base_layer._parameters.items() if name == "weight"}


def test_training_changes_adapters_alone_and_no_reader_of_the_parameters_sees_blocks():
    model = BY_NAME["llama"].adapted(torch.bfloat16, in_place=True).train()
    before = base_weights(model)
    average = copy.deepcopy(before)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for seed in range(3):
        loss_of(model, inputs(model, seed)).backward()
        assert_same_bits(base_weights(model), before)
        optimizer.step()
        # A moving average of what stands in the weights, as a trainer keeps it.
        for name, value in base_weights(model).items():
            average[name].lerp_(value, 0.5)
    assert_same_bits(average, before)


# In a pass.


def test_in_a_pass_the_blocks_of_all_layers_stand_in_the_weights():
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    layers = list(tuner_layers(model).values())
    before = [layer.base_layer.weight.detach().clone() for layer in layers]
    seen = {"forward": [], "backward": []}

    def look(when):
        seen[when].append(
            all(
                torch.equal(layer.base_layer.weight - own, layer.get_delta_weight("default") + own - own)
                or torch.allclose(layer.base_layer.weight - own, layer.get_delta_weight("default"), atol=1e-6)
                for layer, own in zip(layers, before, strict=True)
            )
        )

    layers[0].register_forward_hook(lambda *_: look("forward"))
    layers[0].register_full_backward_hook(lambda *_: look("backward"))
    model.enable_input_require_grads()
    loss_of(model, inputs(model, 1)).backward()
    assert seen == {"forward": [True], "backward": [True]}
    for layer, own in zip(layers, before, strict=True):
        assert torch.equal(layer.base_layer.weight, own)


def test_a_step_writes_and_restores_twice_whatever_the_number_of_layers(sweeps, monkeypatch):
    calls = []
    for name in ("_foreach_copy_", "_foreach_add_"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, name=name, f=original: calls.append(name) or f(*args))
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    loss_of(model, inputs(model, 1)).backward()
    assert sweeps == {"write": 2, "restore": 2}
    assert calls == ["_foreach_copy_", "_foreach_add_", "_foreach_copy_"] * 2


@every_kind_of_checkpointing
def test_a_recomputation_adds_no_sweep(sweeps, use_reentrant):
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss_of(model, inputs(model, 1)).backward()
    assert sweeps == {"write": 2, "restore": 2}


@pytest.mark.parametrize(
    "called", ["the whole model", "the model inside", "the decoder", "one of its layers", "a target"]
)
def test_whichever_module_is_called_opens_one_pass(sweeps, called):
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    inner = model.get_base_model()
    hidden = torch.randn(2, 7, 16)
    if called == "the whole model":
        model(inputs(model, 1))
    elif called == "the model inside":
        inner(inputs(model, 1))
    elif called == "the decoder":
        inner.model(inputs(model, 1))
    elif called == "one of its layers":
        inner.model.layers[0](hidden, position_embeddings=inner.model.rotary_emb(hidden, torch.arange(7)[None]))
    else:
        next(iter(tuner_layers(model).values()))(hidden)
    assert sweeps == {"write": 1, "restore": 1}


def test_a_model_with_injected_layers_opens_passes_too(sweeps):
    model = inject_adapter_in_model(DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj"]), llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    assert sweeps == {"write": 2, "restore": 2}
    assert_same_bits(dict(model.state_dict()), before)


def test_a_generation_is_one_pass(sweeps):
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True)
    with torch.no_grad():
        model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=5, min_new_tokens=5)
    assert sweeps == {"write": 1, "restore": 1}


def test_a_plan_is_made_once_and_anew_where_a_weight_moved(monkeypatch):
    made = []
    original = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *args: made.append(1) or original(self, *args))
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for seed in range(3):
        loss_of(model, inputs(model, seed)).backward()
        optimizer.step()
        with torch.no_grad(), model.disable_adapter():
            model(inputs(model, seed))
    assert len(made) == 2
    layer = next(iter(tuner_layers(model).values()))
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    loss_of(model, inputs(model, 1))
    assert len(made) == 3


# What ends a pass.


class Stop(BaseException):
    """Like Ctrl-C: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["hook", "layer"])
def test_a_forward_that_fails_leaves_the_base_weights(error, where):
    model, beside = twins("llama")
    before = base_weights(model)

    def fail(*_):
        raise error("stop")

    handle = (
        list(tuner_layers(model).values())[-1].register_forward_hook(fail)
        if where == "hook"
        else model.get_base_model().model.norm.register_forward_pre_hook(fail)
    )
    try:
        model(inputs(model, 1))
    except error:
        # Not only after the handler: an interactive session keeps the frames of the error.
        assert_same_bits(base_weights(model), before)
    else:
        pytest.fail("nothing was raised")
    handle.remove()
    for each in (model, beside):
        loss_of(each, inputs(each, 1)).backward()
    assert_same_gradients(model, beside)


@pytest.mark.parametrize("how", ["plain", "nested", "later"])
def test_a_backward_that_fails_leaves_the_base_weights(how):
    model, beside = twins("llama")
    before = base_weights(model)
    if how == "nested":
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    armed = True

    def fail(gradient):
        if armed:
            raise RuntimeError("out of memory")
        return gradient

    # The gradient of what an early layer gives comes late in a backward.
    layers[0].mlp.register_forward_hook(
        lambda module, args, y: y.register_hook(fail) and None if y.requires_grad else None
    )
    gc.disable()
    try:
        loss = loss_of(model, inputs(model, 1))
        if how == "later":
            loss = loss + loss_of(model, inputs(model, 2))
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        assert_same_bits(base_weights(model), before)
    finally:
        gc.enable()
    armed = False
    del loss
    model.zero_grad()
    for each in (model, beside):
        loss_of(each, inputs(each, 1)).backward()
    assert_same_gradients(model, beside)
    assert_same_bits(base_weights(model), before)


def test_what_is_written_to_a_base_weight_between_passes_stays():
    model, beside = twins("llama")
    for each in (model, beside):
        for layer in tuner_layers(each).values():
            loss_of(each, inputs(each, 1)).backward()
            # As code of users does, where no version counter sees it.
            layer.base_layer.weight.data.mul_(0.5)
        each.zero_grad()
        loss_of(each, inputs(each, 1)).backward()
    assert_same_gradients(model, beside)
    assert_same_bits(base_weights(model), base_weights(beside))


def test_a_graph_of_somebody_else_that_has_kept_a_base_weight_is_an_error_and_not_silently_wrong():
    model, _ = twins("ragged")
    layer = next(iter(tuner_layers(model).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = nn.functional.linear(x, layer.base_layer.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + loss_of(model, inputs(model, 1))).backward()


# A pass knows its adapters.


def two_losses(model):
    loss = loss_of(model, inputs(model, 1))
    model.base_model.set_adapter("other")
    for layer in tuner_layers(model).values():
        # PEFT freezes what is not active, and autograd would drop its gradient.
        layer.requires_grad_(True)
        layer.base_layer.requires_grad_(False)
    return loss + loss_of(model, inputs(model, 2))


@pytest.mark.parametrize("in_place", [True, False])
@every_kind_of_checkpointing
def test_a_recomputation_uses_the_adapters_of_its_forward(in_place, use_reentrant):
    expected, model = (with_other(BY_NAME["llama"].adapted(torch.float32, in_place=in_place).train()) for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (expected, model):
        each.enable_input_require_grads()
        two_losses(each).backward()
    names = {name.split(".")[-1] for name in gradients(expected)}
    assert names == {"default", "other"}
    assert_same_gradients(model, expected)


class ReturnsItsInputToo(nn.Module):
    """Three squares after a linear layer, recomputed, and the input as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(lambda x: self.lin(x).square().square().square(), x, use_reentrant=False), x


def test_a_module_that_returns_what_another_pass_gave_does_not_take_its_recomputation_over():
    torch.manual_seed(0)
    base = ReturnsItsInputToo()
    grads = []
    for in_place in (True, False):
        config = DiabloConfig(num_blocks=2, target_modules=["lin"], in_place=in_place)
        model = with_other(fill(get_peft_model(copy.deepcopy(base), config))).train()
        model.base_model.set_adapter("default")
        x = torch.full((3, 8), 0.5, requires_grad=True)
        first, _ = model(x)
        model.base_model.set_adapter("other")
        second, again = model(first)
        (second.sum() + again.sum()).backward()
        grads.append(x.grad)
    dense = copy.deepcopy(base)
    x = torch.full((3, 8), 0.5, requires_grad=True)
    y = x
    total = 0
    for name in ("default", "other"):
        weight = dense.lin.weight.detach() + tuner_layers(model)["lin"].get_delta_weight(name).detach()
        total = total + (y.sum() if name == "other" else 0)
        y = nn.functional.linear(y, weight, dense.lin.bias).square().square().square()
    (total + y.sum()).backward()
    for grad in grads:
        assert (grad - x.grad).norm() <= 1e-5 * x.grad.norm()


@pytest.mark.parametrize("settings", [{"in_place": True}, {"in_place": False}, {"diablo_dropout": 0.1}], ids=str)
def test_a_recomputation_while_adapters_are_switched_off_has_those_of_its_forward(settings):
    expected, model = (BY_NAME["llama"].adapted(torch.float32, **settings).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (expected, model):
        each.enable_input_require_grads()
        torch.manual_seed(0)
        loss = loss_of(each, inputs(each, 1))
        each.base_model.disable_adapter_layers()
        for layer in tuner_layers(each).values():
            layer.diablo_blocks.requires_grad_(True)
        loss.backward()
    assert_same_gradients(model, expected)


def test_a_recomputation_that_cannot_know_its_adapters_is_an_error():
    model = with_other(BY_NAME["ragged"].adapted(torch.float32, in_place=True).train())
    layer = next(iter(tuner_layers(model).values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    first = checkpoint(layer, x, use_reentrant=True)
    model.base_model.set_adapter("other")
    second = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="whether its forward had the adapters default or other"):
        (first + second).sum().backward()
    # The next backward is another one.
    checkpoint(layer, x, use_reentrant=True).sum().backward()


# Copies, classes, threads.


def test_the_modules_keep_their_classes_names_and_signatures_and_are_plain_again_after_unloading():
    base = llama()
    plain = {name: type(module) for name, module in base.named_modules()}
    model = BY_NAME["llama"].adapted(torch.float32)
    inner = model.get_base_model()
    assert isinstance(inner, LlamaForCausalLM)
    assert type(inner).__name__ == "LlamaForCausalLM"
    assert type(inner).__module__ == LlamaForCausalLM.__module__
    assert inspect.signature(inner.forward) == inspect.signature(base.forward)
    assert {name: type(module) for name, module in model.unload().named_modules()} == plain


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_passes_of_its_own(how, sweeps):
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    before = base_weights(model)
    twin = how(model)
    passes = {layer.passes for each in (model, twin) for layer in tuner_layers(each).values()}
    assert len(passes) == 2
    loss_of(twin, inputs(twin, 1)).backward()
    assert sweeps == {"write": 2, "restore": 2}
    assert not gradients(model)
    assert_same_bits(base_weights(twin), before)


def test_a_model_is_freed_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
        loss_of(model, inputs(model, 1)).backward()
        weights = [weakref.ref(layer.base_layer.weight) for layer in tuner_layers(model).values()]
        del model
        assert [weight() for weight in weights] == [None] * len(weights)
    finally:
        gc.enable()


def test_a_backward_outlives_its_model():
    model, beside = twins("llama")
    blocks = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = loss_of(model, inputs(model, 1))
    loss_of(beside, inputs(beside, 1)).backward()
    del model
    loss.backward()
    for name, gradient in gradients(beside).items():
        assert (blocks[name].grad - gradient).norm() <= 1e-5 * gradient.norm()


def in_threads(*functions):
    """Runs functions at the same time; what they raise."""
    raised = []

    def run(function):
        try:
            function()
        except RuntimeError as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


@pytest.mark.parametrize("trained", [True, False])
def test_two_threads_may_run_a_model_with_the_same_adapters_and_not_with_others_in_its_weights(trained):
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True)
    before = base_weights(model)
    if not trained:
        model.requires_grad_(False)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(30)

    handle = model.get_base_model().model.norm.register_forward_hook(wait)
    ids = inputs(model, 1)
    results = {}

    def first():
        with torch.no_grad():
            results["first"] = model(ids).logits

    def second():
        assert inside.wait(30)
        handle.remove()
        try:
            with torch.no_grad():
                results["second"] = model(ids).logits
                with model.disable_adapter():
                    results["disabled"] = model(ids).logits
        finally:
            go_on.set()

    raised = in_threads(first, second)
    assert torch.equal(results["first"], results["second"])
    assert_same_bits(base_weights(model), before)
    if trained:
        assert [str(error).partition(":")[0] for error in raised] == [
            "Two threads run one model that needs different values in its weights for each"
        ]
    else:
        assert not raised
        assert not torch.equal(results["first"], results["disabled"])


def test_data_parallel_is_refused():
    model = BY_NAME["mlp"].adapted(torch.float32)
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        next(iter(tuner_layers(model).values()))._replicate_for_data_parallel()


def test_merging_in_the_middle_of_a_forward_is_refused():
    model = BY_NAME["mlp"].adapted(torch.float32, in_place=True)
    before = base_weights(model)
    layer = next(iter(tuner_layers(model).values()))
    handle = layer.register_forward_hook(lambda *_: model.merge_adapter())
    with pytest.raises(RuntimeError, match="in the middle of a forward or a backward"):
        model(inputs(model, 1))
    handle.remove()
    assert_same_bits(base_weights(model), before)


def test_rows_with_adapters_of_their_own_while_an_adapter_is_trained():
    model, beside = (with_other(each).eval() for each in twins("llama"))
    ids = inputs(model, 1)
    names = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        got, expected = (each(input_ids=ids, adapter_names=names).logits for each in (model, beside))
    assert torch.allclose(got, expected, atol=1e-6)


def test_inference_mode_before_training():
    model, beside = twins("llama")
    for each in (model, beside):
        with torch.inference_mode():
            each(inputs(each, 1))
        loss_of(each, inputs(each, 1)).backward()
    assert_same_gradients(model, beside)


def test_a_loss_within_a_pass_that_is_open_already():
    """As a trainer does that wraps a whole step."""
    model, beside = twins("llama")
    for each in (model, beside):
        with contextlib.ExitStack() as stack:
            stack.enter_context(each._enable_peft_forward_hooks())
            loss_of(each, inputs(each, 1)).backward()
    assert_same_gradients(model, beside)
    assert_same_bits(base_weights(model), base_weights(beside))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "conv1d"])
def test_with_triton_kernels_a_pass_is_the_same_to_the_bit(name, dtype, monkeypatch):
    """In Triton's interpreter; a GPU's passes are written by the same kernels."""
    results = []
    for kernels in ("0", "cpu"):
        monkeypatch.setenv("DIABLO_KERNELS", kernels)
        model = BY_NAME[name].adapted(dtype, in_place=True).train()
        before = base_weights(model)
        loss_of(model, inputs(model, 1)).backward()
        assert_same_bits(base_weights(model), before)
        plans = {
            type(table) for layer in tuner_layers(model).values() for table in layer.passes.plan([layer]).sweep._tables
        }
        assert plans == {sweep._KernelTable if kernels == "cpu" else sweep._TorchTable}
        results.append(gradients(model))
        # Autograd is told of what a kernel writes.
        layer = next(iter(tuner_layers(model).values()))
        x = torch.randn(3, layer.in_features, dtype=dtype, requires_grad=True)
        y = nn.functional.linear(x, layer._weight("weight"))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (y.sum() + loss_of(model, inputs(model, 1))).backward()
    assert_same_bits(*results)


# Passes that overlap, are interrupted, or begin in the middle of another.


def step_is_right(model, beside, seed=1):
    for each in (model, beside):
        each.zero_grad()
        loss_of(each, inputs(each, seed)).backward()
    assert_same_gradients(model, beside)


class Interrupted:
    """Raises KeyboardInterrupt before one of the lines of the pass, counted from the first that runs."""

    files = (passes.__file__, plans.__file__, openers.__file__, sweep.__file__)

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


# Python says of an interruption in a finalizer that it was ignored.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_edited", [False, True])
def test_ctrl_c_before_any_line_of_a_pass_leaves_the_base_weights(is_edited):
    model, beside = twins("mlp")
    model.zero_grad()
    step_is_right(model, beside)
    if is_edited:
        # What is restored must not be what was saved in the pass before.
        for each in (model, beside):
            for layer in tuner_layers(each).values():
                layer.base_layer.weight.data.mul_(1.5)
    before = base_weights(model)
    lines, was_traced = 0, sys.gettrace()
    while True:
        lines += 1
        interrupted = Interrupted(lines)
        sys.settrace(interrupted)
        try:
            loss_of(model, inputs(model, 1)).backward()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(was_traced)
        if interrupted.left > 0:
            break
        # An interruption of the finalizer itself is reported and not raised; the next pass mends what it left.
        if not interrupted_in_a_finalizer(model):
            assert_same_bits(base_weights(model), before)
        step_is_right(model, beside)
        assert_same_bits(base_weights(model), before)
    assert lines > 100


def interrupted_in_a_finalizer(model):
    return next(iter(tuner_layers(model).values())).passes.written is not None


def test_a_second_adapter_on_an_earlier_layer_while_a_graph_is_alive():
    models = []
    for in_place in (True, False):
        config = DiabloConfig(num_blocks=4, target_modules=["down_proj"], in_place=in_place)
        model = fill(get_peft_model(llama(), config)).train()
        before = base_weights(model)
        loss = loss_of(model, inputs(model, 1))
        model.add_adapter(
            "other", DiabloConfig(num_blocks=4, target_modules=["q_proj", "down_proj"], in_place=in_place)
        )
        model.set_adapter("default")
        (loss + loss_of(model, inputs(model, 2))).backward()
        assert_same_bits(base_weights(model), before)
        models.append(model)
    assert_same_gradients(*models)


def test_models_that_share_frozen_weights_have_them_beside():
    models = []
    for in_place in ("auto", False):
        first = llama()
        second = copy.deepcopy(first)
        for own, other in zip(first.modules(), second.modules(), strict=True):
            if isinstance(own, nn.Linear):
                other.weight = own.weight
        pair = [
            fill(
                get_peft_model(
                    base, DiabloConfig(num_blocks=n, target_modules=["q_proj", "up_proj"], in_place=in_place)
                )
            )
            for base, n in ((first, 4), (second, 2))
        ]
        before = base_weights(pair[0])
        losses = [loss_of(model.train(), inputs(model, 1)) for model in pair]
        (losses[0] + losses[1]).backward()
        assert_same_bits(base_weights(pair[0]), before)
        models.append(pair)
    for got, expected in zip(*models, strict=True):
        assert_same_gradients(got, expected)


def test_switching_adapters_in_the_middle_of_a_forward_is_followed():
    logits = []
    for in_place in (True, False):
        model = with_other(BY_NAME["llama"].adapted(torch.float32, in_place=in_place).eval())
        inner = model.get_base_model()
        inner.model.register_forward_pre_hook(lambda *_, model=model: model.base_model.set_adapter("other"))
        with torch.no_grad():
            logits.append(model(inputs(model, 1)).logits)
            logits.append(model(inputs(model, 1)).logits)
    for other in logits[1:]:
        assert_near(logits[0], other)


def test_the_base_model_may_be_asked_in_the_middle_of_a_generation():
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).eval()
    plain, ids, seen = llama().eval(), torch.tensor([[1, 2, 3]]), []

    def ask(ids, scores):
        with model.disable_adapter():
            seen.append((ids, model.get_base_model()(ids).logits))
        return scores

    with torch.no_grad():
        generated = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, logits_processor=[ask])
        expected = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4)
        assert torch.equal(generated, expected)
        for ids, logits in seen:
            assert torch.allclose(logits, plain(ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    "action",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda m: m.state_dict(),
        lambda m: m.load_state_dict({}, strict=False),
    ],
    ids=["copy", "pickle", "state dict", "loading"],
)
def test_what_takes_weights_for_the_bases_in_the_middle_of_a_forward_is_an_error(action):
    model, beside = twins("llama")
    before = base_weights(model)
    handle = tuner_layers(model)["model.layers.1.mlp.up_proj"].register_forward_hook(lambda *_: action(model) and None)
    with pytest.raises(RuntimeError, match="in the middle of a forward or a backward"):
        model(inputs(model, 1))
    handle.remove()
    assert_same_bits(base_weights(model), before)
    step_is_right(model, beside)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = nn.Linear(8, 8)
        self.heads = nn.ModuleList([head, head])

    def forward(self, x):
        return self.heads[0](x) + 2 * self.heads[1](x)


def test_a_module_that_has_two_places_in_a_model_stands_beside():
    base = Twice()
    plain = copy.deepcopy(base)
    model = fill(get_peft_model(base, DiabloConfig(num_blocks=2, target_modules=["heads.0"]))).train()
    x = torch.randn(3, 8)
    got = model(x)
    layer = next(iter(tuner_layers(model).values()))
    update = x @ layer.get_delta_weight("default").T
    assert torch.allclose(got, plain(x) + update, atol=1e-6)
    assert not layer.passes.plan([layer]).held


class Mixing(nn.Module):
    """Parameters that are read by what it returns and by a loss that it keeps aside."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(12, 8) * 0.5), nn.Parameter(torch.randn(8, 12) * 0.5)

    def forward(self, x):
        y = torch.tanh(x @ self.w.T) @ self.v.T
        self.aside = torch.tanh(y @ self.w.T).square().sum()
        return y


def mixing(in_place):
    torch.manual_seed(0)
    model = nn.Sequential(Mixing())
    config = DiabloConfig(num_blocks=4, target_parameters=["0.w", "0.v"], in_place=in_place)
    return fill_parameters(get_peft_model(model, config)).train()


def test_a_loss_that_leaves_adapted_parameters_aside_of_the_result():
    models = [mixing(in_place) for in_place in (True, False)]
    grads = []
    for model in models:
        x = torch.full((3, 8), 0.3, requires_grad=True)
        (model(x).sum() + model.get_base_model()[0].get_base_layer().aside).backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-6)
    assert_same_gradients(*models)


def test_second_derivatives_through_adapted_parameters_in_place_are_refused():
    x = torch.full((3, 8), 0.3, requires_grad=True)
    with pytest.raises(RuntimeError, match="set in_place=False"):
        torch.autograd.grad(mixing(True)(x).square().sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(mixing(False)(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def test_merging_between_a_forward_and_its_backward_beside_is_an_error():
    model = BY_NAME["ragged"].adapted(torch.float32, in_place=False).train()
    loss = loss_of(model, inputs(model, 1))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_forward_with_other_blocks_in_the_middle_of_another_threads_backward_is_an_error():
    model, beside = twins("llama")
    raised = []

    def forward_of_the_base():
        with torch.no_grad(), model.disable_adapter():
            model(inputs(model, 1))

    def in_the_middle(gradient):
        if not raised:
            raised.extend(in_threads(forward_of_the_base))
            for layer in tuner_layers(model).values():
                layer.enable_adapters(True)
        return gradient

    layers = model.get_base_model().model.layers
    layers[1].mlp.register_forward_hook(lambda module, args, y: y.register_hook(in_the_middle) and None)
    loss_of(model, inputs(model, 1)).backward()
    assert [str(error).partition(":")[0] for error in raised] == [
        "Two threads run one model that needs different values in its weights for each"
    ]
    loss_of(beside, inputs(beside, 1)).backward()
    assert_same_gradients(model, beside)


def test_contexts_that_are_left_in_another_order_than_entered():
    model, beside = twins("llama")
    before = base_weights(model)
    first, second = model._enable_peft_forward_hooks(), model._enable_peft_forward_hooks()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert_same_bits(base_weights(model), before)
    step_is_right(model, beside)
    assert_same_bits(base_weights(model), before)


@pytest.mark.parametrize("change", ["a forward of its own", "another class", "dropout"])
def test_what_changes_after_the_first_pass_is_seen_in_the_next(change):
    model = BY_NAME["mlp"].adapted(torch.float32).train()
    model(inputs(model, 1))
    layer = tuner_layers(model)["up"]
    calls = []

    class Other(nn.Linear):
        def forward(self, x):
            calls.append(change)
            return super().forward(x)

    if change == "a forward of its own":
        own = layer.base_layer.forward
        layer.base_layer.forward = lambda x: calls.append(change) or own(x)
    elif change == "another class":
        layer.base_layer.__class__ = Other
    else:
        layer.diablo_dropout["default"] = nn.Dropout(0.5)
        layer.diablo_dropout["default"].register_forward_hook(lambda *_: calls.append(change))
        layer.diablo_in_place["default"] = False
    model(inputs(model, 1))
    assert calls == [change]


def test_a_hook_of_accelerate_that_has_kept_a_forward_goes_on_after_unloading():
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    expected = llama().train()(inputs(model, 1)).logits
    inner = model.get_base_model()
    add_hook_to_module(inner.model, ModelHook())
    model(inputs(model, 1)).logits.sum().backward()
    assert torch.allclose(model.unload()(inputs(model, 1)).logits, expected, atol=1e-6)


def test_a_merge_that_is_refused_leaves_the_passes_as_they_were(sweeps):
    base = llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    model = fill(get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["q_proj", "lm_head"])))
    with pytest.raises(ValueError, match="shares its weight"):
        model.merge_and_unload()
    model(inputs(model, 1))
    assert sweeps == {"write": 1, "restore": 1}


def test_layers_that_are_taken_out_of_a_model_are_freed():
    model = BY_NAME["llama"].adapted(torch.float32, in_place=True).train()
    model(inputs(model, 1))
    gc.collect()
    gone = weakref.ref(model.get_base_model().model.layers[1].self_attn)
    del model.get_base_model().model.layers[1]
    model(inputs(model, 1))
    assert gone() is None


def test_a_slice_of_an_adapted_sequence_and_a_new_object_of_its_class_run():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model = fill(get_peft_model(base, DiabloConfig(num_blocks=2, target_modules=["0", "1"]))).train()
    root, x = model.get_base_model(), torch.randn(3, 8)
    assert torch.allclose(root[:2](x), root[1](root[0](x)), atol=1e-6)
    assert torch.equal(type(root)(nn.Identity())(x), x)


def test_classes_that_are_adapted_in_part_and_those_that_cannot_have_subclasses_are_left_alone(sweeps):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def __init_subclass__(cls, *, reason) -> None:
            """As registries ask for."""

        def forward(self, x):
            return self.lin(x)

    adapted = get_peft_model(Net(), DiabloConfig(num_blocks=2, target_modules=["lin"]))
    adapted.get_base_model()(torch.randn(3, 8)).sum().backward()
    assert type(adapted.get_base_model()) is Net
    assert sweeps["restore"] == sweeps["write"]
    model = get_peft_model(llama(), DiabloConfig(num_blocks=4, target_modules=["q_proj"], layers_to_transform=[0]))
    layers = model.get_base_model().model.layers
    # Who wraps layers by their class finds all of them.
    assert type(layers[0]) is type(layers[1])
