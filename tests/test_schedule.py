import json
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from ganclean.optim import SGD, Adam, AdamW, Clipped, Optimizer, RMSprop
from ganclean.recorder.torch_optimizers import torch_optimizer_of
from ganclean.training.schedule import scheduled_settings

N_UPDATES = 23


def warm_up_and_cosine(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, T_max=18)]
    return SequentialLR(optimizer, parts, milestones=[5])


def two_at_once(optimizer):
    return ChainedScheduler([ExponentialLR(optimizer, 0.9), StepLR(optimizer, 4)])


SCHEDULERS = {
    "step": partial(StepLR, step_size=5, gamma=0.5),
    "cosine": partial(CosineAnnealingLR, T_max=N_UPDATES),
    "lambda": partial(LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    "one cycle": partial(OneCycleLR, max_lr=0.5, total_steps=N_UPDATES),
    "cyclic": partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "sequence": warm_up_and_cosine,
    "chain": two_at_once,
}
RULES = {
    "sgd": SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": Adam(lr=0.1, betas=(0.5, 0.9)),
    "adamw": AdamW(lr=0.1),
    "rmsprop": RMSprop(lr=0.1, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", RULES)
def test_a_schedule_is_that_of_a_loop_in_torch(kind, scheduler):
    rule = RULES[kind]
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch_optimizer_of(rule, [p])
    schedule = SCHEDULERS[scheduler](optimizer)
    expected = []
    for _ in range(N_UPDATES):
        group = optimizer.param_groups[0]
        expected.append({name: group[name] for name in rule.get_params()})
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
        if len(expected) < N_UPDATES:
            schedule.step()
    settings = scheduled_settings(rule, SCHEDULERS[scheduler], N_UPDATES)
    assert [rule.at(changed).get_params() for changed in settings] == expected
    assert len({changed.get("lr", rule.lr) for changed in settings}) > 1
    unscheduled = rule.get_params()
    assert all(value != unscheduled[name] for changed in settings for name, value in changed.items())
    assert scheduled_settings(Clipped(rule, max_norm=1.0), SCHEDULERS[scheduler], N_UPDATES) == settings


@pytest.mark.parametrize(("kind", "cycled"), [("sgd", "momentum"), ("adam", "betas"), ("rmsprop", "momentum")])
def test_one_cycle_changes_the_momentum_too(kind, cycled):
    settings = scheduled_settings(RULES[kind], SCHEDULERS["one cycle"], N_UPDATES)
    assert len({changed.get(cycled) for changed in settings}) > 10


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_settings_survive_json(scheduler):
    settings = scheduled_settings(RULES["adam"], SCHEDULERS[scheduler], N_UPDATES)
    restored = json.loads(json.dumps(settings), parse_constant=pytest.fail)
    rule = RULES["adam"]
    for ours, theirs in zip(settings, restored):
        assert all(isinstance(value, float | tuple) for value in ours.values())
        assert list(rule.at(theirs).betas) == list(rule.at(ours).betas) and rule.at(theirs).lr == rule.at(ours).lr


@given(step_size=st.integers(1, 10), gamma=st.floats(0.1, 1.0), n_updates=st.integers(0, 40))
def test_a_staircase_is_what_its_formula_says(step_size, gamma, n_updates):
    settings = scheduled_settings(SGD(lr=0.1), partial(StepLR, step_size=step_size, gamma=gamma), n_updates)
    assert len(settings) == n_updates
    for t, changed in enumerate(settings):
        assert changed.get("lr", 0.1) == pytest.approx(0.1 * gamma ** (t // step_size))


def test_numbers_of_other_types_become_plain():
    settings = scheduled_settings(
        SGD(lr=1), partial(LambdaLR, lr_lambda=lambda t: torch.tensor(0.5) if t else torch.tensor(1.0)), 2
    )
    assert settings == [{}, {"lr": 0.5}] and type(settings[1]["lr"]) is float


def test_a_rule_of_ones_own_is_scheduled_too():
    class SignDescent(Optimizer):
        def __init__(self, lr=0.1, kind="plain"):
            self.lr = lr
            self.kind = kind

    assert scheduled_settings(SignDescent(lr=1.0), partial(ExponentialLR, gamma=0.5), 3) == [
        {},
        {"lr": 0.5},
        {"lr": 0.25},
    ]


def test_other_hyper_parameters_can_be_scheduled():
    class Decay(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.1 * self.last_epoch
            return [group["lr"] for group in self.optimizer.param_groups]

    settings = scheduled_settings(Adam(), Decay, 3)
    assert settings == [{}, {"weight_decay": 0.1}, {"weight_decay": 0.2}]


def test_the_rule_and_the_callers_random_numbers_are_left_alone():
    rule, state = Adam(lr=0.1), torch.get_rng_state()
    scheduled_settings(rule, SCHEDULERS["one cycle"], N_UPDATES)
    assert repr(rule) == "Adam(lr=0.1)" and torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("error")
def test_no_warning_is_given():
    scheduled_settings(Adam(), SCHEDULERS["cosine"], 5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (ReduceLROnPlateau, "ReduceLROnPlateau waits for a metric"),
        (StepLR, r"could not be built on an optimiser with lr, momentum.*step_size.*Pass a function of the optimiser"),
        ("cosine", "scheduler must build a learning-rate scheduler for an optimiser; got 'cosine'"),
        (StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 3), "must build a learning-rate scheduler.*partial"),
        (lambda optimizer: None, "must return a learning-rate scheduler of the optimiser that it is given; got None"),
        (lambda optimizer: StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 3), "of the optimiser that it is given"),
        (partial(OneCycleLR, max_lr=0.1, total_steps=9), r"needs the moments \['momentum'\], which SGD\(\) does not"),
    ],
)
def test_what_is_no_schedule_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        scheduled_settings(SGD(), scheduler, 5)


def test_a_rule_without_a_rate_cannot_be_scheduled():
    class Fixed(Optimizer):
        def __init__(self, size=1.0):
            self.size = size

    with pytest.raises(ValueError, match="could not be built on an optimiser with size: 'lr'"):
        scheduled_settings(Fixed(), SCHEDULERS["step"], 3)


def test_long_schedules_are_quick():
    start = time.process_time()
    assert len(scheduled_settings(SGD(lr=0.1), partial(StepLR, step_size=100), 5000)) == 5000
    assert time.process_time() - start < 4
