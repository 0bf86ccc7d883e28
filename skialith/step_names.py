"""What steps and their functions are called in records."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from hashlib import blake2b

from .config import MAX_ID_CHARACTERS, check_id

_RESERVED = re.compile("[%#/~]")
"""What ids of steps are made with; in a name each of them becomes ``%XX``."""


@lru_cache(maxsize=1024)
def escaped(name: str) -> str:
    """A name as it stands in an id. Raises ``InvalidArgument`` for what cannot be one."""
    return _RESERVED.sub(lambda found: f"%{ord(found[0]):02X}", check_id("name", name))


def step_id(scope: str, name: str, n: int) -> str:
    """The id of the ``n``-th step ``name`` within ``scope`` (id of the outer step, or empty): ``name``, ``name#2``,
    ``outer/name``.

    What would be longer than an event id becomes its beginning, ``~`` and a hash.
    """
    text = f"{scope}/{name}" if scope else name
    if n > 1:
        text = f"{text}#{n}"
    if len(text) <= MAX_ID_CHARACTERS:
        return text
    digest = blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{text[: MAX_ID_CHARACTERS - 1 - len(digest)]}~{digest}"


def function_name(function: object) -> str:
    """``module.qualname`` of a function or method, of what a ``partial`` calls, of the class of another callable.

    Lambdas of one scope are all called alike.
    """
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    if name is None:
        function = type(function)
        name = function.__qualname__
    return f"{getattr(function, '__module__', None) or 'builtins'}.{name}"
