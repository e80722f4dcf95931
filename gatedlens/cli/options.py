"""Options: what several commands are told in the same words, and the shape that every command has.

    @command("lens", LENS)
    @with_model()
    @TEXT
    @OUT
    def lens(source: Source, text: str | None, out: str) -> Answer: ...

A model is the command's argument or `--model`, with `--tokenizer`, `--variant`, `--device`, `--dtype`, `--revision`, `--offload`;
the function gets them as one Source. An option that takes several words (`several=True`) takes them up to the next option, as in
`--names hook_embed hook_logits --out store`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich_click as click
from click.shell_completion import CompletionItem

from gatedlens.cli.answer import Answer
from gatedlens.cli.source import Source
from gatedlens.version import __version__

# What a Source is made of, and what the parameters are called: `--dtype` of `harvest` is the store's.
HOW = {"dtype": "model_dtype", **{name: name for name in ("tokenizer", "variant", "device", "revision", "offload")}}
Function = Callable[..., Any]
BUNDLED = Path(__file__).parent.parent / "bundled"


class Several(click.Option):
    """An option of several words, given once or more often."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "multiple": True})


class Command(click.RichCommand):
    """A command whose options of several words take all that stand behind them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {name for one in self.get_params(ctx) if isinstance(one, Several) for name in one.opts}
        return super().parse_args(ctx, list(_spread(args, many)))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples as they are typed, line by line."""
        from rich.text import Text

        formatter.console.print(Text(f"{self.epilog}\n"), soft_wrap=True)


class Group(click.RichGroup):
    """The commands in the order in which they are defined: to look, to ask, many inputs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _spread(args: Sequence[str], many: set[str]) -> Iterator[str]:
    """`--names a b` as `--names a --names b`."""
    current, filled = "", False
    for word in args:
        if word.startswith("-") and word != "-" and (filled or not current):
            current, filled = (word, False) if word in many else ("", False)
            yield word
        elif current:
            yield from (current, word) if filled else (word,)
            filled = True
        else:
            yield word


class Word(click.ParamType):
    """A text; the shell completes the words that are usual, and the command itself says what is wrong with another."""

    name = "text"

    def __init__(self, known: Callable[[], Sequence[str]], files: bool = False):
        self.known, self.files = known, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        found = [CompletionItem(w) for w in self.known() if w.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")] if self.files else found


def bundled() -> list[str]:
    """The bundled models' names, as `gl.bundled_models()` says them, without torch: a shell that completes them cannot wait."""
    return [f"gatedlens/{path.parent.name}" for path in sorted(BUNDLED.glob("*/config.json"))]


MODEL = Word(bundled, files=True)
FILES = Word(lambda: (), files=True)
DTYPE = Word(lambda: ("float64", "float32", "bfloat16", "float16"))
DEVICE = Word(lambda: ("cpu", "cuda", "cuda:0", "mps"))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gatedlens", message="%(prog)s %(version)s")
def app() -> None:
    """Open up gated-linear recurrent models: look into one, ask what matters in it, change it.

    A MODEL is a bundled one (gatedlens models lists them), a folder, a checkpoint file, or a name on the hub.
    """


def command(name: str, examples: str, quiet: bool = False) -> Callable[[Function], Any]:
    """`@command("lens", LENS)`: a command of `gatedlens` with --json. quiet: it has --quiet, and its function is told by
    `progress` whether a bar may be shown."""

    def decorate(function: Function) -> Any:
        @functools.wraps(function)
        def answered(json: bool, **given: Any) -> tuple[bool, Answer]:
            if quiet:
                given["progress"] = not (given.pop("quiet") or json)
            return json, function(**given)

        found: Any = answered
        if quiet:
            found = click.option("--quiet", is_flag=True, help="no progress bar")(found)
        found = click.option("--json", is_flag=True, help="print one JSON object instead, an error too")(found)
        found = click.option_panel("Options")(found)  # first; then how a model is opened
        return app.command(name, cls=Command, epilog=f"examples:{examples}")(found)

    return decorate


def as_json() -> bool:
    """Whether the command that runs prints JSON, so that it says nothing else."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("json"))


OF_MODEL = "How the model is opened"  # what the help calls these options


def _of_model(*names: str, **told: Any) -> Callable[[Function], Any]:
    return click.option(*names, panel=OF_MODEL, **told)


def with_model(default: str | None = None, loads: bool = True, dtype: str = "--dtype") -> Callable[[Function], Any]:
    """The model, as `source`. loads: whether its weights are read; dtype: what the option for its numbers is called."""

    def decorate(function: Function) -> Any:
        @functools.wraps(function)
        def opened(named: str | None, model: str | None, **given: Any) -> Any:
            if named is not None and model is not None and named != model:
                raise click.UsageError(f"The model is given twice: {named} and --model {model}.")
            name = named if model is None else model
            name = default if name is None else name
            if name is None:
                raise click.UsageError("Give a model: MODEL, or --model MODEL.")
            how = {key: given.pop(given_as) for key, given_as in HOW.items() if given_as in given}
            source = Source(name, **how)
            return function(source=source, **given)

        said = "float64 for the sharpest figures, bfloat16, ..." if loads else "in which bytes are counted"
        options = [
            click.argument("named", metavar="MODEL", required=False, type=MODEL),
            _of_model("--model", type=MODEL, help=f"the same as MODEL{f' (default: {default})' if default else ''}"),
            _of_model("--variant", help="which model a checkpoint of one file holds, where it does not say so itself"),
            _of_model("--revision", help="of a hub model: a branch, tag or commit"),
            _of_model(dtype, "model_dtype", type=DTYPE, help=f"{said} (default: as the checkpoint)"),
        ]
        if loads:
            disk = click.Choice(["disk"])
            options += [
                _of_model("--device", type=DEVICE, help="cpu, cuda:0, ... (default: cuda where there is one)"),
                _of_model("--offload", type=disk, help="run a model larger than the memory from its files"),
                _of_model("--tokenizer", help="a folder or hub name (default: the one beside the model)"),
            ]
        for option in reversed(options):
            opened = option(opened)
        return opened

    return decorate


TEXT = click.option("--text", help="what it reads (default: a passage or prompt that suits a bundled model)")
IMAGE = click.option("--image", type=FILES, help="the path of the image that a vision model reads")
OUT = click.option("--out", default="out", show_default=True, type=FILES, help="the folder for what is written")
LAYER = click.option("--layer", type=int, default=-1, help="the layer (default: the last)")
POSITION = click.option(
    "--position", type=int, help="which position (default: the last; of an image its class token's)"
)
ANSWER = click.option(
    "--answer", help="the token that is asked about (default: the one that the model finds likeliest)"
)
WRONG = click.option("--wrong", help="the token that it is compared with (default: none)")
BATCH = click.option("--batch-size", type=int, default=8, show_default=True, help="how many are computed together")


def pair(function: Function) -> Any:
    """--clean, --corrupted, --answer, --wrong: two prompts, and the token that each makes likely."""
    for name, said in (
        ("--wrong", "the token that the corrupted prompt makes likely"),
        ("--answer", "the token that the clean prompt makes likely"),
        ("--corrupted", "the prompt that it is compared with, as long as the other"),
        ("--clean", "the prompt of interest (a bundled recall model has a pair of its own)"),
    ):
        function = click.option(name, help=said)(function)
    return function
