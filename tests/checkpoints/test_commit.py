"""A file or folder is the old one or the new one whatever fails, and no change to a sealed folder goes unseen."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from failing_disk import CRASHES, MODES, Crash, FailingDisk

from crocuta.checkpoints import commit
from crocuta.checkpoints.commit import MANIFEST, replace_file, verify_folder, write_folder
from crocuta.errors import CheckpointError


def fill(folder: Path) -> None:
    """What a caller of write_folder does: one file through the protocol, one of its own making."""
    replace_file(folder / "a.bin", bytes(range(256)) * 40)
    (folder / "b.txt").write_text("hello\n")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    write_folder(tmp_path / "sealed", fill)
    return tmp_path / "sealed"


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(commit.TEMPORARY)]


def count_operations(monkeypatch: pytest.MonkeyPatch, action) -> int:
    disk = FailingDisk()
    monkeypatch.setattr(commit, "disk", disk)
    action()
    return len(disk.operations)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_is_the_old_or_the_new_one_wherever_the_disk_fails(mode, tmp_path, monkeypatch):
    old, new = b"old" * 1000, b"new" * 1000
    total = count_operations(monkeypatch, lambda: replace_file(tmp_path / "rehearsal", new))
    assert total >= 6  # create, write, sync, close, rename, sync of the folder
    contents = set()
    for k in range(total):
        path = tmp_path / str(k) / "file"
        path.parent.mkdir()
        path.write_bytes(old)
        monkeypatch.setattr(commit, "disk", FailingDisk(k, mode))
        outcome: BaseException | None = None
        try:
            replace_file(path, new)
        except (Crash, CheckpointError) as error:
            outcome = error
        assert path.read_bytes() in (old, new)
        assert path.read_bytes() == new or outcome is not None
        if isinstance(outcome, CheckpointError):
            assert str(path) in str(outcome)
            assert leftovers(path.parent) == []
        contents.add(path.read_bytes())
    assert contents == ({new} if mode == "short write" else {old, new})


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_is_absent_or_whole_wherever_the_disk_fails(mode, tmp_path, monkeypatch):
    total = count_operations(monkeypatch, lambda: write_folder(tmp_path / "rehearsal", fill))
    seen = set()
    for k in range(total):
        target = tmp_path / str(k) / "target"
        target.parent.mkdir()
        monkeypatch.setattr(commit, "disk", FailingDisk(k, mode))
        try:
            write_folder(target, fill)
            assert target.exists()
        except Crash:
            assert mode in CRASHES
        except CheckpointError:
            assert leftovers(target.parent) == []
        seen.add(target.exists())
        if target.exists():
            assert verify_folder(target) == ("a.bin", "b.txt")
    assert seen == ({True} if mode == "short write" else {True, False})


def test_the_failure_of_a_full_disk_names_path_and_bytes(tmp_path, monkeypatch):
    for k in (0, 1, 2):
        monkeypatch.setattr(commit, "disk", FailingDisk(k, "no space"))
        with pytest.raises(CheckpointError, match=r"/file: got No space left .*, [\d,]+ bytes free; .*3,000 bytes"):
            replace_file(tmp_path / "file", b"x" * 3000)


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "target", interrupted)
    assert os.listdir(tmp_path) == []


class PowerDisk(FailingDisk):
    """Leaves out the n-th of the operations that force something to the disk."""

    def __init__(self, left_out: int | None = None) -> None:
        super().__init__()
        self.syncs, self.left_out = 0, left_out
        self.descriptors: dict[int, Path] = {}
        self.unsafe_files: set[Path] = set()
        self.unsafe_folders: set[Path] = set()

    def perform(self, name, *arguments):
        if name.startswith("sync"):
            self.syncs += 1
            if self.syncs - 1 == self.left_out:
                return None
        if name == "sync_path" and not arguments[0].is_dir():
            self.unsafe_files.discard(arguments[0])
        elif name == "sync_path":
            self.unsafe_folders.discard(arguments[0])
        elif name == "sync":
            self.unsafe_files.discard(self.descriptors[arguments[0]])
        elif name == "rename":
            self.rename_now(*arguments)
        result = super().perform(name, *arguments)
        if name == "create":
            self.descriptors[result] = arguments[0]
            self.unsafe_folders.add(arguments[0].parent)
        if name == "write":
            self.unsafe_files.add(self.descriptors[arguments[0]])
        return result

    def rename_now(self, old: Path, new: Path) -> None:
        """The rule that power cuts impose: whatever gets its final name must be on the disk already."""
        assert old not in self.unsafe_files, f"{new.name} named before its bytes are on the disk"
        if old.is_dir():
            assert old not in self.unsafe_folders, f"{new.name} named before its names are on the disk"
            assert not {file for file in self.unsafe_files if file.parent == old}
        self.unsafe_folders.add(new.parent)


def power_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: int | None) -> tuple[bool, int]:
    disk = PowerDisk(left_out)
    monkeypatch.setattr(commit, "disk", disk)
    name = f"power-{left_out}"
    try:
        write_folder(tmp_path / name, lambda folder: (folder / "b.txt").write_text("hello\n") and None)
        replace_file(tmp_path / f"{name}.txt", b"hello")
    except AssertionError:
        return False, disk.syncs
    return not disk.unsafe_files and not disk.unsafe_folders, disk.syncs


def test_everything_is_on_the_disk_before_it_is_named_and_reported(tmp_path, monkeypatch):
    safe, syncs = power_safe(tmp_path, monkeypatch, None)
    assert safe
    # Controls. Number 0 forces a file that another writer made, which this model of a disk does not see; the name
    # of the folder (3) is forced together with the later file's (5), so each alone hides the other.
    unsafe = {n for n in range(syncs) if not power_safe(tmp_path, monkeypatch, n)[0]}
    assert syncs == 6
    assert unsafe == {1, 2, 4, 5}


def test_a_file_that_the_caller_wrote_is_forced_to_the_disk(tmp_path, monkeypatch):
    disk = FailingDisk()
    monkeypatch.setattr(commit, "disk", disk)
    write_folder(tmp_path / "target", lambda folder: (folder / "b.txt").write_text("hello\n") and None)
    verbs = [operation.split()[0] for operation in disk.operations]
    synced = [i for i, operation in enumerate(disk.operations) if "b.txt" in operation]
    assert synced
    assert synced[-1] < verbs.index("rename")
    assert disk.operations[-1] == f"sync_path {tmp_path}"


def test_an_existing_target_is_never_overwritten(sealed):
    with pytest.raises(CheckpointError, match="exists"):
        write_folder(sealed, fill)
    assert verify_folder(sealed) == ("a.bin", "b.txt")


@pytest.mark.parametrize("make", [lambda p: (p / "sub").mkdir(), lambda p: (p / "l").symlink_to("/etc/hosts")])
def test_only_plain_files_can_be_sealed(make, tmp_path):
    with pytest.raises(CheckpointError, match="cannot seal"):
        write_folder(tmp_path / "target", make)
    assert os.listdir(tmp_path) == []


def test_300_random_bit_flips_are_all_found(sealed):
    rng = random.Random(1)
    for _ in range(300):
        path = sealed / rng.choice(["a.bin", "b.txt", MANIFEST, MANIFEST])
        data = bytearray(original := path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=path.name if path.name != MANIFEST else None):
            verify_folder(sealed)
        path.write_bytes(original)
    verify_folder(sealed)


def test_every_truncation_is_found(sealed):
    for path in sorted(sealed.iterdir()):
        original = path.read_bytes()
        for size in sorted({*range(0, len(original), 1 + len(original) // 60), len(original) - 1}):
            path.write_bytes(original[:size])
            with pytest.raises(CheckpointError, match=path.name):
                verify_folder(sealed)
        path.write_bytes(original + b" ")
        with pytest.raises(CheckpointError, match=path.name):
            verify_folder(sealed)
        path.write_bytes(original)
    verify_folder(sealed)


def swap(folder: Path) -> None:
    (folder / "a.bin").rename(folder / "c")
    (folder / "b.txt").rename(folder / "a.bin")
    (folder / "c").rename(folder / "b.txt")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json: got No such file"),
        (lambda f: (f / "extra").touch(), "extra is extra"),
        (swap, "a.bin is damaged"),
        (lambda f: ((f / "b.txt").unlink(), (f / "b.txt").mkdir()), "b.txt is not a plain file"),
        (
            lambda f: (shutil.move(f / "b.txt", f.parent), (f / "b.txt").symlink_to("../b.txt")),
            "not a plain file",
        ),
        (lambda f: (f / MANIFEST).write_text("[1]"), "damaged"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a": 1}}'), "damaged"),
        (lambda f: ((f / MANIFEST).unlink(), os.mkfifo(f / MANIFEST)), "not a regular file"),
    ],
)
def test_other_damage_is_named(damage, reason, sealed):
    damage(sealed)
    with pytest.raises(CheckpointError, match=reason):
        verify_folder(sealed)


def test_extra_files_can_be_allowed(sealed):
    (sealed / "extra").touch()
    assert verify_folder(sealed, allow_extra=True) == ("a.bin", "b.txt")


def test_a_file_too_large_for_the_limit_of_the_process_is_a_clear_error(tmp_path):
    import resource

    replace_file(tmp_path / "file", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
            replace_file(tmp_path / "file", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
