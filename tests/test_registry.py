"""Names and options are checked with a hint at what was meant."""

import pytest

from extend.errors import ExtendError, RecipeError
from extend.registry import check_options, lookup, option_names, suggest


def member(spec, length, *, needed: float, spare: int = 3):
    return spec


def test_lookup():
    assert lookup({"one": 1, "two": 2}, "two", "count") == 2
    with pytest.raises(RecipeError) as caught:
        lookup({"linear": 1, "critical": 2}, "critcal", "method")
    assert str(caught.value) == ("method: unknown 'critcal'; did you mean 'critical'? choose one "
                                 "of linear, critical")
    with pytest.raises(RecipeError) as caught:
        lookup({"linear": 1}, "qqq", "method")
    assert str(caught.value) == "method: unknown 'qqq'; choose one of linear"


def test_suggest():
    assert suggest("lenght", ["length", "depth"]) == " did you mean 'length'?"
    assert suggest("xyz", ["length", "depth"]) == ""
    assert suggest("xyz", []) == ""


def test_options():
    assert list(option_names(member)) == ["needed", "spare"]
    check_options(member, {"needed": 1.0}, "method member")
    check_options(member, {"needed": 1.0, "spare": 2}, "method member")


@pytest.mark.parametrize(("options", "message"), [
    ({"neded": 1}, "m: unknown option 'neded'; did you mean 'needed'? it accepts needed, spare"),
    ({"length": 1, "needed": 1}, "m: unknown option 'length'; it accepts needed, spare"),
    ({"spare": 1}, "m: missing option needed"),
])
def test_wrong_options(options, message):
    with pytest.raises(RecipeError) as caught:
        check_options(member, options, "m")
    assert str(caught.value) == message
    assert isinstance(caught.value, ExtendError | ValueError)


def test_a_member_without_options():
    with pytest.raises(RecipeError, match="it accepts no options"):
        check_options(lambda spec: spec, {"a": 1}, "m")
