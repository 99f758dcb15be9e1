"""The exceptions: one tree, all problems in one paragraph."""

import pytest

from fedmide import errors
from fedmide.errors import MAX_SHOWN, ConfigError, DataError, FedMIDEError, MessageError, UserError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
USER_ERRORS = [value for value in CLASSES if issubclass(value, UserError)]


def test_the_tree_is_the_one_drawn() -> None:
    for kind in CLASSES:
        assert kind.__name__ in (errors.__doc__ or "")
        assert issubclass(kind, FedMIDEError)
        assert kind in (FedMIDEError, UserError, MessageError) or kind.__bases__ == (UserError,)
    assert MessageError.__bases__ == UserError.__bases__ == (FedMIDEError,)
    assert not issubclass(MessageError, UserError)


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_one_problem_is_a_sentence_with_its_remedy(kind: type[UserError]) -> None:
    error = kind("a.json:3: no response", "Give it one")
    assert str(error) == "a.json:3: no response. Give it one"
    assert (error.problems, error.remedy) == (("a.json:3: no response",), "Give it one")
    assert str(kind("a.json:3: no response")) == "a.json:3: no response"


def test_all_problems_are_one_paragraph() -> None:
    error = DataError(["a.json:3: no response", "a.json:9: not an object"], "Fix them")
    assert str(error) == "2 problems: a.json:3: no response; a.json:9: not an object. Fix them"
    assert "\n" not in str(error)
    assert str(DataError(["only one"])) == "only one"


def test_very_many_are_counted_and_kept() -> None:
    error = ConfigError([f"problem {number}" for number in range(MAX_SHOWN + 5)])
    assert str(error).endswith(f"problem {MAX_SHOWN - 1}; and 5 more, which --json lists")
    assert str(error).startswith(f"{MAX_SHOWN + 5} problems: ")
    assert len(error.problems) == MAX_SHOWN + 5
    assert "more" not in str(ConfigError([f"problem {number}" for number in range(MAX_SHOWN)]))
