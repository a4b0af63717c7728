"""Whatever kills a run, `--resume` ends it with the bytes of an uninterrupted one, and leaves nothing else."""

import errno
import json
import shutil
import signal
import time

import pytest
from tests import forked

from prunelm import demo, evaluation, workbench, writing
from prunelm.workbench import Workbench, place_of


class _Stop(BaseException):
    pass


def _stop(*_):
    raise _Stop


SMALL = ("--samples", "12", "--length", "32", "--multiple-of", "1", "--sparsity", "0.3")
RUNS = {
    "two-step": ("llama", "--recipe", "goa-budget"),
    "repair toward the dense model": ("llama", "--recipe", "liar", "--criterion", "obs"),
    "one-shot": ("gpt2", "--recipe", "wanda-sp"),
    "search": ("llama", "--recipe", "best"),
    "global": ("qwen3", "--recipe", "flap"),
    "hidden": ("llama", "--recipe", "liar", "--hidden", "0.25", "--per-block"),
}
LONG_RUNS = {
    "split": ("llama", "--recipe", "best-uniform"),
    "policy": ("llama", "--recipe", "osp-repaired", "--samples", "24"),
    "own text": ("llama", "--recipe", "goa-data-free"),
    "fusion": ("llama", "--recipe", "hywia"),
    "family": ("llama", "--recipe", "obs", "--sparsity", "0.2,0.3"),
}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def unproven(monkeypatch):
    """Folders are not loaded again in a fresh process, which other tests look at."""
    monkeypatch.setattr("prunelm.checkpoint.prove_folder", lambda *_: 0.0)


@pytest.fixture
def snapshots(monkeypatch, tmp_path, unproven):
    """Copies of the working folder as a kill after each step would leave it, in order."""
    taken, put = [], Workbench.put

    def watched(self, name, step):
        put(self, name, step)
        taken.append(tmp_path / f"snapshot-{len(taken)}")
        shutil.copytree(place_of(tmp_path / "out"), taken[-1])

    monkeypatch.setattr(Workbench, "put", watched)
    return taken


def check_resumed(cli, out, command, options, snapshots, some):
    ran = cli(command, *options)
    assert ran.code == 0, ran
    assert not place_of(out).exists()
    expected, moments = tree(out), list(snapshots)
    assert len(moments) >= 2
    for moment in dict.fromkeys(some(moments)):
        shutil.rmtree(out)
        moment.rename(place_of(out))
        ran = cli(command, "--resume", out)
        assert ran.code == 0, ran
        assert tree(out) == expected
        assert not place_of(out).exists()


@pytest.mark.parametrize("name", RUNS)
def test_resumed_in_the_middle_the_bytes_are_the_same(name, cli, tiny_folder, text_file, tmp_path, snapshots):
    family, *options = RUNS[name]
    out = tmp_path / "out"
    whole = (tiny_folder(family), out, "--text", text_file, *SMALL, *options)
    check_resumed(cli, out, "prune", whole, snapshots, lambda moments: moments[len(moments) // 2 - 1 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS | LONG_RUNS)
def test_resumed_after_any_step_the_bytes_are_the_same(name, cli, tiny_folder, text_file, tmp_path, snapshots):
    family, *options = (RUNS | LONG_RUNS)[name]
    out = tmp_path / "out"
    text = () if name == "own text" else ("--text", text_file)
    whole = (tiny_folder(family, num_hidden_layers=4), out, *text, *SMALL, *options)
    check_resumed(cli, out, "prune", whole, snapshots, lambda moments: moments)


def test_calibrations_are_resumed_too(cli, tiny_folder, text_file, tmp_path, snapshots):
    out = tmp_path / "out"
    whole = (tiny_folder("llama"), out, "--text", text_file, *SMALL)
    check_resumed(cli, out, "calibrate", whole, snapshots, lambda moments: moments[:1])


@pytest.fixture
def begun(cli, tiny_folder, text_file, tmp_path, snapshots):
    """The options of a run that was killed after its first block, and a text of its own that may be changed."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(text_file.read_text()[:8000])
    options = (tiny_folder("llama"), out, "--recipe", "obs", "--text", text, *SMALL)
    assert cli("prune", *options).code == 0
    expected = tree(out)
    shutil.rmtree(out)
    snapshots[0].rename(place_of(out))
    return options, text, expected


def test_the_same_command_goes_on_too(cli, begun, tmp_path):
    options, _, expected = begun
    assert cli("prune", *options).code == 0
    assert tree(tmp_path / "out") == expected


def test_other_work_is_refused_and_says_what_differs(cli, begun, tmp_path, monkeypatch):
    options, text, expected = begun
    out = tmp_path / "out"
    ran = cli("prune", *options, "--seed", "7")
    assert ran.code == 1
    assert "has the unfinished work of another run: task.recipe.seed was 0 and is 7. To finish that one, " in ran.err
    assert f"go on with prunelm prune --resume {out}" in ran.err
    words = text.read_text()
    text.write_text(words[::-1])
    ran = cli("prune", "--resume", out)
    assert ran.code == 1
    assert "the unfinished work of other inputs: calibration.sha256 was" in ran.err
    text.write_text(words)
    monkeypatch.setattr("prunelm.workbench.versions", lambda: {"prunelm": "0.0.1"})
    ran = cli("prune", "--resume", out)
    assert ran.code == 1
    assert "the unfinished work of another version: versions.prunelm was" in ran.err
    monkeypatch.undo()
    ran = cli("calibrate", "--resume", out)
    assert ran.code == 1
    assert "has the unfinished work of prunelm prune" in ran.err
    monkeypatch.setattr("prunelm.checkpoint.prove_folder", lambda *_: 0.0)
    assert cli("prune", "--resume", out).code == 0
    assert tree(out) == expected


def test_an_error_of_inputs_drops_nothing(cli, begun, tmp_path):
    """A text cut short is refused before it is compared with the first; put back, it goes on."""
    _, text, expected = begun
    whole = text.read_text()
    text.write_text(whole[:10])
    ran = cli("prune", "--resume", tmp_path / "out")
    assert ran.code == 1
    assert "tokens, but one calibration window needs" in ran.err
    assert ran.err.endswith(f"What is done is kept; go on with prunelm prune --resume {tmp_path / 'out'}\n")
    text.write_text(whole)
    assert cli("prune", "--resume", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["task.json", "*/inputs.json"])
def test_one_bit_of_what_was_asked(name, cli, begun, tmp_path):
    _, _, expected = begun
    (path,) = place_of(tmp_path / "out").glob(name)
    whole = path.read_bytes()
    at = whole.index(b"0.1" if name == "task.json" else b"tokens") + 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    ran = cli("prune", "--resume", tmp_path / "out")
    assert ran.code == 1
    assert f"{path}: damaged, its checksum differs. Say --force with the whole command, or remove " in ran.err
    path.write_bytes(whole)
    assert cli("prune", "--resume", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["task.json", "*/inputs.json"])
def test_damaged_work_is_dropped_by_force(name, cli, begun, tmp_path):
    options, _, expected = begun
    (path,) = place_of(tmp_path / "out").glob(name)
    path.write_text("{}")
    assert cli("prune", *options).code == 1
    assert cli("prune", *options, "--force").code == 0
    assert tree(tmp_path / "out") == expected


def test_force_takes_other_inputs(cli, begun, tmp_path):
    options, text, expected = begun
    head = place_of(tmp_path / "out") / "task.json"
    task = json.loads(head.read_text())
    text.write_text(text.read_text()[::-1])
    assert cli("prune", *options).code == 1
    workbench._write(head, {**{key: value for key, value in task.items() if key != "sum"}, "force": True})
    ran = cli("prune", "--resume", tmp_path / "out")
    assert ran.code == 1
    assert "the unfinished work of other inputs: calibration.sha256 was" in ran.err
    assert cli("prune", *options, "--force").code == 0
    found = tree(tmp_path / "out")
    assert found != expected
    shutil.rmtree(tmp_path / "out")
    assert cli("prune", *options).code == 0
    assert tree(tmp_path / "out") == found
    assert not place_of(tmp_path / "out").exists()


def test_force_begins_anew(cli, begun, tmp_path):
    options, _, expected = begun
    assert cli("prune", *options, "--seed", "7", "--force").code == 0
    assert tree(tmp_path / "out") != expected
    assert not place_of(tmp_path / "out").exists()


def test_a_damaged_step_is_made_again(cli, begun, tmp_path):
    _, _, expected = begun
    (step,) = place_of(tmp_path / "out").rglob("block-0.*")
    raw = bytearray(step.read_bytes())
    raw[len(raw) // 2] ^= 1
    step.write_bytes(raw)
    assert cli("prune", "--resume", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == expected


@pytest.mark.usefixtures("begun")
def test_nothing_to_resume(cli, tmp_path):
    ran = cli("prune", "--resume", tmp_path / "other")
    assert ran.code == 1
    assert "there is no unfinished work on it" in ran.err
    ran = cli("prune", "--resume", tmp_path / "out", "--sparsity", "0.2")
    assert ran.code == 2
    assert "leave out --sparsity" in ran.err.replace("\n", " ")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_killed_when_the_output_stands_already(force, cli, begun, tmp_path, monkeypatch):
    """Work, lock and an old folder are left; all of them go, and the output stays."""
    options, _, expected = begun
    out, old = tmp_path / "out", tmp_path / ".out.old"
    if force:
        out.mkdir()
    replace = writing._replace

    def killed(partial, out):
        monkeypatch.setattr("prunelm.writing._remove", _stop)
        replace(partial, out)

    monkeypatch.setattr("prunelm.writing._replace", killed)
    with pytest.raises(_Stop):
        cli("prune", *options, *force)
    monkeypatch.undo()
    (tmp_path / ".out.lock").touch()
    assert old.exists() == bool(force)
    ran = cli("prune", "--resume", out)
    assert ran.code == 0
    assert ran.out == f"{out}: finished\n"
    assert tree(out) == expected
    assert {path.name for path in tmp_path.glob(".*")} == set()


def test_something_else_of_that_name_is_not_taken_for_the_output(cli, begun, tmp_path):
    _, _, expected = begun
    out = tmp_path / "out"
    out.mkdir()
    ran = cli("prune", "--resume", out)
    assert ran.code == 1
    assert "exists, and is not what the unfinished work on it has made: move it away" in ran.err
    out.rmdir()
    assert cli("prune", "--resume", out).code == 0
    assert tree(out) == expected


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(5, "Input/output error", "disk"), "error: disk: Input/output error. What is done is kept; go on with"),
        (MemoryError(), "batches of one sequence of 32 tokens, and "),
        (RuntimeError("can't allocate memory: you tried to allocate 99 bytes"), "batches of one sequence of 32 tokens"),
    ],
)
def test_what_may_pass_keeps_the_work(error, says, cli, begun, tmp_path, monkeypatch):
    _, _, expected = begun

    def fails(*_):
        raise error

    monkeypatch.setattr(Workbench, "put", fails)
    ran = cli("prune", "--resume", tmp_path / "out")
    assert ran.code == 1
    assert says in ran.err
    assert ran.err.endswith(f"What is done is kept; go on with prunelm prune --resume {tmp_path / 'out'}\n")
    monkeypatch.undo()
    assert cli("prune", "--resume", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == expected


def test_an_interrupt_keeps_what_has_cost_time(cli, tiny_folder, text_file, tmp_path, monkeypatch, unproven):
    from prunelm.cli import _Interrupted

    out, put = tmp_path / "out", Workbench.put

    def interrupted(self, name, step):
        put(self, name, step)
        raise _Interrupted(signal.SIGINT)

    monkeypatch.setattr(Workbench, "put", interrupted)
    command = ("prune", tiny_folder("llama"), out, "--text", text_file, *SMALL)
    ran = cli(*command)
    assert ran.err.endswith("error: interrupted; nothing was left half-written\n")
    assert not place_of(out).exists()
    monkeypatch.setattr(workbench, "WORTH_KEEPING", 0.0)
    ran = cli(*command)
    assert ran.code == 128 + signal.SIGINT
    assert ran.err.endswith(f"error: interrupted; What is done is kept; go on with prunelm prune --resume {out}\n")
    monkeypatch.setattr(Workbench, "put", put)
    assert cli("prune", "--resume", out).code == 0


def test_killed_for_real(cli, tiny_folder, text_file, tmp_path, tmp_path_factory, unproven):
    """kill -9 from outside at some moment of the work, which goes on in another process."""
    out = tmp_path / "out"
    options = (tiny_folder("llama", num_hidden_layers=4), out, "--text", text_file, *SMALL, "--samples", "100")
    heard = tmp_path_factory.mktemp("heard")
    process = forked.start(heard, "-m", "prunelm", "prune", *map(str, options))
    end = time.monotonic() + 120
    while len(list(place_of(out).rglob("block-*"))) < 2:
        assert process.code is None, process.err
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ran = cli("prune", "--resume", out, "--json")
    assert ran.code == 0, ran
    resumed = tree(out)
    assert json.loads(ran.out)["out"] == str(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(out)
    assert cli("prune", *options).code == 0
    assert tree(out) == resumed


def _stopped_at(count, monkeypatch):
    """Windows are scored up to one that stops the run, and then all; those that were begun."""
    scored, seen = evaluation.score_windows, []

    def counted(*args):
        seen.append(args)
        if len(seen) == count:
            raise _Stop
        return scored(*args)

    monkeypatch.setattr(evaluation, "score_windows", counted)
    return seen


def test_an_evaluation_goes_on_window_by_window(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    options = ("--length", "64", "--max-tokens", "512", "--json")
    whole = ("evaluate", tiny_folder("llama"), "--against", tiny_folder("llama", num_hidden_layers=3), *options)
    expected = cli(*whole, "--text", text_file)
    assert expected.code == 0, expected
    seen = _stopped_at(4, monkeypatch)
    with pytest.raises(_Stop):
        cli(*whole, "--text", text_file)
    assert len(list((tmp_path / "prunelm").iterdir())) == 1
    again = cli(*whole, "--text", text_file)
    assert again.out == expected.out
    assert len(seen) == 4 + 5
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_a_comparison_keeps_the_models_that_it_has_measured(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    monkeypatch.setattr("prunelm.workflow.comparing.prefill_speed", lambda models: [1.0 for _ in models])
    models = (tiny_folder("llama"), tiny_folder("llama", num_hidden_layers=3))
    whole = ("compare", *models, "--text", text_file, "--length", "64", "--max-tokens", "256", "--json")
    expected = cli(*whole)
    assert expected.code == 0, expected
    seen = _stopped_at(6, monkeypatch)
    with pytest.raises(_Stop):
        cli(*whole)
    assert cli(*whole).out == expected.out
    assert len(seen) == 2 * 4 + 1
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_what_was_measured_on_a_folder_is_of_all_files_in_it(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    corpora = [tmp_path / name for name in "ab"]
    for n, corpus in enumerate(corpora):
        (corpus / "below").mkdir(parents=True)
        (corpus / "below" / "text.txt").write_text(text_file.read_text()[5_000 * n :][:5_000])
    window = ("--length", "64", "--max-tokens", "256", "--json")
    first, other = (("evaluate", tiny_folder("llama"), "--text", corpus, *window) for corpus in corpora)
    expected = cli(*other)
    _stopped_at(3, monkeypatch)
    with pytest.raises(_Stop):
        cli(*first)
    assert cli(*other).out == expected.out


@pytest.mark.parametrize("command", ["evaluate", "evaluate --json", "compare", "compare --json"])
def test_what_was_measured_stays_until_it_is_printed(cli, tiny_folder, text_file, tmp_path, monkeypatch, command):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.journal.MINUTE", 1e-9)
    monkeypatch.setattr("prunelm.workflow.comparing.prefill_speed", lambda models: [1.0 for _ in models])
    name, *more = command.split()
    models = (tiny_folder("llama"), tiny_folder("llama", num_hidden_layers=3))[: 1 + (name == "compare")]
    whole = (name, *models, "--text", text_file, "--length", "64", "--max-tokens", "256", *more)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prunelm.commands.console.out.print", full)
        patch.setattr(f"prunelm.commands.{name}.print_json", full)
        ran = cli(*whole)
    way_on = f"What is done is kept; give its command (prunelm {name}) again"
    assert ran.code == 1
    assert ran.err == f"error: the output cannot be written: No space left on device. {way_on}\n"
    assert len(list((tmp_path / "prunelm").iterdir())) == len(models)
    monkeypatch.setattr(evaluation, "score_windows", _stop)
    assert cli(*whole).code == 0
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_texts_of_the_demo_lie_where_an_interrupted_one_finds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "texts", lambda: ("one", "other"))
    with pytest.raises(_Stop), demo._written(tmp_path / "out") as first:
        raise _Stop
    with demo._written(tmp_path / "out") as second:
        assert [path.read_text() for path in second] == ["one", "other"]
    assert first == second
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_another_plan_is_other_inputs(cli, tiny_folder, tmp_path, snapshots):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    options = ("--recipe", "l2", "--per-block", "--allocator", "per-module", "--multiple-of", "1", "--sparsity", "0.3")
    assert cli("plan", tiny_folder("llama"), plan, *options).code == 0
    assert cli("prune", tiny_folder("llama"), out, "--plan", plan).code == 0
    expected, made = tree(out), plan.read_text()
    shutil.rmtree(out)
    snapshots[0].rename(place_of(out))
    data = json.loads(made)
    for block, more in ((0, 1), (1, -1)):
        data["sites"][f"{block}.ffn"]["keep"] += more
    plan.write_text(json.dumps(data))
    ran = cli("prune", "--resume", out)
    assert ran.code == 1
    assert "the unfinished work of other inputs: plan was" in ran.err
    plan.write_text(made)
    assert cli("prune", "--resume", out).code == 0
    assert tree(out) == expected


def test_another_held_out_text_is_other_inputs(cli, tiny_folder, text_file, tmp_path, snapshots):
    held, out = tmp_path / "held.txt", tmp_path / "out"
    held.write_text(text_file.read_text()[-9000:])
    options = ("--recipe", "wanda-sp", "--text", text_file, *SMALL[:-2], "--max-ppl", "+5%", "--held-out-text", held)
    assert cli("prune", tiny_folder("llama"), out, *options).code == 0
    shutil.rmtree(out)
    snapshots[-1].rename(place_of(out))
    held.write_text(held.read_text()[::-1])
    ran = cli("prune", "--resume", out)
    assert ran.code == 1
    assert "the unfinished work of other inputs: held_out_text was" in ran.err


def test_several_sizes_go_on_by_the_same_command(cli, tiny_folder, text_file, tmp_path, snapshots):
    out = tmp_path / "out"
    whole = (tiny_folder("llama"), out, "--text", text_file, *SMALL, "--recipe", "obs", "--sparsity", "0.2,0.3")
    assert cli("prune", *whole).code == 0
    expected = tree(out)
    shutil.rmtree(out / "0.3")
    again = cli("prune", *whole)
    assert again.code == 1
    assert f"{out}/0.2 exists" in again.err
    snapshots[-1].rename(place_of(out))
    other = cli("prune", *whole, "--seed", "7")
    assert other.code == 1
    assert "has the unfinished work of another run: task.recipe.seed was 0 and is 7" in other.err
    ran = cli("prune", *whole)
    assert ran.code == 0, ran
    assert tree(out) == expected
    assert not place_of(out).exists()
