"""Plans and budgets through the command line: what is asked for is met exactly, and edits are what is pruned."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import prunelm
from prunelm import sized_pruning
from prunelm.cli import _Interrupted
from prunelm.commands import console
from prunelm.errors import RecipeError
from prunelm.limits import limit_of
from prunelm.loading import find_model, load_model
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.sizing import sized
from prunelm.workbench import Workbench


class _Stop(BaseException):
    pass


FREE = ("--recipe", "l1")
ONE = (*FREE, "--multiple-of", "1")
SMALL = ("--samples", "8", "--length", "32")


@pytest.fixture(autouse=True)
def unproven(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written folders are not opened in a fresh process, which is tested elsewhere and slow."""
    if request.node.name != "test_edits_are_what_is_pruned":
        monkeypatch.setattr("prunelm.checkpoint.prove_folder", lambda *_: 0.0)


@pytest.fixture(scope="module")
def planned(cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """A plan of the tiny Llama; do not write there."""
    path: Path = tmp_path_factory.mktemp("plans") / "plan.json"
    ran = cli("plan", tiny_folder("llama"), path, "--sparsity", "0.3", *ONE)
    assert ran.code == 0, ran
    assert "29.55% of the blocks" in ran.out
    assert "predicted KL: recipe 'l1' prices nothing" in ran.err
    return path


def edited(planned: Path, target: Path, *pairs: tuple[str, str]) -> Path:
    text = planned.read_text()
    for pattern, new in pairs:
        text, count = re.subn(pattern, new, text, count=1)
        assert count, pattern
    target.write_text(text)
    return target


def error_of(ran: Any) -> str:
    lines = [line for line in ran.err.splitlines() if not line.startswith(("recipe: ", "note: "))]
    assert ran.code == 1, ran
    assert len(lines) == 1, ran
    assert lines[0].startswith("error: ")
    return str(lines[0])


def test_a_plan_as_it_is_gives_what_the_sparsity_gives(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], planned: Path, tmp_path: Path
) -> None:
    assert cli("prune", tiny_folder("llama"), tmp_path / "a", "--plan", planned).code == 0
    assert cli("prune", tiny_folder("llama"), tmp_path / "b", "--sparsity", "0.3", *ONE).code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all((one[name] == other[name]).all() for name in one.keys() | other.keys())
    facts = json.loads((tmp_path / "a" / "pruning.json").read_text())
    assert facts["asked"] == {"plan": "plan.json"}


def test_edits_are_what_is_pruned(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], planned: Path, tmp_path: Path
) -> None:
    pairs = ((r'"per_block": false', '"per_block": true'), (r'"0.ffn": {.*}', '"0.ffn": {"kept": [10, 3, 1]}'))
    mine = edited(planned, tmp_path / "mine.json", *pairs, (r'("1.ffn": {.*"keep": )\d+', r"\g<1>7"))
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--plan", mine)
    assert ran.code == 0, ran
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert facts["sites"]["0.ffn"]["kept"] == [1, 3, 10]
    assert len(facts["sites"]["1.ffn"]["kept"]) == 7
    assert facts["recipe"]["sparsity"] == pytest.approx(144 * (37 + 33) / 25_344)
    shown = cli("plan", "--diff", planned, mine)
    assert re.search(r"0\.ffn.* 14 .* 3 .*-1,584", shown.out)
    assert "-2,592" in shown.out
    assert cli("plan", "--diff", planned, planned).out == "The two plans keep the same units.\n"
    left_out = edited(planned, tmp_path / "left-out.json", (r'"1.attention": {.*},\n', ""))
    assert cli("plan", "--diff", planned, left_out).out == "The two plans keep the same units.\n"
    refused = cli("plan", "model", "--diff", planned, mine, "--sparsity", "0.3")
    assert refused.code != 0
    assert "leave out --sparsity, model" in refused.err
    again = cli("plan", tiny_folder("llama"), "--plan", mine, "--json")
    assert json.loads(again.out)["rows"][0]["units"]["ffn"] == [3, 40]


def test_every_line_that_cannot_be_used_is_named(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], planned: Path, tmp_path: Path
) -> None:
    pairs = [
        (r'"ridge": [\d.]+', '"ridge": -3.0'),
        (r'("0.attention": {.*"keep": )\d+', r"\g<1>-4"),
        (r'"0.ffn"', '"0.fn"'),
        (r'"1.attention": {"units": 3', '"1.attention": {"units": 4'),
        (r'"1.ffn": {.*}', '"1.ffn": {"kept": [1, 1]}'),
    ]
    bad = edited(planned, tmp_path / "bad.json", *pairs)
    lines = {name: n for n, line in enumerate(bad.read_text().splitlines(), 1) for name in line.split('"')[1:2] if name}
    line = error_of(cli("prune", tiny_folder("llama"), tmp_path / "out", "--plan", bad))
    assert "5 lines cannot be used" in line
    assert f"line {lines['ridge']}: ridge must be a number from 0 up, got -3.0" in line
    assert f"line {lines['0.attention']}: 0.attention keeps -4 of 3 units" in line
    assert f"line {lines['0.fn']}: this model has no site '0.fn'. Did you mean '0.ffn'?" in line
    assert f"line {lines['1.attention']}: 1.attention has units 4, and the model's is 3" in line
    assert f"line {lines['1.ffn']}: 1.ffn keeps unit 1 more than once" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(r'("0.ffn": {.*"keep": )\d+', r"\g<1>0")], "0.ffn keeps 0 units, at least 1 must stay"),
        ([(r'("0.ffn": {.*"keep": )\d+', r"\g<1>true")], "0.ffn must say how many units it keeps, got true"),
        ([(r'("0.ffn": {.*"keep": )\d+', r"\g<1>3")], "and others .*, but a stock config says one number"),
        ([(r'"0.ffn": {.*}', '"0.ffn": 3')], r'0.ffn must be an object like {"keep": 12}, got 3'),
        ([(r'"keep"', '"keeps"')], "unknown field 'keeps'. Did you mean 'keep'"),
        ([(r'"0.ffn": {.*}', '"0.ffn": {"kept": [40]}')], "keeps unit 40, but its units are 0 to 39"),
        ([(r'"0.ffn": {.*}', '"0.ffn": {"kept": [4], "keep": 2}')], "keeps 2 units and names 1"),
        ([(r'"1.ffn"', '"0.ffn"')], "'0.ffn' is there 2 times"),
        ([(r'"format": 1', '"format": 9')], "line 2: format 9 is not known here"),
        ([(r'"sites": {', '"sites": [')], "is not valid JSON"),
        ([(r'\n "sites"', '\n "site"')], r"line \d+: unknown field 'site'. Did you mean 'sites'"),
        ([(r"[0-9a-f]{64}", "0" * 64)], "made for other weights"),
        ([(r'"[0-9a-f]{64}"', "{}")], "does not say which model it is for. Make it again"),
        ([(r'\n "sites"', '\n "asked": null,\n "sites"')], "'asked' must be an object"),
    ],
)
def test_nonsense_in_a_plan(
    pairs: list[tuple[str, str]],
    says: str,
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    planned: Path,
    tmp_path: Path,
) -> None:
    bad = edited(planned, tmp_path / "bad.json", *pairs)
    assert re.search(says, error_of(cli("prune", tiny_folder("llama"), tmp_path / "out", "--plan", bad)))
    assert not (tmp_path / "out").exists()


def test_a_plan_that_removes_nothing_or_is_not_there(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], planned: Path, tmp_path: Path
) -> None:
    whole = edited(planned, tmp_path / "whole.json", (r'  "0.ffn": .*\n.*\n  "1.ffn": .*', '  "0.ffn": {"keep": 40}'))
    out = tmp_path / "out"
    assert "there is nothing to remove" in error_of(cli("prune", tiny_folder("llama"), out, "--plan", whole))
    missing = error_of(cli("prune", tiny_folder("llama"), out, "--plan", tmp_path / "no.json"))
    assert "cannot be read: No such file" in missing
    assert "made for a llama model" in error_of(cli("prune", tiny_folder("gpt2"), out, "--plan", planned))
    both = error_of(cli("prune", tiny_folder("llama"), out, "--plan", planned, "--sparsity", "0.2"))
    assert "are 2 budgets" in both
    there = error_of(cli("prune", tiny_folder("llama"), out, "--plan", planned, "--ridge", "1"))
    assert "--ridge cannot be said here: edit it there" in there
    typed = ("--for", "any", "--self-generated", "--no-bias", "--uniform")
    there = error_of(cli("prune", tiny_folder("llama"), out, "--plan", planned, *typed))
    assert re.search(r"so (--[\w-]+, ){3}--[\w-]+ cannot be said here", there)
    assert all(option in there for option in typed if option.startswith("-"))
    assert "no budget is given" in error_of(cli("prune", tiny_folder("llama"), out))
    assert "exists" in error_of(cli("plan", tiny_folder("llama"), planned, "--sparsity", "0.2"))
    assert "no model is named" in error_of(cli("plan", "--sparsity", "0.2"))


def test_the_table_of_a_plan_has_room(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, left_out in ((70, "q8_0 bytes"), (50, "cache at 8,192"), (160, "")):
        monkeypatch.setattr(console.out, "width", columns)
        ran = cli("plan", tiny_folder("llama"), "--plan", planned)
        assert max(map(len, ran.out.splitlines()[:8])) <= columns
        assert "…" not in ran.out
        assert "parameters" in ran.out
        said = ran.out.partition("No room for ")[2]
        assert left_out in said
        assert bool(said) == bool(left_out)


@pytest.mark.parametrize("recipe", ["l1", "sensitivity"])
def test_parameters_are_met_within_one_step(
    recipe: str, cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    options = ("--recipe", recipe, "--multiple-of", "1", "--text", text_file, *SMALL)
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--params", "33000", *options)
    assert ran.code == 0, ran
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    asked = facts["asked"]
    assert 33_000 - asked["step"] < facts["parameters"]["after"] <= 33_000
    assert asked["step"] == {"l1": 2 * 144, "sensitivity": 144}[recipe]
    assert facts["recipe"]["sparsity"] == asked["sparsity"]
    assert "--params 33000 is sparsity" in ran.err


def test_a_plan_by_looking_says_what_to_expect(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    options = ("--recipe", "sensitivity", "--multiple-of", "1")
    text = ("--text", text_file, *SMALL)
    wanted = "decides widths by looking at the model: give --text"
    assert wanted in error_of(cli("plan", tiny_folder("llama"), "--sparsity", "0.3", *options))
    ran = cli("plan", tiny_folder("llama"), tmp_path / "plan.json", "--sparsity", "0.3", *options, *text, "--json")
    assert ran.code == 0, ran
    *rows, total = json.loads(ran.out)["rows"]
    assert 0 < total["kl"] == pytest.approx(sum(row["kl"] or 0 for row in rows))
    assert cli("prune", tiny_folder("llama"), tmp_path / "out", "--plan", tmp_path / "plan.json", *text[:2]).code == 0
    widths = json.loads((tmp_path / "out" / "pruning.json").read_text())["widths"]
    assert [widths[f"{row['block']}.ffn"]["units"] for row in rows[:2]] == [row["units"]["ffn"][0] for row in rows[:2]]


def test_bytes_fit_and_the_plan_says_of_what(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--fit", "90KB@f16+100", *ONE, "--sites", "ffn")
    assert ran.code == 0, ran
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["asked"]["found"]
    model = load_model(find_model(tmp_path / "out"))
    assert found["f16 cache of 100 tokens"] == 2 * 2 * model.config.num_key_value_heads * 8 * 100 * 2
    matrices = sum(p.numel() * (2 if p.dim() > 1 else 4) for p in model.parameters())
    assert found["weights as f16"] == matrices
    unit = 2 * 2 * 144
    assert 90_000 - unit < sum(found.values()) <= 90_000
    assert find_sites(model)[1].n_units < 40


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            ("--params", "3k"),
            r"3,000 parameters cannot be reached: .* 14,640 parameters \(embeddings, norms\)",
        ),
        (("--params", "1B"), "has 39,984 parameters, and 1,000,000,000 are allowed: no unit has to go"),
        (("--fit", "10KB@q8_0"), "10,000 bytes cannot be reached: with the fewest units"),
        (("--fit", "1GB@q9"), "unknown format 'q9'"),
    ],
)
def test_budgets_that_cannot_be(
    option: tuple[str, str], says: str, cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    assert re.search(says, error_of(cli("prune", tiny_folder("llama"), tmp_path / "out", *option, *ONE)))
    assert re.search(says, error_of(cli("prune", tiny_folder("llama"), tmp_path / "out", *option, *ONE, "--dry-run")))
    assert list(tmp_path.iterdir()) == []


def test_whole_blocks_have_no_other_budget(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "blocks.toml"
    recipe.write_text('held_out = 0.125\n[policy]\nlayers = "block"\npool = "all"\n')
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--params", "30k", "--recipe", recipe)
    assert "drops whole blocks: its size is said by --sparsity only" in error_of(ran)


def resumed(cli: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """What stands in OUT once it has gone on, which is what stands in WHOLE."""
    ran = cli("prune", "--resume", folder / "out")
    assert ran.code == 0, ran
    one, other = (json.loads((folder / name / "pruning.json").read_text()) for name in ("whole", "out"))
    assert one == other
    return dict(other)


def test_an_interrupted_run_to_a_budget_goes_on(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--params", "33000", "--recipe", "obs", "--multiple-of", "1", "--text", text_file, *SMALL)
    assert cli("prune", tiny_folder("llama"), tmp_path / "whole", *options).code == 0
    put = Workbench.put

    def dies(self: Workbench, name: str, step: Any) -> None:
        put(self, name, step)
        if name == "block-0":
            raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "put", dies)
        patched.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
        assert cli("prune", tiny_folder("llama"), tmp_path / "out", *options).code == 9
    resumed(cli, tmp_path)


@pytest.mark.parametrize("recipe", ["obs", "sensitivity"])
def test_perplexity_is_within_the_limit_as_it_is_written(
    recipe: str, cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.txt"
    held.write_text(text_file.read_text()[-3000:])
    options = ("--recipe", recipe, "--multiple-of", "1", "--dtype", "bfloat16", *SMALL)
    model, texts = tiny_folder("llama"), ("--text", text_file, "--held-out-text", held)
    ran = cli("prune", model, tmp_path / "out", "--max-ppl", "+0.2%", *options, *texts)
    assert ran.code == 0, ran
    asked = json.loads((tmp_path / "out" / "pruning.json").read_text())["asked"]
    assert asked["perplexity"] <= asked["limit"] == pytest.approx(1.002 * asked["dense"])
    tried = {trial["sparsity"]: trial["perplexity"] for trial in asked["trials"]}
    assert min(value for value in tried.values() if value > asked["limit"]) > asked["perplexity"]
    window = ("--length", asked["length"], "--max-tokens", "8192")
    found = json.loads(cli("evaluate", tmp_path / "out", "--text", held, *window, "--json").out)
    assert found["value"] == pytest.approx(asked["perplexity"], rel=1e-4)
    assert f"at most {asked['limit']:.4g} allowed" in ran.err


def test_trials_of_a_perplexity_are_not_made_again(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--max-ppl", "+0.2%", "--recipe", "obs", "--multiple-of", "1", "--text", text_file, *SMALL)
    assert cli("prune", tiny_folder("llama"), tmp_path / "whole", *options).code == 0
    made, stops, perplexity_on = [], [4], sized_pruning.perplexity_on

    def counted(*args: Any) -> float:
        made.append(args)
        if len(made) in stops:
            raise _Stop
        return perplexity_on(*args)

    monkeypatch.setattr(sized_pruning, "perplexity_on", counted)
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    with pytest.raises(_Stop):
        cli("prune", tiny_folder("llama"), tmp_path / "out", *options)
    begun = len(made)
    made.clear()
    stops.clear()
    asked = resumed(cli, tmp_path)["asked"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    # The dense model is measured again, and of the trials only those that were not finished.
    assert len(made) == 1 + len(asked["trials"]) - (begun - 2)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("written", [True, False])
def test_an_interrupted_look_goes_on(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: bool,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def command(name: str, *size: str) -> tuple[object, ...]:
        recipe = ("--recipe", "sensitivity", "--text", text_file, "--multiple-of", "1", *SMALL)
        file = (tmp_path / name,) if written else ()
        return ("plan", tiny_folder("llama"), *file, *recipe, *(size or ("--sparsity", "0.3")), "--json")

    whole = cli(*command("whole.json"))
    assert whole.code == 0, whole
    put, seen = Workbench.put, []

    def interrupted(self: Workbench, name: str, step: Any) -> None:
        put(self, name, step)
        seen.append(name)
        if len(seen) == 1:
            raise _Interrupted(signal.SIGINT)

    monkeypatch.setattr(Workbench, "put", interrupted)
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    ran = cli(*command("plan.json"))
    assert ran.err == "error: interrupted; What is done is kept; give its command (prunelm plan) again\n"
    first = len(seen)
    if not written:
        # Another question is other work.
        assert cli(*command("plan.json", "--sparsity", "0.2")).code == 0
        assert seen[0] in seen[first:]
        assert [path.suffix for path in (tmp_path / "prunelm").iterdir()] == [".work"]
        first = len(seen)
    again = cli(*command("plan.json"))
    assert (again.code, again.out) == (0, whole.out)
    assert seen[first:]
    assert seen[0] not in seen[first:]
    assert not list(tmp_path.glob(".plan*"))
    assert written or not list((tmp_path / "prunelm").iterdir())
    assert not written or (tmp_path / "plan.json").read_text() == (tmp_path / "whole.json").read_text()


def test_a_look_at_another_text_drops_the_unfinished_one_by_force_only(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text(text_file.read_text())
    command = (
        "plan",
        tiny_folder("llama"),
        out,
        "--recipe",
        "sensitivity",
        "--text",
        text,
        *SMALL,
        "--sparsity",
        "0.3",
    )
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    put = Workbench.put
    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "put", lambda *args: [put(*args), _stopped()])
        with pytest.raises(_Stop):
            cli(*command)
    text.write_text(text_file.read_text()[100:])
    ran = cli(*command)
    assert f"{out} has the unfinished work of another run: task.inputs.calibration.sha256 was " in ran.err
    assert ran.err.endswith("give its command (prunelm plan) again. To drop it, say --force.\n")
    assert cli(*command, "--force").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "text.txt"]


def _stopped() -> None:
    raise _Stop


LOOKING = ("--recipe", "sensitivity", *SMALL, "--multiple-of", "1")


def _full(*_args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_plan_stays_known_until_it_is_printed(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    command = ("plan", tiny_folder("llama"), "--text", text_file, *LOOKING)
    with monkeypatch.context() as patched:
        patched.setattr("prunelm.commands.plan.print_json", _full)
        ran = cli(*command, "--sparsity", "0.3", "--json")
    assert ran.err.endswith("No space left on device. What is done is kept; give its command (prunelm plan) again\n")
    seen: list[str] = []
    monkeypatch.setattr(Workbench, "put", lambda _self, name, _step: seen.append(name))
    assert cli(*command, "--sparsity", "0.3", "--json").code == 0
    assert seen == []
    assert list((tmp_path / "prunelm").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_a_plan_without_a_place_for_its_work(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    command = ("plan", tiny_folder("llama"), "--text", text_file, *LOOKING)
    with monkeypatch.context() as patched:
        patched.setattr("prunelm.writing.os.fsync", _full)
        ran = cli(*command, "--sparsity", "0.3")
    assert ran.code == 1
    assert "cannot be written: the disk is full." in ran.err
    assert ran.err.endswith("$XDG_STATE_HOME names another folder for unfinished work.\n")
    monkeypatch.setattr("prunelm.own_work.state_folder", lambda: None)
    assert cli(*command, "--sparsity", "0.3").code == 0


def test_what_perplexity_is_measured_on(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    def refused(*options: object, model: str = "llama") -> str:
        return error_of(cli("prune", tiny_folder(model), tmp_path / "out", *options, *ONE))

    text = ("--text", text_file)
    assert "give --held-out-text" in refused("--max-ppl", "+5%")
    assert "calibrates, so no perplexity on it counts" in refused(
        "--max-ppl", "+5%", *text, "--held-out-text", text_file
    )
    assert "no --max-ppl is given" in refused("--params", "30k", "--held-out-text", text_file)
    assert "which the dense model does not meet itself" in refused("--max-ppl", "1.5", *text)
    assert "no next token" in refused("--max-ppl", "+5%", *text, model="bert")
    assert "there is no dry run of that" in refused("--max-ppl", "+5%", *text, "--dry-run")
    assert "a plan cannot" not in cli("plan", tiny_folder("llama"), "--sparsity", "0.2", *ONE).err


@pytest.mark.parametrize("keep", ['"12"', "1.5", "null"])
def test_two_plans_of_which_one_makes_no_sense(
    keep: str, cli: Callable[..., Any], planned: Path, tmp_path: Path
) -> None:
    bad = edited(planned, tmp_path / "bad.json", (r'("0.ffn": {.*"keep": )\d+', rf"\g<1>{keep}"))
    line = error_of(cli("plan", "--diff", planned, bad))
    assert line.endswith(f"0.ffn must say how many units it keeps, got {keep}.")


def test_what_is_said_beside_a_recipe_counts_and_beside_a_plan_is_refused(
    tiny_folder: Callable[..., Path], planned: Path, tmp_path: Path
) -> None:
    model, given = tiny_folder("llama"), Recipe.load("l2", sparsity=0.2)
    assert prunelm.plan(model, recipe=given, sparsity=0.5).recipe == Recipe.load("l2", sparsity=0.5)
    with pytest.raises(RecipeError, match="recipe 'l2': unknown key 'nonsense'"):
        prunelm.plan(model, recipe=given, nonsense=3)
    beside: list[dict[str, Any]] = [{"sparsity": 0.9}, {"recipe": given}]
    for said in beside:
        for run, plan in ((prunelm.prune, "plan"), (prunelm.plan, "edited")):
            with pytest.raises(RecipeError, match=f"holds its recipe, so {next(iter(said))} cannot be said here"):
                run(model, tmp_path / "out", **{plan: planned}, **said)
    assert list(tmp_path.iterdir()) == []


def test_rows_in_blocks_keep_what_the_named_program_likes(tiny_folder: Callable[..., Path]) -> None:
    source = find_model(tiny_folder("llama", intermediate_size=320))
    for targets, multiple in ((("transformers",), 32), (("vllm",), 64)):
        recipe = Recipe.load("l1", sites=("ffn",), targets=targets)
        found = sized(limit_of(fit="150kB@q4_k_m"), source, recipe)
        assert found.recipe.multiple_of == multiple
        assert found.notes[1] == f"FFN widths are multiples of {multiple}: rows of q4_k_m are in blocks of 32"
