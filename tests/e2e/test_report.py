"""The report says what is known and what is missing, and works in a browser that may not load anything."""

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.record import DATA, needed

import prunelm
from prunelm.errors import CheckpointError
from prunelm.loading import find_model, load_model, load_tokenizer
from prunelm.progress import silent
from prunelm.report import write_report
from prunelm.report.caveats import caveats
from prunelm.suite import Setting
from prunelm.suite.summary import digits
from prunelm.workflow.texts import calibration_batches

_NUMBER = re.compile(r"[\d.,]+")
QUICK = Setting(length=32, max_tokens=512, rounds=2, prompts=2, new_tokens=6)
PARTS = ("quality", "positions", "generation", "noise", "speed")


def pruned(dense: Path, out: Path, text: Path, *, sparsity: float, recipe: str, **fields: Any) -> None:
    """What `prunelm prune` writes, without the proof in a fresh process, which other tests see to."""
    source = find_model(dense)
    model, tokenizer = load_model(source), load_tokenizer(source)
    chosen = prunelm.Recipe.load(recipe, sparsity=sparsity, samples=16, length=32, multiple_of=4, **fields)
    batches, refit = calibration_batches(model, tokenizer, chosen, prunelm.read_documents(text), name=text.name)
    report = prunelm.prune_(model, batches, chosen, refit=refit)
    prunelm.save(model, report, out, source=source, tokenizer=tokenizer, prove=False)


@pytest.fixture(scope="module")
def folders(
    tiny_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A family of five sizes with widths per block, and one model of equal widths with everything measured."""
    root, dense = tmp_path_factory.mktemp("report"), tiny_folder("llama")
    text = root / "held-out.txt"
    text.write_text(text_file.read_text()[20_000:])
    (root / "FAMILY").mkdir()
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5):
        folder = root / "FAMILY" / str(sparsity)
        pruned(dense, folder, text_file, sparsity=sparsity, recipe="sensitivity", held_out=0.25)
        prunelm.measure(folder, text, against=dense, out=folder / "evaluation.json", setting=QUICK)
    one = root / '<ONE> & "only"'
    pruned(dense, one, text_file, sparsity=0.4, recipe="goa-budget")
    prunelm.measure(one, text, against=dense, parts=PARTS, out=one / "evaluation.json", setting=QUICK)
    recipe = prunelm.Recipe.load("goa-budget", sparsity=0.4, samples=8, length=32)
    (root / "a.txt").write_text(text_file.read_text()[:9_000])
    texts = [root / "a.txt", text]
    prunelm.transfer(dense, texts, recipe=recipe, length=32, max_tokens=128, out=one / "transfer.json")
    return root / "FAMILY", one


@pytest.fixture(scope="module")
def page(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(folders, tmp_path_factory.mktemp("page") / "report.html")


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def own_text(page: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)


def commands_of(text: str) -> list[str]:
    """The commands that a page shows."""
    return [re.sub(r"<[^>]+>", "", found) for found in re.findall(r'<pre class="command">(.*?)</pre>', text, re.S)]


def titles_of(text: str) -> list[str]:
    """The titles of the figures of a page."""
    return re.findall(r'<h[34] class="drawn">(.*?)</h', text)


def test_the_page_is_complete(page: Path, folders: tuple[Path, Path]) -> None:
    text = own_text(page)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert "default-src 'none'" in text
    assert "&lt;ONE&gt; &amp;" in text
    assert "<ONE>" not in text
    evaluation = json.loads((folders[1] / "evaluation.json").read_text())["parts"]["quality"]["results"]
    assert digits(evaluation["kl"]["value"], 3) in text
    assert f"{evaluation['ratio']['value']:.3f}x" in text
    made = "--sparsity 0.4 --recipe goa-budget --text words.txt --multiple-of 4 --samples 16 --length 32"
    assert any(command.endswith(made) for command in commands_of(text))
    name = "'<ONE> & \"only\"'"
    measured = f"prunelm evaluate {name} --text held-out.txt --against llama --parts {','.join(PARTS)} --length 32 "
    commands = [html.unescape(command) for command in commands_of(text)]
    assert any(command.startswith(measured) for command in commands), commands
    starts = re.findall(r'type="range" id="[^"]+" min="([^"]+)" max="([^"]+)" step="0.01" value="([^"]+)"', text)
    assert len(starts) == 6
    shares = {json.loads(p.read_text())["parameters"]["share_of_blocks"] for p in folders[0].glob("*/pruning.json")}
    for low, high, start in (map(float, found) for found in starts):
        assert low < 0.01 < start < high
        assert (start - low) / 0.01 == pytest.approx(round((start - low) / 0.01), abs=1e-3)
    assert shares <= {float(start) for _, _, start in starts}
    assert page.stat().st_size < 1_500_000
    figures = data_of(page)["figures"]
    assert all(len(spec["description"]) > 20 for spec in figures.values())
    titles = titles_of(text)
    for title in (
        "Attention: units that stay",
        "FFN: units",
        "Sensitivity",
        "Perplexity by position",
        "Transfer",
        "Robu",
    ):
        assert any(found.startswith(title) for found in titles), titles
    assert "Quality against size: perplexity" in titles


def test_what_was_not_measured_is_said_with_its_command(
    folders: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    bare = tmp_path / "BARE"
    bare.mkdir()
    shutil.copy(folders[1] / "pruning.json", bare)
    ran = cli("report", bare)
    assert ran.code == 0, ran
    assert "report.html: written" in ran.out
    text = own_text(bare / "report.html")
    assert "No quality has been measured yet" in text
    commands = commands_of(text)
    assert any(
        re.match(
            r"prunelm evaluate BARE --against llama --text YOUR_TEXT --parts quality,positions,generation,noise", c
        )
        for c in commands
    )
    assert any("--others FILE,FILE --out BARE/evaluation.json" in c for c in commands)
    assert any(c.startswith("prunelm transfer llama TEXT_A TEXT_B") for c in commands)
    assert "curves.json" in text
    with pytest.raises(CheckpointError, match=r"no pruning\.json in it or one level below"):
        write_report([tmp_path / "none"])
    refused = cli("report", bare, "--out", tmp_path / "no" / "page.html")
    assert refused.code == 1
    assert "cannot be written" in refused.err


def test_caveats_are_said(folders: tuple[Path, Path]) -> None:
    pruning = json.loads((folders[1] / "pruning.json").read_text())
    evaluation = json.loads((folders[1] / "evaluation.json").read_text())
    evaluation["parts"]["quality"]["overlap"] = {"share": 0.4, "checked": 10, "shared": 4, "flagged": True}
    evaluation["parts"]["speed"]["results"]["ratio"]["decode"]["value"] = 0.9
    cells = [{"calibrated": a, "tested": b, "ratio": {"value": 1.1 if a == b else 1.5}} for a in "xy" for b in "xy"]
    pruning["calibration"]["criterion"]["tokens"] = 100
    pruning["sites"]["0.ffn"]["kept"] = list(range(13))
    said = "\n".join(caveats(pruning, evaluation, {"cells": cells}))
    for words in (
        "40% of its 8-word",
        "Decoding is not faster",
        "0.900x",
        "hangs on its calibration text: on x",
        ": 13. Part widths measures it",
    ):
        assert words in said
    assert "Few calibration tokens: 100 for FFNs of" in said
    assert "hangs" not in "\n".join(caveats(pruning, evaluation, None))
    ratio = {"value": 0.8, "low": 0.78, "high": 0.83}
    even = {"value": 1.0, "low": 0.9, "high": 1.1}
    row = {"site": "ffn", "width": 13, "blocks": 2, "wider": [{"width": 16, "reading": ratio, "writing": even}]}
    evaluation["parts"]["widths"] = {"results": {"widths": [row]}}
    said = "\n".join(caveats(pruning, evaluation, None))
    assert "Width 13 (FFN, 2 blocks) is slower at reading than 16 would be: that takes 0.80x its time" in said
    assert "no multiple of 8" not in said


def test_heads_are_joined_where_they_are_alike(folders: tuple[Path, Path], page: Path) -> None:
    from prunelm.report.head_graph import head_graphs

    pruning, curves = (json.loads((folders[1] / name).read_text()) for name in ("pruning.json", "curves.json"))
    graphs = head_graphs(pruning, curves["similarity"])
    assert len(graphs) == len({key for key in pruning["sites"] if key.endswith("attention")})
    for graph in graphs:
        flat = curves["similarity"][f"{graph['block']}.attention"]
        assert len(graph["edges"]) == sum(d < 0.16 for d in flat)
        assert len(flat) == len(graph["nodes"]) * (len(graph["nodes"]) - 1) // 2
        site = pruning["sites"][f"{graph['block']}.attention"]
        share = sum(node["kept"] for node in graph["nodes"]) / len(graph["nodes"])
        assert share == len(site["kept"]) / site["units"]
    assert page.read_text().count('class="stays"') == sum(n["kept"] for g in graphs for n in g["nodes"])


def test_curves_are_those_of_the_plan(folders: tuple[Path, Path]) -> None:
    for folder in (folders[1], folders[0] / "0.4"):
        pruning, curves = (json.loads((folder / name).read_text()) for name in ("pruning.json", "curves.json"))
        assert curves["sites"]
        for key, site in curves["sites"].items():
            assert site["kept"] == len(pruning["sites"][key]["kept"])
            assert site["units"] - site["kept"] in site["removed"]
            assert len(site["removed"]) == len(site["error"]) <= 40
            assert site["error"] == sorted(site["error"])
            assert ("damage" in site) == (folder != folders[1])
        gone = sum((s["units"] - s["kept"]) * s["cost"] for s in curves["sites"].values())
        sizes = pruning["parameters"]
        assert gone == sizes["before"] - sizes["after"]


THEMES = [("light", 1200), ("dark", 390)]


@pytest.mark.parametrize(("theme", "width"), THEMES)
def test_the_page_works_in_a_browser(
    browser: Any, page: Path, folders: tuple[Path, Path], theme: str, width: int
) -> None:
    _works(browser, page, folders[1], theme, width)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The dense model of the demo."""
    from prunelm import demo

    try:
        return demo.model_file()
    except CheckpointError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def demonstrated(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the demo of the README writes, on less text, with everything measured; removed afterwards."""
    from prunelm import demo

    root = tmp_path_factory.mktemp("demo")
    out, text = root / "smollm2-pruned", root / "text.txt"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SAMPLES", 8), ("WINDOWS", 2), ("LENGTH", 256)):
            patch.setattr(demo, name, value)
        demo.run(out, sparsity=0.2, recipe="goa-budget", force=False, progress=silent)
    text.write_text(demo.language_reference()[1][:20_000])
    setting = Setting(length=128, max_tokens=1024, rounds=2, prompts=4, new_tokens=12)
    named = ("quality", "generation", "positions", "heads", "speed", "widths", "memory")
    prunelm.measure(out, text, against=smollm2, parts=named, out=out / "evaluation.json", setting=setting)
    yield out
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "width"), THEMES)
def test_the_page_of_the_demo_works_in_a_browser(browser: Any, demonstrated: Path, theme: str, width: int) -> None:
    _works(browser, write_report([demonstrated]), demonstrated, theme, width)
    graphs = own_text(demonstrated / "report.html").count('<svg viewBox="0 0 120 120"')
    assert graphs == find_model(demonstrated).config()["num_hidden_layers"]


@pytest.fixture(scope="module")
def smollm2_sizes(cli: Callable[..., Any], smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Five sizes of one model, pruned by one command and measured on other text; removed afterwards."""
    calibration, wikitext = DATA / "text" / "c4_calibration.jsonl", DATA / "text" / "wikitext2_raw_test.txt"
    if not needed(calibration, wikitext):
        pytest.skip("the texts of the benchmarks are not here")
    root = tmp_path_factory.mktemp("sizes")
    out, text = root / "SIZES", root / "held-out.txt"
    text.write_text(wikitext.read_text(encoding="utf-8")[:20_000])
    read = ("--text", calibration, "--samples", "16", "--length", "256")
    ran = cli("prune", smollm2, out, "--sparsity", "0.1,0.2,0.3,0.4,0.5", "--recipe", "obs", *read)
    assert ran.code == 0, ran
    setting = Setting(length=256, max_tokens=2048, rounds=2, prompts=2, new_tokens=12)
    for folder in sorted(out.iterdir()):
        parts = ("quality", "generation", "speed")
        prunelm.measure(folder, text, against=smollm2, parts=parts, out=folder / "evaluation.json", setting=setting)
    yield out
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "width"), THEMES)
def test_the_page_of_five_sizes_works_in_a_browser(browser: Any, smollm2_sizes: Path, theme: str, width: int) -> None:
    page = write_report([smollm2_sizes])
    assert any(title.startswith("Quality against") for title in titles_of(own_text(page)))
    _works(browser, page, smollm2_sizes / "0.5", theme, width)


def _works(browser: Any, page: Path, measured: Path, theme: str, width: int) -> None:
    """The page opens without a complaint or a request, draws everything, slides and sorts."""
    opened = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 900})
    opened.set_default_timeout(120_000)  # a busy machine draws slowly
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    opened.wait_for_selector("html[data-drawn]", timeout=120_000)
    data = data_of(page)
    # Several models are closed at first; a link opens its model, and whatever is opened is drawn.
    drawn = opened.evaluate("Number(document.documentElement.dataset.drawn)")
    closed = "document.querySelectorAll('details.model .plot').length"
    assert drawn == opened.evaluate(f"document.querySelectorAll('.plot').length - {closed}")
    if opened.evaluate(closed):
        opened.click("nav a >> nth=-1")
        opened.wait_for_function("document.querySelector('main > details:last-of-type').open")
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    opened.wait_for_selector(f"html[data-drawn='{len(data['figures'])}']", timeout=120_000)
    marks = opened.evaluate(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('svg [role=graphics-symbol]').length)"
    )
    assert len(marks) == len(data["figures"])
    assert min(marks) > 0
    names = "[...document.querySelectorAll('.plot, .heads svg')].every((s) => s.getAttribute('aria-label'))"
    assert opened.evaluate(names)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    _slides(opened, measured)
    _sorts(opened)
    if opened.evaluate(closed):
        _prints(opened, page)
    assert said == []
    assert [url for url in asked if url.partition("#")[0] != page.as_uri()] == []
    opened.close()


def _prints(opened: Any, page: Path) -> None:
    """Paper shows closed models too; their figures are drawn in the same breath, for a printer does not wait."""
    opened.goto(page.as_uri())
    opened.wait_for_selector("html[data-drawn]", timeout=120_000)
    breath = """async () => {
        dispatchEvent(new Event("beforeprint"));
        for (let turn = 0; turn < 2000; turn += 1) await null;
        const drawn = document.querySelectorAll(".plot svg").length;
        dispatchEvent(new Event("afterprint"));
        return [drawn, document.querySelectorAll("details[open]").length];
    }"""
    assert opened.evaluate(breath) == [len(data_of(page)["figures"]), 0]


def _slides(opened: Any, measured: Path) -> None:
    """The slider starts at what was measured, and moves with the keyboard."""
    sliders = opened.evaluate("[...document.querySelectorAll('input[type=range]')].map((i) => i.id)")
    last = sliders[-1]  # the model of equal widths

    def predicted() -> float:
        return float(re.search(r"KL ([\d.]+)", opened.inner_text(f"#{last}-said"))[1])

    found = json.loads((measured / "evaluation.json").read_text())["parts"]["quality"]["results"]["kl"]["value"]
    first = predicted()
    assert first == pytest.approx(found, rel=0.15)
    figure = opened.evaluate(f"data.sliders['{last}'].figure")
    before = opened.evaluate(f"views['{figure}'].data('rows').map((r) => r.kept)")
    opened.focus(f"#{last}")
    for _ in range(10):
        opened.keyboard.press("ArrowRight")
    assert predicted() > first
    after = opened.evaluate(f"views['{figure}'].data('rows').map((r) => r.kept)")
    assert sum(after) < sum(before)


def _sorts(opened: Any) -> None:
    """A click on the head of a column sorts its table, the second click the other way round."""
    column = "[...document.querySelector('table.sortable').tBodies[0].rows].map((r) => r.cells[2].textContent)"
    head = opened.locator("table.sortable").first.locator("thead button").nth(2)

    def numbers() -> list[float]:
        return [float(found[0].replace(",", "")) for cell in opened.evaluate(column) if (found := _NUMBER.match(cell))]

    head.click()
    rising = numbers()
    assert rising == sorted(rising)
    head.press("Enter")
    assert numbers() == rising[::-1] != rising
    assert opened.get_attribute("table.sortable thead th:nth-child(3)", "aria-sort") == "descending"


def test_compare_writes_the_page_too(
    cli: Callable[..., Any], folders: tuple[Path, Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    bare, text = tmp_path / "BARE", tmp_path / "t.txt"
    shutil.copytree(folders[1], bare, ignore=shutil.ignore_patterns("evaluation.json", "transfer.json"))
    text.write_text("some words that nobody has read before. " * 20)
    window = ("--text", text, "--length", "32", "--max-tokens", "128")
    page = tmp_path / "page.html"
    dense, other = tiny_folder("llama"), folders[0] / "0.2"
    ran = cli("compare", dense, bare, other, *window, "--out", page, "--json")
    assert ran.code == 0, ran
    rows, shown = json.loads(ran.out), own_text(page)
    assert digits(rows[1]["evaluation"]["kl"], 3) in shown
    assert digits(rows[0]["evaluation"]["value"], 4) in shown
    assert f"{rows[1]['speedup']:.2f}x" in shown
    assert "Quality against size" in shown
    # What was just measured replaces what the folder has, so that all models on the page read the same text.
    assert digits(rows[2]["evaluation"]["value"], 4) in shown
    ratio = rows[1]["evaluation"]["ratio"]
    assert f"{ratio['value']:.3f}x ({ratio['low']:.3f} to {ratio['high']:.3f})" in shown
    assert "held-out.txt" not in shown.partition("Robustness")[0].partition("All models")[2].partition("</table>")[0]
    # One window says nothing of how much windows differ.
    single = cli("compare", dense, bare, "--text", text, "--length", "32", "--max-tokens", "32", "--out", page)
    assert single.code == 0, single
    nowhere = cli("compare", dense, bare, *window, "--out", tmp_path / "nowhere" / "page.html")
    assert nowhere.code == 1
    assert "does not exist. Make it first" in nowhere.err
    refused = cli("compare", dense, dense, *window, "--out", page)
    assert refused.code == 1
    assert "no pruning.json" in refused.err


def copied(folder: Path, there: Path, *names: str) -> Path:
    """A folder with some files of another."""
    there.mkdir(parents=True)
    for name in names:
        shutil.copy(folder / name, there)
    return there


def test_models_that_were_measured_on_other_text_are_not_drawn_together(
    folders: tuple[Path, Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    text, page = tmp_path / "other.txt", tmp_path / "page.html"
    text.write_text("some words that nobody has read before. " * 200)
    family = tmp_path / "FAMILY"
    for size in ("0.1", "0.3", "0.5"):
        shutil.copytree(folders[0] / size, family / size)
    lone = family / "0.5"
    (lone / "evaluation.json").unlink()
    prunelm.measure(lone, text, against=tiny_folder("llama"), out=lone / "evaluation.json", setting=QUICK)
    shown = own_text(write_report([family], page))
    assert "Quality against size: perplexity on held-out.txt, windows of 32 tokens up to 512" in titles_of(shown)
    assert "All of these models read the same windows" in shown
    assert "measured alike, not for 0.5 on other.txt, windows of 32 tokens up to 512" in shown
    figure = next(spec for spec in data_of(page)["figures"].values() if "against parameters" in spec["description"])
    assert {row["label"] for row in figure["data"]["values"]} == {"0.1", "0.3", "dense"}
    table = shown.partition("<table")[2].partition("</table>")[0]
    assert "measured on" in table
    assert table.count("other.txt, windows") == 1
    assert ">dense<" not in table
    shutil.rmtree(family / "0.3")
    shown = own_text(write_report([family], page))
    assert not any(title.startswith("Quality against") for title in titles_of(shown))
    assert "not for 0.1 on held-out.txt, windows of 32 tokens up to 512; 0.5 on other.txt" in shown


def test_files_of_other_models_are_left_out(
    folders: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    other, mine = folders[0] / "0.2", folders[1]
    strange = tmp_path / "STRANGE"
    shutil.copytree(other, strange)
    for name in ("evaluation.json", "transfer.json", "curves.json"):
        shutil.copy(mine / name, strange)
    ran = cli("report", strange)
    assert ran.code == 0, ran
    text = own_text(strange / "report.html")
    for said in (
        "STRANGE: evaluation.json was left out, since it is of another model: it was measured on",
        "STRANGE: curves.json was left out, since it is of another model: it keeps",
        "STRANGE: transfer.json was left out, since it is of another model: it says llama pruned with goa-budget at 0.",
        "and this one is llama pruned with sensitivity at 0.2",
    ):
        assert said in ran.err
        assert said in re.sub(r"</?span[^>]*>", "", text)
    assert "No quality has been measured yet" in text
    assert "Transfer between texts" not in text
    # Without its weights, a folder is known by its size.
    bare = copied(other, tmp_path / "BARE", "pruning.json", "evaluation.json", "config.json")
    assert "left out" not in own_text(write_report([bare]))
    shutil.copy(mine / "evaluation.json", bare)
    assert "and this one has" in own_text(write_report([bare]))
    assert "left out" not in own_text(write_report([mine], tmp_path / "mine.html"))


@pytest.mark.parametrize(
    ("model_class", "fitting", "text"),
    [
        ("BertForSequenceClassification", "quality,noise,heads,speed,widths,memory", "YOUR_LABELED_TEXT.jsonl"),
        ("BertForMaskedLM", "quality,pseudo-perplexity,heads,speed,widths,memory", "YOUR_TEXT"),
        (None, "quality,heads,speed,widths,memory", "YOUR_TEXT"),
    ],
)
def test_encoders_get_commands_that_fit_them(
    model_class: str | None, fitting: str, text: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    from prunelm.testing import tiny_model

    dense, out, words = tmp_path / "dense", tmp_path / "OUT", tmp_path / "words.txt"
    words.write_text("a line of words\nand another one\n" * 20)
    options: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 128}
    options |= {"model_class": model_class} if model_class is not None else {}
    tiny_model("bert", **options).save_pretrained(dense)
    byte_tokenizer.save_pretrained(dense)
    pruned(dense, out, words, sparsity=0.12, recipe="l2")
    shown = commands_of(own_text(write_report([out])))
    said = f"prunelm evaluate OUT --against dense --text {text} --parts {fitting} --out OUT/evaluation.json"
    assert said in shown
    assert not any("transfer" in line or "--others" in line or "--tasks" in line for line in shown)
    if model_class is None:
        prunelm.measure(out, words, against=dense, out=out / "evaluation.json", setting=QUICK)
        page = own_text(write_report([out]))
        assert "<dt>cosine</dt>" in page
        two = own_text(write_report([out, out], tmp_path / "two.html"))
        assert "not measured" not in two.partition("<table")[2].partition("</table>")[0]
        assert "quality not measured" not in two
