"""`prunelm calibrate`: looking once, pruning often."""

import json
import shlex
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunelm
from prunelm.calibration import fingerprint
from prunelm.errors import CalibrationError, CheckpointError
from prunelm.loading import find_model
from prunelm.planning import plan
from prunelm.recipe import Recipe

SMALL = ("--samples", "24", "--length", "32", "--multiple-of", "1")


@pytest.fixture(scope="module")
def calibrated(cli, tiny_folder, text_file, tmp_path_factory):
    """Folders of `calibrate` on the tiny Llama, by recipe."""
    made = {}

    def make(recipe):
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("calibrated") / recipe
            command = ("calibrate", tiny_folder("llama"), made[recipe], "--recipe", recipe, "--text", text_file, *SMALL)
            ran = cli(*command)
            assert ran.code == 0, ran
            assert "what was seen of 4 sites" in ran.out
        return made[recipe]

    return make


@pytest.mark.parametrize("recipe", ["sensitivity", "flap"])
def test_a_saved_calibration_serves_other_sizes(recipe, cli, calibrated, tiny_folder, text_file, tmp_path):
    kept = []
    for sparsity in ("0.2", "0.35"):
        command = ("prune", tiny_folder("llama"), tmp_path / sparsity, "--recipe", recipe, "--sparsity", sparsity)
        ran = cli(*command, "--calibrated", calibrated(recipe), "--text", text_file, *SMALL)
        assert ran.code == 0, ran
        facts = json.loads((tmp_path / sparsity / "pruning.json").read_text())
        assert any("what was seen of the dense model comes from" in note for note in facts["notes"])
        assert facts["parameters"]["share_of_blocks"] <= float(sparsity)
        kept.append(sum(len(site["kept"]) for site in facts["sites"].values()))
    assert kept[0] > kept[1]


def test_the_last_line_of_calibrate_is_a_command_that_works(cli, tiny_folder, text_file, tmp_path):
    made = cli("calibrate", tiny_folder("llama"), tmp_path / "see n", "--text", text_file, *SMALL)
    assert made.code == 0, made
    words = shlex.split(made.out.splitlines()[-1])
    assert words[:2] == ["prunelm", "prune"]
    ran = cli(*(str(tmp_path / "out") if word == "OUT" else word for word in words[1:]))
    assert ran.code == 0, ran
    assert f"recipe best-uniform, with which {tmp_path / 'see n'} was made" in ran.err
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (facts["recipe"]["name"], facts["recipe"]["samples"], facts["loader"]) == (
        "best-uniform",
        24,
        "transformers",
    )


def test_the_recipe_of_a_calibration_is_what_later_work_uses(calibrated, cli, tiny_folder, text_file, tmp_path):
    seen = {"calibrated": calibrated("flap"), "text": text_file, "sparsity": 0.25}
    report = prunelm.prune(tiny_folder("llama"), tmp_path / "out", **seen)
    assert report.recipe == Recipe.load("flap", sparsity=0.25, samples=24, length=32, multiple_of=1)
    assert plan(tiny_folder("llama"), **seen).recipe == report.recipe
    ran = cli("plan", tiny_folder("llama"), "--sparsity", "0.25", "--calibrated", calibrated("flap"))
    assert ran.code == 0, ran
    ran = cli("prune", tiny_folder("llama"), tmp_path / "no", "--sparsity", "0.3", "--calibrated", tmp_path / "none")
    assert (ran.code, "no saved calibration" in ran.err) == (1, True)


def test_no_text_is_needed_where_nothing_is_repaired(cli, tiny_folder, text_file, tmp_path):
    dense = tiny_folder("llama")
    recipe = ("--recipe", "wanda-sp", *SMALL)
    assert cli("calibrate", dense, tmp_path / "seen", *recipe, "--text", text_file).code == 0
    ran = cli("prune", dense, tmp_path / "out", *recipe, "--sparsity", "0.3", "--calibrated", tmp_path / "seen")
    assert ran.code == 0, ran
    scores = load_file(tmp_path / "seen" / "calibration.safetensors")
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    for key, site in facts["sites"].items():
        ranked = scores[f"scores/{key}"].argsort(descending=True)[: len(site["kept"])]
        assert site["kept"] == sorted(ranked.tolist())


def test_what_does_not_fit_is_refused_by_name(cli, calibrated, tiny_folder, text_file, tmp_path):
    seen = calibrated("sensitivity")
    other = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for file in tiny_folder("llama").glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    half = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).half()
    half.save_pretrained(tmp_path / "half")
    for file in tiny_folder("llama").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in seen.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    whole = (broken / "calibration.safetensors").read_bytes()
    (broken / "calibration.safetensors").write_bytes(whole[: len(whole) // 2])
    same = ("--recipe", "sensitivity", "--sparsity", "0.3", "--text", text_file, *SMALL)
    for model, folder, options, says in (
        (tmp_path / "other", seen, same, "made from other weights or settings (model.safetensors differ)"),
        (tmp_path / "half", seen, same, "made from other weights"),
        (tiny_folder("gpt2"), seen, same, "made from a llama model, but this one is gpt2"),
        (tiny_folder("llama"), seen, (*same, "--ridge", "0.5"), "made with ridge = 0.1, but the recipe says 0.5"),
        (tiny_folder("llama"), seen, (*same, "--seed", "4"), "made with seed = 0, but the recipe says 4"),
        (tiny_folder("llama"), broken, same, "damaged or cut short"),
        (
            tiny_folder("llama"),
            seen,
            (*same, "--compute-dtype", "bfloat16"),
            "made with compute_dtype = 'float32', but this run says 'bfloat16'. Say --compute-dtype float32, or",
        ),
        (tiny_folder("llama"), tmp_path, same, "no saved calibration"),
    ):
        ran = cli("prune", model, tmp_path / "out", "--calibrated", folder, *options)
        assert ran.code == 1
        assert says in ran.err, ran.err
        assert not (tmp_path / "out").exists()


def test_models_in_pickle_files_are_told_apart_too(tiny_folder, text_file, tmp_path):
    def pickled(name, scale):
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        torch.save({**weights, "model.norm.weight": scale * weights["model.norm.weight"]}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    options = {"recipe": "wanda-sp", "samples": 8, "length": 32, "multiple_of": 1, "allow_pickle": True}
    mine, other, seen = pickled("mine", 1), pickled("other", 2), tmp_path / "seen"
    prunelm.calibrate(mine, seen, text=text_file, **options)
    with pytest.raises(CalibrationError, match=r"other weights or settings \(pytorch_model\.bin differ\)"):
        prunelm.prune(other, tmp_path / "out", calibrated=seen, text=text_file, sparsity=0.3, **options)
    prunelm.prune(mine, tmp_path / "out", calibrated=seen, text=text_file, sparsity=0.3, **options)
    source = find_model(mine, allow_pickle=True)
    (mine / "pytorch_model.bin").rename(mine / "weights.pt")
    with pytest.raises(CheckpointError, match=r"mine: it has no \.safetensors or \.bin file, so its weights cannot be"):
        fingerprint(source)


def test_another_tokenizer_is_told(calibrated, tiny_folder, text_file, tmp_path):
    seen, dense = calibrated("flap"), shutil.copytree(tiny_folder("llama"), tmp_path / "dense")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    options = {"recipe": "flap", "samples": 24, "length": 32, "multiple_of": 1, "sparsity": 0.3, "text": text_file}
    said = "tokens), read by another tokenizer (chat_template.jinja differ)"
    for folder, told in ((dense, True), (tiny_folder("llama"), False)):
        report = prunelm.prune(folder, tmp_path / "out", calibrated=seen, force=True, **options)
        assert any(note.endswith(said) for note in report.notes) == told
    older = shutil.copytree(seen, tmp_path / "older")
    facts = json.loads((older / "calibration.json").read_text())
    (older / "calibration.json").write_text(json.dumps({**facts, "format": 4}))
    with pytest.raises(CalibrationError, match=r"format 4 is not known here\. Calibrate again"):
        prunelm.prune(dense, tmp_path / "out", calibrated=older, force=True, **options)


def test_the_library_twin(calibrated, tiny_folder, text_file, tmp_path):
    sizes = {"samples": 24, "length": 32, "multiple_of": 1}
    seen = prunelm.calibrate(
        tiny_folder("llama"), tmp_path / "seen", recipe="sensitivity", text=text_file, sparsity=0.3, **sizes
    )
    ours = load_file(tmp_path / "seen" / "calibration.safetensors")
    theirs = load_file(calibrated("sensitivity") / "calibration.safetensors")
    assert seen.survey.prices
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_decides_scores_must_be_the_same(cli, calibrated, tiny_folder, text_file, tmp_path):
    seen, dense = calibrated("sensitivity"), shutil.copytree(tiny_folder("llama"), tmp_path / "dense")
    options = {"recipe": "sensitivity", "sparsity": 0.3, "samples": 24, "length": 32, "multiple_of": 1}
    for changed in (
        {"exclude_sink": True},
        {"similarity_rows": 2},
        {"covariance_text": "random-tokens"},
        {"candidates": 3},
    ):
        (name,) = changed
        with pytest.raises(CalibrationError, match=f"made with {name} = "):
            prunelm.prune(dense, tmp_path / "out", calibrated=seen, text=text_file, **options, **changed)
    config = json.loads((dense / "config.json").read_text())
    config["rms_norm_eps"] *= 2
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalibrationError, match=r"other weights or settings \(config.json differ\)"):
        prunelm.prune(dense, tmp_path / "out", calibrated=seen, text=text_file, **options)


def test_a_calibration_of_more_sites_than_a_target_lets_shrink(cli, tiny_folder, text_file, tmp_path):
    dense = tiny_folder("opt")
    options = {"recipe": "sensitivity", "sparsity": 0.1, "samples": 24, "length": 32, "multiple_of": 1}
    prunelm.calibrate(dense, tmp_path / "seen", text=text_file, **options)
    vllm = {"text": text_file, "targets": ("vllm",), **options}
    report = prunelm.prune(dense, tmp_path / "out", calibrated=tmp_path / "seen", **vllm)
    assert {key.split(".")[1] for key in report.sites} == {"ffn"}
    prunelm.calibrate(dense, tmp_path / "less", **vllm)
    with pytest.raises(CalibrationError, match=r"has not seen 0\.attention, 1\.attention, which may lose units here"):
        prunelm.prune(dense, tmp_path / "more", calibrated=tmp_path / "less", text=text_file, **options)


def test_the_plan_that_a_search_found_is_kept(tiny_folder, text_file, tmp_path):
    options = {"recipe": "best", "samples": 16, "length": 32, "multiple_of": 1, "rounds": 3, "text": text_file}
    prunelm.calibrate(tiny_folder("llama"), tmp_path / "seen", sparsity=0.3, **options)
    found = json.loads((tmp_path / "seen" / "calibration.json").read_text())["found"]
    seen = {"calibrated": tmp_path / "seen", **options}
    for sparsity, same in ((0.3, True), (0.2, False)):
        report = prunelm.prune(tiny_folder("llama"), tmp_path / f"{sparsity}", sparsity=sparsity, **seen)
        kept = {key: site["kept"] for key, site in report.sites.items()}
        assert ({key: kept[key] for key in found["counts"]} == found["counts"]) is same
        assert any("widths here are by the prices" in note for note in report.notes) is not same


def test_one_saved_calibration_serves_several_sizes(cli, tiny_folder, text_file, tmp_path):
    options = {"recipe": "best", "samples": 24, "length": 32, "multiple_of": 1, "sparsity": 0.3}
    seen = prunelm.calibrate(tiny_folder("llama"), tmp_path / "seen", text=text_file, **options)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.1,0.2,0.3", "--text", text_file)
    ran = cli(*command, "--calibrated", tmp_path / "seen")
    assert ran.code == 0, ran
    plans = [json.loads((tmp_path / "out" / size / "pruning.json").read_text()) for size in ("0.1", "0.2", "0.3")]
    assert all(any("dense model comes from seen (" in note for note in plan["notes"]) for plan in plans)
    kept = [{key: set(site["kept"]) for key, site in plan["sites"].items()} for plan in plans]
    assert {key: len(units) for key, units in kept[2].items()} == seen.chosen.counts
    for larger, smaller in pairwise(kept):
        assert all(smaller[key] < larger[key] or smaller[key] == larger[key] for key in larger)
    ran = cli(*command, "--calibrated", tmp_path / "seen", "--journal", tmp_path / "j.jsonl", "--force")
    assert (ran.code, "leave --journal out" in ran.err) == (1, True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "0.1", trust_remote_code=True)
    assert model.num_parameters() == plans[0]["parameters"]["after"]


def test_steps_read_text_where_nothing_repairs(cli, tiny_folder, text_file, tmp_path):
    recipe = tmp_path / "stepped.toml"
    recipe.write_text(
        'allocator = "uniform"\nreconstruction = "none"\nheld_out = 0.25\nnatural_steps = 2\nmultiple_of = 1\n'
        'samples = 24\nlength = 32\n[attention]\ncriterion = "wanda-sp"\n[ffn]\ncriterion = "wanda-sp"\n'
    )
    made = cli("calibrate", tiny_folder("llama"), tmp_path / "seen", "--recipe", recipe, "--text", text_file)
    assert made.code == 0, made
    words = shlex.split(made.out.splitlines()[-1])
    assert words[-2:] == ["--text", str(text_file)]
    ran = cli(*(str(tmp_path / "out") if word == "OUT" else word for word in words[1:]))
    assert ran.code == 0, ran
    assert any(
        "natural gradient" in note for note in json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"]
    )
