"""The check that a mistake ends in one `UserError`."""

from collections.abc import Callable

import pytest

from sprint_jax.core.errors import UserError


def refuse(call: Callable, *args, parts: list[str], exit_code: int = 2) -> None:
    """The call raises a `UserError` of one line that has these parts."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert caught.value.exit_code == exit_code and "\n" not in message
    assert all(part in message for part in parts), message
