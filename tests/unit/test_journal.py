"""A journal gives back what was made before, survives a cut line, and refuses to serve another search."""

import contextlib
import os
import time

import pytest

from prunelm.errors import CalibrationError, DataError, DeviceError, EvaluationError, OutputError, PruneLMError
from prunelm.journal import Journal, drop_forgotten, journal_beside, own_journal, place_beside


def _never():
    raise AssertionError("made twice")


def test_entries_are_made_once(tmp_path):
    path = tmp_path / "search.jsonl"
    first = Journal(path, {"seed": 1})
    assert [first.entry(lambda n=n: {"n": n}) for n in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    again = Journal(path, {"seed": 1})
    assert [again.entry(_never) for _ in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert again.entry(lambda: {"n": 3}) == {"n": 3}
    assert len(path.read_text().splitlines()) == 5


def test_a_line_cut_by_an_interrupt_is_dropped(tmp_path):
    path = tmp_path / "search.jsonl"
    journal = Journal(path)
    journal.entry(lambda: {"n": 0})
    with path.open("a") as opened:
        opened.write('{"n": 1, "pla')
    again = Journal(path)
    assert again.entry(_never) == {"n": 0}
    assert again.entry(lambda: {"n": "new"}) == {"n": "new"}
    assert Journal(path).entry(_never) == {"n": 0}


def test_another_search_and_damage_are_named(tmp_path):
    path = tmp_path / "search.jsonl"
    Journal(path, {"seed": 1, "model": "a"})
    with pytest.raises(CalibrationError, match=r'other work: seed was 1 and is 2, model was "a" and is "b"\.'):
        Journal(path, {"seed": 2, "model": "b"})
    path.write_text('{"format": 1}\nnot json\n{"n": 1}\n')
    with pytest.raises(CalibrationError, match="line 1 is damaged"):
        Journal(path)


@pytest.mark.parametrize("damage", ["digit", "lost", "moved"])
def test_an_altered_line_is_noticed(damage, tmp_path):
    path = tmp_path / "search.jsonl"
    journal = Journal(path)
    for n in range(3):
        journal.entry(lambda n=n: {"n": n})
    head, *lines = path.read_text().splitlines()
    if damage == "digit":
        lines[1] = lines[1].replace('"n": 1', '"n": 7')
    lines = {"digit": lines, "lost": [lines[0], lines[2]], "moved": [lines[1], lines[0], lines[2]]}[damage]
    path.write_text("\n".join([head, *lines]) + "\n")
    with pytest.raises(CalibrationError, match=r"line (2|3) is damaged\. Remove the file"):
        Journal(path)


def test_without_a_path_nothing_is_kept():
    journal = Journal()
    assert journal.entry(lambda: {"n": 0}) == {"n": 0}
    assert journal.path is None


def test_short_work_leaves_no_file(tmp_path):
    path = tmp_path / "state" / "search.jsonl"
    journal = Journal(path, {"seed": 1}, after=3600.0)
    assert journal.entry(lambda: {"n": 0}) == {"n": 0}
    assert not path.parent.exists()
    late = Journal(path, {"seed": 1}, after=1e-9)
    assert [late.entry(lambda n=n: {"n": n}) for n in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    again = Journal(path, {"seed": 1}, after=3600.0)
    assert [again.entry(_never) for _ in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_work_goes_on_without_a_journal_of_its_own_where_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prunelm.journal.os.fsync", full)
    with own_journal({"seed": 1}, command="evaluate") as journal:
        assert [journal.entry(lambda n=n: {"n": n}) for n in range(2)] == [{"n": 0}, {"n": 1}]
    assert list((tmp_path / "prunelm").iterdir()) == []
    with pytest.raises(OutputError, match="the disk is full"):
        Journal(tmp_path / "search.jsonl", after=1e-9).entry(lambda: {"n": 0})


def test_a_journal_of_its_own_stays_after_an_error_that_may_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    for error in (DeviceError("no memory"), DataError("too short")):
        with contextlib.suppress(PruneLMError), own_journal({"seed": 1}, command="evaluate") as journal:
            journal.entry(lambda: {"n": 0})
            raise error
        assert any((tmp_path / "prunelm").iterdir()) == isinstance(error, DeviceError)


def test_a_journal_of_its_own_goes_when_the_work_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    with contextlib.suppress(KeyboardInterrupt), own_journal({"seed": 1}, command="evaluate") as journal:
        journal.entry(lambda: {"n": 0})
        raise KeyboardInterrupt
    (file,) = (tmp_path / "prunelm").iterdir()
    with own_journal({"seed": 1}, command="evaluate") as journal:
        assert journal.entry(_never) == {"n": 0}
    assert not file.exists()
    file.write_text("not one of ours\n")
    with own_journal({"seed": 1}, command="evaluate") as journal:
        assert journal.entry(lambda: {"n": 1}) == {"n": 1}
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_the_journal_of_a_part_has_one_place_and_one_way_on(tmp_path):
    out = tmp_path / "found.json"
    path = place_beside(out, "quality")

    def work(error, entries):
        with journal_beside(out, "quality", {"seed": 1}, command="evaluate") as journal:
            for n in range(entries):
                journal.entry(lambda n=n: {"n": n})
            raise error

    def begun(error, entries=1):
        with pytest.raises(type(error)) as told:
            work(error, entries)
        return getattr(told.value, "__notes__", [])

    full = OutputError("full")
    full.add_note("Nothing was left behind.")
    for error in (KeyboardInterrupt(), full, OSError(5, "Input/output error")):
        assert begun(error) == ["What is done is kept; give its command (prunelm evaluate) again"]
        assert [path.name for path in tmp_path.iterdir()] == [".found.json.quality.journal"]
    with (
        pytest.raises(CalibrationError, match=r"seed was 1 and is 2. Put that back, name another file, or remove"),
        journal_beside(out, "quality", {"seed": 2}, command="evaluate"),
    ):
        _never()
    assert path.is_file()
    assert begun(EvaluationError("not finite")) == []
    assert not path.exists()
    assert begun(KeyboardInterrupt(), entries=0) == []
    assert not path.exists()
    Journal(path, {"seed": 1})  # Killed before its first entry, it is of no work.
    with journal_beside(out, "quality", {"seed": 2}, command="evaluate") as journal:
        journal.entry(lambda: {"n": 0})
    assert not path.exists()


def test_unfinished_work_that_nobody_goes_on_with_goes(tmp_path):
    names = [f"{'a1' * 8}.jsonl", f".plan-{'b2' * 8}.work/look/step.safetensors", f"demo-{'c3' * 6}/calibration.txt"]
    names.append(f".plan-{'b2' * 8}.lock")
    mine = [*names, "notes.jsonl", "README.md"]
    long_ago = time.time() - 31 * 24 * 3600
    for age in (long_ago, None):
        for name in mine:
            path = tmp_path / (name if age else name.replace("1", "4").replace("2", "5").replace("3", "6"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            for part in (path, *list(path.parents)[: name.count("/")]) if age else ():
                os.utime(part, (age, age))
    drop_forgotten(tmp_path)
    expected = [f".plan-{'b5' * 8}.work", f".plan-{'b5' * 8}.lock", f"demo-{'c6' * 6}", f"{'a4' * 8}.jsonl"]
    expected += ["notes.jsonl", "README.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    drop_forgotten(tmp_path / "none")


def test_a_first_line_that_was_cut_is_written_anew(tmp_path):
    path = tmp_path / "parts.jsonl"
    Journal(path, {"seed": 1}).entry(lambda: {"n": 0})
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + b'{"n": 0, "pl')
    again = Journal(path, {"seed": 1}, after=0.001)
    time.sleep(0.002)
    assert [again.entry(lambda n=n: {"n": n}) for n in (3, 4)] == [{"n": 3}, {"n": 4}]
    read = Journal(path, {"seed": 1}, after=0.001)
    assert [read.entry(_never) for _ in range(2)] == [{"n": 3}, {"n": 4}]
