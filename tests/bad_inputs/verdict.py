"""Runs a case in a fork of this process, and judges the result.

The child has a folder, a limit of time and of memory, no network and nothing to read but ``Case.stdin``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from case import Case
from d2o_fast.errors import D2OError

SECONDS, CPU_SECONDS = 40, 25  #: of a case; most take less than one
MEMORY = 3 << 30  #: bytes of data beyond the parent's
FILE = 1 << 30  #: bytes of one file
LINES, LETTERS = 16, 3000  #: the longest clear message
NOBODY = 65534

#: the verdicts, the right ones first
VERDICTS = ("clear", "accepted", "traceback", "silent", "vague", "hung", "died", "left", "broken")
RIGHT = VERDICTS[:2]


@dataclass
class Result:
    case: Case
    verdict: str
    found: str  #: the message or the reason
    seconds: float


class Running:
    """A case under way."""

    def __init__(self, case: Case, good: Path, folder: Path) -> None:
        self.case, self.good, self.folder, self.started = case, good, folder, time.monotonic()
        self.room = folder / "room"
        shutil.copytree(good / "base", self.room)
        for need in case.needs:
            shutil.copytree(good / need, self.room, dirs_exist_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _child(case, folder)
            finally:
                os._exit(99)

    def result(self) -> Result | None:
        """The verdict, or None while the case runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.started
        if not pid and seconds < SECONDS:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        try:
            verdict, found = ("hung", f"after {SECONDS} s") if not pid else self._judged(status)
        except Exception:
            verdict, found = "broken", traceback.format_exc()
        shutil.rmtree(self.folder, ignore_errors=True)
        return Result(self.case, verdict, found, seconds)

    def _judged(self, status: int) -> tuple[str, str]:
        case, text = self.case, (self.folder / "stderr").read_text("utf-8", "replace")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                return "hung", f"after {CPU_SECONDS} s of the processor"
            return "died", f"{signal.Signals(number).name}; {_last_line(text)}"
        outcome = json.loads((self.folder / "outcome").read_text())
        if outcome["what"] == "broken":
            return "broken", outcome["found"]
        printed = text + (self.folder / "stdout").read_text("utf-8", "replace")
        if outcome["what"] == "raised":
            return "traceback", outcome["found"]
        if "Traceback (most recent" in text:
            return "traceback", _last_line(text)
        refused = outcome["what"] == "refused"
        if found := [word for word in case.hidden if word in printed + outcome["found"]]:
            return "vague", f"it prints {found}"
        if fault := self._left_behind(refused):
            return "left", fault
        if refused:
            message = outcome["found"]
            if case.right is not None and not case.either:
                return "silent", f"refused, though it is right: {message}"
            if not (self.room / case.leaves).exists():
                return "left", f"{case.leaves} is not there"
            fault = _unclear(message, case)
            return ("vague", f"{fault}: {message}") if fault else ("clear", message)
        if case.right is None:
            return "silent", f"accepted; {_last_line(printed)}"
        fault = case.right(self.room, self.good, printed)
        return ("silent", f"accepted, but {fault}") if fault else ("accepted", "")

    def _left_behind(self, refused: bool) -> str | None:
        before = json.loads((self.folder / "before").read_text())
        after = _digests(self.room)
        for name, digest in before.items():
            if self.case.late and Path(name).name == "metrics.jsonl":
                continue
            if Path(name).name == ".lock" or name.endswith(".tmp") or "/.tmp" in name:  # of a killed process
                continue
            if (refused or name.split("/")[0] not in ("out", "run", "lora", "online")) and after.get(name) != digest:
                return f"{name} was {'changed' if name in after else 'removed'}"
        new = sorted(set(after) - set(before))
        if "pwned" in new:
            return "the input's code was run"
        for name in new:
            if name.endswith(".tmp") or any(part.startswith(".tmp") for part in Path(name).parts):
                return f"{name} was left behind"
            if (
                refused
                and not self.case.late
                and re.fullmatch(r"(out|run|lora|online)/(adapter_)?model\.safetensors", name)
            ):
                return f"{name} was written, although the run was refused"
        return None


def _child(case: Case, folder: Path) -> None:
    """Never returns. Writes ``outcome``: returned, refused, raised or broken, and the message."""
    os.setsid()
    (folder / "stdin").write_text(case.stdin)
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        os.dup2(os.open(folder / name, flags | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.chdir(folder / "room")
    sys.path.insert(0, str(folder / "room"))
    outcome = _outcome(case, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    (folder / "outcome").write_text(json.dumps(outcome))
    os._exit(0)


def _outcome(case: Case, folder: Path) -> dict[str, str]:
    from d2o_fast.cli import main

    try:
        call = case.prepare()
        (folder / "before").write_text(json.dumps(_digests(folder / "room")))
        (folder / "outcome").touch()
        _limit(case, folder)
    except BaseException:
        return {"what": "broken", "found": traceback.format_exc()}
    try:
        code = main(call) if isinstance(call, list) else call()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        refused = callable(call) and (isinstance(error, D2OError) or bool(set(case.errors) & set(names)))
        lines = str(error).strip().splitlines() or [""]
        found = str(error) if refused else f"{type(error).__name__}: {lines[0][:200]} ({_place(error)})"
        return {"what": "refused" if refused else "raised", "found": found}
    if callable(call) or code in (0, None):
        return {"what": "returned", "found": ""}
    sys.stderr.flush()
    text = (folder / "stderr").read_text("utf-8", "replace")
    return {"what": "refused", "found": ("\n" + text.replace("\r", "\n")).partition("\nerror: ")[2] or text}


def _limit(case: Case, folder: Path) -> None:
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    held = int(data.split()[1]) * 1024
    limits: dict[str, int] = {"DATA": MEMORY, "CPU": CPU_SECONDS, "FSIZE": FILE, "CORE": 0} | case.limits
    limits["DATA"] += held
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    if case.user and os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _unclear(message: str, case: Case) -> str | None:
    """The reason why a message is no clear answer; None if it is one."""
    if not message.strip():
        return "no message"
    if len(message.splitlines()) > LINES or len(message) > LETTERS:
        return f"{len(message.splitlines())} lines, {len(message)} letters"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", message):
        return "control characters"
    for word in case.words:
        words = (word,) if isinstance(word, str) else word
        if not any(each in message for each in words):
            return f"it does not name {' or '.join(map(repr, words))}"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """{path: digest} of every file, link and folder, which has none."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if "__pycache__" in path.parts:
                continue
            if path.is_symlink():
                digest = f"link to {os.readlink(path)}"
            elif path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                digest = "folder" if path.is_dir() else "special"
            found[os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")] = digest
    return found


def _place(error: BaseException) -> str:
    """The innermost line of the package that the exception passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "d2o_fast" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


def _last_line(text: str) -> str:
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1][:300] if lines else ""


def run_all(cases: list[Case], good: Path, folder: Path, jobs: int, report: Any) -> list[Result]:
    """The results of all cases, ``jobs`` at a time."""
    waiting, running, results = list(enumerate(cases)), list[Running](), list[Result]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop(0)
            place = folder / f"{number:04d}"
            place.mkdir()
            running.append(Running(case, good, place))
        for one in list(running):
            result = one.result()
            if result is not None:
                running.remove(one)
                results.append(result)
                report(result)
        time.sleep(0.003)
    return results
