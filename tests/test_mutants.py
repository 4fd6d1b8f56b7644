"""The code changes with which `bench.mutants` tests the tests."""

import pytest

from bench.changes import changed, mutants, sample

SOURCE = b'''"""What 1 + 1 is, says a docstring."""
LIMIT: int = 3

def f(a: int | None, b=True):
    """Not 5 < 4 either."""
    if not a:
        raise ValueError(f"{a} is not above {0 + 0}")
    print(a + 7)
    a += 1
    return a < b and [k for k in (1,
                                  2) if k]
'''


def test_code_is_changed_and_texts_types_and_messages_are_not():
    found = {}
    for mutant in mutants("f.py", SOURCE):
        found.setdefault(mutant.line, set()).add(mutant.change)
    assert found == {
        2: {"3 -> 4", "3 -> 2", "3 -> 0"},
        4: {"True -> False"},
        6: {"not a -> a"},
        7: {'raise ValueError(f"{a} is not above {0 + 0}") -> pass'},
        9: {"a += 1 -> a -= 1", "a += 1 -> pass", "1 -> 2", "1 -> 0"},
        10: {
            *("a < b and [k for k in (1, 2) if k] -> a < b or [k for k in (1, 2) if k]", "a < b -> a <= b"),
            *("return a < b and [k for k in (1, 2) if k] -> return None", "1 -> 2", "1 -> 0"),
        },
        11: {"2 -> 3", "2 -> 1", "2 -> 0", "k -> not k"},
    }


def test_a_change_keeps_the_numbers_of_the_other_lines():
    for mutant in mutants("f.py", SOURCE):
        new = changed(mutant, SOURCE)
        assert new != SOURCE
        if not mutant.change.endswith(("-> pass", "-> return None")):
            assert new.count(b"\n") == SOURCE.count(b"\n"), mutant.change


@pytest.mark.parametrize("most", [3, 100])
def test_a_larger_sample_contains_the_smaller_one_and_one_change_per_place(most):
    drawn = sample("f.py", SOURCE, most, 0)
    assert set(sample("f.py", SOURCE, 2, 0)) < set(drawn)
    assert len({(m.start, m.end) for m in drawn}) == len(drawn) == min(most, 12)
