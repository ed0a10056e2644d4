"""What a run says when it goes wrong, by hand-made histories."""

from types import SimpleNamespace

import pytest

from training.callbacks import WINDOW, Watch, troubles

FINE = {
    "reward": 0.5,
    "frac_reward_zero_std": 0.5,
    "policy/unboxed": 0.1,
    "judge/pointwise/positive_rate": 0.5,
    "judge/pairwise/first_rate": 0.5,
}


def history(**changes):
    rows = [dict(FINE, reward=0.5 + 0.01 * i) for i in range(WINDOW)]
    return [row | {name.replace("__", "/"): value for name, value in changes.items()} for row in rows]


def test_a_healthy_run_says_nothing():
    assert troubles(history()) == {}
    assert troubles([{"reward": 0.1}, {"reward": 0.2}]) == {}  # plain GRPO with other rewards


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"reward": 0.0}, "constant reward", "has been 0 in all of the last 20 logs"),
        ({"reward": None, "judge__pairwise__first_rate": None}, "nothing scorable", "no rollout could be scored"),
        ({"frac_reward_zero_std": 1.0}, "no mixed group", "no question had right and wrong rollouts"),
        ({"policy__unboxed": 0.6}, "unboxed", "60% of the rollouts"),
        ({"judge__pointwise__positive_rate": 0.97}, "pointwise", "says correct in 97%"),
        ({"judge__pointwise__positive_rate": 0.02}, "pointwise", "says incorrect in 98%"),
        ({"judge__pairwise__first_rate": 0.01}, "pairwise", "says B in 99%"),
    ],
)
def test_each_trouble_has_its_line(changes, name, says):
    found = troubles(history(**changes))
    assert list(found) == [name]
    assert says in found[name]


def test_a_log_with_nothing_scorable_in_between_changes_nothing():
    rows = history()
    rows[3] = dict.fromkeys(rows[3])
    assert troubles(rows) == {}


def test_a_trouble_is_told_once_and_again_when_it_comes_back(capsys):
    watch, state = Watch(), SimpleNamespace(is_world_process_zero=True, global_step=0)
    bad, good = history(policy__unboxed=0.9), history()
    for rows, told in ((bad[:-1], 0), (bad[-1:], 1), (bad, 0), (good, 0), (bad, 1)):
        for row in rows:
            watch.on_log(None, state, None, logs=row)
        assert capsys.readouterr().err.count("policy/unboxed") == told
    watch.on_log(None, state, None, logs={"train_runtime": 1.0})
