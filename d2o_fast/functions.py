"""The user's functions: a judge, a score. They are found by name, and their errors tell the row.

Each is called as ``function(prompt: str, response: str)``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable
from typing import Any

from d2o_fast.errors import D2OError, DataError, shortened

Function = Callable[[str, str], Any]


def load_function(name: str, setting: str = "judge") -> Function:
    """The function that ``"package.module:function"`` names. Messages call it ``setting``.

    Raises:
        D2OError: ``name`` has another form, the module cannot be imported, it has no such function, or the function
            does not take a prompt and a response.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise D2OError(f"{setting} is {name!r}; it must be of the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, attribute, None)
    except ImportError as error:
        raise D2OError(
            f"{setting} '{name}': module '{module_name}' cannot be imported ({_told(error)}). "
            "It must be installed, or lie in a folder on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise D2OError(f"{setting} '{name}': module '{module_name}' raises {_told(error)}") from error
    if not callable(function):
        found = "nothing of that name" if function is None else f"a {type(function).__name__}"
        near = difflib.get_close_matches(attribute, [each for each in vars(module) if not each.startswith("_")], n=1)
        tip = f"; did you mean '{module_name}:{near[0]}'?" if function is None and near else ""
        raise D2OError(f"{setting} '{name}': expected a function '{attribute}' in {module_name}, found {found}{tip}")
    _refuse_other_arguments(function, f"{setting} '{name}'")
    return function


def call_function(function: Function, what: str, prompt: str, response: str, source: str, row: int) -> Any:
    """``function(prompt, response)``, as a plain number if it is one. Messages call the function ``what``.

    Raises:
        DataError: the function raises an exception; the message names the row of ``source``.
    """
    try:
        found = function(prompt, response)
        return found.item() if getattr(found, "shape", None) == () else found  # numpy's and torch's numbers
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        found = f"{what} raises {_told(error)} for {pair_text(prompt, response)}"
        raise DataError(source, row, None, found, "Mend the function, or let it answer for such a response") from error


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a real number, which is not infinite and not NaN."""
    return isinstance(value, numbers.Real) and abs(value) <= sys.float_info.max  # type: ignore[operator]


def name_of(function: Function) -> str:
    """``package.module:function``, as a setting would name it."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def pair_text(prompt: str, response: str) -> str:
    """Prompt and response, shortened, for a message."""
    return f"{shortened(response)!r} after the prompt {shortened(prompt)!r}"


def _refuse_other_arguments(function: Function, what: str) -> None:
    try:
        inspect.signature(function).bind("", "")
    except TypeError as error:
        raise D2OError(f"{what} must take (prompt, response), two texts: {error}") from error
    except ValueError:  # some builtins tell no signature
        pass
    if isinstance(function, type):
        raise D2OError(f"{what} is a class; it must be a function, or an object of the class")
    for kind in ("coroutine", "asyncgen", "generator"):
        if any(getattr(inspect, f"is{kind}function")(each) for each in (function, type(function).__call__)):
            name = "a generator" if kind == "generator" else "an async"
            raise D2OError(f"{what} is {name} function; it must return its answer itself")


def _told(error: BaseException) -> str:
    """Type, text and place of an exception in one line."""
    try:
        text = shortened(str(error), 200, one_line=True)
    except Exception:  # the text of a user's exception may raise, too
        text = ""
    if isinstance(error, SyntaxError):  # its text ends in the place
        return f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
