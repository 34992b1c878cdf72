"""What does a failing rank say? The first to fail says why; later ones name the first. The store is torch's own, over a
real socket."""

import logging
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from nemotron_train.errors import DataError
from nemotron_train.platform.failure import _CAUSE, _COUNT, report_failure
from nemotron_train.platform.ranks import LaunchedRank

LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4321\nat some line")


def rank(number: int) -> LaunchedRank:
    return LaunchedRank(rank=number, world_size=4, local_rank=number, is_launched=True)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The launcher's store, as rank 0 or torchrun serves it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return server


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "nemotron_train.platform.failure"]


def test_the_first_failure_is_told_in_full_and_the_others_name_it(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if the lost connections of the other ranks bury the cause."""
    report_failure(DataError("web.bin is too short"), rank(2))
    report_failure(LOST, rank(0))
    report_failure(ValueError("another"), rank(1))
    first = "Stopping, because another rank failed first (rank 2: DataError: web.bin is too short)."
    assert messages(caplog) == ["DataError: web.bin is too short", first, first]


def test_a_bug_shows_its_traceback_and_a_users_error_does_not(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if an unexpected exception loses its traceback, or a wrong path prints one."""
    try:
        raise ZeroDivisionError("planted")
    except ZeroDivisionError as error:
        report_failure(error, rank(1))
    assert "in test_a_bug_shows" in caplog.text
    caplog.clear()
    report_failure(DataError("no such file"), LaunchedRank(rank=0, world_size=1, local_rank=0))
    assert messages(caplog) == ["DataError: no such file"]
    assert "Traceback" not in caplog.text


def test_a_killed_rank_cannot_speak_so_the_first_lost_connection_is_told(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if kill -9 of a rank shows the user a traceback from gloo, or nothing at all."""
    report_failure(LOST, rank(3))
    report_failure(LOST, rank(1))
    lost = "lost its connection to another rank, which died or was killed"
    assert messages(caplog) == [
        f"This rank {lost}: [gloo] Connection closed by peer [127.0.0.1]:4321",
        f"Stopping, because another rank failed first (rank 3: {lost}).",
    ]


def test_of_ranks_that_fail_together_one_is_the_first(store: dist.TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if two ranks both think they were first, or one gives up while the first has not written its cause yet."""
    threads = [
        threading.Thread(target=report_failure, args=(ValueError(f"of {number}"), rank(number))) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = messages(caplog)
    assert sum(message.startswith("Unexpected ValueError") for message in told) == 1
    assert len({message for message in told if message.startswith("Stopping")}) == 1
    assert len(told) == 4


def test_a_rank_waits_for_the_cause_of_the_first(store: dist.TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a rank that comes between the first one's count and its cause reports itself."""
    entries = dist.PrefixStore("attempt_0", store)
    entries.add(_COUNT, 1)

    def write_late() -> None:
        time.sleep(0.3)
        entries.set(_CAUSE, "rank 3: slow to speak")

    writer = threading.Thread(target=write_late)
    writer.start()
    report_failure(ValueError("second"), rank(0))
    writer.join()
    assert messages(caplog) == ["Stopping, because another rank failed first (rank 3: slow to speak)."]


def test_a_restarted_launch_forgets_the_last_attempt(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if torchrun's second attempt blames the cause of the first."""
    report_failure(DataError("first attempt"), rank(1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    report_failure(DataError("second attempt"), rank(0))
    assert messages(caplog) == ["DataError: first attempt", "DataError: second attempt"]


def test_without_a_store_a_rank_tells_its_own_cause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a rank whose launcher is gone says nothing, or raises while it reports."""
    caplog.set_level(logging.ERROR)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "not a port")
    report_failure(DataError("my own"), rank(1))
    assert messages(caplog) == ["DataError: my own"]
