"""What lies in a run folder, what is refused, and what is left alone."""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import esjax
from esjax.config.settings import Config, DataConfig, EsConfig, to_yaml
from esjax.data.text_files import FileRecord
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.runs.durable import write_new_files, write_new_folder
from esjax.runs.folder import FORMAT, RunFolder
from esjax.runs.reader import is_running, read_run

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")

CONFIG = Config(seed=5, data=DataConfig(text="some/text.txt"))
VOCABULARY = Vocabulary("char", ("a", " ", "é", "\n", '"', "\U0001f600"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "first"
    RunFolder.create(path, CONFIG, VOCABULARY, "digest of the text")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def refused(path: Path) -> str:
    with pytest.raises(EsjaxError) as caught:
        RunFolder(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_new_run_is_read_back_as_it_was_made(path: Path) -> None:
    folder = RunFolder(path)
    assert folder.config == CONFIG
    assert folder.vocabulary == VOCABULARY
    assert folder.text_digest == "digest of the text"
    assert (path / "config.yaml").read_text(encoding="utf-8") == to_yaml(CONFIG)


def test_the_files_of_a_text_are_read_back_whatever_their_names(tmp_path: Path) -> None:
    """A name may hold bytes that are no UTF-8, or what ends a line for `str.splitlines`."""
    files = [FileRecord(name, 1, "digest") for name in ("caf\udce9.txt", "a\u2028b.txt", "a\nb.txt")]
    RunFolder.create(tmp_path / "run", CONFIG, VOCABULARY, "", text_files=files)
    assert RunFolder(tmp_path / "run").read_text_files() == files


def test_the_bytes_vocabulary_is_read_back(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG, Vocabulary("byte"), "")
    assert RunFolder(tmp_path / "run").vocabulary == Vocabulary("byte")


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", CONFIG, VOCABULARY, "").config == CONFIG


def test_an_existing_run_is_left_alone(path: Path) -> None:
    before = contents(path)
    with pytest.raises(EsjaxError, match="exists already") as caught:
        RunFolder.create(path, Config(), Vocabulary("byte"), "other")
    assert str(path) in str(caught.value)
    assert contents(path) == before


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(EsjaxError, match="exists already"):
        RunFolder.create(tmp_path / "run", CONFIG, VOCABULARY, "")
    assert contents(tmp_path) == {"run": b"mine"}


def test_a_folder_inside_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EsjaxError, match="cannot write"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG, VOCABULARY, "")
    assert contents(tmp_path) == {"file": b"mine"}


@needs_permissions
def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EsjaxError, match="cannot write"):
        RunFolder.create(tmp_path / "run", CONFIG, VOCABULARY, "")


@needs_permissions
def test_an_unwritable_run_cannot_be_locked_but_read(path: Path) -> None:
    path.chmod(0o500)
    folder = RunFolder(path)
    with pytest.raises(EsjaxError, match="cannot write"):
        folder.lock()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(tmp_path / "none")


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    name = "x" * 300
    assert name in refused(tmp_path / name)
    with pytest.raises(EsjaxError, match=name):
        RunFolder.create(tmp_path / name, CONFIG, VOCABULARY, "")


@needs_permissions
def test_a_place_that_may_not_be_looked_into_is_refused(path: Path) -> None:
    path.parent.chmod(0)
    try:
        assert str(path) in refused(path)
        with pytest.raises(EsjaxError):
            RunFolder.create(path, CONFIG, VOCABULARY, "")
    finally:
        path.parent.chmod(0o700)


def test_a_folder_of_something_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert "not a run folder" in message


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "vocabulary.json"])
def test_a_missing_part_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    message = refused(path)
    assert f"it has no {name}" in message
    assert ("is damaged" in message) == (name != "run.json")


def test_another_format_is_told_with_both_numbers_and_the_version_to_use(path: Path) -> None:
    (path / "run.json").write_text(json.dumps({"format": FORMAT + 1, "esjax": "9.8.7"}))
    message = refused(path)
    assert f"format {FORMAT + 1}" in message
    assert f"format {FORMAT}" in message
    assert "9.8.7" in message


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", ""),
        ("run.json", '{"format": 1'),
        ("run.json", "[1]"),
        ("run.json", "\udcff"),
        ("vocabulary.json", ""),
        ("vocabulary.json", '{"kind": "char", "symbols": ["a"'),
        ("vocabulary.json", '{"kind": "char"}'),
        ("vocabulary.json", '{"symbols": ["a"]}'),
        ("vocabulary.json", '{"kind": "char", "symbols": 3}'),
        ("vocabulary.json", '{"kind": "char", "symbols": [1, 2]}'),
        ("vocabulary.json", '{"kind": "char", "symbols": ["ab"]}'),
        ("vocabulary.json", '{"kind": "char", "symbols": ["a", "a"]}'),
        ("vocabulary.json", '{"kind": "words", "symbols": ["a"]}'),
        ("vocabulary.json", "\udcff"),
        ("config.yaml", "seed: [1"),
        ("config.yaml", "seed: many"),
        ("config.yaml", "\udcff"),
    ],
)
def test_a_damaged_file_is_named(path: Path, name: str, damage: str) -> None:
    (path / name).write_text(damage, encoding="utf-8", errors="surrogateescape")
    assert name in refused(path)


def test_a_folder_in_place_of_a_file_is_named(path: Path) -> None:
    (path / "config.yaml").unlink()
    (path / "config.yaml").mkdir()
    assert "config.yaml" in refused(path)


def test_a_run_has_one_lock(path: Path) -> None:
    first, second = RunFolder(path), RunFolder(path)
    first.lock()
    with pytest.raises(EsjaxError, match="another process") as caught:
        second.lock()
    assert str(path) in str(caught.value)
    first.unlock()
    second.lock()
    with pytest.raises(EsjaxError, match="another process"):
        first.lock()
    second.unlock()


def test_a_new_run_is_locked_from_its_creation_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "new", CONFIG, VOCABULARY, "")
    assert is_running(tmp_path / "new")
    with pytest.raises(EsjaxError, match="another process"):
        RunFolder(tmp_path / "new").lock()
    with folder.locked():
        assert is_running(tmp_path / "new")
    assert not is_running(tmp_path / "new")
    with RunFolder(tmp_path / "new").locked():
        assert is_running(tmp_path / "new")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_named_as_such(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre and some of NFS are: nobody trains the run, and so it is not said to be running either."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    RunFolder(path).lock()  # so that there is a file to lock
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(EsjaxError, match=r"cannot lock .*; use a folder on a file system with file locks") as caught:
        RunFolder(path).lock()
    assert os.strerror(number) in str(caught.value)
    assert not is_running(path)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_process_holds_is_said(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By flock(2) the first, by fcntl(2), which network file systems make of it, either."""

    def held(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    RunFolder(path).lock()
    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(EsjaxError, match="is being trained by another process"):
        RunFolder(path).lock()
    assert is_running(path)


def test_unlocking_what_is_not_locked_does_nothing(path: Path) -> None:
    first, second = RunFolder(path), RunFolder(path)
    first.lock()
    second.unlock()
    with pytest.raises(EsjaxError, match="another process"):
        second.lock()
    first.unlock()


def not_told(line: str) -> None:
    raise AssertionError(line)


def lines(path: Path) -> list[str]:
    return (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_metrics_are_appended(path: Path) -> None:
    folder = RunFolder(path)
    for step in (1, 2):
        with folder.open_metrics(step - 1, not_told) as metrics:
            metrics.write(json.dumps({"step": step}) + "\n")
    assert lines(path) == ['{"step": 1}', '{"step": 2}']


def test_metrics_after_the_checkpoint_are_cut_off(path: Path) -> None:
    written = [json.dumps({"step": step, "loss": step / 3}) for step in range(1, 6)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in written))
    with RunFolder(path).open_metrics(3, not_told) as metrics:
        metrics.write('{"step": 4}\n')
    assert lines(path) == [*written[:3], '{"step": 4}']


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step"', "{}", '"step"', "\0\0\0\0"])
def test_a_torn_last_line_of_metrics_is_dropped(path: Path, torn: str) -> None:
    (path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    with RunFolder(path).open_metrics(1, not_told) as metrics:  # the checkpoint is before it: it is done again
        metrics.write('{"step": 2}\n')
    assert lines(path) == ['{"step": 1}', '{"step": 2}']


def test_lines_that_are_missing_for_good_are_told(path: Path) -> None:
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n{"step": 6}\n')
    told: list[str] = []
    with RunFolder(path).open_metrics(4, told.append) as metrics:  # 2 is torn, 4 was never written
        metrics.write('{"step": 5}\n')
    assert lines(path) == ['{"step": 1}', '{"step": 3}', '{"step": 5}']
    assert told == [f"{path / 'metrics.jsonl'} has no whole line for 2 of 4 steps; they stay left out"]


def test_lost_metrics_are_told(path: Path) -> None:
    told: list[str] = []
    with RunFolder(path).open_metrics(3, told.append) as metrics:
        metrics.write('{"step": 4}\n')
    assert told == [f"{path / 'metrics.jsonl'} has no whole line for 3 of 3 steps; they stay left out"]


def test_metrics_that_cannot_be_read_are_no_traceback(path: Path) -> None:
    (path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe')
    with RunFolder(path).open_metrics(1, not_told) as metrics:
        metrics.write('{"step": 2}\n')
    assert lines(path) == ['{"step": 1}', '{"step": 2}']


def test_samples_are_appended_under_their_step(path: Path) -> None:
    folder = RunFolder(path)
    folder.add_sample(3, "first\ntext")
    folder.add_sample(4, "é")
    samples = (path / "samples.txt").read_text(encoding="utf-8")
    assert samples == "--- step 3\nfirst\ntext\n\n--- step 4\né\n\n"


@pytest.mark.usefixtures("lenient_promotion")
def test_a_run_of_the_format_before_is_used_and_not_gone_on_with(tmp_path: Path) -> None:
    """Its weights are the same; its noise and its last bits were others."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    path = tmp_path / "run"
    config = Config(steps=2, data=DataConfig(text=str(text)), es=EsConfig(population_size=16), ledger=True)
    list(esjax.train(config, path))
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**run, "format": 1}))
    for begin in (esjax.resume, esjax.resume_serving, esjax.replay):
        with pytest.raises(EsjaxError, match=r"earlier esjax.* cannot be resumed or replayed; evaluate, generate"):
            begin(path)
    loaded = esjax.load(path)
    assert loaded.generate("the", max_tokens=3)
    assert loaded.evaluate().nats_per_token > 0
    assert esjax.export(path, tmp_path / "weights.safetensors")


def test_the_token_may_have_any_name(path: Path, tmp_path: Path) -> None:
    folder = RunFolder(path)
    for name in ("my keys", "new\nline", "trailing\n"):
        with folder.keep_address("tcp://127.0.0.1:1", tmp_path / name):
            assert (folder.address, folder.token) == ("tcp://127.0.0.1:1", tmp_path / name)
    with folder.keep_address("tcp://127.0.0.1:1"):
        assert (folder.address, folder.token) == ("tcp://127.0.0.1:1", None)


@pytest.mark.parametrize(
    "name", ["no", "1e3", "~", "null", "2026-01-01", "a: b # c", "[1]", "\x85\u2028😀", "back\\slash", "&a"]
)
def test_settings_hold_every_name_of_a_text(tmp_path: Path, name: str) -> None:
    config = Config(data=DataConfig(text=name))
    assert RunFolder.create(tmp_path / "run", config, VOCABULARY, "").config == config
    assert read_run(tmp_path / "run").settings["data.text"] == name


def together(count: int, act: Callable[[int], object]) -> list[object]:
    """Do something in some threads at once; return what each returned or raised."""
    start = threading.Barrier(count)

    def one(number: int) -> object:
        start.wait()
        try:
            return act(number)
        except EsjaxError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("is_there", [False, True])
def test_of_several_that_make_a_folder_at_once_one_succeeds(tmp_path: Path, is_there: bool) -> None:
    for attempt in range(10):
        path = tmp_path / f"run {attempt}"
        if is_there:
            path.mkdir()
        found = together(4, lambda seed, path=path: RunFolder.create(path, Config(seed=seed), VOCABULARY, f"{seed}"))
        (seed,) = [number for number, one in enumerate(found) if isinstance(one, RunFolder)]
        folder = RunFolder(path)
        assert (folder.config.seed, folder.text_digest) == (seed, f"{seed}")
        assert all("exists already" in str(one) for number, one in enumerate(found) if number != seed)
        assert contents(path).keys() == {"config.yaml", "vocabulary.json", "run.json", ".lock"}


def test_of_several_that_write_new_files_one_succeeds_and_the_others_leave_nothing(tmp_path: Path) -> None:
    def write(number: int) -> int:
        try:
            write_new_files({tmp_path / f"only {number}": "x", tmp_path / "both": f"{number}"})
        except FileExistsError:
            return -1
        return number

    (winner,) = {*together(4, write)} - {-1}
    assert contents(tmp_path) == {f"only {winner}": b"x", "both": f"{winner}".encode()}


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A text that is no UTF-8 cannot be written, as a full disk takes no more."""
    with pytest.raises(UnicodeEncodeError):
        write_new_folder(tmp_path / "new", {"a": "x", "b": "\ud800"})
    with pytest.raises(UnicodeEncodeError):
        write_new_files({tmp_path / "a": "x", tmp_path / "b": "\ud800"})
    assert not [*tmp_path.iterdir()]


def test_starts_of_the_coordinator_are_counted_on_from_the_file_of_earlier_runs(path: Path) -> None:
    folder = RunFolder(path)
    (path / "epoch").write_text("6\n")  # its name in earlier versions
    assert [folder.next_incarnation(), folder.next_incarnation()] == [7, 8]
    assert (path / "incarnation").read_text() == "8\n"
