"""Compares checkpoints by quality: perplexity and zero-shot accuracy against bits per weight.

    python benchmarks/quality.py "fp16=SmolLM2.gguf" "W4 g64=w4/" "W4 S30=s30/" --text wiki.test.raw -o quality/
    python benchmarks/quality.py checkpoints/ --text wiki.test.raw --task piqa --task arc_easy --data tasks/ -o quality/

A checkpoint is whatever `gqsac eval` takes: a .gqsa file runs in the runtime, anything else in PyTorch in fp32 with
its weights dequantised. Give LABEL=PATH, a folder of checkpoints, or a .json list of {"label", "path"} and, where
the label does not say it, "series" and "bits_per_weight". Writes results.json, table.md and perplexity.png.

What is finished is kept: the same command goes on after a kill, and measures anew what has failed or changed.
A checkpoint that fails is recorded, and the next one runs; the exit code is then 1.
"""

import argparse
import sys
import time
import zlib
from functools import partial
from pathlib import Path

from gqsa_runtime.cli import progress, read_text
from gqsa_runtime.errors import GqsaError, InputError

from gqsac.evaluate import compare
from gqsac.evaluate.load import open_scorer
from gqsac.evaluate.plot import plot
from gqsac.evaluate.tasks import check_harness, evaluate_task, load_tasks


def measure(row: compare.Row, entry: compare.Entry, text: str, rows: dict[str, list[dict]], args, saved) -> None:
    """Fills in what a row lacks, and calls saved() after each piece. Failures go into row.errors, by stage."""

    def stage(name: str, work):
        began_s = time.perf_counter()
        row.errors.pop(name, None)
        try:
            value = work()
        except GqsaError as error:
            row.errors[name] = str(error)
        except Exception as error:  # a row of many must not end the others
            row.errors[name] = f"{type(error).__name__}: {error}"
        else:
            tell(f"  {name} in {time.perf_counter() - began_s:.1f} s")
            return value
        tell(f"  {name} failed: {row.errors[name]}")
        saved()
        return None

    if row.bits_per_weight is None:
        row.bits_per_weight = entry.bits_per_weight or stage(
            "bits", lambda: compare.bits_per_weight(entry.path, args.bits)
        )
    scorer = stage("load", lambda: open_scorer(entry.path, args.device, args.context, args.threads))
    if scorer is None:
        return
    try:
        if row.perplexity is None:
            result = stage(
                "perplexity",
                lambda: scorer.perplexity(text, args.window, None, args.max_windows, partial(progress, unit="window")),
            )
            row.perplexity = result and dict(vars(result))
            saved()
        for name in rows:
            if name not in row.tasks:
                bar = partial(progress, unit=f"{name} request")
                result = stage(name, lambda name=name, bar=bar: evaluate_task(scorer, name, rows[name], bar))
                if result is not None:
                    row.tasks[name] = dict(vars(result))
                    saved()
    finally:
        scorer.close()


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(args) -> int:
    """Measures, writes all files, prints the table; 1 if a row has failed."""
    entries = compare.read_entries(args.checkpoints)
    text = read_text(args.text, "text")
    tasks = load_tasks(args.task, args.data, args.limit) if args.task else {}
    if tasks:
        check_harness()
    settings = {
        "text": f"{Path(args.text).name}, {len(text):,} characters, CRC-32 {zlib.crc32(text.encode()):08x}",
        "window": args.window, "max_windows": args.max_windows, "limit": args.limit, "bits": args.bits,
    }  # fmt: skip
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the output folder {args.output} cannot be made: {error.strerror}; choose another") from None
    results = args.output / "results.json"
    known = compare.load(results, settings)

    def saved() -> None:
        compare.save(results, settings, list(known.values()))

    for number, entry in enumerate(entries, 1):
        mark, row = compare.fingerprint(entry.path), known.get(entry.label)
        tell(f"[{number}/{len(entries)}] {entry.label}")
        if row is None or (row.path, row.fingerprint) != (entry.path, mark):
            row = known[entry.label] = compare.Row(entry.label, entry.path, entry.series, mark)
        row.series = entry.series
        if entry.bits_per_weight is not None:
            row.bits_per_weight = entry.bits_per_weight
        if row.is_finished(tasks):
            tell("  finished before")
            continue
        measure(row, entry, text, tasks, args, saved)
        saved()

    rows = [known[entry.label] for entry in entries]
    saved()
    markdown = compare.table(rows, list(tasks))
    (args.output / "table.md").write_text(markdown + "\n", encoding="utf-8")
    print(markdown)
    if any(row.perplexity for row in rows):
        windows = f"first {args.max_windows} windows" if args.max_windows else "windows"
        plot(rows, args.output / "perplexity.png", args.title or f"{Path(args.text).name}, {windows} of {args.window}")
    failed = [row.label for row in rows if row.errors]
    if failed:
        tell(f"failed: {', '.join(failed)}; the same command tries them again")
    return int(bool(failed))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=PATH|FOLDER|LIST.json")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--text", required=True, help="UTF-8 text to score")
    parser.add_argument("--window", type=int, default=2048, help="tokens scored in one go (default: 2048)")
    parser.add_argument("--max-windows", type=int, help="stop after so many windows")
    parser.add_argument("--task", action="append", default=[], help="zero-shot task; repeatable (default: none)")
    parser.add_argument("--data", default=".", help="folder of the tasks' files")
    parser.add_argument("--limit", type=int, help="only the first so many rows of each task")
    parser.add_argument(
        "--bits", choices=("built", "coded"), default="built",
        help="count them as `gqsac build` packs (default), or as the method needs, by each folder's report.json",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--context", type=int, help="tokens that fit at once")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--title", help="of the plot")
    try:
        return run(parser.parse_args(argv))
    except GqsaError as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
