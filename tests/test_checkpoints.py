from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganclean.runs.checkpoints import IN_USE, MOST_RECOMPUTATIONS, plan_checkpoints, slots_for, stride

RUNS = {
    "n_steps": st.integers(1, 300),
    "skipped": st.integers(0, 300),
    "room": st.integers(0, 400),
    "spare": st.integers(0, 6),
    "on_disk": st.booleans(),
}


def planned(every, n_steps, skipped, room, spare, on_disk):
    """Return the plan for states of 7 bytes and a budget of `room` of them, some bytes to spare."""
    start = min(skipped, n_steps - 1)
    return plan_checkpoints(
        every, n_steps=n_steps, start=start, state_bytes=7, memory_budget=7 * room + spare, on_disk=on_disk
    )


@settings(max_examples=100)
@given(**RUNS)
def test_the_budget_holds_whenever_it_can(**run):
    auto = planned("auto", **run)
    traced = auto.n_steps - auto.start
    plans = [planned(every, **run) for every in range(1, traced + 1)]
    fitting = [plan for plan in plans if plan.fits]
    assert auto.fits == bool(fitting)
    if fitting:
        assert auto.recomputations == min(plan.recomputations for plan in fitting)
        assert auto.every == min(plan.every for plan in fitting if plan.recomputations == auto.recomputations)
    else:
        assert auto.bytes_needed == min(plan.bytes_needed for plan in plans)
    kept, held = auto.n_kept * 7, auto.n_held * 7
    assert (auto.bytes_kept, auto.bytes_held) == (kept, held)
    assert auto.fits == ((max(kept, held) if run["on_disk"] else kept + held) <= auto.memory_budget)


@given(**RUNS)
def test_all_states_are_kept_where_they_fit(**run):
    auto = planned("auto", **run)
    n_all = auto.n_steps - auto.start + 1 + (auto.start > 0)
    assert (auto.every == 1) == (n_all <= run["room"] or auto.n_steps - auto.start == 1)


@given(every=st.integers(1, 20), **RUNS)
def test_a_plan_keeps_the_first_state_every_so_many_of_the_traced_ones_and_the_last(every, **run):
    plan = planned(every, **run)
    kept = [index for index in range(plan.n_steps + 1) if plan.keeps(index)]
    assert kept == sorted({0, *range(plan.start, plan.n_steps, every), plan.n_steps})
    assert len(kept) == plan.n_kept


def test_a_run_in_a_folder_has_passing_checkpoints_before_its_traced_part():
    run = {"n_steps": 110, "start": 100, "state_bytes": 1, "memory_budget": 100}
    plan = plan_checkpoints(5, on_disk=True, **run)
    assert [index for index in range(111) if plan.passes(index)] == list(range(0, 100, 10))
    assert not any(plan_checkpoints(5, on_disk=False, **run).passes(index) for index in range(111))
    rare = plan_checkpoints(40, on_disk=True, **run)
    assert [index for index in range(111) if rare.passes(index)] == [0, 40, 80]


def walk(length, slots):
    """Visit the states length − 1, …, 0 as the backward pass does; return recomputations of each step and most held."""
    held, counts, most = [0], [0] * length, 0
    for end in range(length, 0, -1):
        while held[-1] < end - 1:
            ahead = held[-1] + stride(end - 1 - held[-1], slots + 1 - len(held))
            for t in range(held[-1], ahead):
                counts[t] += 1
            held.append(ahead)
        most = max(most, len(held) - 1)
        assert held.pop() == end - 1
    return counts, most


@settings(max_examples=100)
@given(length=st.integers(2, 120), slots=st.integers(1, 130))
def test_no_step_is_recomputed_more_often_than_the_slots_make_necessary(length, slots):
    counts, most = walk(length, slots)
    needed = next(r for r in range(1, length) if comb(slots + r, r) >= length)
    assert most <= slots and max(counts) <= needed
    if slots >= length - 1:
        assert counts[:-1] == [1] * (length - 1)


def fewest_recomputations(length, slots, known):
    """The least number of recomputed steps, by trying every place for the next held state."""
    if length <= 1 or slots == 0:
        return 0 if length <= 1 else 10**9
    if (length, slots) not in known:
        known[length, slots] = min(
            x + fewest_recomputations(length - x, slots - 1, known) + fewest_recomputations(x, slots, known)
            for x in range(1, length)
        )
    return known[length, slots]


def test_the_strides_are_the_best_there_are():
    known = {}
    for length in range(2, 40):
        for slots in range(1, 8):
            assert sum(walk(length, slots)[0]) == fewest_recomputations(length, slots, known)


@given(length=st.integers(1, 5000), room=st.integers(-10, 200))
def test_slots_are_those_there_is_room_for_but_enough_for_a_few_recomputations(length, room):
    slots = slots_for(length, room)
    assert comb(slots + MOST_RECOMPUTATIONS, slots) >= length and slots <= length - 1
    if slots > room - IN_USE:
        assert slots == 0 or comb(slots - 1 + MOST_RECOMPUTATIONS, slots - 1) < length
    else:
        assert slots == min(length - 1, room - IN_USE)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_long_run_of_large_states_is_planned_at_once(on_disk):
    plan = plan_checkpoints(
        "auto", n_steps=1_000_000, start=0, state_bytes=10**8, memory_budget=2 * 10**10, on_disk=on_disk
    )
    assert plan.fits and plan.recomputations <= 4
