"""Output folders are filled and replaced, never removed, and nothing is lost however a replacement ends."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepfuse.data.folder_files import files_below
from stepfuse.data.folder_swap import NEW, OLD, PLAN, WORK
from stepfuse.data.output_file import atomic_file, require_new_file
from stepfuse.data.output_folder import (
    atomic_output_dir,
    complete_interrupted,
    delete_files,
    require_empty_dir,
    resolve_folder,
)
from tests.fixtures_tiny import refused

BEFORE = {"a.txt": "old a", "sub/b.txt": "old b", "sub/deep/c.txt": "old c"}
AFTER = {"a.txt": "new a", "sub/d.txt": "new d"}
FOREIGN = {"notes.md": "mine", "sub/mine.txt": "mine too"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def ours(folder):
    return [Path(name) for name in BEFORE]


def replace(output, files=AFTER, **options):
    with atomic_output_dir(output, **{"ours": ours} | options) as temporary:
        fill(temporary, files)


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "out", BEFORE | FOREIGN)
    return tmp_path / "out"


@contextmanager
def mounted(folder, options="size=1m"):
    """A real tmpfs there."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# Replacing


def test_files_of_the_command_are_replaced_and_all_others_stay(folder):
    place = folder.stat().st_ino
    replace(folder)
    assert contents(folder) == AFTER | FOREIGN
    assert folder.stat().st_ino == place
    assert not (folder / "sub" / "deep").exists()  # it became empty


@pytest.mark.parametrize("kind", ["missing", "empty", "link", "dangling link", "dot", "dots", "slash", "relative"])
def test_an_output_may_be_named_in_any_way(tmp_path, monkeypatch, kind):
    target = tmp_path / "deep" / "target"
    output = target
    if kind not in ("missing", "dangling link"):
        target.mkdir(parents=True)
    if "link" in kind:
        output = tmp_path / "link"
        output.symlink_to(target)
    elif kind == "dot":
        monkeypatch.chdir(target)
        output = Path(".")
    elif kind == "dots":
        output = target / ".." / "target"
    elif kind == "slash":
        output = Path(f"{target}/")
    elif kind == "relative":
        monkeypatch.chdir(tmp_path)
        output = Path("deep/target")
    assert require_empty_dir(output, overwrite=False) == target
    replace(output)
    assert contents(target) == AFTER
    assert output.is_symlink() == ("link" in kind)
    replace(output, {"x": "third"}, ours=lambda _: [Path(name) for name in AFTER])
    assert contents(target) == {"x": "third"}


def test_a_mount_point_is_filled_and_replaced_though_its_parent_is_another_filesystem(tmp_path):
    with mounted(tmp_path / "volume") as volume:
        fill(volume, BEFORE | FOREIGN)
        replace(volume)
        assert contents(volume) == AFTER | FOREIGN
        assert sorted(path.name for path in tmp_path.iterdir()) == ["volume"]


def test_a_folder_is_filled_though_its_parent_is_read_only(tmp_path):
    with mounted(tmp_path / "parent") as parent:
        (parent / "out").mkdir()
        with mounted(parent / "out") as output:
            subprocess.run(["mount", "-o", "remount,ro", parent], check=True)
            replace(output)
            assert contents(output) == AFTER
            with refused("parent", "read-only"):
                require_empty_dir(parent / "other", overwrite=False)
            with refused("parent", "read-only"):
                require_new_file(parent / "file.txt", overwrite=True)


def test_a_volumes_lost_and_found_is_no_content(tmp_path):
    (tmp_path / "lost+found").mkdir()
    require_empty_dir(tmp_path, overwrite=False)


# Nothing is lost


@pytest.mark.parametrize("name", ["notes.md", "sub/mine.txt/x", "notes.md/x", "sub"])
def test_a_new_file_never_takes_the_position_of_one_of_other_origin(folder, name):
    before = contents(folder)
    with refused(str(folder), "notes.md" if "notes" in name else "sub/mine.txt"):
        replace(folder, {"a.txt": "new", name: "new"})
    assert contents(folder) == before
    assert not (folder / WORK).exists()


def test_a_folder_that_is_a_link_is_not_written_through(folder, tmp_path):
    shutil.move(folder / "sub", tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with refused("sub"):
        replace(folder)
    delete_files(folder, ours(folder))
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_that_fails_changes_nothing(tmp_path, existing, error):
    output = tmp_path / "new" / "out"
    if existing:
        fill(output, BEFORE)

    def check(temporary):
        assert contents(temporary) == AFTER
        raise error

    with pytest.raises(error):
        replace(output, check=check)
    assert (contents(output) if existing else list(tmp_path.iterdir())) == (BEFORE if existing else [])


def test_content_that_is_found_wrong_changes_nothing(folder):
    def check(temporary):
        raise ValueError("wrong")

    with refused("wrong"):
        replace(folder, check=check)
    assert contents(folder) == BEFORE | FOREIGN


def test_a_full_disk_changes_nothing(tmp_path):
    with mounted(tmp_path / "volume") as volume:
        fill(volume, BEFORE)
        with refused("volume", os.strerror(errno.ENOSPC)):
            replace(volume, {"a.txt": "new", "big": "x" * 2**21})
        assert contents(volume) == BEFORE
        replace(volume)  # there is room again


def test_a_limit_on_the_size_of_files_changes_nothing(folder):
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with refused(str(folder), os.strerror(errno.EFBIG)):
            replace(folder, {"a.txt": "new", "big": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before


def test_a_swap_that_fails_half_way_is_undone(folder):
    """`sub` is a volume: files move to it from the folder's filesystem only by copying, and it cannot be moved."""
    shutil.rmtree(folder / "sub")
    with mounted(folder / "sub"):
        fill(folder, BEFORE)
        with refused(str(folder), os.strerror(errno.EXDEV)):
            replace(folder)
        assert contents(folder) == BEFORE | {"notes.md": "mine"}
        assert not (folder / WORK).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from stepfuse.data.output_folder import atomic_output_dir

left = int(sys.argv[2])

def rename(source, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(source, target)

move, os.rename = os.rename, rename
with atomic_output_dir(Path(sys.argv[1]), ours=lambda _: [Path(name) for name in sys.argv[3].split()]) as temporary:
    for name in ("a.txt", "sub/d.txt"):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text("new " + name[-5])
"""


@pytest.mark.parametrize("moves", range(5))  # three files go and two come
def test_a_process_killed_while_it_replaces_is_completed_by_the_next(folder, moves):
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(moves), " ".join(BEFORE)])
    assert done.returncode == -signal.SIGKILL
    assert (folder / WORK / PLAN).exists()
    complete_interrupted(folder)
    assert contents(folder) == AFTER | FOREIGN


def test_a_process_killed_while_it_writes_leaves_the_old_and_the_next_cleans_up(folder):
    (folder / WORK / NEW).mkdir(parents=True)
    (folder / WORK / NEW / "a.txt").write_text("hal")
    complete_interrupted(folder)
    assert (folder / "a.txt").read_text() == "old a"
    replace(folder)
    assert contents(folder) == AFTER | FOREIGN


def test_what_a_killed_process_left_in_a_new_folder_is_no_content(tmp_path):
    (tmp_path / "out" / WORK / NEW).mkdir(parents=True)
    require_empty_dir(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize("name", ["../stolen", "/stolen", ".", f"{WORK}/{NEW}/x"])
def test_a_plan_by_another_hand_moves_nothing_out_of_the_folder(folder, tmp_path, name):
    for part in (NEW, OLD):
        (folder / WORK / part).mkdir(parents=True)
    (folder / WORK / PLAN).write_text(f'{{"old": ["{name}"], "new": []}}')
    (tmp_path / "stolen").write_text("mine")
    with refused(str(folder / WORK)):
        complete_interrupted(folder)
    assert (tmp_path / "stolen").exists()
    assert not contents(folder / WORK / OLD)


def test_a_plan_whose_files_are_elsewhere_is_refused(folder, tmp_path):
    (folder / WORK / OLD).mkdir(parents=True)
    fill(tmp_path / "elsewhere", {"x": "mine"})
    (folder / WORK / NEW).symlink_to(tmp_path / "elsewhere")
    (folder / WORK / PLAN).write_text('{"old": [], "new": ["x"]}')
    with refused(str(folder / WORK)):
        complete_interrupted(folder)
    assert contents(tmp_path / "elsewhere") == {"x": "mine"}


def test_two_processes_do_not_replace_one_folder_together(folder):
    with atomic_output_dir(folder, ours=ours) as temporary:
        fill(temporary, AFTER)
        with refused(str(folder), "another process"):
            replace(folder)
    assert contents(folder) == AFTER | FOREIGN


# What is refused before anything is done


def test_a_folder_that_holds_something_is_refused_unless_overwritten(folder):
    with refused(str(folder), "--overwrite"):
        require_empty_dir(folder, overwrite=False)
    require_empty_dir(folder, overwrite=True, ours=ours, writes=["a.txt"])
    with refused("notes.md"):
        require_empty_dir(folder, overwrite=True, ours=ours, writes=["notes.md"])
    with refused("sub/mine.txt"):
        require_empty_dir(folder, overwrite=True, ours=ours, writes=["sub"])


@pytest.mark.parametrize("name", ["a.txt", "a.txt/below", "a.txt/below/deeper"])
def test_a_path_that_is_or_lies_below_a_file_is_no_folder(folder, name):
    with refused("a.txt"):
        resolve_folder(folder / name)


@pytest.mark.parametrize("name", ["nowhere/../out", "nowhere/../../out/file.txt"])
def test_a_path_that_leads_back_from_nowhere_is_named(folder, tmp_path, name):
    for check in (lambda path: replace(path), lambda path: require_new_file(path, overwrite=True)):
        with refused("no folder", "nowhere"):
            check(tmp_path / name)
    assert contents(tmp_path / "out") == BEFORE | FOREIGN


def test_links_in_a_ring_are_one_line(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with refused("one"):
        replace(tmp_path / "one")


def test_a_name_too_long_is_one_line(tmp_path):
    with refused(os.strerror(errno.ENAMETOOLONG)):
        replace(tmp_path / ("x" * 300))


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "table.csv"
    with atomic_file(file) as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("first")
    block = atomic_file(file)
    block.__enter__().write_text("hal")
    assert block.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert contents(tmp_path) == {"new/table.csv": "first"}


def test_a_file_keeps_its_mode_and_a_link_leads_to_the_new_one(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "target.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    with atomic_file(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"
    assert (tmp_path / "target.txt").stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_and_not_replaced():
    with atomic_file(Path("/dev/null")) as temporary:
        temporary.write_text("nothing")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "overwrite", "culprit"),
    [("a.txt", False, "--overwrite"), ("sub", True, "folder"), ("a.txt/x", True, "a.txt")],
)
def test_a_file_that_cannot_be_written_is_named(folder, name, overwrite, culprit):
    with refused(name, culprit):
        require_new_file(folder / name, overwrite=overwrite)
    assert contents(folder) == BEFORE | FOREIGN


def test_an_output_folder_that_is_a_new_volume_counts_as_empty(tmp_path):
    (tmp_path / "lost+found").mkdir()
    require_empty_dir(tmp_path, overwrite=False)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        require_empty_dir(tmp_path, overwrite=False)
    require_empty_dir(tmp_path, overwrite=True)


# Clearing


def test_clearing_deletes_the_files_of_the_command_alone(folder, tmp_path):
    (folder / "link").symlink_to(tmp_path)
    delete_files(folder, files_below(folder, "a.txt", "sub/deep", "link"))
    assert contents(folder) == {"sub/b.txt": "old b"} | FOREIGN
    assert tmp_path.exists()
    assert not (folder / "sub" / "deep").exists()
