"""An error that ends a program becomes its own text and exit code, also where a subclass of it is raised."""

from __future__ import annotations

import pickle
import signal

import pytest

from eva_mim.core.errors import Diverged, Interrupted, LostProcess, ProgramError, UserError
from eva_mim.run.program import guard


def ended(error: BaseException) -> int:
    """Exit code of a program that raises `error`."""
    def work() -> None:
        raise error

    return guard(work)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("run.epochs=0: must be positive"), 2, "error: run.epochs=0: must be positive\n"),
        (Diverged("dump in x"), 3, "diverged: dump in x\n"),
        (LostProcess("rank 0"), 69,
         "error: rank 0; if it was a fault of its host, the same command goes on from the last checkpoint\n"),
        (Interrupted(signal.SIGTERM), 75, "stopped; the same command goes on from the last checkpoint\n"),
        (Interrupted(signal.SIGUSR1), 75, "stopped; the same command goes on from the last checkpoint\n"),
        (Interrupted(signal.SIGINT), 130, "stopped; the same command goes on from the last checkpoint\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_each_end_has_its_code_and_its_text(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("base", [UserError, Diverged, LostProcess])
def test_a_subclass_ends_a_program_as_its_base(base: type[ProgramError]) -> None:
    class Nearer(base):  # type: ignore[misc, valid-type]
        pass

    assert ended(Nearer("x")) == base.exit_code


def test_a_foreign_error_of_the_same_name_keeps_its_traceback() -> None:
    foreign = type("Diverged", (Exception,), {})
    with pytest.raises(foreign):
        ended(foreign("x"))


def test_an_error_crosses_processes() -> None:
    """Ranks and workers send errors to each other."""
    sent = pickle.loads(pickle.dumps(Interrupted(signal.SIGINT)))
    assert (sent.number, sent.exit_code) == (signal.SIGINT, 130)
