"""What the documentation shows is run as it stands: commands, Python, plug-in packages, links, generated pages."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from tests import forked

from prunelm.allocators import ALLOCATORS
from prunelm.cli import app
from prunelm.criteria import CRITERIA
from prunelm.recipe import Recipe
from prunelm.reconstructions import RECONSTRUCTIONS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The README's examples name MODEL, OUT, calibration.txt and held-out.txt; the fixture below makes files of these names,
# so its lines run unchanged. Only what would take long is made smaller, by options appended to lines that hold the key.
SMALLER = {
    "--self-generated": ["--samples", "8", "--length", "64"],
    "osp": ["--samples", "16", "--length", "32"],
    "liar": ["--multiple-of", "4"],
    "--for": ["--multiple-of", "4"],
}


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def command_lines(page):
    """The arguments of every `prunelm ...` line in a console block."""
    lines = [line for block in blocks(page, "console", "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["prunelm"]]


def run(*command, cwd, **environment):
    """What a fresh Python prints; one thread, because the models are tiny and the machine may be busy."""
    environment["OMP_NUM_THREADS"] = "1"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tiny_folder, text_file, tmp_path_factory):
    """A folder with the files that the README names: MODEL with a tokenizer of bytes, and two texts."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_folder("llama", max_position_embeddings=1024, intermediate_size=128), folder / "MODEL")
    text = text_file.read_text(encoding="utf-8")
    (folder / "calibration.txt").write_text(text[:10_000], encoding="utf-8")
    (folder / "held-out.txt").write_text(text[-5_000:], encoding="utf-8")
    return folder


@pytest.mark.long
def test_the_commands_of_the_readme_run(workplace, cli, monkeypatch):
    monkeypatch.chdir(workplace)
    lines = command_lines(ROOT / "README.md")
    assert {words[0] for words in lines} == {
        *("inspect", "plan", "prune", "calibrate", "repair", "evaluate", "report", "compare", "list")
    }
    shown = {}
    for words in lines:
        ran = cli(*words, *(o for key, options in SMALLER.items() if key in words for o in options))
        assert ran.code == 0, (words, ran)
        shown[" ".join(words)] = ran.out
    assert "prunable" in shown["inspect MODEL"]
    assert "Nothing was written" in shown["prune MODEL OUT --sparsity 0.2 --dry-run"]
    assert "same logits" in shown["prune MODEL OUT --sparsity 0.2 --text calibration.txt"]
    assert "same logits" in shown["prune MODEL OUT-SELF --sparsity 0.2 --self-generated"]
    assert "KL to dense" in shown["evaluate OUT --text held-out.txt --against MODEL"]
    assert "report.html: written" in shown["report OUT"]
    assert "tokens/s" in shown["compare MODEL OUT OUT-SELF --text held-out.txt"]
    assert "goa-data-free" in shown["list recipes"]


@pytest.mark.long
def test_the_python_of_the_readme_and_of_the_quickstart_runs(workplace):
    twin = next(block for block in blocks(ROOT / "README.md", "python") if "prunelm.prune(" in block)
    assert len([line for line in twin.splitlines() if line]) == 5
    in_memory = next(block for block in blocks(ROOT / "docs" / "quickstart.md", "python") if "prune_(" in block)
    shutil.rmtree(workplace / "OUT", ignore_errors=True)
    shown = run("-c", f"{twin}\n{in_memory}", cwd=workplace)
    assert re.search(r"metric='perplexity', value=\d", shown)
    assert (workplace / "OUT" / "pruning.json").is_file()
    assert (workplace / "OUT-MEMORY" / "tokenizer.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["l2", "random"])
def test_the_lora_of_the_page_on_recovery_trains_and_merges(workplace, cli, recipe, monkeypatch):
    monkeypatch.chdir(workplace)
    options = ["--sparsity", "0.3", "--recipe", recipe, "--force", *(["--per-block"] if recipe == "random" else [])]
    assert cli("prune", "MODEL", "OUT", *options).code == 0
    (page,) = blocks(ROOT / "docs" / "recover.md", "python")
    checks = """
before = prunelm.load("OUT")
same = [n for n, p in before.named_parameters() if p.shape != dict(merged.named_parameters())[n].shape]
moved = sum(float((p - dict(merged.named_parameters())[n]).abs().max()) > 0 for n, p in before.named_parameters())
with torch.no_grad():
    losses = [float(m(**batch, labels=batch["input_ids"]).loss) for m in (before, merged)]
print("shapes", same, "moved", moved > 0, "better", losses[1] < losses[0])
"""
    ran = forked.run("-c", page + checks, cwd=workplace)
    assert "shapes [] moved True better True" in ran.stdout, ran.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=lambda page: page.name)
def test_every_command_line_parses(page):
    commands = typer.main.get_command(app).commands
    for words in command_lines(page):
        with commands[words[0]].make_context(words[0], list(words[1:])) as context:
            assert context.params, f"{page.name}: {' '.join(words)}"


def test_the_quickstart_has_command_lines_for_every_step():
    assert {words[0] for words in command_lines(ROOT / "docs" / "quickstart.md")} >= {
        "inspect",
        "prune",
        "evaluate",
        "compare",
    }


def test_the_recipe_of_the_quickstart_is_valid():
    (source,) = blocks(ROOT / "docs" / "quickstart.md", "toml")
    recipe = Recipe.from_dict(tomllib.loads(source))
    assert (recipe.attention.criterion, recipe.attention_share, recipe.ridge) == ("head-similarity", 0.5, 1.0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for number, block in enumerate(blocks(page, "python")):
        compile(block, f"{page.name}, block {number}", "exec")


def install(page, folder):
    """Write the files of a documented package, and the metadata by which Python finds its entry points."""
    named = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for name, source in named:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    project = tomllib.loads(dict(named)["pyproject.toml"])["project"]
    info = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"]
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in found.items()) for group, found in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.long
def test_the_packages_of_the_docs_pass_their_own_checks(tmp_path):
    for page in ("add-a-model.md", "add-a-method.md"):
        (tmp_path / page).mkdir()
        install(ROOT / "docs" / page, tmp_path / page)
    path = os.pathsep.join(str(folder / "src") for folder in tmp_path.iterdir())
    shown = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *tmp_path.glob("*/tests"), cwd=tmp_path, PYTHONPATH=path
    )
    assert re.search(r"\b14 passed", shown), shown


def test_generated_pages_are_up_to_date():
    run("docs/generate.py", "--check", cwd=ROOT)


def test_a_stale_generated_page_is_noticed(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(generate, "cli_page", lambda: "new")
    monkeypatch.setattr(generate, "plugins_page", lambda: "same")
    (tmp_path / "cli.md").write_text("old\n")
    (tmp_path / "plugins.md").write_text("same\n")
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == "stale: docs/cli.md. Run: make docs\n"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def links(page):
    """Targets of the relative links of a page, without anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        found = page.parent / name
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in known, f"{page.name} links to {target}; known: {sorted(known)}"


def test_the_readme_links_to_every_page_of_the_docs():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert {page.resolve() for page in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("registry", [CRITERIA, ALLOCATORS, RECONSTRUCTIONS], ids=lambda registry: registry.kind)
def test_every_plug_in_is_described_with_cost_source_and_use(registry):
    parts = re.split(r"^### (.*)$", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), flags=re.M)
    said = {name: text for heads, text in zip(parts[1::2], parts[2::2], strict=True) for name in heads.split(", ")}
    for name in (name for name, _, origin in registry.describe() if origin.startswith("prunelm")):
        points = "\n".join(re.findall(r"^- .*$", said[name], re.M)).lower()
        assert not [word for word in ("cost", "source", "use") if word not in points], name
