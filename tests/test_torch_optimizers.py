import copy
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from ganclean.optim import SGD, Adam, AdamW, Clipped, Optimizer, RMSprop
from ganclean.recorder.torch_optimizers import (
    moments_of,
    n_updates,
    restore_moments,
    rule_of,
    settings_of,
    torch_optimizer_of,
)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd with everything": partial(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "adam with everything": partial(torch.optim.Adam, lr=0.05, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.01),
    "adam without mean": partial(torch.optim.Adam, lr=0.05, betas=(0.0, 0.9)),
    "adamw": partial(torch.optim.AdamW, lr=0.05),
    "adamw with everything": partial(torch.optim.AdamW, lr=0.05, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.5),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "rmsprop with everything": partial(
        torch.optim.RMSprop, lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.01, momentum=0.5, centered=True
    ),
}
SCHEDULERS = {
    "none": None,
    "step": partial(StepLR, step_size=3, gamma=0.3),
    "cosine": partial(CosineAnnealingLR, T_max=5),
    "warm-up from 0": partial(LambdaLR, lr_lambda=lambda t: min(t / 4, 1.0)),
    "one cycle": partial(OneCycleLR, max_lr=0.2, total_steps=8),
}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()


def loss_of(module, step):
    inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (module(inputs) - inputs.prod(1, keepdim=True)).square().mean()


def copied(params):
    return {name: p.detach().clone() for name, p in params.items()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, copied(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_at_any_point_of_a_loop_the_rule_takes_the_step_that_torch_takes(kind, scheduler):
    module = network()
    params = dict(module.named_parameters())
    optimizer = OPTIMIZERS[kind](module.parameters())
    schedule = SCHEDULERS[scheduler] and SCHEDULERS[scheduler](optimizer)
    rule = rule_of(optimizer)
    seen = []
    for step in range(1, 9):
        settings = settings_of(optimizer, rule)
        seen.append(settings)
        before, moments = copied(params), moments_of(optimizer, rule, params)
        assert n_updates(optimizer) == (0 if isinstance(rule, SGD) else step - 1)
        optimizer.zero_grad()
        loss_of(module, step).backward()
        grads = {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        new, new_moments = rule.at(settings).update(before, grads, moments, step)
        assert_same(new, params)
        theirs = moments_of(optimizer, rule, params)
        for moment, tensors in new_moments.items():
            assert_same(tensors, theirs[moment])
        if schedule is not None and step < 8:
            schedule.step()
    if scheduler == "none":
        assert seen == [{}] * 8
    else:
        assert any("lr" in settings for settings in seen)
    if scheduler == "one cycle":
        assert any(("betas" if isinstance(rule, Adam) else "momentum") in settings for settings in seen)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loop_that_is_entered_late_goes_on_as_in_torch(kind):
    module = network()
    params, optimizer = dict(module.named_parameters()), OPTIMIZERS[kind](module.parameters())
    rule = rule_of(optimizer)
    for step in range(1, 11):
        if step == 5:
            state, moments = copied(params), moments_of(optimizer, rule, params)
        optimizer.zero_grad()
        loss_of(module, step).backward()
        if step >= 5:
            grads = {name: p.grad for name, p in params.items()}
            state, moments = rule.update(state, grads, moments, step)
        optimizer.step()
    assert_same(state, params)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_a_momentum_that_comes_later_is_refused(kind):
    optimizer = OPTIMIZERS[kind]([torch.zeros(1)])
    rule = rule_of(optimizer)
    SCHEDULERS["one cycle"](optimizer)
    with pytest.raises(ValueError, match=r"needs the moments \['momentum'\].*switch it on"):
        rule.at(settings_of(optimizer, rule))


def test_every_hyper_parameter_is_read():
    p = [torch.zeros(1)]
    read = rule_of(torch.optim.SGD(p, lr=0.3, momentum=0.5, nesterov=True, weight_decay=0.1))
    assert (type(read), read.get_params()) == (
        SGD,
        {"lr": 0.3, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    )
    for ours, theirs in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        read = rule_of(theirs(p, lr=0.3, betas=(0.1, 0.2), eps=0.4, weight_decay=0.5))
        assert (type(read), read.get_params()) == (
            ours,
            {"lr": 0.3, "betas": (0.1, 0.2), "eps": 0.4, "weight_decay": 0.5},
        )
    read = rule_of(torch.optim.RMSprop(p, lr=1, alpha=0.1, eps=0.2, weight_decay=0.3, momentum=0.4, centered=True))
    assert (type(read), read.get_params()) == (
        RMSprop,
        {"lr": 1.0, "alpha": 0.1, "eps": 0.2, "weight_decay": 0.3, "momentum": 0.4, "centered": True},
    )


@pytest.mark.parametrize("rule", [SGD, Adam, AdamW, RMSprop])
def test_the_defaults_are_those_of_torch(rule):
    theirs = rule_of(torch_optimizer_of(rule(), [torch.zeros(1)]))
    optimizer = type(torch_optimizer_of(rule(), [torch.zeros(1)]))
    assert theirs.get_params() == rule().get_params() == rule_of(optimizer([torch.zeros(1)])).get_params()


def test_adam_with_decoupled_decay_is_adamw():
    try:
        optimizer = torch.optim.Adam([torch.zeros(1)], weight_decay=0.1, decoupled_weight_decay=True)
    except TypeError:
        pytest.skip("This version of torch has no such option.")
    rule = rule_of(optimizer)
    assert type(rule) is AdamW and rule.weight_decay == 0.1
    assert settings_of(optimizer, rule) == {}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_rate_in_a_tensor_is_a_number(kind):
    try:
        optimizer = kind([torch.zeros(1)], lr=torch.tensor(0.25))
    except (TypeError, ValueError):
        pytest.skip("This version of torch takes numbers only.")
    rule = rule_of(optimizer)
    assert rule.lr == 0.25 and isinstance(rule.lr, float)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert settings_of(optimizer, rule) == {"lr": 0.5} and isinstance(settings_of(optimizer, rule)["lr"], float)


def test_the_implementation_does_not_matter():
    p = [torch.zeros(1)]
    plain, foreach = torch.optim.Adam(p), torch.optim.Adam(p, foreach=True)
    assert rule_of(plain).get_params() == rule_of(foreach).get_params()
    assert settings_of(foreach, rule_of(plain)) == {}


def test_parameter_groups_with_equal_hyper_parameters_are_one():
    module = network()
    params = dict(module.named_parameters())
    groups = [{"params": list(layer.parameters())} for layer in (module[0], module[2])]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    rule = rule_of(optimizer)
    before = copied(params)
    loss_of(module, 0).backward()
    optimizer.step()
    grads = {name: p.grad for name, p in params.items()}
    assert_same(rule.update(before, grads, rule.init(before), 1)[0], params)


def other_groups(*settings, kind=torch.optim.Adam, **common):
    return kind([{"params": [torch.zeros(1)], **group} for group in settings], **common)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            partial(torch.optim.Adagrad, [torch.zeros(1)]),
            r"SGD, Adam, AdamW and RMSprop themselves; got .*Adagrad\. Tr",
        ),
        (partial(torch.optim.NAdam, [torch.zeros(1)]), r"got .*NAdam\. Train with one of these"),
        (lambda: type("Mine", (torch.optim.Adam,), {})([torch.zeros(1)]), r"got .*Mine\. Train with one of these"),
        (lambda: "adam", r"got builtins\.str"),
        (partial(torch.optim.Adam, [torch.zeros(1)], amsgrad=True), "Adam with amsgrad=True; expected amsgrad=False"),
        (partial(torch.optim.SGD, [torch.zeros(1)], lr=0.1, maximize=True), "SGD with maximize=True; expected"),
        (partial(torch.optim.AdamW, [torch.zeros(1)], maximize=True), "AdamW with maximize=True; expected"),
        (partial(torch.optim.SGD, [torch.zeros(1)], lr=0.1, momentum=0.5, dampening=0.5), "dampening=0.5; expected"),
        (
            partial(other_groups, {"lr": 0.1}, {"lr": 0.2}),
            "The parameter groups of the Adam differ in lr; expected the",
        ),
        (partial(other_groups, {"eps": 0.1, "weight_decay": 1.0}, {}), "differ in eps, weight_decay; expected"),
        (partial(other_groups, {}, {}, {"betas": (0.1, 0.2)}), "differ in betas; expected"),
        (partial(other_groups, {}, {"amsgrad": True}), "Adam with amsgrad=True; expected"),
    ],
)
def test_what_no_rule_describes_is_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        rule_of(optimizer())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_with_names_have_rules_of_their_own(kind):
    module = network()
    params = dict(module.named_parameters())
    groups = [{"params": list(layer.parameters())} for layer in (module[0], module[2])]
    optimizer = OPTIMIZERS[kind](groups)
    optimizer.param_groups[1]["lr"] *= 0.1
    rule = rule_of(optimizer, params)
    assert list(rule.rules) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    for step in range(1, 6):
        if step > 2:
            optimizer.param_groups[step % 2]["lr"] *= 0.5
        settings, before, moments = settings_of(optimizer, rule), copied(params), moments_of(optimizer, rule, params)
        assert settings.keys() == {1: set(), 2: set(), 3: {"1"}, 4: {"0", "1"}, 5: {"0", "1"}}[step]
        optimizer.zero_grad()
        loss_of(module, step).backward()
        grads = {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        new, new_moments = rule.at(settings).update(before, grads, moments, step)
        assert_same(new, params)
        again = network()
        names = dict(again.named_parameters())
        copy_of = OPTIMIZERS[kind]([{"params": list(layer.parameters())} for layer in (again[0], again[2])])
        restore_moments(copy_of, rule, names, new_moments, step)
        theirs = moments_of(copy_of, rule, names)
        for moment, tensors in moments_of(optimizer, rule, params).items():
            assert_same(new_moments[moment], tensors)
            assert_same(theirs[moment], tensors)
        assert n_updates(copy_of) == n_updates(optimizer)


def test_groups_that_come_later_are_refused():
    a, b, c = (torch.zeros(1) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    rule = rule_of(optimizer, {"a": a, "b": b})
    optimizer.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match="has 3 parameter groups by now; expected 2"):
        settings_of(optimizer, rule)


def test_a_scheduler_that_parts_the_groups_is_refused():
    optimizer = other_groups({}, {})
    rule = rule_of(optimizer)
    LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5])
    with pytest.raises(ValueError, match="differ in lr"):
        settings_of(optimizer, rule)


@pytest.mark.parametrize("read", [settings_of, lambda optimizer, rule: moments_of(optimizer, rule, {})])
def test_the_rule_of_another_optimizer_is_refused(read):
    optimizer = torch.optim.Adam([torch.zeros(1)])
    for rule in (AdamW(), SGD(), Clipped(SGD(), max_norm=1.0)):
        with pytest.raises(ValueError, match=r"The Adam follows the rule Adam; got the rule \w+\(.*Pass rule_of"):
            read(optimizer, rule)


def test_a_clipped_rule_reads_the_settings_and_moments_of_the_rule_inside():
    module = network()
    params, optimizer = dict(module.named_parameters()), torch.optim.Adam(module.parameters(), lr=0.1)
    rule = Clipped(rule_of(optimizer), max_norm=0.1)
    for step in range(1, 5):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        settings, before, moments = settings_of(optimizer, rule), copied(params), moments_of(optimizer, rule, params)
        optimizer.zero_grad()
        loss_of(module, step).backward()
        grads = {name: p.grad.clone() for name, p in params.items()}
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        assert_same(rule.at(settings).update(before, grads, moments, step)[0], params)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_before_the_first_step_are_zeros_and_reading_them_changes_nothing(kind):
    module = network()
    params, optimizer = dict(module.named_parameters()), OPTIMIZERS[kind](module.parameters())
    rule = rule_of(optimizer)
    moments, expected = moments_of(optimizer, rule, params), rule.init(copied(params))
    assert moments.keys() == expected.keys()
    for moment in expected:
        assert_same(moments[moment], expected[moment])
    assert not optimizer.state and n_updates(optimizer) == 0


def test_moments_are_copies():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p])
    p.square().sum().backward()
    optimizer.step()
    moments = moments_of(optimizer, rule_of(optimizer), {"p": p})
    kept = copy.deepcopy(moments)
    optimizer.step()
    assert torch.equal(moments["mean"]["p"], kept["mean"]["p"])
    assert not torch.equal(optimizer.state[p]["exp_avg"], kept["mean"]["p"])
    assert not any(t.requires_grad for tensors in moments.values() for t in tensors.values())


def test_a_parameter_that_no_gradient_has_reached_has_zero_moments():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([used, unused])
    used.square().sum().backward()
    optimizer.step()
    moments = moments_of(optimizer, rule_of(optimizer), {"used": used, "unused": unused})
    assert moments["mean"]["used"].all()
    assert torch.equal(moments["mean"]["unused"], torch.zeros(3))
    assert n_updates(optimizer) == 1


def test_a_parameter_that_the_optimizer_does_not_update_is_refused():
    p, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match=r"The SGD does not update the parameters \['other'\]\. Pass them to it too"):
        moments_of(optimizer, rule_of(optimizer), {"p": p, "other": other})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_parameters_that_are_updated_at_different_times_have_no_common_number(kind):
    early, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = kind([early, late])
    early.sum().backward()
    optimizer.step()
    late.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="updated some parameters 1 and others 2 times"):
        n_updates(optimizer)


def test_rmsprop_does_not_mind_when_its_parameters_are_updated():
    early, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RMSprop([early, late])
    early.sum().backward()
    optimizer.step()
    late.sum().backward()
    optimizer.step()
    assert n_updates(optimizer) == 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rule_and_its_optimizer_are_each_others_inverse(kind):
    optimizer = OPTIMIZERS[kind]([torch.zeros(1)])
    back = torch_optimizer_of(rule_of(optimizer), [torch.zeros(1)])
    assert type(back) is type(optimizer)
    assert rule_of(back).get_params() == rule_of(optimizer).get_params()


def test_whole_numbers_are_no_obstacle_to_torch():
    optimizer = torch_optimizer_of(Adam(lr=1, betas=(0, 0.9)), [torch.zeros(1)])
    assert settings_of(optimizer, Adam(lr=1, betas=[0, 0.9])) == {}


def test_a_rule_that_torch_does_not_have_is_refused():
    class Mine(Optimizer):
        pass

    for rule in (Mine(), Clipped(SGD(), max_norm=1.0)):
        with pytest.raises(
            ValueError, match=r"torch\.optim has no optimiser for \w+\(.*; expected SGD, Adam, AdamW or"
        ):
            torch_optimizer_of(rule, [torch.zeros(1)])
