"""The output folder of a run while it is locked."""

from pathlib import Path

import pytest
from filelock import FileLock

from stepfuse.data.run_lock import LOCK, check_free, locked
from tests.fixtures_tiny import refused


def test_a_lock_is_refused_by_its_holder_or_where_none_can_be_read_as_another_runs(tmp_path, monkeypatch):
    with locked(tmp_path):
        text = (tmp_path / LOCK).read_text()
        with refused(f"in use by {text.strip()};"), locked(tmp_path):
            pass

    def unreadable(*_, **__):
        raise PermissionError(13, "Permission denied")

    with FileLock(tmp_path / LOCK):
        monkeypatch.setattr(Path, "read_text", unreadable)
        with refused("in use by another run;"), locked(tmp_path):
            pass


def test_a_folder_that_a_run_will_refuse_is_found_before_and_left_as_it_is(tmp_path):
    folder = tmp_path / "new"
    check_free(folder, empty=True)
    assert not folder.exists()
    with locked(folder), refused("in use by"):
        check_free(folder, empty=False)
    (folder / "mine.txt").write_text("mine")
    (folder / LOCK).write_text("left by a run that was killed")
    with refused("not empty"):
        check_free(folder, empty=True)
    check_free(folder, empty=False)


@pytest.mark.parametrize("kept", [False, True])
def test_folders_that_a_failed_run_created_are_deleted_unless_they_hold_something(tmp_path, kept):
    output = tmp_path / "a" / "b"

    def fail():
        if kept:
            (output / "config.yaml").write_text("rank: 4\n")
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError), locked(output):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "b", "config.yaml"] if kept else [])
