"""Zero-shot tasks from local files: which files, how a row looks, and rows checked one by one.

Nothing is downloaded. A folder holds, of the tasks that are asked for:

- piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl: {"query": "Question: ...", "choices": [...], "gold": 1} a line
- winogrande.jsonl: {"context_options": [...], "continuation": "...", "gold": 0} a line; the options are the text
  up to and with each candidate, the continuation is what follows
- hellaswag.jsonl, rows as PIQA's with the context as query; or hellaswag_val_full.txt, six lines a row: the
  context, the number of the right ending, four endings

gold counts from 0. Prompts are those of the lm-eval harness: "Question: ...\\nAnswer:" for PIQA and ARC, the bare
context for HellaSwag and WinoGrande; a blank stands between prompt and choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gqsa_runtime.errors import InputError

_ENDINGS = 4  # of a HellaSwag row
_ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class TaskSpec:
    """files: names that are looked for, in order. multiple_inputs: the choices are contexts, not continuations.

    suffix: what the prompt ends with after the row's query. normalised: whether accuracy by length-normalised
    log-probabilities means anything; it does not where all choices are followed by the same text.
    """

    name: str
    files: tuple[str, ...]
    suffix: str = ""
    multiple_inputs: bool = False

    @property
    def normalised(self) -> bool:
        return not self.multiple_inputs


TASKS = {
    task.name: task
    for task in (
        TaskSpec("piqa", ("piqa.jsonl",), suffix=_ANSWER),
        TaskSpec("arc_easy", ("arc_easy.jsonl",), suffix=_ANSWER),
        TaskSpec("arc_challenge", ("arc_challenge.jsonl",), suffix=_ANSWER),
        TaskSpec("hellaswag", ("hellaswag.jsonl", "hellaswag_val_full.txt")),
        TaskSpec("winogrande", ("winogrande.jsonl",), multiple_inputs=True),
    )
}


def task_spec(name: str) -> TaskSpec:
    """The task of that name. Raises InputError that lists the known ones."""
    if name not in TASKS:
        raise InputError(f"the task {name!r} is not known; choose from {', '.join(TASKS)}")
    return TASKS[name]


def read_rows(name: str, folder: str | Path, limit: int | None = None) -> list[dict]:
    """The first `limit` rows of a task (all without one), in the file's order.

    A row is {"query": str, "choices": [str, ...], "gold": int}; of a task with multiple inputs
    {"choices": contexts, "continuation": str, "gold": int}. Raises InputError where the folder, the file or a
    row is not what it should be: it names the file and the line.
    """
    task = task_spec(name)
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} rows, expected at least 1")
    path = _find(task, Path(folder))
    rows = []
    for row in _six_line_rows(path) if path.suffix == ".txt" else _json_rows(path, task):
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{path} holds no rows; expected the data of {name}")
    return rows


def _find(task: TaskSpec, folder: Path) -> Path:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"the data folder {folder} {what}; give the folder that holds {task.files[0]} with --data")
    for file in task.files:
        if (folder / file).is_file():
            return folder / file
    raise InputError(f"the data folder {folder} holds no {' or '.join(task.files)}, which the task {task.name} needs")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line. Raises InputError where the file is not UTF-8."""
    try:
        # Not splitlines: rows may hold U+2028 and other characters that it takes for line ends.
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); is the file damaged?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_rows(path: Path, task: TaskSpec) -> Iterator[dict]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise InputError(f"{where} holds {type(raw).__name__}, expected a JSON object")
        if task.multiple_inputs:
            choices = _strings(raw, "context_options", where)
            row = {"choices": choices, "continuation": _string(raw, "continuation", where)}
        else:
            choices = _strings(raw, "choices", where)
            row = {"query": _string(raw, "query", where).rstrip("\n") + task.suffix, "choices": choices}
        yield {**row, "gold": _gold(raw.get("gold"), len(choices), where)}


def _six_line_rows(path: Path) -> Iterator[dict]:
    """HellaSwag as text: context, label, four endings."""
    block: list[str] = []
    number = 0
    for number, line in _lines(path):
        if not line.strip():
            raise InputError(f"{path}, line {number} is empty; expected rows of a context, a label and four endings")
        block.append(line)
        if len(block) == 2 + _ENDINGS:
            label, where = block[1].strip(), f"{path}, line {number - _ENDINGS}"
            gold = _gold(int(label) if label.isdecimal() else label, _ENDINGS, where)
            yield {"query": block[0], "choices": block[2:], "gold": gold}
            block = []
    if block:
        raise InputError(f"{path} ends at line {number} within a row; expected {2 + _ENDINGS} lines for each row")


def _string(raw: dict, key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {_shown(value)}, expected a text")
    return value


def _strings(raw: dict, key: str, where: str) -> list[str]:
    value = raw.get(key)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v.strip() for v in value):
        raise InputError(f"{where}: {key} is {_shown(value)}, expected a list of at least two texts")
    return value


def _gold(value, n_choices: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < n_choices:
        raise InputError(f"{where}: the right choice is {_shown(value)}, expected a number from 0 to {n_choices - 1}")
    return value


def _shown(value) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
