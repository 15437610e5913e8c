"""``d2o`` in a process that kills itself: SIGKILL, as from outside, but at one place on a machine of any speed.

    python dying.py FUNCTION COUNT PATH command ...

The process dies at the COUNT-th call of FUNCTION (os.replace, say) that finds PATH there.
"""

import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any


def main(name: str, count: str, path: str, *command: str) -> int:
    place, _, attribute = name.rpartition(".")
    owner, calls = pkgutil.resolve_name(place), 0
    function = getattr(owner, attribute)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += Path(path).exists()
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, attribute, dying)
    from d2o_fast.cli import main as d2o

    return d2o(command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
