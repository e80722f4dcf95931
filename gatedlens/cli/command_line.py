"""The command line: `gatedlens demo`, `attention`, `patch`, `harvest`, ...; each has --help with examples, and --json.

Models, plots and torch are imported by the command that needs them: help, and what is typed wrong, wait for none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from gatedlens.errors import GatedlensError, in_bytes
from gatedlens.files import to_json
from gatedlens.version import __version__

DEMO = """examples:
  gatedlens demo
  gatedlens demo --model gatedlens/mamba-recall --text "D 3 dog A 7 hay ? D"
  gatedlens demo --text "It was the whiteness of the whale" --layer 0 --out figures --json"""

ATTENTION = """examples:
  gatedlens attention --model gatedlens/mamba-moby --text "It was the whiteness of the whale" --layer 1
  gatedlens attention --model gatedlens/mamba-recall --text "D 3 dog A 7 hay ? D" --reduce row --json
  gatedlens attention --model vim_t_midclstok_76p1acc.pth --image cat.jpg --reduce row --out figures"""

PATCH = """examples:
  gatedlens patch --model gatedlens/mamba-recall
  gatedlens patch --model gatedlens/griffin-recall --point gate --out figures --json
  gatedlens patch --model gatedlens/mamba-recall --clean "D 3 dog A 7 hay ? D" --corrupted "D 5 dog A 7 hay ? D" \\
      --answer 3 --wrong 5 --point state --axes layer,pos"""

HARVEST = """examples:
  gatedlens harvest --model gatedlens/mamba-moby --data corpus.jsonl --names "blocks.*.mixer.hook_gated" --context 128 --out store
  gatedlens harvest --model state-spaces/mamba-130m-hf --data texts/ --names blocks.3.hook_resid_post --reduce mean covariance
  gatedlens harvest --model gatedlens/vim-digits --data images/ --names "blocks.*.hook_mixer_out" --engine ray --workers 4"""

EVALUATE = """examples:
  gatedlens evaluate --model gatedlens/vim-digits --data digits --limit 50 --out out/digits
  gatedlens evaluate --model gatedlens/mamba-recall --data recall --limit 64 --methods lrp rollout:sign=abs occlusion
  gatedlens evaluate --model vim_s_midclstok_80p5acc.pth --data gtsegs_ijcv.mat --methods rollout gradient_attention
  gatedlens evaluate --model state-spaces/mamba-370m-hf --data imdb/test.jsonl --limit 200 --nothing "<|endoftext|>"

--data: digits, recall, moby; an ImageNet folder of class folders; gtsegs_ijcv.mat; a Pascal VOC folder; IMDB or ARC-Easy as
JSON lines or a folder of datasets' save_to_disk. A method may carry options: gradient_attention:factors=hidden,mode=official.
The same command goes on where it was stopped."""

INSPECT = """examples:
  gatedlens inspect gatedlens/mamba-moby
  gatedlens inspect state-spaces/mamba-2.8b-hf --tokens 4096 --dtype bfloat16
  gatedlens inspect path/to/folder --json"""

VERIFY = """examples:
  gatedlens verify gatedlens/mamba-moby
  gatedlens verify path/to/folder --dtype float64
  gatedlens verify state-spaces/mamba-130m-hf --json

The exit status is 1 if a claim fails."""

TABLE = """examples:
  gatedlens table gatedlens/mamba-moby
  gatedlens table path/to/model --layer 3 --json"""


def _console() -> Any:
    """A rich console: as wide as the terminal, or wide enough for a table when the output goes to a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demo and say what it found."""
    from rich.markup import escape
    from rich.table import Table

    from gatedlens.cli.demo import run
    from gatedlens.plot.drawing import label

    report = run(args.model, args.text, args.layer, args.out)
    if args.json:
        return report.to_dict()
    console = _console()
    console.print(f"[bold]{escape(report.model)}[/] reads {escape(repr(report.text))}", soft_wrap=True)
    console.print(
        f"cached {report.n_cached} activations, {in_bytes(report.cached_bytes)}: every gate, conv and scan intermediate"
    )
    for layer, error in report.errors.items():
        console.print(
            f"layer {layer}: attention @ x + remainder equals the layer's output, relative error {error:.1e}",
            soft_wrap=True,
        )
    console.print(
        f"What the last position attends to in layer {report.layer} (mean |attention| over channels):", soft_wrap=True
    )
    table = Table()
    for column in ("token", "position", "attention"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for token, position, value in report.tops:
        table.add_row(escape(label(token)), str(position), f"{value:.4f}")
    console.print(table)
    likely = ", ".join(f"{label(token)!r} {p:.0%}" for token, p in report.next_tokens)
    console.print(f"next token: {escape(likely)}", soft_wrap=True)
    console.print(f"picture: {report.figure}\npage:    {report.page}  (hover the tokens)", soft_wrap=True)
    return {}


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Draw and save the implicit attention of one layer for a text or an image."""
    from gatedlens.cli.attention import show

    shown = show(args.model, args.text, args.image, args.layer, args.reduce, args.position, args.out)
    if args.json:
        return shown.to_dict()
    print(f"{shown.model}, layer {shown.layer}, reads {shown.input!r}")
    print(f"attention @ x + remainder equals the layer's output, relative error {shown.error:.1e}")
    print(f"position {shown.position} attends most to ({shown.reduce} over channels):".replace("row over", "mean over"))
    for name, position, value in shown.tops:
        print(f"  {name!r:>12} at {position}: {value:+.4f}")
    print("\n".join(shown.files))
    return {}


def patch(args: argparse.Namespace) -> dict[str, Any]:
    """Patch a clean prompt's activations into a corrupted one, one place at a time, and show what restores the answer."""
    from gatedlens.cli.patch import patch as run

    found = run(
        args.model, args.clean, args.corrupted, args.answer, args.wrong, args.point, args.axes, args.out,
        progress=not args.json,
    )  # fmt: skip
    if args.json:
        return found.to_dict()
    print(f"clean:     {found.clean!r}, logit of {found.answer!r} - {found.wrong!r} = {found.clean_metric:+.3f}")
    print(f"corrupted: {found.corrupted!r}, {found.corrupted_metric:+.3f}")
    print(f"patching {found.points}; strongest (1: as in the clean run, 0: as in the corrupted one):")
    for cell in found.tops:
        where = ", ".join(f"{axis} {cell[axis]}" for axis in found.axes)
        print(f"  {where:>20} {cell.get('pos_label', '')!r:>8}: {cell['value']:+.3f}")
    print("\n".join(found.files))
    return {}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure how faithful attribution methods are on a data set, and write a report; goes on where it was stopped."""
    from gatedlens.cli.outfolder import out_folder
    from gatedlens.evaluation import evaluate as run
    from gatedlens.evaluation import explainer, open_samples, report
    from gatedlens.loading import from_pretrained

    for name in args.methods or ():
        explainer(name)
    samples = open_samples(args.data)
    model = from_pretrained(args.model)
    out = out_folder(args.out)
    options: dict[str, Any] = {"limit": args.limit, "seed": args.seed, "nothing": args.nothing}
    progress = not (args.json or args.quiet)
    found = run(model, samples, args.methods, out=out, batch_size=args.batch_size, progress=progress, **options)
    page = report(found, model).save(out / "report.html")
    numbers = found.save(out / "results.json")
    if not args.json:
        console = _console()
        console.print(found.table().brief())
        console.print(f"report:  {page}  (with intervals, curves and maps)\nnumbers: {numbers}", soft_wrap=True)
    return {**found.to_dict(), "files": [str(page), str(numbers)]}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Show the architectures side by side, on one prompt and one handwritten digit."""
    from rich.table import Table

    from gatedlens.cli.demo import compare as run

    found = run(args.out)
    if args.json:
        return found.to_dict()
    console = _console()
    console.print(f"prompt: {found.prompt}", soft_wrap=True)
    table = Table()
    for column in ("model", "answer", "right answer", "source it reads most", "reconstruction error"):
        table.add_column(column)
    for name, (answer, right, strongest, error) in found.recalled.items():
        table.add_row(name, answer, right, strongest, f"{error:.1e}")
    console.print(table)
    label, guess, probability, error = found.digit
    console.print(f"gatedlens/vim-digits reads a handwritten {label} as {guess} ({probability:.0%}), error {error:.1e}")
    console.print(f"picture: {found.figure}", soft_wrap=True)
    return {}


def harvest(args: argparse.Namespace) -> dict[str, Any]:
    """Harvest activations of a whole corpus into a folder; run again after an interruption, it goes on."""
    from gatedlens import store
    from gatedlens.loading import from_pretrained

    model = from_pretrained(args.model, revision=args.revision, offload=args.offload)
    what = {"max_tokens": args.max_tokens, "positions": args.positions, "dtype": args.dtype, "reduce": args.reduce}
    options = {"batch_size": args.batch_size, "context": args.context, "field": args.field, **what}
    size = store.estimate(model, args.data, args.names, args.out, **options)
    if not args.json:
        print(f"{args.out}: {size}")
    how = {"engine": args.engine, "workers": args.workers, "progress": not (args.json or args.quiet)}
    made = store.harvest(model, args.data, args.names, args.out, **options, **how)
    done = made.manifest["finished"]
    if not args.json:
        print(f"{args.out}: {done['rows']} samples, {done['tokens']} tokens of {len(made.names)} points")
        print("\n".join(done["notes"]))
    return {"store": str(args.out), "points": made.names, **done}


def models(args: argparse.Namespace) -> dict[str, Any]:
    """List the bundled models."""
    from gatedlens.loading import BUNDLED, bundled_models

    found = {}
    for name in bundled_models():
        report = json.loads((BUNDLED / name.partition("/")[2] / "training.json").read_text())
        found[name] = {"task": report["task"], "parameters": report["parameters"], **report["metric"]}
    if not args.json:
        for name, facts in found.items():
            print(f"{name:28} " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    return found


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Say what a model is and what a cache of it would weigh, from its config alone: no weight is read."""
    from gatedlens.inspection import inspect as run

    found = run(args.model, args.tokens, args.dtype, args.variant)
    if not args.json:
        print(found)
    return found.to_dict()


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on a model what is claimed of it: the vendor's numbers, every point, A x + r, splits, padding, edits."""
    from gatedlens.verification import verify as run

    found = run(args.model, dtype=args.dtype)
    if not args.json:
        print(found)
    args.failed = not found.passed
    return found.to_dict()


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Print the hook points of a model."""
    from gatedlens.loading import from_pretrained

    rows = from_pretrained(args.model).hook_table(layer=args.layer)
    if not args.json:
        _console().print(rows)
    return {"model": args.model, "points": rows.rows}


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="gatedlens", description="Open up gated-linear recurrent models.")
    main_parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, function: Any, examples: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(
            name, help=function.__doc__, description=function.__doc__, epilog=examples, formatter_class=raw
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.set_defaults(function=function, failed=False)
        return sub

    sub = command("demo", demo, DEMO)
    sub.add_argument(
        "--model", default="gatedlens/mamba-moby", help="a bundled model, a folder or a hub name (%(default)s)"
    )
    sub.add_argument("--text", help="what it reads (a passage or prompt that suits a bundled model)")
    sub.add_argument("--layer", type=int, default=-1, help="the layer whose attention is listed (the last)")
    sub.add_argument("--out", default="out", help="the folder for the picture and the page (%(default)s)")
    sub = command("attention", attention, ATTENTION)
    sub.add_argument("--model", required=True, help="a bundled model, a folder, a file or a hub name")
    sub.add_argument("--text", help="what a language model reads (as in demo)")
    sub.add_argument("--image", help="the path of the image that a vision model reads")
    sub.add_argument("--layer", type=int, default=-1, help="the layer (the last)")
    sub.add_argument(
        "--reduce",
        default="mean",
        help="mean or abs_mean over channels (a matrix), or row: one row of the mean (%(default)s)",
    )
    sub.add_argument("--position", type=int, help="whose row (the last token's; of an image the class token's)")
    sub.add_argument("--out", default="out", help="the folder for the picture and the numbers (%(default)s)")
    sub = command("patch", patch, PATCH)
    sub.add_argument("--model", required=True, help="a bundled model, a folder or a hub name")
    sub.add_argument("--clean", help="the prompt whose activations are put in (a bundled recall model has its own)")
    sub.add_argument("--corrupted", help="the prompt that they are put into, as long as the other")
    sub.add_argument("--answer", help="the token that the clean prompt makes likely")
    sub.add_argument("--wrong", help="the token that the corrupted prompt makes likely")
    sub.add_argument(
        "--point", default="resid_pre", help="resid_pre, mixer_out, gate, state, ... or a glob (%(default)s)"
    )
    sub.add_argument(
        "--axes", default="layer,pos", help="what is swept: layer, and any axes of the point (%(default)s)"
    )
    sub.add_argument("--out", default="out", help="the folder for the picture and the numbers (%(default)s)")
    sub = command("evaluate", evaluate, EVALUATE)
    sub.add_argument("--model", required=True, help="a bundled model, a folder, a file or a hub name")
    sub.add_argument("--data", required=True, help="a bundled data set or the path of one (see below)")
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="attribution methods, with options (all)")
    sub.add_argument("--out", default="out", help="the folder for records, report and numbers (%(default)s)")
    sub.add_argument("--limit", type=int, help="how many samples, drawn from the seed (all)")
    sub.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    sub.add_argument("--nothing", help="what is put in the place of what is taken away: a token, or black, mean, blur")
    sub.add_argument("--batch-size", type=int, default=8, help="samples that are explained together (%(default)s)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    sub = command("compare", compare, "examples:\n  gatedlens compare\n  gatedlens compare --out figures --json")
    sub.add_argument("--out", default="out", help="the folder for the picture (%(default)s)")
    sub = command("harvest", harvest, HARVEST)
    sub.add_argument("--model", required=True, help="a bundled model, a folder, a file or a hub name")
    sub.add_argument("--revision", help="of a hub model: a branch, tag or commit")
    sub.add_argument("--offload", choices=["disk"], help="run a model larger than the memory from its files")
    sub.add_argument(
        "--data", required=True, help="a JSONL or text file, a folder of texts or images, a datasets folder"
    )
    sub.add_argument("--names", required=True, nargs="+", help="hook points: names, aliases or globs")
    sub.add_argument("--out", default="store", help="the folder of the store (%(default)s)")
    sub.add_argument("--batch-size", type=int, default=8, help="rows that the model reads at once (%(default)s)")
    sub.add_argument("--context", type=int, help="tokens in a row, documents packed (without it a row is a document)")
    sub.add_argument("--max-tokens", type=int, help="stop after so many tokens of the corpus")
    sub.add_argument("--positions", default="all", help="all, last, or mask: those that the corpus marks (%(default)s)")
    sub.add_argument("--dtype", help="float16, bfloat16, float32 or float64 (as computed)")
    sub.add_argument("--reduce", nargs="+", help="statistics instead: mean variance covariance kurtosis max sample ...")
    sub.add_argument("--field", help="the field of a record that holds the text or the ids")
    sub.add_argument("--engine", default="local", help="local, or ray (%(default)s)")
    sub.add_argument("--workers", type=int, default=2, help="of the ray engine (%(default)s)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    command("models", models, "examples:\n  gatedlens models\n  gatedlens models --json")
    sub = command("inspect", inspect, INSPECT)
    sub.add_argument("model", help="a bundled model, a folder, a file or a hub name")
    sub.add_argument("--tokens", type=int, default=1024, help="of the row that is cached (%(default)s)")
    sub.add_argument("--dtype", help="in which bytes are counted: bfloat16, float32, ... (as the config says)")
    sub.add_argument("--variant", help="which model a checkpoint of one file holds, where it does not say so itself")
    sub = command("verify", verify, VERIFY)
    sub.add_argument("model", help="a bundled model, a folder, a file or a hub name")
    sub.add_argument("--dtype", help="float64 for the sharpest figures (as the checkpoint)")
    sub = command("table", table, TABLE)
    sub.add_argument("model", help="a bundled model, a folder or a hub name")
    sub.add_argument("--layer", type=int, default=0, help="the block to show (%(default)s)")
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; what goes wrong is one line on stderr: exit code 2 for errors that gatedlens raises on purpose and
    files that cannot be read or written, 130 after Ctrl-C, 143 after SIGTERM, 1 when nobody reads the output any more
    and when `verify` finds a claim that fails."""
    args = parser().parse_args(argv)
    with _terminable() as received:
        try:
            result = args.function(args)
            if args.json:
                print(to_json(result, indent=1))
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _let_go_of_stdout()
            return 1
        except (GatedlensError, ImportError, OSError, MemoryError) as error:
            return _failed(args.command, _said(error), 2)
        except KeyboardInterrupt as stop:
            said = str(stop) or "stopped; `evaluate` and `harvest` go on when the same command is given again"
            return _failed(args.command, said, 128 + (received[0] if received else signal.SIGINT))
    return int(args.failed)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM ends a command as Ctrl-C does; which signals came. Handlers belong to the main thread: elsewhere none is set."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _said(error: BaseException) -> str:
    """One line; of an error of the operating system with the file it is about."""
    if isinstance(error, GatedlensError) or not isinstance(error, OSError):
        said = str(error) or type(error).__name__
    else:
        said = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)
    return " ".join(said.split("\n"))


def _failed(command: str, said: str, code: int) -> int:
    with suppress(OSError):  # nobody may be left to read it
        print(f"gatedlens {command}: {said.rstrip('.')}.", file=sys.stderr)
    return code


def _let_go_of_stdout() -> None:
    """Else Python would try to write the rest when it ends, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
