"""What each stage of the method brings: perplexity and KL after one-shot, BQPO, distill, E2E-OQP, one budget for all.

    python benchmarks/method.py SmolLM2.gguf --calibration train.txt --text wiki.test.raw --steps 1400 -o results/
    python benchmarks/method.py SmolLM2.gguf ... --only "W4 S50" --only "W2 g64"
    python benchmarks/method.py SmolLM2.gguf ... --also "S50 global: sparsity=0.5 stages=distill allocation=global"
    python benchmarks/method.py SmolLM2.gguf ... --trained-only --also "rows 2.6: target_bpw=2.6 stages=distill"
    python benchmarks/method.py SmolLM2.gguf ... --workers 2 --seconds 540 \\
        --also "own 2.6: target_bpw=2.6 stages=distill calibration=self:3M"

Every configuration goes through `gqsac.compress.run.compress`, and its dequantised model is scored after each stage,
with f32 arithmetic. --minutes is the training time of a configuration, all its stages together; --steps, which does not
depend on the machine's speed, its end-to-end steps (BQPO then has its --epochs). Results are appended to
OUT/method.jsonl as they come, one line for each stage; a configuration that is there is not run again, one that was
stopped goes on, and one that fails is recorded and the next one runs. Prints a table in the end, and draws what the
last stages reached over the bits per weight in OUT/method.png. KL and flips are those of `gqsac eval kl` after the last
stage; --other names texts that are scored beside the first.

With --workers N so many processes, the i-th with the i-th GPU alone, take configurations from one list, in its order.
With --seconds a process begins none that would be done too late, were it to take as long as the longest before, and
what is under way then is stopped. A configuration may have a calibration text of its own, files separated by commas;
what a model writes (self:3M) is kept in OUT/own-text for all of them. "bits, built" are those of a file that
`gqsac build` makes, "coded" are without headers, padding and tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch
from gqsa_runtime.errors import GqsaError, InputError
from gqsa_runtime.tokenizer import Tokenizer
from tqdm import tqdm

from gqsac.compress.calibrate import read_text
from gqsac.compress.options import Options, checked
from gqsac.compress.prepare import choose_device
from gqsac.compress.run import compress
from gqsac.evaluate.compare import DENSE_BITS, REFERENCE, Row, series_of
from gqsac.evaluate.divergence import divergence
from gqsac.evaluate.plot import plot
from gqsac.source import Source, load_source

FULL = ("bqpo", "distill", "e2e-oqp")
# Share of a configuration's minutes that each of its training stages gets.
SHARES = {"bqpo": 0.2, "distill": 0.7, "e2e-oqp": 0.1}
STEP_SHARES = {"distill": 0.85, "e2e-oqp": 0.15}
TRAINING = ("weight_lr", "scale_lr", "distill", "removal", "batch_tokens", "train_samples", "epochs", "e2e_steps")
# What all lines of a method.jsonl have in common, beside model and texts.
SETTINGS = (
    "minutes",
    "steps",
    "epochs",
    "batch_tokens",
    "samples",
    "train_samples",
    "seq_len",
    "window",
    "max_windows",
    "other_windows",
)
UNCOMPRESSED = "uncompressed"
CONFIGURATIONS = {
    "W4 S0 1x16": {"bits": 4, "sparsity": 0.0},
    "W4 S30 1x16": {"bits": 4, "sparsity": 0.3},
    "W4 S50 1x16": {"bits": 4, "sparsity": 0.5},
    "W2 g64": {"bits": 2, "group_size": 64, "sparsity": 0.0},
    "W3 g64": {"bits": 3, "group_size": 64, "sparsity": 0.0},
    "W4 2:4 g64": {"bits": 4, "group_size": 64, "pattern": "2:4"},
    "W4 S50 1x16, as in the paper": {"bits": 4, "sparsity": 0.5, "stages": ("bqpo", "e2e-oqp")},
    "W4 S50 1x16, distill alone": {"bits": 4, "sparsity": 0.5, "stages": ("distill",)},
}


class Results:
    """The lines of method.jsonl: {"config", "stage", "perplexity", …}; a config's last line has "done" or "error".

    settings: of all configurations, kept in a line of their own. Raises InputError if the file was made with others.
    """

    def __init__(self, file: Path, settings: dict):
        self._file = file
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.lines = [line for line in found if "config" in line]
        known = next((line["settings"] for line in found if "settings" in line), None)
        for key, value in settings.items():
            if known is not None and known.get(key) != value:
                raise InputError(
                    f"{file} was made with {key} {known.get(key)!r}, now it is {value!r}; give the same, or another "
                    "output folder"
                )
        if known is None:
            self._write({"settings": settings})

    def add(self, **line) -> None:
        self.lines.append(line)
        self._write(line)
        tell(json.dumps(line))

    def _write(self, line: dict) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> None:
        """What other processes have added, too."""
        lines = [json.loads(line) for line in self._file.read_text().splitlines()]
        self.lines = [line for line in lines if "config" in line]

    def is_done(self, config: str) -> bool:
        return any(line["config"] == config and line.get("done") for line in self.lines)

    def has(self, config: str, stage: str) -> bool:
        return any((line["config"], line.get("stage")) == (config, stage) for line in self.lines)


def run_configuration(name: str, options: dict, source: Source, score, results: Results, args) -> None:
    """One-shot at full sparsity, then the configuration's stages, each scored as it ends."""
    options = dict(options)
    if "target_bpw" not in options:  # a scale for each group, as in the paper, unless the configuration says otherwise
        options = {"quant_group_size": options.get("group_size", 16), **options}
    stages = options.pop("stages", FULL)
    minutes = options.pop("minutes", args.minutes)
    steps = options.pop("steps", args.steps)
    budget = {"minutes": None if minutes is None else divided(minutes, {stage: SHARES[stage] for stage in stages})}
    if steps is not None:
        parts = divided(steps, {stage: share for stage, share in STEP_SHARES.items() if stage in stages})
        budget["e2e_steps"] = tuple(round(part) for part in parts) or None
    common = {
        "calibration": options.pop("calibration", args.calibration), "own_text": args.output / "own-text",
        "seq_len": args.seq_len, "samples": args.samples, "device": args.device, "progress": sys.stderr.isatty(),
    }  # fmt: skip
    work, slug = args.output / "work", slug_of(name)

    def after(stage: str, make) -> None:
        if stage != "start" and not results.has(name, stage):
            seconds = time.monotonic() - began
            results.add(config=name, stage=stage, **score(make()), seconds=round(seconds, 1))

    began = time.monotonic()
    if not args.trained_only and not results.has(name, "one-shot"):
        out = work / f"{slug}-one-shot"
        shutil.rmtree(out, ignore_errors=True)
        one_shot = {key: value for key, value in options.items() if key not in TRAINING}
        one_shot["allocation"] = checked(Options(**one_shot, stages=stages)).allocation  # as the training has it
        compress(source, out, after_stage=after, **(common | one_shot))
        shutil.rmtree(out)
    out = work / slug
    shutil.rmtree(out, ignore_errors=True)
    training = {"epochs": args.epochs, "train_samples": args.train_samples, "batch_tokens": args.batch_tokens}
    report = compress(source, out, stages=stages, after_stage=after, **(common | training | budget | options))
    facts = {
        stage: {key: value for key, value in fact.items() if key not in ("curve", "blocks")}
        for stage, fact in report["stages"].items()
    }
    blocks = [
        [round(block["before"], 5), round(block["after"], 5), block["kept"], block["epochs"]]
        for block in report["stages"].get("bqpo", {}).get("blocks", [])
    ]
    curves = {stage: fact["curve"][:: max(1, len(fact["curve"]) // 40)] for stage, fact in report["stages"].items()
              if "curve" in fact}  # fmt: skip
    results.add(
        config=name, done=True, seconds=report["seconds"], bits_per_weight=report["bits_per_weight"],
        coded_bits_per_weight=report["coded_bits_per_weight"], calibration=report["calibration"],
        options=report["options"], stages=facts, blocks=blocks, curves=curves,
        **({"row_widths": report["all_row_widths"]} if "all_row_widths" in report else {}),
    )  # fmt: skip
    if not args.keep:
        shutil.rmtree(out)


def slug_of(name: str) -> str:
    """The name of a configuration as files are called."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def divided(whole: float, shares: dict[str, float]) -> tuple[float, ...]:
    """The parts of `whole` in the ratio of the shares, in their order."""
    return tuple(whole * share / sum(shares.values()) for share in shares.values())


def table(lines: list[dict]) -> str:
    """Markdown: a row for each configuration, a column for each stage; KL, flips and other texts after the last."""
    stages = ["one-shot", *FULL]
    others = list(dict.fromkeys(name for line in lines for name in line.get("others", ())))
    far = ["KL", "99 %", "flips", *(f"{name}: perplexity, KL" for name in others)]
    columns = ["configuration", "bits, built", "coded", *stages, *far, "steps", "s", "of it training", "of it choosing"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in dict.fromkeys(line["config"] for line in lines):
        mine = [line for line in lines if line["config"] == name]
        done = next((line for line in mine if line.get("done")), None)
        bits = [f"{done[key]:.3f}" if done else "-" for key in ("bits_per_weight", "coded_bits_per_weight")]
        cells = {line["stage"]: f"{line['perplexity']:.2f}" for line in mine if "stage" in line}
        if "error" in mine[-1]:
            cells[stages[-1]] = f"failed: {mine[-1]['error'][:60]}"
        last, distances = next((line for line in reversed(mine) if "kl" in line), None), [""] * len(far)
        if last:
            distances = [f"{last['kl']:.4f}", f"{last['kl_99']:.2f}", f"{last['flips']:.1%}"]
            of_others = [last.get("others", {}).get(other) for other in others]
            distances += [f"{found['perplexity']:.2f}, {found['kl']:.4f}" if found else "" for found in of_others]
        trained = [fact for fact in done["stages"].values() if "train_seconds" in fact] if done else []
        spent = ["" for _ in range(4)]
        if done:
            sums = [sum(fact.get(key, 0) for fact in trained) for key in ("train_seconds", "choosing_seconds")]
            steps = " + ".join(str(fact["steps"]) for fact in trained)
            spent = [steps, *(f"{seconds:.0f}" for seconds in (done["seconds"], *sums))]
        rows.append(f"| {' | '.join([name, *bits, *(cells.get(s, '') for s in stages), *distances, *spent])} |")
    return "\n".join(rows)


def points(lines: list[dict]) -> list[Row]:
    """Of each finished configuration, what its last stage reached; what follows a comma in a label is a series."""
    rows = []
    for name in dict.fromkeys(line["config"] for line in lines):
        mine = [line for line in lines if line["config"] == name]
        bits = next((line["coded_bits_per_weight"] for line in mine if line.get("done")), None)
        reached = [line["perplexity"] for line in mine if "stage" in line]
        label, _, way = name.partition(", ")
        series = series_of(label)
        if series == REFERENCE:  # a name of the user's own; without a number at its end, as of its budget
            series = re.sub(r" [0-9.]+$", "", label)
        series = f"{series}, {way}" if way else series
        if name == "uncompressed":
            bits, series = DENSE_BITS, REFERENCE
        if bits and reached:
            rows.append(Row(label, "", series, "", bits, {"perplexity": reached[-1]}))
    return rows


def parse_also(text: str) -> tuple[str, dict]:
    """ "LABEL: key=value key=value" as a name and options of `compress`; stages are separated by commas."""
    name, colon, rest = text.partition(": ")
    options = {}
    for part in rest.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--also {text!r}: {part!r} is not of the form key=value")
        if key in ("stages", "calibration"):
            options[key] = tuple(value.split(","))
        elif key == "widths":
            options[key] = tuple(map(int, value.split(",")))
        else:
            options[key] = _value(value)
    if not colon or not options:
        raise InputError(f"--also is {text!r}, expected 'LABEL: key=value …'")
    return name.strip(), options


def _value(text: str):
    """A number or true and false where the text is one, otherwise the text."""
    for kind in (json.loads, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or .gguf file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--calibration", action="append", help="UTF-8 text; repeatable (default: the built-in one)")
    parser.add_argument("--text", required=True, help="UTF-8 text to score")
    parser.add_argument("--minutes", type=float, help="training time of a configuration at most")
    parser.add_argument("--steps", type=int, help="end-to-end steps of a configuration at most")
    parser.add_argument("--window", type=int, default=2048, help="tokens scored in one go (default: 2048)")
    parser.add_argument("--max-windows", type=int, help="score only the first so many")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sample (default: 1024)")
    parser.add_argument("--samples", type=int, default=256, help="for calibration and BQPO (default: 256)")
    parser.add_argument("--train-samples", type=int, default=3000, help="for the other stages (default: 3000)")
    parser.add_argument("--epochs", type=int, default=5, help="of BQPO at most (default: 5)")
    parser.add_argument("--batch-tokens", type=int, help="tokens of an end-to-end step")
    parser.add_argument(
        "--other", action="append", default=[], metavar="FILE", help="another text to score; repeatable"
    )
    parser.add_argument("--other-windows", type=int, default=16, help="of those, score the first so many (default: 16)")
    parser.add_argument("--workers", type=int, help="processes, each with a GPU of its own")
    parser.add_argument("--seconds", type=float, help="after which all stops")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a worker: the time of its end
    parser.add_argument("--only", action="append", default=[], help="run this configuration; repeatable")
    parser.add_argument("--also", action="append", default=[], metavar="SPEC", help="a configuration of your own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trained-only", action="store_true", help="no one-shot pass at full compression before")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, in OUT/work")
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else list(argv)
    try:
        return run(args)
    except GqsaError as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on")
        return 130


def run(args) -> int:
    """Runs what is not done yet; 1 if a configuration failed."""
    if args.minutes is None and args.steps is None:
        raise InputError("neither --minutes nor --steps is given; one of them has to end the training")
    also = dict(parse_also(text) for text in args.also)
    unknown = [name for name in args.only if name not in CONFIGURATIONS]
    if unknown:
        raise InputError(f"--only {unknown[0]!r} is none of: {'; '.join(CONFIGURATIONS)}")
    wanted = {name: CONFIGURATIONS[name] for name in args.only or ([] if also else CONFIGURATIONS)} | also
    (args.output / "work").mkdir(parents=True, exist_ok=True)
    text, others = read_text(args.text), {Path(file).stem: read_text(file) for file in args.other}
    source = load_source(args.model)
    settings = {
        "model": f"{Path(args.model).name}, CRC-32 {source.fingerprint()}",
        "text": f"{Path(args.text).name}, CRC-32 {zlib.crc32(text.encode()):08x}",
        "calibration": [Path(file).name for file in args.calibration or ()],
        "others": {name: f"CRC-32 {zlib.crc32(other.encode()):08x}" for name, other in others.items()},
        **{key: getattr(args, key) for key in SETTINGS},
    }
    results = Results(args.output / "method.jsonl", settings)
    if args.until is None:
        for claim in (args.output / "work").glob("*.claimed"):
            claim.unlink()  # of a run that was stopped
    if args.until is None and (args.workers or args.seconds):
        failed = run_workers(args)
        results.read()
    else:
        failed = run_configurations(wanted, source, text, others, results, args)
    print(table(results.lines))
    windows = f"first {args.max_windows} windows" if args.max_windows else "windows"
    if args.until is None and (rows := points(results.lines)):
        plot(rows, args.output / "method.png", f"{Path(args.text).name}, {windows} of {args.window}")
    return int(failed > 0)


def run_configurations(wanted: dict, source: Source, text: str, others: dict, results: Results, args) -> int:
    """Runs those that no other process has claimed. How many failed."""
    device, tokenizer = choose_device(args.device), Tokenizer(source.tokenizer_json)
    reference = copy.deepcopy(source.model).float()
    texts = {None: (tokenizer.encode(text), args.max_windows)}
    texts |= {name: (tokenizer.encode(other), args.other_windows) for name, other in others.items()}

    def score(model) -> dict:
        shown = tqdm if sys.stderr.isatty() else None
        model, other = model.to(device), reference.to(device)
        figures = {}
        for name, (tokens, windows) in texts.items():
            found = divergence(model, other, tokens, args.window, max_windows=windows, progress=shown)
            of_text = {"perplexity": found.perplexity, "kl": found.kl, "kl_99": found.kl_99, "flips": found.flips}
            figures[name] = {key: round(value, 5) for key, value in of_text.items()}
        reference.to("cpu")  # its memory is the training's
        return figures.pop(None) | ({"others": figures} if figures else {})

    failed, longest = 0, 0.0
    for name in (UNCOMPRESSED, *wanted):
        if results.has(name, "one-shot") if name == UNCOMPRESSED else results.is_done(name):
            continue
        if args.until is not None and time.time() + longest > args.until:
            tell(f"{name}: not begun, for there is no time left")
            continue
        if not claimed(args.output / "work" / f"{slug_of(name)}.claimed"):
            continue
        began = time.monotonic()
        try:
            if name == UNCOMPRESSED:
                results.add(config=name, stage="one-shot", **score(copy.deepcopy(reference)))
            else:
                run_configuration(name, wanted[name], source, score, results, args)
        except Exception as error:  # the others are to run all the same
            failed += 1
            traceback.print_exc()
            results.add(config=name, error=f"{type(error).__name__}: {error}")
        longest = max(longest, time.monotonic() - began)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def claimed(file: Path) -> bool:
    """Whether the file, which stands for something to do, was not there and now is."""
    try:
        file.open("x").close()
    except FileExistsError:
        return False
    return True


def run_workers(args) -> int:
    """Lets processes run the configurations. How many ended otherwise than well."""
    until = time.time() + (args.seconds or float("inf"))
    count = args.workers or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(count)]
    if len(gpus) < count:
        raise InputError(f"--workers is {count}, but CUDA_VISIBLE_DEVICES={visible} shows {len(gpus)} GPUs; give fewer")
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *args.given, "--until", str(until)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, stdout=subprocess.DEVNULL,
        )
        for gpu in gpus[:count]
    ]  # fmt: skip
    try:
        for worker in workers:
            try:
                worker.wait(None if args.seconds is None else max(0.0, until - time.time()))
            except subprocess.TimeoutExpired:
                tell("what is under way is stopped, for the time is over")
                break
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    return sum(worker.wait() != 0 for worker in workers)


if __name__ == "__main__":
    raise SystemExit(main())
