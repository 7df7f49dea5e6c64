"""Rows of local task files: what is read, and that each kind of damage names its file and line."""

import json
import sys

import pytest

from gqsac.errors import DeviceError, InputError
from gqsac.evaluate import tasks
from gqsac.evaluate.task_data import TASKS, read_rows, task_spec
from tests.e2e.command import gqsac, refusal

PIQA = {"query": "Question: To open a jar, one must\n", "choices": ["turn the lid.", "shake it."], "gold": 0}
ARC = {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1}
WINOGRANDE = {"context_options": ["The cat saw Bob so Bob", "The cat saw Bob so the cat"], "continuation": "ran.",
              "gold": 1}  # fmt: skip


def write(folder, file, *rows):
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_prompts_are_those_of_the_harness(tmp_path):
    write(tmp_path, "piqa.jsonl", PIQA)
    write(tmp_path, "arc_easy.jsonl", ARC)
    write(tmp_path, "arc_challenge.jsonl", ARC)
    write(tmp_path, "hellaswag.jsonl", {**ARC, "query": "Baking: A man"})
    write(tmp_path, "winogrande.jsonl", WINOGRANDE)
    assert read_rows("piqa", tmp_path) == [{**PIQA, "query": "Question: To open a jar, one must\nAnswer:"}]
    arc = [{**ARC, "query": "Question: What is hot?\nAnswer:"}]
    assert read_rows("arc_easy", tmp_path) == read_rows("arc_challenge", tmp_path) == arc
    assert read_rows("hellaswag", tmp_path) == [{**ARC, "query": "Baking: A man"}]
    options = {"choices": WINOGRANDE["context_options"], "continuation": "ran.", "gold": 1}
    assert read_rows("winogrande", tmp_path) == [options]


def test_hellaswag_in_six_lines(tmp_path):
    endings = ["one.", "two\u2028two.", "three.", "four."]  # U+2028 is no end of a line here
    lines = ["Baking: A man", "2", *endings, "Rowing: She", "0", *endings]
    (tmp_path / "hellaswag_val_full.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second = read_rows("hellaswag", tmp_path)
    assert first == {"query": "Baking: A man", "choices": endings, "gold": 2}
    assert (second["query"], second["gold"]) == ("Rowing: She", 0)


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    write(tmp_path, "piqa.jsonl", PIQA, {**PIQA, "gold": 1})
    with (tmp_path / "piqa.jsonl").open("a") as file:
        file.write("\nno JSON\n")
    assert [row["gold"] for row in read_rows("piqa", tmp_path, 2)] == [0, 1]
    with pytest.raises(InputError, match=r"piqa\.jsonl, line 4 is not valid JSON"):
        read_rows("piqa", tmp_path)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one(tmp_path, limit):
    write(tmp_path, "piqa.jsonl", PIQA)
    with pytest.raises(InputError, match=f"limit is {limit} rows, expected at least 1"):
        read_rows("piqa", tmp_path, limit)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("[1, 2]", "holds list, expected a JSON object"),
        ('{"choices": ["a", "b"], "gold": 0}', "query is missing, expected a text"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', 'query is " ", expected a text'),
        ('{"query": "q", "choices": ["a"], "gold": 0}', r'choices is \["a"\], expected a list of at least two'),
        ('{"query": "q", "choices": ["a", 2], "gold": 0}', "choices is .* expected a list of at least two texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "choices is .* expected a list of at least two texts"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "the right choice is 2, expected a number from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "the right choice is true, expected a number"),
        ('{"query": "q", "choices": ["a", "b"]}', "the right choice is missing, expected a number from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 0', "is not valid JSON"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path, row, match):
    write(tmp_path, "piqa.jsonl", PIQA)
    with (tmp_path / "piqa.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError, match=rf"piqa\.jsonl, line 2:? {match}"):
        read_rows("piqa", tmp_path)


def test_malformed_winogrande(tmp_path):
    write(tmp_path, "winogrande.jsonl", {**WINOGRANDE, "continuation": None})
    with pytest.raises(InputError, match=r"winogrande\.jsonl, line 1: continuation is missing"):
        read_rows("winogrande", tmp_path)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["context", "4", "a", "b", "c", "d"], "line 2: the right choice is 4, expected a number from 0 to 3"),
        (["context", "one", "a", "b", "c", "d"], 'line 2: the right choice is "one"'),
        (["context", "0", "a", "", "c", "d"], "line 4 is empty"),
        (["context", "0", "a", "b", "c", "d", "context", "1"], "ends at line 8 within a row; expected 6 lines"),
    ],
)
def test_malformed_six_lines(tmp_path, lines, match):
    (tmp_path / "hellaswag_val_full.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"hellaswag_val_full\.txt,? {match}"):
        read_rows("hellaswag", tmp_path)


def test_missing_folder_file_task_and_rows(tmp_path):
    with pytest.raises(InputError, match="data folder .*nowhere does not exist; give the folder that holds piqa.jsonl"):
        read_rows("piqa", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no hellaswag\.jsonl or hellaswag_val_full\.txt"):
        read_rows("hellaswag", tmp_path)
    with pytest.raises(InputError, match="the task 'boolq' is not known; choose from piqa, arc_easy"):
        task_spec("boolq")
    (tmp_path / "piqa.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no rows"):
        read_rows("piqa", tmp_path)
    (tmp_path / "arc_easy.jsonl").write_bytes(b'{"query": "\xff"}\n')
    with pytest.raises(InputError, match=r"arc_easy\.jsonl is not UTF-8 text \(byte \d+\)"):
        read_rows("arc_easy", tmp_path)


def test_names_are_checked_and_taken_once(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps(PIQA))
    assert list(tasks.load_tasks(["piqa", "piqa"], tmp_path)) == ["piqa"]
    with pytest.raises(InputError, match=r"holds no arc_easy\.jsonl"):
        tasks.load_tasks([], tmp_path)


def test_a_missing_harness_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(DeviceError, match=r'need the lm-eval harness, .*; install it with pip install "gqsac\[eval\]"'):
        tasks.check_harness()
    (tmp_path / "piqa.jsonl").write_text(json.dumps(PIQA))
    assert "lm-eval" in refusal(gqsac("eval", "tasks", tmp_path / "m", "--task", "piqa", "--data", tmp_path))


def test_the_real_files_are_read_to_their_end(shared_tasks):
    counts = {"piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "winogrande": 1267}
    assert {name: len(read_rows(name, shared_tasks)) for name in TASKS} == counts


@pytest.fixture
def shared_tasks():
    from tests.conftest import SHARED

    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip("needs the task files of ../shared/benchmarks")
    return folder
