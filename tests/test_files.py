"""A file is complete or absent, whenever its writer dies."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from dgmr import files
from dgmr.errors import DgmrError

PACKAGES = Path(__file__).parents[1] / "workflow"
OLD, NEW = "old" * 40_000, "new" * 50_000


def write_file(path, text=NEW):
    with files.replaced(path) as partial:
        partial.write_text(text)


def write_folder(path, text=NEW):
    with files.replaced_folder(path) as partial:
        (partial / "inner").mkdir()
        for name in ("a", "b", "inner/c"):
            (partial / name).write_text(text)


def content(path):
    """Text of a file, or texts of a folder's files, or None where there is nothing."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}
    return path.read_text() if path.exists() else None


def whole(kind, text):
    return text if kind == "file" else dict.fromkeys(("a", "b", "inner/c"), text)


WRITE = {"file": write_file, "folder": write_folder}
both = pytest.mark.parametrize("kind", ["file", "folder"])


@both
def test_written_whole_and_nothing_left_beside_it(tmp_path, kind):
    target = tmp_path / "new" / "deeper" / "target"
    WRITE[kind](target, OLD)
    assert content(target) == whole(kind, OLD)
    WRITE[kind](target, NEW)
    assert content(target) == whole(kind, NEW)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@both
def test_nothing_under_the_final_name_before_the_end(tmp_path, kind):
    target = tmp_path / "target"
    opened = files.replaced(target) if kind == "file" else files.replaced_folder(target)
    with opened as partial:
        inside = partial if kind == "file" else partial / "a"
        inside.write_text(NEW)
        assert not target.exists()
    assert target.exists()


@both
@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "old"])
def test_error_leaves_what_was_there(tmp_path, kind, before):
    target = tmp_path / "target"
    if before:
        WRITE[kind](target, before)
    opened = files.replaced(target) if kind == "file" else files.replaced_folder(target)
    with pytest.raises(KeyError), opened as partial:
        (partial if kind == "file" else partial / "a").write_text(NEW)
        raise KeyError
    assert content(target) == (whole(kind, before) if before else None)
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if before else [])


def test_folder_loses_files_of_the_one_before(tmp_path):
    with files.replaced_folder(tmp_path / "target") as partial:
        (partial / "gone").write_text(OLD)
    write_folder(tmp_path / "target")
    assert not (tmp_path / "target" / "gone").exists()


@both
def test_bytes_are_flushed_before_the_rename(tmp_path, kind, monkeypatch):
    events = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def recorded_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recorder(act):
        def recorded(self, target):
            events.append("rename")
            return act(self, target)

        return recorded

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorder(replace))
    monkeypatch.setattr(Path, "rename", recorder(rename))
    WRITE[kind](tmp_path / "target")
    written = {"target", "a", "b", "inner", "c"} if kind == "folder" else {"target.partial"}
    middle = events.index("rename")
    assert set(events[:middle]) == written
    assert events[middle:] == ["rename", tmp_path.name]


# A writer as a process of its own: argv is kind, target and the step at which it dies.
WRITER = f"""
import os, signal, sys
sys.path.insert(0, {str(PACKAGES)!r})
from pathlib import Path
from dgmr import files
from dgmr.errors import DgmrError

kind, target, dies_at = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
text = "new" * {len(NEW) // 3}

def pause():
    if dies_at == "middle":
        print("half written", flush=True)
        sys.stdin.read()

steps = 0
def at_step(event, arguments):
    # What changes the disk: files opened to be written, os.mkdir, os.rename, os.remove, os.rmdir.
    global steps
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        steps += 1
        if steps == int(dies_at):
            os.kill(os.getpid(), signal.SIGKILL)

if dies_at != "middle":
    sys.addaudithook(at_step)
if kind == "file":
    with files.replaced(target) as partial, partial.open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        pause()
        file.write(text[len(text) // 2 :])
else:
    with files.replaced_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "a").write_text(text)
        (partial / "b").write_text(text[: len(text) // 2])
        pause()
        (partial / "b").write_text(text)
        (partial / "inner" / "c").write_text(text)
"""


def writer(kind, target, dies_at):
    # -S: no site packages, which the writer does not need and which take time.
    command = [sys.executable, "-S", "-c", WRITER, kind, str(target), str(dies_at)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@both
@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "old"])
def test_killed_in_the_middle_of_writing(tmp_path, kind, before):
    target = tmp_path / "target"
    if before:
        WRITE[kind](target, before)
    with writer(kind, target, "middle") as process:
        assert process.stdout.readline() == "half written\n"
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    # It did die in the middle: half of it lies there, under another name.
    half = tmp_path / "target.partial" / ("target/b" if kind == "folder" else "")
    assert half.read_text() == NEW[: len(NEW) // 2]
    assert content(target) == (whole(kind, before) if before else None)

    WRITE[kind](target)
    assert content(target) == whole(kind, NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@both
def test_killed_at_every_step(tmp_path, kind):
    """Old, new, or nothing; never a part, also while the old one is being replaced."""
    seen, kills = [], 0
    while True:
        target = tmp_path / f"{kills}" / "target"
        WRITE[kind](target, OLD)
        with writer(kind, target, kills + 1) as process:
            process.stdin.close()
            status = process.wait(timeout=60)
        seen.append(content(target))
        assert seen[-1] in (whole(kind, OLD), whole(kind, NEW), None)
        WRITE[kind](target, NEW)
        assert content(target) == whole(kind, NEW)
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= {"file": 2, "folder": 12}[kind]
    assert seen[0] == whole(kind, OLD) and seen[-1] == whole(kind, NEW)
    assert kind == "folder" or None not in seen  # a file's rename replaces the old one


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "é": "ü"}
    files.write_json(tmp_path / "new" / "v.json", value)
    assert files.read_json(tmp_path / "new" / "v.json") == value
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "new" / "v.json", {"a": object()})
    assert files.read_json(tmp_path / "new" / "v.json") == value


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 bytes"), (1, "1 bytes"), (999, "999 bytes"), (1000, "1 kB"), (83_230, "83.2 kB")]
    + [(999_600, "1 MB"), (1_234_000_000, "1.23 GB"), (10**12, "1 TB"), (4.5e15, "4500 TB")],
)
def test_sizes_have_three_digits_and_a_unit(count, told):
    assert files.readable(count) == told


def test_sha256_is_the_official_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected


def test_link_gives_a_second_name(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_text(NEW)
    target.parent.mkdir()
    files.link_or_copy(source, target)
    assert target.samefile(source)


def test_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_text(NEW)
    files.link_or_copy(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").samefile(tmp_path / "source")
    assert (tmp_path / "target").read_text() == NEW


def write_room(folder, text):
    """Two files, a folder and the one that vouches for them."""
    with files.replaced_files(folder, "last") as partial:
        (partial / "inner").mkdir()
        for name in ("a", "b", "inner/c", "last"):
            (partial / name).write_text(text)


ROOM = ("a", "b", "inner/c", "last")


def test_files_that_belong_together_leave_the_others_alone(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    for name in ("other", "z"):
        (room / name).write_text("other")
    for text in (OLD, NEW):
        write_room(room, text)
        others = {"other": "other", "z": "other"}
        assert content(room) == dict.fromkeys(ROOM, text) | others


def test_what_vouches_goes_first_and_comes_last(tmp_path, monkeypatch):
    write_room(tmp_path, OLD)
    moved, rename = [], Path.rename

    def recorded(self, target):
        moved.append(str(target.relative_to(tmp_path)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    write_room(tmp_path, NEW)
    gone = [f"last.discarded/{name}" for name in ("last", "a", "b", "inner")]
    assert moved == [*gone, "a", "b", "inner", "last"]


@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "old"])
def test_a_rename_that_fails_takes_the_others_back(tmp_path, monkeypatch, before):
    count = 8 if before else 4
    rename = Path.rename
    for fails_at in range(1, count + 1):
        room = tmp_path / str(fails_at)
        if before:
            write_room(room, before)
        left = [fails_at]

        def failing(self, target, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return rename(self, target)

        with monkeypatch.context() as patched, pytest.raises(DgmrError):
            patched.setattr(Path, "rename", failing)
            write_room(room, NEW)
        assert content(room) == (dict.fromkeys(ROOM, before) if before else {})
    write_room(tmp_path / "done", NEW)


def test_a_disk_that_fails_is_told_with_the_file(tmp_path, monkeypatch):
    for number, words in ((errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output")):

        def fail(_descriptor, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(DgmrError, match=f"target.* cannot be written .{words}.*make room on"):
            write_folder(tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), files.replaced(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "mine")


def test_a_linked_file_stays_protected(tmp_path):
    """DVC's cache may have the same file, and protects it."""
    source = tmp_path / "source"
    source.write_text(NEW)
    source.chmod(0o400)
    with files.replaced_folder(tmp_path / "room") as partial:
        files.link_or_copy(source, partial / "linked")
    assert stat.S_IMODE(source.stat().st_mode) & 0o777 == 0o444


def test_only_what_is_kept_stays(tmp_path):
    for name in ("a/x", "a/old/x", "b/c/x", "b/x", "old/deep/x", "old.stamp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(NEW)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files.keep_only(tmp_path, [tmp_path / "a", tmp_path / "b/c"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a/x", "a/old/x", "b/c/x"}
    files.keep_only(tmp_path, [])
    assert not list(tmp_path.iterdir())
