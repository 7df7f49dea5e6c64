"""The comparison of checkpoints: entries, bits, table, plot, and a run that goes on and survives failures."""

import json
import math

import pytest

from benchmarks import method, quality
from gqsac.errors import InputError, ModelError
from gqsac.evaluate import compare
from gqsac.evaluate.compare import GQSA, REFERENCE, TWO_FOUR, UNIFORM, Entry, Row
from gqsac.evaluate.plot import plot
from tests.e2e.checkpoints import save_checkpoint, save_multi_stream

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "models"
    folder.mkdir()
    source = save_checkpoint(folder / "fp16", "llama")
    save_multi_stream(folder / "W4 S30", source)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def row(label, bits, value, **fields):
    result = None if value is None else {"perplexity": value, "n_tokens": 9, "n_windows": 1, "seconds": 0.1}
    return Row(label, f"{label}/", compare.series_of(label), "", bits, result, **fields)


@pytest.mark.parametrize(
    ("label", "series"),
    [("fp16", REFERENCE), ("SmolLM2-135M", REFERENCE), ("W8 g64", UNIFORM), ("llama-w3-g128", UNIFORM),
     ("2:4 + W4", TWO_FOUR), ("w4_2-4", TWO_FOUR), ("W4 S50", GQSA), ("W4 S0 1x16", GQSA), ("w4-s5", GQSA)],
)  # fmt: skip
def test_series_of_labels(label, series):
    assert compare.series_of(label) == series


def test_entries(tmp_path, checkpoints):
    entries = compare.read_entries([str(checkpoints), "W3=some/where", f"again={checkpoints / 'fp16'}"])
    assert [(entry.label, entry.series) for entry in entries] == [
        ("W4 S30", GQSA), ("fp16", REFERENCE), ("W3", UNIFORM), ("again", REFERENCE),
    ]  # fmt: skip
    assert entries[2].path == "some/where"
    listed = [{"label": "W4 S50", "path": "a/", "bits_per_weight": 2.69}, {"label": "x", "path": "b/", "series": "new"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    expected = [Entry("W4 S50", "a/", GQSA, 2.69), Entry("x", "b/", "new", None)]
    assert compare.read_entries([str(tmp_path / "list.json")]) == expected


def test_bad_entries(tmp_path, checkpoints):
    (tmp_path / "list.json").write_text('[{"label": "a"}]')
    for source, match in [
        (str(checkpoints / "fp16"), "give a single checkpoint a label"),
        (str(tmp_path / "none"), "is no LABEL=PATH"),
        ("=path", "is no LABEL=PATH"),
        (str(tmp_path), "holds no model folders"),
        (str(tmp_path / "list.json"), "entry 0 is .* expected label, path"),
        (str(tmp_path / "other.json"), "cannot be read as JSON"),
    ]:
        with pytest.raises(InputError, match=match):
            compare.read_entries([source])
    with pytest.raises(InputError, match="label 'a' stands for 2 checkpoints"):
        compare.read_entries(["a=b", "a=c"])


def test_bits_per_weight(tmp_path, checkpoints):
    from gqsac.checkpoint import Checkpoint

    assert compare.bits_per_weight(str(checkpoints / "fp16")) == compare.bits_per_weight("org/name") == 16
    checkpoint = Checkpoint.open(checkpoints / "W4 S30")
    weights = n_bits = 0
    for module in checkpoint.modules():
        for stream in checkpoint.streams(module):
            # Row starts and task boundaries: so small a linear has a task for each row.
            n_bits += stream.nnz * (16 * stream.bits + 32) + 2 * 32 * (stream.rows + 1)
        weights += stream.rows * stream.columns
    counted = compare.bits_per_weight(str(checkpoints / "W4 S30"))
    assert 0.99 * n_bits / weights < counted < n_bits / weights  # stacks of linears share the ends of their tables
    reported = save_multi_stream(tmp_path / "reported", checkpoints / "fp16")
    (reported / "report.json").write_text('{"bits_per_weight": 9.5, "coded_bits_per_weight": 3.125}')
    assert compare.bits_per_weight(str(reported)) == counted
    assert compare.bits_per_weight(str(reported), "coded") == 3.125
    assert compare.bits_per_weight(str(checkpoints / "fp16"), "coded") == 16
    with pytest.raises(ModelError, match=r"report\.json does not give coded_bits_per_weight"):
        compare.bits_per_weight(str(checkpoints / "W4 S30"), "coded")
    with pytest.raises(ModelError, match="is compiled, so its bits are those that it stores"):
        compare.bits_per_weight("some.gqsa", "coded")


def test_table():
    accuracy = {"acc": 0.61234, "acc_stderr": 0.011, "acc_norm": 0.5, "acc_norm_stderr": 0.02}
    single = {"acc": 1.0, "acc_stderr": None, "acc_norm": None, "acc_norm_stderr": None}
    rows = [
        row("W4 S50", 2.69, 40.0, tasks={"piqa": accuracy, "winogrande": {**accuracy, "acc_norm": None}}),
        row("fp16", 16.0, 20.0, tasks={"winogrande": single}),
        row("W2", 2.28, None, errors={"perplexity": "no"}),
        row("W4 S80", 1.5, math.inf, errors={"piqa": "no"}),
        row("gone", None, None, errors={"load": "no"}),
    ]
    assert compare.table(rows, ["piqa", "winogrande"]).splitlines() == [
        "| model | bits per weight | perplexity | relative | piqa | winogrande |",
        "|---|---|---|---|---|---|",
        "| gone | - | failed | - | - | - |",
        "| fp16 | 16.00 | 20.00 | 1.00 | - | 100.0 |",
        "| W4 S50 | 2.69 | 40.00 | 2.00 | 50.0 ± 2.0 | 61.2 ± 1.1 |",
        "| W2 | 2.28 | failed | - | - | - |",
        "| W4 S80 | 1.50 | inf | inf | failed | - |",
    ]


def test_plot_draws_every_finite_row(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    rows = [row("fp16", 16.0, 20.0), row("W3", 3.3, 26.0), row("W2", 2.3, 51.0), row("W4 S50", 2.7, 60.0),
            row("W4 S80", 1.5, math.inf), row("W4 S70", 2.0, None)]  # fmt: skip
    plot(rows, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "title")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines[UNIFORM] == [[2.3, 51.0], [3.3, 26.0]] and lines[GQSA] == [[2.7, 60.0]]
    assert [y for _, y in lines["fp16: 20.0"]] == [20.0, 20.0] and len(lines) == 3
    assert sorted(text.get_text() for text in axes.texts) == ["W2", "W3", "W4 S50"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)
    plot(rows[:1], tmp_path / "b.png", "the reference alone")
    with pytest.raises(InputError, match="no row has a perplexity"):
        plot(rows[4:], tmp_path / "c.png", "title")


def test_results_keep_an_infinite_perplexity(tmp_path):
    rows = [row("W4 S80", 1.5, math.inf), row("fp16", 16.0, 20.0, errors={"piqa": "no"})]
    compare.save(tmp_path / "results.json", {"window": 8}, rows)
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    assert compare.load(tmp_path / "results.json", {"window": 8}) == {"W4 S80": rows[0], "fp16": rows[1]}
    with pytest.raises(InputError, match="was made with window 8, and now 9 is asked for"):
        compare.load(tmp_path / "results.json", {"window": 9})


def test_a_run_survives_a_failure_and_goes_on(tmp_path, checkpoints, text, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    arguments = [f"broken={tmp_path / 'broken'}", str(checkpoints), "--text", str(text), "--window", "64",
                 "--max-windows", "2", "--device", "cpu", "-o", str(out)]  # fmt: skip
    assert quality.main(arguments) == 1
    printed = capsys.readouterr()
    assert "load failed: " in printed.err and "failed: broken; the same command tries them again" in printed.err
    table = (out / "table.md").read_text()
    assert printed.out == table and "| broken | 16.00 | failed | - |" in table
    results = json.loads((out / "results.json").read_text())
    assert set(results["rows"][0]["errors"]) == {"load"} and results["settings"]["window"] == 64
    assert [entry["perplexity"] is not None for entry in results["rows"]] == [False, True, True]
    assert results["rows"][1]["perplexity"]["n_windows"] == 2
    assert (out / "perplexity.png").stat().st_size > 10_000

    # The broken one is mended; nothing that is finished is opened again.
    for file in (checkpoints / "fp16").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    opened = []
    original = quality.open_scorer
    monkeypatch.setattr(quality, "open_scorer", lambda path, *rest: opened.append(path) or original(path, *rest))
    assert quality.main(arguments) == 0
    assert opened == [str(tmp_path / "broken")]
    after = json.loads((out / "results.json").read_text())["rows"]
    assert after[1:] == results["rows"][1:] and after[0]["errors"] == {}
    assert after[0]["perplexity"]["perplexity"] == pytest.approx(after[2]["perplexity"]["perplexity"])

    # Other settings do not mix with these results.
    capsys.readouterr()
    assert quality.main([*arguments, "--window", "32"]) == 1
    assert "was made with window 64, and now 32" in capsys.readouterr().err


def test_a_run_with_tasks_measures_only_what_is_new(tmp_path, checkpoints, text, monkeypatch):
    pytest.importorskip("lm_eval", reason='needs the lm-eval harness: pip install "gqsac[eval]"')
    for file in ("piqa.jsonl", "arc_easy.jsonl"):
        line = json.dumps({"query": "Question: what is hot?", "choices": ["the sun", "ice"], "gold": 0})
        (tmp_path / file).write_text(f"{line}\n" * 3)
    out = tmp_path / "out"
    arguments = [f"fp16={checkpoints / 'fp16'}", "--text", str(text), "--window", "64", "--device", "cpu",
                 "--data", str(tmp_path), "-o", str(out)]  # fmt: skip
    assert quality.main([*arguments, "--task", "piqa"]) == 0
    asked = []
    original = quality.evaluate_task
    monkeypatch.setattr(quality, "evaluate_task", lambda s, name, *rest: asked.append(name) or original(s, name, *rest))
    assert quality.main([*arguments, "--task", "piqa", "--task", "arc_easy"]) == 0
    assert asked == ["arc_easy"]
    (entry,) = json.loads((out / "results.json").read_text())["rows"]
    assert {name: result["n_rows"] for name, result in entry["tasks"].items()} == {"piqa": 3, "arc_easy": 3}
    assert "| piqa | arc_easy |" in (out / "table.md").read_text()


def test_names_of_ones_own_are_points_and_no_references():
    names = ("uncompressed", "own text 2.60", "own text 3.00, seed 1", "own text 3.00", "W3 g64, bqpo")
    lines = [{"config": name, "stage": "distill", "perplexity": 30.0} for name in names]
    lines += [{"config": name, "done": True, "coded_bits_per_weight": 2.5} for name in names[1:]]
    series = [row.series for row in method.points(lines)]
    assert series == [REFERENCE, "own text", "own text, seed 1", "own text", f"{UNIFORM}, bqpo"]
