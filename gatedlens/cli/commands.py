"""Commands: what is typed after `gatedlens`, each with its options, its examples and what it shows.

Models, plots and torch are imported by the command that needs them: help, and what is typed wrong, wait for none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import rich_click as click

from gatedlens.cli.answer import Answer, cells, table
from gatedlens.cli.options import (
    ANSWER,
    BATCH,
    DTYPE,
    IMAGE,
    LAYER,
    OUT,
    POSITION,
    TEXT,
    WRONG,
    Several,
    Word,
    app,
    as_json,
    command,
    pair,
    with_model,
)
from gatedlens.cli.source import Source
from gatedlens.errors import in_bytes

DEMO = """
  gatedlens demo
  gatedlens demo gatedlens/mamba-recall --text "D 3 dog A 7 hay ? D"
  gatedlens demo --text "It was the whiteness of the whale" --layer 0 --out figures --json"""

ATTENTION = """
  gatedlens attention gatedlens/mamba-moby --text "It was the whiteness of the whale" --layer 1
  gatedlens attention gatedlens/mamba-recall --text "D 3 dog A 7 hay ? D" --reduce row --json
  gatedlens attention vim_t_midclstok_76p1acc.pth --image cat.jpg --reduce row --out figures"""

LENS = """
  gatedlens lens gatedlens/mamba-recall
  gatedlens lens gatedlens/mamba-moby --text "It was the whiteness of the whal" --answer e --top 5
  gatedlens lens state-spaces/mamba-130m-hf --text "The Eiffel Tower is in" --answer " Paris" --json"""

DLA = """
  gatedlens dla gatedlens/mamba-recall
  gatedlens dla gatedlens/mamba-recall --by token --text "D 3 dog A 7 hay ? D" --answer 3 --wrong 7
  gatedlens dla gatedlens/mamba2-recall --by head --out figures --json"""

ATTRIBUTE = """
  gatedlens attribute gatedlens/mamba-recall
  gatedlens attribute gatedlens/mamba-recall --method occlusion --text "D 3 dog A 7 hay ? D" --answer 3 --wrong 7
  gatedlens attribute vim_s_midclstok_80p5acc.pth --image cat.jpg --method rollout:sign=abs --answer 281"""

ABLATE = """
  gatedlens ablate gatedlens/mamba-recall
  gatedlens ablate gatedlens/mamba-recall --point mixer_out --how mean --axes layer,pos
  gatedlens ablate gatedlens/gdn-recall --text "D 3 dog A 7 hay ? D" --answer 3 --wrong 7 --json"""

CIRCUIT = """
  gatedlens circuit gatedlens/mamba-recall
  gatedlens circuit gatedlens/rwkv-recall --method edge_patch --top 5 --out figures
  gatedlens circuit gatedlens/mamba-recall --clean "D 3 dog A 7 hay ? D" --corrupted "D 5 dog A 7 hay ? D" --answer 3 --wrong 5"""

PATCH = """
  gatedlens patch gatedlens/mamba-recall
  gatedlens patch gatedlens/griffin-recall --point gate --out figures --json
  gatedlens patch gatedlens/mamba-recall --clean "D 3 dog A 7 hay ? D" --corrupted "D 5 dog A 7 hay ? D" \\
      --answer 3 --wrong 5 --point state --axes layer,pos"""

HARVEST = """
  gatedlens harvest gatedlens/mamba-moby --data corpus.jsonl --names "blocks.*.mixer.hook_gated" --context 128 --out store
  gatedlens harvest state-spaces/mamba-130m-hf --data texts/ --names blocks.3.hook_resid_post --reduce mean covariance
  gatedlens harvest gatedlens/vim-digits --data images/ --names "blocks.*.hook_mixer_out" --engine ray --workers 4"""

EVALUATE = """
  gatedlens evaluate gatedlens/vim-digits --data digits --limit 50 --out out/digits
  gatedlens evaluate gatedlens/mamba-recall --data recall --limit 64 --methods lrp rollout:sign=abs occlusion
  gatedlens evaluate vim_s_midclstok_80p5acc.pth --data gtsegs_ijcv.mat --methods rollout gradient_attention
  gatedlens evaluate state-spaces/mamba-370m-hf --data imdb/test.jsonl --limit 200 --nothing "<|endoftext|>"

--data: digits, recall, moby; an ImageNet folder of class folders; a folder with images/ and masks/; gtsegs_ijcv.mat; a Pascal VOC
folder; IMDB or ARC-Easy as JSON lines or a folder of datasets' save_to_disk. A method may carry options, as in
gradient_attention:factors=hidden,mode=official. The same command goes on where it was stopped."""

COMPARE = """
  gatedlens compare
  gatedlens compare --out figures --json"""

MODELS = """
  gatedlens models
  gatedlens models --json"""

INSPECT = """
  gatedlens inspect gatedlens/mamba-moby
  gatedlens inspect state-spaces/mamba-2.8b-hf --tokens 4096 --dtype bfloat16
  gatedlens inspect path/to/folder --json"""

VERIFY = """
  gatedlens verify gatedlens/mamba-moby
  gatedlens verify path/to/folder --dtype float64
  gatedlens verify state-spaces/mamba-130m-hf --json

The exit status is 1 if a claim fails."""

TABLE = """
  gatedlens table gatedlens/mamba-moby
  gatedlens table path/to/model --layer 3 --json"""

COMPLETION = """
  eval "$(gatedlens completion bash)"                            # in .bashrc; zsh likewise, in .zshrc
  gatedlens completion fish > ~/.config/fish/completions/gatedlens.fish"""

REDUCE = Word(lambda: ("mean", "abs_mean", "row"))
BY = Word(lambda: ("component", "token", "head", "head-token"))
METHOD = Word(lambda: (
    "raw_attention", "rollout", "gradient_attention", "lrp", "secant", "mix", "grad_x_input", "integrated_gradients",
    "smoothgrad", "occlusion", "random",
))  # fmt: skip
EDGES = Word(lambda: ("eap", "eap_ig", "edge_patch"))
HOW = Word(lambda: ("zero", "mean", "noise"))
DATA = Word(lambda: ("digits", "recall", "moby"), files=True)


# -- look ------------------------------------------------------------------------------------------------------------


@command("demo", DEMO)
@with_model(default="gatedlens/mamba-moby")
@TEXT
@LAYER
@OUT
def demo(source: Source, text: str | None, layer: int, out: str) -> Answer:
    """Run the main job from end to end on a bundled model, and say what it found."""
    from gatedlens.cli.demo import run
    from gatedlens.plot.drawing import label

    report = run(source, text, layer, out)
    errors = (
        f"layer {at}: attention @ x + remainder equals the layer's output, relative error {error:.1e}"
        for at, error in report.errors.items()
    )
    likely = ", ".join(f"{label(token)!r} {p:.0%}" for token, p in report.next_tokens)
    return Answer(
        report.to_dict(),
        [
            f"{report.model} reads {report.text!r}",
            f"cached {report.n_cached} activations, {in_bytes(report.cached_bytes)}: every gate, conv and scan intermediate",
            *errors,
            f"What the last position attends to in layer {report.layer} (mean |attention| over channels):",
            table("token position attention", [[repr(token), *rest] for token, *rest in report.tops]),
            f"next token: {likely}",
        ],
        files=[f"picture: {report.figure}", f"page:    {report.page}  (hover the tokens)"],
    )


@command("models", MODELS)
def models() -> Answer:
    """List the bundled models."""
    from gatedlens.loading import BUNDLED, bundled_models

    found = {}
    for name in bundled_models():
        report = json.loads((BUNDLED / name.partition("/")[2] / "training.json").read_text())
        found[name] = {"task": report["task"], "parameters": report["parameters"], **report["metric"]}
    rows = []
    for name, facts in found.items():
        told = [f"{key} {value}" for key, value in facts.items() if key not in ("task", "parameters")]
        rows.append([name, facts["task"], facts["parameters"], ", ".join(told)])
    return Answer(found, [table("model task parameters measured", rows)])


@command("compare", COMPARE)
@OUT
def compare(out: str) -> Answer:
    """Show the architectures side by side, on one prompt and one handwritten digit."""
    from gatedlens.cli.demo import compare as run

    found = run(out)
    label, guess, probability, error = found.digit
    rows = [
        [name, answer, right, strongest, f"{off:.1e}"]
        for name, (answer, right, strongest, off) in found.recalled.items()
    ]
    return Answer(
        found.to_dict(),
        [
            f"prompt: {found.prompt}",
            table("model answer right_answer source_it_reads_most reconstruction_error", rows),
            f"gatedlens/vim-digits reads a handwritten {label} as {guess} ({probability:.0%}), error {error:.1e}",
        ],
        files=[f"picture: {found.figure}"],
    )


@command("inspect", INSPECT)
@with_model(loads=False)
@click.option("--tokens", type=int, default=1024, show_default=True, help="of the row that is cached")
def inspect(source: Source, tokens: int) -> Answer:
    """Say what a model is and what a cache of it would weigh, from its config alone: no weight is read."""
    from gatedlens.inspection import inspect as run

    hub = {} if source.revision is None else {"revision": source.revision}
    found = run(source.name, tokens, source.dtype, source.variant, **hub)
    return Answer(found.to_dict(), [str(found)])


@command("table", TABLE)
@with_model()
@click.option("--layer", type=int, default=0, show_default=True, help="the block to show")
def hook_table(source: Source, layer: int) -> Answer:
    """Print the hook points of a model: names, axes, sizes, equations."""
    rows = source.open().hook_table(layer=layer)
    return Answer({"model": source.name, "points": rows.rows}, [rows])


@command("verify", VERIFY)
@with_model()
def verify(source: Source) -> Answer:
    """Measure on a model what is claimed of it: the vendor's numbers, every point, A x + r, splits, padding, edits."""
    from gatedlens.verification import verify as run

    found = run(source.open())
    return Answer(found.to_dict(), [str(found)], failed=not found.passed)


# -- ask -------------------------------------------------------------------------------------------------------------


@command("attention", ATTENTION)
@with_model()
@TEXT
@IMAGE
@LAYER
@click.option(
    "--reduce",
    type=REDUCE,
    default="mean",
    show_default=True,
    help="mean or abs_mean over channels, or row: one row of the mean",
)
@POSITION
@OUT
def attention(
    source: Source, text: str | None, image: str | None, layer: int, reduce: str, position: int | None, out: str
) -> Answer:
    """Draw and save the implicit attention of one layer for a text or an image."""
    from gatedlens.cli.attention import show

    shown = show(source, text, image, layer, reduce, position, out)
    over = "mean" if reduce == "row" else reduce
    return Answer(
        shown.to_dict(),
        [
            f"{shown.model}, layer {shown.layer}, reads {shown.input!r}",
            f"attention @ x + remainder equals the layer's output, relative error {shown.error:.1e}",
            f"position {shown.position} attends most to ({over} over channels):",
            table("token position attention", [[repr(token), *rest] for token, *rest in shown.tops]),
        ],
        files=shown.files,
    )


@command("lens", LENS)
@with_model()
@TEXT
@click.option("--answer", help="a token whose probability and rank are told, and drawn")
@POSITION
@click.option("--top", type=int, default=3, show_default=True, help="how many tokens a layer")
@click.option("--fitted", metavar="FILE", help="a saved J-, R- or tuned lens of the model, to read by")
@OUT
def lens(
    source: Source,
    text: str | None,
    answer: str | None,
    position: int | None,
    top: int,
    fitted: str | None,
    out: str,
) -> Answer:
    """The logit lens: what each layer would predict, if it were the last; or a lens that was fitted."""
    from gatedlens.cli.lens import lens as run

    return run(source, text, answer, position, top, fitted, out)


@command("dla", DLA)
@with_model()
@TEXT
@ANSWER
@WRONG
@click.option("--by", type=BY, default="component", show_default=True, help="component, token, head or head-token")
@POSITION
@click.option("--top", type=int, default=10, show_default=True, help="how many shares are shown")
@OUT
def dla(
    source: Source,
    text: str | None,
    answer: str | None,
    wrong: str | None,
    by: str,
    position: int | None,
    top: int,
    out: str,
) -> Answer:
    """Direct logit attribution: which component, token or head writes the answer's logit. The shares sum exactly."""
    from gatedlens.cli.dla import dla as run

    return run(source, text, answer, wrong, by, position, top, out)


@command("attribute", ATTRIBUTE)
@with_model()
@TEXT
@IMAGE
@click.option("--method", type=METHOD, default="lrp", show_default=True, help="one of gl.attribution's, with options")
@click.option("--answer", help="the token, or the number of the class, that is explained (default: what is predicted)")
@WRONG
@click.option("--top", type=int, default=5, show_default=True, help="how many tokens or patches are shown")
@OUT
def attribute(
    source: Source,
    text: str | None,
    image: str | None,
    method: str,
    answer: str | None,
    wrong: str | None,
    top: int,
    out: str,
) -> Answer:
    """Explain a prediction: the relevance of each token, as a coloured page, or of each patch, as a map."""
    from gatedlens.cli.attribute import attribute as run

    return run(source, text, image, method, answer, wrong, top, out)


@command("ablate", ABLATE)
@with_model()
@TEXT
@ANSWER
@WRONG
@click.option(
    "--point", help="mixer_out, gate, state, ... or a glob (default: whole components: scan, conv, gate, ...)"
)
@click.option("--how", type=HOW, default="zero", show_default=True, help="what a point becomes: zero, mean or noise")
@click.option("--axes", default="layer", show_default=True, help="layer, or of a point layer,pos")
@click.option("--top", type=int, default=10, show_default=True, help="how many are shown")
@OUT
def ablate(
    source: Source, text: str | None, answer: str | None, wrong: str | None, point: str | None, how: str, axes: str, top: int,
    out: str,
) -> Answer:  # fmt: skip
    """Take components or points away, one at a time, and measure how the answer suffers."""
    from gatedlens.cli.ablate import ablate as run

    return run(source, text, answer, wrong, point, how, axes, top, out)


@command("patch", PATCH, quiet=True)
@with_model()
@pair
@click.option(
    "--point", default="resid_pre", show_default=True, help="resid_pre, mixer_out, gate, state, ... or a glob"
)
@click.option("--axes", default="layer,pos", show_default=True, help="what is swept: layer, and any axes of the point")
@click.option("--batch-size", type=int, help="how many patches a run holds at most (default: what memory allows)")
@OUT
def patch(
    source: Source, clean: str | None, corrupted: str | None, answer: str | None, wrong: str | None, point: str, axes: str,
    batch_size: int | None, out: str, progress: bool,
) -> Answer:  # fmt: skip
    """Patch a clean prompt's activations into a corrupted one, one place at a time, and show what restores the answer."""
    from gatedlens.cli.patch import patch as run

    found = run(source, clean, corrupted, answer, wrong, point, axes, out, batch_size, progress)
    rows = cells(found.tops, found.axes)
    return Answer(
        found.to_dict(),
        [
            f"clean:     {found.clean!r}, logit of {found.answer!r} - {found.wrong!r} = {found.clean_metric:+.3f}",
            f"corrupted: {found.corrupted!r}, {found.corrupted_metric:+.3f}",
            f"patching {found.points}; strongest (1: as in the clean run, 0: as in the corrupted one):",
            table(" ".join([*found.axes, "restored"]), rows),
        ],
        files=found.files,
    )


@command("circuit", CIRCUIT, quiet=True)
@with_model()
@pair
@click.option("--method", type=EDGES, default="eap_ig", show_default=True, help="eap, eap_ig, or edge_patch (exact)")
@click.option("--top", type=int, default=8, show_default=True, help="how many edges are kept")
@OUT
def circuit(
    source: Source, clean: str | None, corrupted: str | None, answer: str | None, wrong: str | None, method: str, top: int,
    out: str, progress: bool,
) -> Answer:  # fmt: skip
    """Find the edges between blocks that carry the difference of two prompts, and how much they keep of it alone."""
    from gatedlens.cli.circuit import circuit as run

    return run(source, clean, corrupted, answer, wrong, method, top, out, progress)


# -- many inputs -----------------------------------------------------------------------------------------------------


@command("evaluate", EVALUATE, quiet=True)
@with_model()
@click.option("--data", type=DATA, required=True, help="a bundled data set or the path of one (see below)")
@click.option("--methods", cls=Several, type=METHOD, help="attribution methods, with options (default: all)")
@OUT
@click.option("--limit", type=int, help="how many samples, drawn from the seed (default: all)")
@click.option("--seed", type=int, default=0, show_default=True, help="of the draw")
@click.option("--nothing", help="what is put in the place of what is taken away: a token, or black, mean, blur")
@BATCH
def evaluate(
    source: Source, data: str, methods: Sequence[str], out: str, limit: int | None, seed: int, nothing: str | None,
    batch_size: int, progress: bool,
) -> Answer:  # fmt: skip
    """Measure how faithful attribution methods are on a data set, and write a report; goes on where it was stopped."""
    from gatedlens.cli.outfolder import out_folder
    from gatedlens.evaluation import evaluate as run
    from gatedlens.evaluation import explainer, open_samples, report

    for name in methods:
        explainer(name)
    samples = open_samples(data)
    model, folder = source.open(), out_folder(out)
    options: dict[str, Any] = {"limit": limit, "seed": seed, "nothing": nothing, "progress": progress}
    found = run(model, samples, methods or None, out=folder, batch_size=batch_size, **options)
    page = report(found, model).save(folder / "report.html")
    numbers = found.save(folder / "results.json")
    return Answer(
        {**found.to_dict(), "files": [str(page), str(numbers)]},
        [found.table().brief(), f"report:  {page}  (with intervals, curves and maps)", f"numbers: {numbers}"],
    )


@command("harvest", HARVEST, quiet=True)
@with_model(dtype="--model-dtype")
@click.option("--data", required=True, help="a JSONL or text file, a folder of texts or images, a datasets folder")
@click.option("--names", cls=Several, required=True, help="hook points: names, aliases or globs")
@click.option("--out", default="store", show_default=True, help="the folder of the store")
@BATCH
@click.option("--context", type=int, help="tokens in a row, documents packed (default: a row is a document)")
@click.option("--max-tokens", type=int, help="stop after so many tokens of the corpus")
@click.option("--positions", default="all", show_default=True, help="all, last, or mask: those that the corpus marks")
@click.option("--dtype", type=DTYPE, help="of the numbers in the store (default: as computed)")
@click.option("--reduce", cls=Several, help="statistics instead: mean variance covariance kurtosis max sample ...")
@click.option("--field", help="the field of a record that holds the text or the ids")
@click.option("--engine", default="local", show_default=True, help="local, or ray")
@click.option("--workers", type=int, default=2, show_default=True, help="of the ray engine")
def harvest(
    source: Source, data: str, names: Sequence[str], out: str, batch_size: int, context: int | None, max_tokens: int | None,
    positions: str, dtype: str | None, reduce: Sequence[str], field: str | None, engine: str, workers: int, progress: bool,
) -> Answer:  # fmt: skip
    """Harvest activations of a whole corpus into a folder; run again after an interruption, it goes on."""
    from gatedlens import store

    model = source.open()
    what = {"max_tokens": max_tokens, "positions": positions, "dtype": dtype, "reduce": list(reduce) or None}
    options: dict[str, Any] = {"batch_size": batch_size, "context": context, "field": field, **what}
    size = store.estimate(model, data, list(names), out, **options)
    if not as_json():
        click.echo(f"{out}: {size}")
    made = store.harvest(model, data, list(names), out, **options, engine=engine, workers=workers, progress=progress)
    done = made.manifest["finished"]
    return Answer(
        {"store": out, "points": made.names, **done},
        [f"{out}: {done['rows']} samples, {done['tokens']} tokens of {len(made.names)} points", *done["notes"]],
    )


@command("completion", COMPLETION)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> Answer:
    """Print what a shell runs to complete the words of this command."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(app, {}, "gatedlens", COMPLETE).source()
    return Answer({"shell": shell, "script": script}, [script])


COMPLETE = "_GATEDLENS_COMPLETE"  # what the shell's script sets, and click reads
