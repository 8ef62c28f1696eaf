"""The tree of errors is what its drawing says, and every error crosses process boundaries unchanged."""

import inspect
import pickle
import re

import pytest

from pipeline import errors
from pipeline.errors import SecateurError

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def drawn_parents() -> dict[str, str | None]:
    """Each class of the drawing with the one it hangs from: the last one above that is drawn further left."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for match in re.finditer(r"^( [ │├└─]*)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE):
        column, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < column]
        assert name not in parents, f"{name} is drawn twice"
        parents[name] = above[-1][1] if above else None
        above.append((column, name))
    return parents


def test_the_drawing_shows_exactly_the_classes_there_are_under_their_parents() -> None:
    actual = {name: value.__base__.__name__ for name, value in CLASSES.items() if value is not SecateurError}
    assert drawn_parents() == {"SecateurError": None, **actual}
    assert len(CLASSES) >= 13


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_is_pickled_with_its_type_and_message(name: str) -> None:
    error = CLASSES[name]("block 3: 0.5 asked for, 0.6 found")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CLASSES[name]
    assert str(again) == again.message == error.message == "block 3: 0.5 asked for, 0.6 found"


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_is_one_of_ours_and_says_what_it_is_for(name: str) -> None:
    assert issubclass(CLASSES[name], SecateurError)
    assert CLASSES[name].__doc__
