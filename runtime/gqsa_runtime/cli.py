"""The command `gqsa`: everything that a compiled model is used for.

Generated text alone goes to stdout, all else to stderr, so that output can be piped. Exit codes:
0 done, 1 an error (one sentence on stderr), 2 wrong usage, 3 `check` found that a sound file does not run here,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from gqsa_runtime import __version__, rebuild
from gqsa_runtime.errors import FormatError, GqsaError, InputError

if TYPE_CHECKING:
    from gqsa_runtime.model import Model

_FILE = click.argument("file", type=click.Path(path_type=str))
OPTIONAL_FILE = click.argument("file", type=click.Path(path_type=str), required=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def main(group: click.Command | None = None, args: Sequence[str] | None = None, prog_name: str | None = None) -> None:
    """Runs a command group to its end and exits the process with the codes above. gqsac uses it too."""
    _replace_closed_streams()
    try:
        code = (group or gqsa).main(args=args, prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except GqsaError as error:
        click.echo(f"error: {error}", err=True)
        code = 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = 130
    except (_ReaderGone, BrokenPipeError):
        # The reader has gone (`gqsa run … | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # of a file that no one foresaw: a full disk, a folder that may not be read
        click.echo(f"error: {_explain_os_error(error)}", err=True)
        code = 1
    except MemoryError:
        click.echo("error: there is not enough memory; close other programs or use a smaller model", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


class _ReaderGone(Exception):
    """Standard output was closed by who read it; click would end the process with 1 for a BrokenPipeError."""


class Commands(click.Group):
    """A group of commands whose reader may leave early, as in `gqsa run … | head`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGone from error


def _replace_closed_streams() -> None:
    # A process may be started without them (`gqsa run … <&-`); Python then has None in their place.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _explain_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the free space on the disk"


def commands() -> list[click.Command]:
    """The commands of `gqsa`, for another group to mount."""
    return [run, chat, check, inspect, verify, bench, evaluate, doctor]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gqsa")
def gqsa() -> None:
    """Runs, inspects and measures compiled models (.gqsa files).

    A .gqsa file holds native code: open only files that you trust.

    \b
    Example:
      gqsa run model.gqsa --prompt "Name three rivers." --max-new-tokens 64
    """


_Function = Callable[..., Any]


def _options(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    return functools.partial(functools.reduce, lambda function, option: option(function), options[::-1])


def _context(value: str | int) -> int | str:
    """A number of tokens, or "auto": what free memory allows."""
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number of tokens nor auto") from None


signature_options = _options(
    click.option(
        "--require-signature",
        metavar="PEM",
        type=click.Path(dir_okay=False),
        help="Use FILE only if this public key signed it, or a signer whose certificate descends from these.",
    ),
    click.option("--signature", type=click.Path(dir_okay=False), help="With it: the signature. Default: FILE.sig."),
)

_place_options = _options(
    click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N or cpu."),
    click.option(
        "--context",
        type=_context,
        metavar="INTEGER|AUTO",
        help="Tokens that fit at once; auto: as many as the model has and free memory allows. Default: 4096, or less "
        "to fit.",
    ),
)


@dataclasses.dataclass(frozen=True)
class _Opening:
    """The options of all commands that open a model, as `Model.open` has them."""

    device: str
    context: int | str | None
    threads: int | None
    rebuild_kernels: bool
    require_signature: str | None
    signature: str | None


def _model_options(command: _Function) -> _Function:
    """Gives a command the options of an _Opening, which it takes as `how`."""

    @functools.wraps(command)
    def with_opening(**values: Any) -> Any:
        how = _Opening(**{field.name: values.pop(field.name) for field in dataclasses.fields(_Opening)})
        return command(how=how, **values)

    return _OPENING(with_opening)


_OPENING = _options(
    signature_options,
    _place_options,
    click.option("--threads", type=int, help="CPU threads. Default: all."),
    click.option(
        "--rebuild-kernels",
        is_flag=True,
        help="Run no code of the file: have gqsac, which must be installed, compile the kernels that its plan names.",
    ),
)


def _sampling_options(temperature: float) -> Callable[[_Function], _Function]:
    return _options(
        click.option("--max-new-tokens", type=int, default=256, show_default=True),
        click.option("--temperature", type=float, default=temperature, show_default=True, help="0: the likeliest."),
        click.option("--top-k", type=int, default=0, help="Only the K likeliest tokens. 0: off."),
        click.option("--top-p", type=float, default=1.0, help="Only the likeliest tokens of this mass. 1: off."),
        click.option("--min-p", type=float, default=0.0, help="Only tokens of this share of the likeliest. 0: off."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 avoids repetition."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--stop", multiple=True, help="End before this text. May be given several times."),
        click.option(
            "--context-shift",
            is_flag=True,
            help="Where the context is full, forget the older half of the text and go on. Default: end there.",
        ),
        click.option(
            "--keep", "n_keep", type=int, default=0, help="With --context-shift: tokens of the beginning that stay."
        ),
    )


def _tell(message: str) -> None:
    click.echo(message, err=True)


def _open_model(file: str, how: _Opening, sampling: dict[str, Any] | None = None) -> Model:
    from gqsa_runtime.model import Model

    check_signature_options(how.require_signature, how.signature)
    Model.check_options(**(sampling or {}))  # better refused now than after seconds of loading
    if how.rebuild_kernels:
        rebuild.compiler()
        _tell("making the kernels anew")
    kernels = rebuild.REBUILD if how.rebuild_kernels else rebuild.FILE
    with _LoadingBar() as bar:
        model = Model.open(
            file, how.device, how.context, how.threads, bar.update, kernels, how.require_signature, how.signature
        )
    _tell(f"device {model.device_reason}")
    if model.context_reason:
        _tell(model.context_reason)
    return model


def check_signature_options(require_signature: str | None, signature: str | None, file: str | None = "") -> None:
    """Raises a usage error for options without what they belong to. file: None, where no file is named at all."""
    if file is None and (require_signature is not None or signature is not None):
        raise click.UsageError("--require-signature and --signature are about a FILE; name it, too")
    if signature is not None and require_signature is None:
        raise click.UsageError("--signature says where a signature lies; --require-signature, by whom it must be")


class _LoadingBar:
    """A progress bar over bytes, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _LoadingBar:
        return self

    def update(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(items: Iterable[Any], unit: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal."""
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
    return bar


def _write(pieces: Iterable[str]) -> str:
    text = []
    for piece in pieces:
        text.append(piece)
        click.echo(piece, nl=False)
    click.echo()
    return "".join(text)


def _tell_if_full(model: Model) -> None:
    if model.stats.finish_reason == "context":
        _tell(
            f"the context of {model.context} tokens is full, so the text ends here; --context-shift goes on, or open "
            f"the model with a larger --context (up to {model.program.max_context})"
        )


def _tell_stats(model: Model) -> None:
    stats = model.stats
    _tell(
        f"prompt {stats.prompt_tokens} tokens ({stats.cached_tokens} kept) in {stats.prefill_seconds:.3f} s, "
        f"{stats.prefill_tokens_per_second:.1f} tokens/s; generated {stats.new_tokens} in "
        f"{stats.decode_seconds:.3f} s, {stats.decode_tokens_per_second:.1f} tokens/s; finished: {stats.finish_reason}"
        + (f"; the context was shifted {stats.context_shifts} times" if stats.context_shifts else "")
    )


def read_text(path: str, what: str) -> str:
    """A UTF-8 text file, "-" for standard input. Raises InputError that names `what`."""
    try:
        with click.open_file(path, encoding="utf-8") as file:
            return str(file.read())
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: the {what} is not UTF-8 text; convert it first") from None


@click.command()
@_FILE
@click.option("--prompt", "-p", help="The prompt. Default: read from standard input.")
@click.option("--raw", is_flag=True, help="Continue the prompt itself, without the file's chat template.")
@_sampling_options(temperature=0.0)
@_model_options
@click.option(
    "--session",
    type=click.Path(dir_okay=False),
    help="File of a prompt that was read before: what this one shares with it is not read again. Made, or made anew.",
)
@click.option("--stats", is_flag=True, help="Tell counts and speeds on standard error.")
def run(
    file: str,
    prompt: str | None,
    raw: bool,
    how: _Opening,
    session: str | None,
    stats: bool,
    **sampling: Any,
) -> None:
    """Answers one prompt, as a chat message if the file has a chat template, and exits.

    \b
    Examples:
      gqsa run model.gqsa --prompt "Name three rivers."
      echo "Once upon a time" | gqsa run model.gqsa --raw --temperature 0.8 --seed 1
      gqsa run model.gqsa --raw --session book.session < book-and-question.txt
      gqsa run model.gqsa --raw -p "Once" --context 2048 --context-shift --keep 64 --max-new-tokens 9999
    """
    from gqsa_runtime.session import check_session_path

    if session is not None:
        check_session_path(session)
    if prompt is None:
        if sys.stdin.isatty():
            _tell("reading the prompt from standard input; end it with Ctrl-D")
        prompt = read_text("-", "prompt")
    with _open_model(file, how, sampling) as model:
        if session is not None and os.path.exists(session):
            _tell(f"{session}: {model.load_session(session)} tokens are in the cache")
        if model.has_chat_template and not raw:
            pieces = model.chat([{"role": "user", "content": prompt}], **sampling)
        else:
            pieces = model.generate(prompt, **sampling)
        _write(pieces)
        _tell_if_full(model)
        if session is not None:
            model.save_session(session)
        if stats:
            _tell_stats(model)


@click.command()
@_FILE
@click.option("--system", help="A system message to begin with.")
@_sampling_options(temperature=0.7)
@_model_options
@click.option("--stats", is_flag=True, help="Tell counts and speeds after each answer.")
def chat(
    file: str,
    system: str | None,
    how: _Opening,
    stats: bool,
    **sampling: Any,
) -> None:
    """Talks with the model, line by line; /reset begins anew, /exit or Ctrl-D ends.

    Ctrl-C ends an answer. Where the context is full, the oldest messages are forgotten; an answer that fills it ends,
    unless --context-shift lets it go on.

    \b
    Example:
      gqsa chat model.gqsa --system "Answer in one sentence."
    """
    opening = [{"role": "system", "content": system}] if system else []
    with _open_model(file, how, sampling) as model:
        if not model.has_chat_template:
            raise InputError(f"{file}: the file carries no chat template; use `gqsa run` instead")
        messages = list(opening)
        while True:
            line = _read_line()
            if line is None or line == "/exit":
                return
            if line == "/reset":
                messages = list(opening)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer: list[str] = []
            try:
                messages = _forget_oldest(model, messages, len(opening))
                _write(_kept(model.chat(messages, **sampling), answer))
            except KeyboardInterrupt:
                click.echo()
            except InputError as error:  # of this message: too long alone, or the template will not have it
                _tell(f"error: {error}")
                messages.pop()
                continue
            _tell_if_full(model)
            messages.append({"role": "assistant", "content": "".join(answer)})
            if stats:
                _tell_stats(model)


def _forget_oldest(model: Model, messages: list[dict[str, str]], n_opening: int) -> list[dict[str, str]]:
    """The messages without the oldest ones after the opening, until they leave an eighth of the context free."""
    kept = list(messages)
    while len(kept) > n_opening + 1 and len(model.chat_tokens(kept)) > model.context - model.context // 8:
        # A question goes with its answer, so that roles alternate as before.
        del kept[n_opening : n_opening + 2]
    if len(kept) < len(messages):
        _tell(f"the context of {model.context} tokens is full: the oldest {len(messages) - len(kept)} messages are out")
    return kept


def _kept(pieces: Iterable[str], into: list[str]) -> Iterable[str]:
    for piece in pieces:
        into.append(piece)
        yield piece


def _read_line() -> str | None:
    if sys.stdin.isatty():
        click.echo("> ", err=True, nl=False)
    line = sys.stdin.readline()
    return line.strip() if line else None


@click.command()
@_FILE
@signature_options
@_place_options
@_JSON
@click.pass_context
def check(
    ctx: click.Context,
    file: str,
    require_signature: str | None,
    signature: str | None,
    device: str,
    context: int | str | None,
    as_json: bool,
) -> None:
    """Says whether a file runs here, on which device, and in how much memory, without reading its weights.

    Exit code 0: it runs. 3: it is sound as far as its header tells, but does not run here; the first line says why. 1:
    it is no sound file, or, with --require-signature, which hashes all of it, not one of that signer.

    \b
    Examples:
      gqsa check model.gqsa
      gqsa check model.gqsa --device cuda --context 8192 --json
    """
    from gqsa_runtime import doctor as examination
    from gqsa_runtime.check import check_file

    check_signature_options(require_signature, signature)
    found = check_file(file, device, context, require_signature, signature)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        click.echo(f"{file} {'runs' if found.runs else 'does not run'} here: {found.reason}")
        if found.context is not None and found.needed_bytes is not None and found.runs:
            fits = "" if found.largest_context is None else f"; up to {found.largest_context:,} fit"
            needed = f"{found.needed_bytes / 1e9:.2f} GB"
            click.echo(f"it opens with {found.context:,} of {found.max_context:,} tokens in {needed}{fits}")
            if found.context_reason:
                click.echo(found.context_reason)
        click.echo(examination.render(examination.file_findings(found)))
    ctx.exit(0 if found.runs else 3)


@click.command()
@_FILE
@click.option("--context", type=int, help="Tokens to state the memory for. Default: 4096, or what the model has.")
@click.option("--kernels", is_flag=True, help="List the kernels and their constants.")
@click.option("--tensors", is_flag=True, help="List the tensors.")
@signature_options
@_JSON
def inspect(
    file: str,
    context: int | None,
    kernels: bool,
    tensors: bool,
    require_signature: str | None,
    signature: str | None,
    as_json: bool,
) -> None:
    """Shows what a file holds: size, bits per weight, targets, kernels, memory.

    \b
    Example:
      gqsa inspect model.gqsa --context 8192
    """
    from gqsa_runtime import inspect_
    from gqsa_runtime.reader import ArtifactFile, naming
    from gqsa_runtime.validate import validate

    check_signature_options(require_signature, signature)
    with ArtifactFile.open(file, require_signature, signature) as artifact, naming(file):
        validate(artifact.program, artifact.tensors)
        if context is not None and not 1 <= context <= artifact.program.max_context:
            raise InputError(f"--context is {context}, but this model is made for 1 to {artifact.program.max_context}")
        facts = inspect_.describe(artifact, context)
        lists = {"kernel_list": inspect_.kernel_rows(artifact)} if kernels else {}
        lists |= {"tensor_list": inspect_.tensor_rows(artifact)} if tensors else {}
    if as_json:
        click.echo(json.dumps(facts | lists, indent=2, ensure_ascii=False))
        return
    click.echo(inspect_.render(facts))
    for rows in lists.values():
        click.echo("\n" + inspect_.table(rows))


@click.command()
@_FILE
@signature_options
@click.option(
    "--rebuild",
    "compare",
    is_flag=True,
    help="Have gqsac, which must be installed, compile every kernel anew, too, and compare the machine code.",
)
@_JSON
def verify(file: str, require_signature: str | None, signature: str | None, compare: bool, as_json: bool) -> None:
    """Checks every digest, the launch plan and all index tensors of a file.

    With --rebuild it says of each kernel whether its machine code is what gqsac makes of the launch plan here: same,
    different, or different compiler, where the file says that another version made it. Exit code 0: all are the same.

    \b
    Examples:
      gqsa verify model.gqsa
      gqsa verify model.gqsa --rebuild
      gqsa verify model.gqsa --require-signature maker.pem
    """
    from gqsa_runtime.reader import ArtifactFile
    from gqsa_runtime.verify import verify_open

    check_signature_options(require_signature, signature)
    compiler = rebuild.compiler() if compare else None
    compared = None
    with ArtifactFile.open(file, require_signature, signature) as artifact:
        found = verify_open(artifact, functools.partial(progress, unit="tensor"))
        facts: dict[str, Any] = {"path": file, "ok": True, "tensors": found.n_tensors, "bytes": found.n_bytes}
        if not as_json:
            click.echo(
                f"{file} is sound: {found.n_tensors} tensors, {found.n_bytes:,} bytes, "
                "launch plan, tokenizer and chat template"
            )
        if compiler is not None:
            with compiler.BuildProgress() as bars:
                compared = compiler.compare(artifact, bars)
            facts |= {"ok": compared.same, "rebuilt": dataclasses.asdict(compared)}
            if not as_json:
                _show_comparison(compared)
    if as_json:
        click.echo(json.dumps(facts))
    if compared is not None and not compared.same:
        raise FormatError(
            f"{file}: {compared.n_differing} of {len(compared.kernels)} kernels differ from those that "
            f"{compared.installed} makes; the file says that {compared.recorded or 'nothing'} made them"
        )


def _show_comparison(compared: rebuild.Comparison) -> None:
    from gqsa_runtime.inspect_ import table

    rows = [{"target": row.target, "kernel": row.kernel or "all", "code": row.verdict} for row in compared.kernels]
    click.echo(
        f"kernels made anew by {compared.installed}; the file says {compared.recorded or 'nothing'}\n{table(rows)}"
    )


@click.command()
@_FILE
@click.option("--at", "lengths", help="Contexts to decode at, in tokens. Default: 128,1024,2048, or what fits.")
@click.option("--prompts", help="Prompts to measure, in tokens. Default: 128,512,2048,8192, or what fits.")
@click.option("--decode", "n_decode", type=int, default=64, show_default=True, help="Decode steps per round.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Timed rounds.")
@click.option("--profile", is_flag=True, help="Time each kernel by itself, too.")
@click.option("--plot", type=click.Path(path_type=str), help="Draw a roofline to this PNG file; needs matplotlib.")
@_model_options
@_JSON
def bench(
    file: str,
    lengths: str | None,
    prompts: str | None,
    n_decode: int,
    repeats: int,
    profile: bool,
    plot: str | None,
    how: _Opening,
    as_json: bool,
) -> None:
    """Measures opening, decode and prompts at given lengths: warm-up, then medians.

    Without --context what fits 4096 tokens is measured; --context auto measures prompts of 8192, too.

    \b
    Examples:
      gqsa bench model.gqsa --at 128,1024,4096 --context 8192
      gqsa bench model.gqsa --profile --plot roofline.png
    """
    from gqsa_runtime import bench as benchmark
    from gqsa_runtime import inspect_

    contexts, sizes = _numbers(lengths, "--at"), _numbers(prompts, "--prompts")
    if plot:
        from gqsa_runtime import roofline

        roofline.check(plot)  # better refused now than after the measurement
    with _open_model(file, how) as model:
        track = functools.partial(progress, unit="length")
        found = benchmark.bench(model, contexts, sizes, n_decode, repeats, profile, track)
        found = {"path": file, "name": model.program.name, "device": model.device.name, **found}
    if plot:
        roofline.plot(found, plot)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"{found['name']} on {found['device']}\n{benchmark.render(found, inspect_.table)}")


def _numbers(text: str | None, option: str) -> list[int] | None:
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 128,1024", param_hint=option) from None


@click.group("eval")
def evaluate() -> None:
    """Measures quality.

    \b
    Example:
      gqsa eval ppl model.gqsa --text wiki.test.raw
    """


@evaluate.command()
@_FILE
@click.option("--text", required=True, type=click.Path(path_type=str), help="A UTF-8 text file, - for stdin.")
@click.option("--window", type=int, default=2048, show_default=True, help="Tokens scored in one go.")
@click.option("--stride", type=int, help="Tokens from one window to the next. Default: the window.")
@click.option("--max-windows", type=int, help="Stop after so many windows.")
@_model_options
@_JSON
def ppl(
    file: str,
    text: str,
    window: int,
    stride: int | None,
    max_windows: int | None,
    how: _Opening,
    as_json: bool,
) -> None:
    """Perplexity of a text. The last tokens that fill no window are left out; a shorter text is scored whole.

    \b
    Example:
      gqsa eval ppl model.gqsa --text wiki.test.raw --window 2048 --max-windows 20
    """
    from gqsa_runtime.perplexity import perplexity

    content = read_text(text, "text")
    with _open_model(file, dataclasses.replace(how, context=how.context or None)) as model:
        result = perplexity(model, content, window, stride, max_windows, functools.partial(progress, unit="window"))
    if as_json:
        click.echo(json.dumps({"path": file, "window": window, "stride": stride or window, **vars(result)}))
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f} over {result.n_tokens:,} tokens in {result.n_windows} windows, "
            f"{result.n_tokens / max(result.seconds, 1e-9):,.0f} tokens/s"
        )


@click.command()
@OPTIONAL_FILE
@signature_options
@_JSON
def doctor(file: str | None, require_signature: str | None, signature: str | None, as_json: bool) -> None:
    """Says what this machine can run, and what to install where something is missing.

    With FILE, a compiled model, also how much memory it needs at which context, and what fits here.

    \b
    Examples:
      gqsa doctor
      gqsa doctor model.gqsa
    """
    from gqsa_runtime import doctor as examination

    check_signature_options(require_signature, signature, file)
    findings = examination.examine()
    findings += examination.examine_file(file, require_signature, signature) if file else []
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        click.echo(examination.render(findings))


for _command in commands():
    gqsa.add_command(_command)
