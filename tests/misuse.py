"""Misused options: `python -m tests.misuse` passes each of some wrong values to each option and prints whatever raises an error
that is not ours. In a process of its own: where tests run, beartype refuses wrong types before our own checks do."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy
import torch

import gatedlens as gl

WRONG = (
    None, True, -1, 0, 99, 1.5, float("nan"), "x", "", [], [None], {}, object(), torch.tensor(3.5), numpy.array(3.5), (1, 2, 3),
)  # fmt: skip
METRIC = gl.metrics.logit_difference(1, 2)
OF_A_GRAPH = ("of", "into", "out_of", "value", "node", "prune", "predict", "intervene", "to_circuit_tracer", "top")


class Given:
    """A bundled model with an input and its cache."""

    def __init__(self) -> None:
        matplotlib.use("agg")
        self.model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
        self.tokens = gl.tasks.recall(2, seed=0).tokens
        self.logits, self.cache = self.model.run_with_cache(self.tokens, names_filter="*")
        self.attention = gl.implicit_attention(self.cache, layer=0)
        width = self.model.cfg.d_model
        self.dictionary = gl.dictionaries.Dictionary(torch.ones(width, 4), torch.ones(4, width), point="hook_embed")
        self.atom = gl.dictionaries.WriteAtom.of(self.cache, layer=0, pos=1)
        self.graph = gl.feature_graph.attribute(self.model, self.tokens[:1], progress=False)
        self.probe = gl.probes.fit(self.cache, self.tokens, "hook_embed", None, "ridge", held_out=0.5)

    def under(self, intervention: Any) -> Any:
        return self.model.run_with_hooks(self.tokens, fwd_hooks=intervention.hooks(self.model))

    def grafted(self, **option: Any) -> Any:
        with gl.comparing.graft(self.model, **option).on(self.model):
            return self.model(self.tokens)

    def top(self, model: Any) -> gl.Result:
        return gl.lens.logit_lens(model, self.cache).top()


def options(names: str, call: Callable[..., Any]) -> dict[str, Callable[[Given, Any], Any]]:
    """For each name, the call with that option alone."""
    return {name: lambda g, wrong, name=name: call(g, **{name: wrong}) for name in names.split()}


CALLS: dict[str, dict[str, Callable[[Given, Any], Any]]] = {
    "model": options(
        "return_type loss_per_token prepend_bos padding_side start_at_layer stop_at_layer attention_mask state return_state"
        " tokens position_ids",
        lambda g, **option: g.model(g.tokens, **option),
    ),
    "input": {"model": lambda g, x: g.model(x), "lens": lambda g, x: gl.lens.logit_lens(g.model, x)},
    "run_with_cache": options(
        "names_filter device remove_batch_dim incl_bwd pos_slice max_bytes",
        lambda g, **option: g.model.run_with_cache(g.tokens, **option),
    ),
    "run_with_hooks": options("fwd_hooks bwd_hooks", lambda g, **option: g.model.run_with_hooks(g.tokens, **option)),
    "add_hook": {
        "name": lambda g, x: g.model.add_hook(x, lambda a, hook: a),
        "hook": lambda g, x: g.model.add_hook("hook_embed", x),
        "dir": lambda g, x: g.model.add_hook("hook_embed", lambda a, hook: a, dir=x),
    },
    "generate": options(
        "temperature top_k top_p seed stop_at_eos do_sample eos_token_id",
        lambda g, **option: g.model.generate(g.tokens[:1], max_new_tokens=1, verbose=False, **option),
    ),
    "new tokens": {
        "number": lambda g, x: g.model.generate(g.tokens[:1], max_new_tokens=0 if x == 99 else x, verbose=False)
    },
    "hook_table": options("layer", lambda g, **option: g.model.hook_table(**option)),
    "implicit_attention": options("layer", lambda g, **option: gl.implicit_attention(g.model, g.tokens, **option)),
    "views": {
        name: lambda g, x, name=name: getattr(g.attention, name)(x)
        for name in ("row", "column", "dense", "weighted", "grouped", "without", "only", "paper", "__matmul__")
    },
    "cache": {"key": lambda g, x: g.cache[x], "layer": lambda g, x: g.cache["dt", x]},
    "ablation": {
        "points": lambda g, x: g.under(gl.ablation.zero(x)),
        "scale": lambda g, x: g.under(gl.ablation.scale(x, 2.0)),
        "pos": lambda g, x: g.under(gl.ablation.zero("blocks.0.mixer.hook_x", pos=x)),
        "layers": lambda g, x: g.under(gl.ablation.open_gate(layers=x)),
    },
    "knockout": {
        "src": lambda g, x: g.under(gl.knockout.cut(x, -1)),
        "layers": lambda g, x: g.under(gl.knockout.cut(0, -1, layers=x)),
    },
    "optimise": options(
        "metric start layers parts lr seed checkpoint",
        lambda g, **option: gl.states.optimise(
            g.model, g.tokens, **{"metric": METRIC, "steps": 1, "progress": False, **option}
        ),
    ),
    "comparing": {
        **options("layers parts share", lambda g, **option: g.grafted(**option)),
        "other": lambda g, x: gl.comparing.graft(x).on(g.model).__enter__(),
        "align": lambda g, x: gl.comparing.side_by_side(g.top, {"a": g.model, "b": g.model}, align=x),
        "analysis": lambda g, x: gl.comparing.side_by_side(x, {"a": g.model, "b": g.model}),
        "models": lambda g, x: gl.comparing.side_by_side(g.top, x),
        "sweep metric": lambda g, x: gl.comparing.graft_sweep(g.model, g.model, g.tokens, x, progress=False),
        "of": lambda g, x: gl.comparing.difference(
            gl.comparing.side_by_side(g.top, {"a": g.model, "b": g.model}), x, "a"
        ),
    },
    "states": {"pos": lambda g, x: g.under(gl.states.patch(g.cache, pos=x))},
    "sweep": {
        "points": lambda g, x: gl.patching.sweep(g.model, g.tokens, g.cache, METRIC, x, progress=False),
        "metric": lambda g, x: gl.patching.sweep(
            g.model, g.tokens, g.cache, x, "blocks.0.hook_resid_pre", progress=False
        ),
        "axes": lambda g, x: gl.patching.sweep(
            g.model, g.tokens, g.cache, METRIC, "blocks.0.hook_resid_pre", x, progress=False
        ),
        "clean": lambda g, x: gl.patching.sweep(
            g.model, g.tokens, x, METRIC, "blocks.0.hook_resid_pre", progress=False
        ),
    },
    "dictionaries": {
        **options(
            "activation normalise axes index centred point out_point",
            lambda g, **option: gl.dictionaries.Dictionary(
                torch.ones(3, 4), torch.ones(4, 3), **{"point": "hook_embed", **option}
            ),
        ),
        "k": lambda g, x: gl.dictionaries.TopK(x),
        "load": lambda g, x: gl.dictionaries.load(x) if not isinstance(x, str) else None,
        "splice": lambda g, x: gl.dictionaries.splice(g.model, x).__enter__(),
    },
    "dictionary": {
        **options(
            "n_features activation out_point steps batch_size lr l1 aux dead_after skip seed",
            lambda g, **option: gl.dictionaries.train(
                torch.randn(8, 3), "hook_embed", **{"n_features": 4, "steps": 1, "progress": False, **option}
            ),
        ),
        **options(
            "metric batch_size", lambda g, **option: gl.dictionaries.measure(g.model, g.dictionary, g.tokens, **option)
        ),
        **options(
            "features n around",
            lambda g, **option: gl.dictionaries.examples(g.model, g.dictionary, g.tokens, **option),
        ),
        "at": lambda g, x: g.dictionary.at(point=x),
        "page": lambda g, x: gl.dictionaries.examples(g.model, g.dictionary, g.tokens, [0]).page(x),
    },
    "write atom": {
        **options(
            "layer pos head row",
            lambda g, **option: gl.dictionaries.WriteAtom.of(g.cache, **{"layer": 0, "pos": 1, **option}),
        ),
        **options("pos at amount", lambda g, **option: g.atom.scan(g.cache, **{"pos": 1, **option})),
        "removed": lambda g, x: g.under(g.atom.removed(x)),
        "substituted": lambda g, x: g.atom.substituted(x),
    },
    "steering": {
        "pos": lambda g, x: gl.steering.vector(g.model, g.tokens, g.tokens, "blocks.0.hook_resid_post", pos=x),
        "name": lambda g, x: gl.steering.vector(g.model, g.tokens, g.tokens, x),
    },
    "feature graph": {
        **options(
            "dictionaries logits pos mixers max_nodes batch_size attention_mask position_ids",
            lambda g, **option: gl.feature_graph.attribute(g.model, g.tokens[:1], **option, progress=False),
        ),
        "input": lambda g, x: gl.feature_graph.attribute(g.model, x, progress=False),
        **{name: lambda g, x, name=name: getattr(g.graph, name)(x) for name in OF_A_GRAPH},
        "clamped": lambda g, x: g.graph.predict({g.graph.of("token")[0]: x}),
        "through": lambda g, x: g.graph.predict({g.graph.of("token")[0]: 0.0}, through=x),
        "load": lambda g, x: gl.feature_graph.FeatureGraph.load(x),
    },
    "subspaces": {
        **options(
            "rank pos source_pos axes epochs batch_size lr seed checkpoint read head",
            lambda g, **option: (
                gl.subspaces.das(
                    g.model, g.tokens, g.tokens, [1, 2], "hook_embed", **{"epochs": 0, "progress": False, **option}
                )
                if option.get("epochs") != 99
                else None
            ),
        ),
        "name": lambda g, x: gl.subspaces.random(g.model, x),
        "answers": lambda g, x: gl.subspaces.das(
            g.model, g.tokens, g.tokens, x, "hook_embed", epochs=0, progress=False
        ),
        "labels": lambda g, x: gl.subspaces.lda(g.model, g.tokens, x, "hook_embed"),
        "directions": lambda g, x: gl.subspaces.spanned(g.model, "hook_embed", x),
        "interchange": lambda g, x: g.under(
            gl.subspaces.random(g.model, "hook_embed").interchange(g.model, g.tokens, x)
        ),
        "ablate": lambda g, x: g.under(gl.subspaces.random(g.model, "hook_embed").ablate(x)),
        "scored": lambda g, x: gl.subspaces.score(g.model, x, g.tokens, g.tokens, [1, 2], progress=False),
    },
    "subspaces' sweep": options(
        "names pos rank fit axes controls untrained held_out read epochs folder",
        lambda g, **option: gl.subspaces.sweep(
            g.model, g.tokens, g.tokens, [1, 2], **{"names": "hook_embed", "fit": "pca", "progress": False, **option}
        ),
    ),
    "probes": {
        **options(
            "name pos kind axes penalty held_out seed channel",
            lambda g, **option: gl.probes.fit(
                g.cache, g.tokens, **{"name": "hook_embed", "pos": None, "held_out": 0.5, **option}
            ),
        ),
        "labels": lambda g, x: gl.probes.fit(g.cache, x, "hook_embed", None),
        "source": lambda g, x: gl.probes.fit(x, g.tokens, "hook_embed"),
        "names": lambda g, x: gl.probes.sweep(g.cache, g.tokens, x, None, "ridge", held_out=0.5, progress=False),
        "by": lambda g, x: gl.probes.sweep(
            g.cache, g.tokens, "hook_embed", None, "ridge", x, held_out=0.5, progress=False
        ),
        "ablate": lambda g, x: g.under(g.probe.ablate(x)),
        "of": lambda g, x: g.under(g.probe.ablate(labels=g.tokens, of=x)),
        "along": lambda g, x: g.under(g.probe.ablate(along=x)),
        "to": lambda g, x: g.under(g.probe.ablate(to=x)),
        "mean": lambda g, x: g.under(g.probe.remove_mean(x)),
        "matched": lambda g, x: gl.probes.matched_rows(x, 1),
        "predict": lambda g, x: g.probe.predict(x),
        "test": lambda g, x: g.probe.test(x, g.tokens),
    },
    "analyses": {
        "logit_attribution": lambda g, x: gl.lens.logit_attribution(g.model, g.tokens, x),
        **options(
            "layers skip_first skip_last dim_batch checkpoint",
            lambda g, **option: gl.lens.jacobian_lens(
                g.model, g.tokens[:1], progress=False, **{"skip_first": 18, "dim_batch": 64, **option}
            ),
        ),
        **options(
            "steps lr seed",
            lambda g, **option: gl.lens.tuned_lens(
                g.model, g.tokens, progress=False, **{"steps": 1, **{k: 1 if v == 99 else v for k, v in option.items()}}
            ),
        ),
        **{
            f"state lens {name}": call
            for name, call in options(
                "pos layers scan channel", lambda g, **option: gl.lens.state_lens(g.model, g.tokens, g.tokens, **option)
            ).items()
        },
        "subject": lambda g, x: gl.tracing.causal_trace(
            g.model, g.tokens, METRIC, subject=x, samples=1, positions=[-1], progress=False
        ),
        "eap": lambda g, x: gl.circuits.eap(g.model, g.tokens[:1], g.tokens[1:], x),
        "path_patch": lambda g, x: gl.circuits.path_patch(g.model, g.tokens[:1], g.tokens[1:], METRIC, x, "logits"),
        "lrp": lambda g, x: gl.attribution.lrp(g.model, g.tokens, target=x),
        "raw_attention": lambda g, x: gl.attribution.raw_attention(g.model, g.tokens, layers=x),
        "heatmap": lambda g, x: gl.plot.heatmap(x),
        "metric": lambda g, x: gl.metrics.logit(x)(torch.zeros(2, 3, 30)),
    },
    "a model": {
        name: lambda g, x, call=call: call(x if x is not True else torch.nn.Linear(2, 2), g.tokens)
        for name, call in {
            "logit_lens": gl.lens.logit_lens,
            "jacobian_lens": lambda m, x: gl.lens.jacobian_lens(m, x, progress=False),
            "relevance_lens": lambda m, x: gl.lens.relevance_lens(m, x, progress=False),
            "tuned_lens": lambda m, x: gl.lens.tuned_lens(m, x, steps=1, progress=False),
            "state_lens": lambda m, x: gl.lens.state_lens(m, x, x),
            "logit_attribution": lambda m, x: gl.lens.logit_attribution(m, x, 1),
            "token_attribution": lambda m, x: gl.lens.token_attribution(m, x, 1),
            "implicit_attention": gl.implicit_attention,
            "lrp": gl.attribution.lrp,
            "rollout": gl.attribution.rollout,
            "knockout": lambda m, x: gl.knockout.sweep(m, x, METRIC, progress=False),
            "causal_trace": lambda m, x: gl.tracing.causal_trace(m, x, METRIC, subject=[1], progress=False),
            "patching": lambda m, x: gl.patching.get_act_patch_resid_pre(m, x, {}, METRIC, progress=False),
            "block_every": lambda m, x: gl.patching.get_act_patch_block_every(m, x, {}, METRIC, progress=False),
            "eap": lambda m, x: gl.circuits.eap(m, x, x, METRIC),
            "path_patch": lambda m, x: gl.circuits.path_patch(m, x, x, METRIC, "embed", "logits"),
            "attribution_patch": lambda m, x: gl.circuits.attribution_patch(m, x, x, METRIC, "hook_embed"),
            "vector": lambda m, x: gl.steering.vector(m, x, x, "hook_embed"),
            "das": lambda m, x: gl.subspaces.das(m, x, x, [1, 2], "hook_embed", epochs=0, progress=False),
            "pca": lambda m, x: gl.subspaces.pca(m, x, "hook_embed"),
            "untrained": lambda m, x: gl.probes.untrained(m),
            "slowest": lambda m, x: gl.ablation.slowest(m, 0.5, [x], progress=False),
            "means": lambda m, x: gl.ablation.means(m, [x], "hook_embed", progress=False),
            "splice": lambda m, x: gl.states.splice(m, x, x),
            "perturbation": lambda m, x: gl.evaluation.perturbation(m, x, torch.zeros(2, 3)),
            "evaluate": lambda m, x: gl.evaluation.evaluate(m, "recall", ["lrp"], limit=1, progress=False),
            "harvest": lambda m, x: gl.store.estimate(m, x, "hook_embed"),
            "feature_graph": lambda m, x: gl.feature_graph.attribute(m, x[:1], progress=False),
        }.items()
    },
    "loading": {
        "from_pretrained": lambda g, x: gl.from_pretrained(x) if x != "x" else None,  # a name would ask the hub
        "wrap": lambda g, x: gl.wrap(x),
    },
}


def unnamed(given: Given, option: str, call: Callable[[Given, Any], Any], wrong: Any) -> str:
    """What is wrong with the error, if there is one; empty if it is one of ours, or there is none."""
    try:
        call(given, wrong)
    except gl.GatedlensError as error:
        return "" if str(error) else f"{option}={wrong!r:.30}: {type(error).__name__} without a word"
    except Exception as error:
        return f"{option}={wrong!r:.30}: {type(error).__name__}: {error!s:.90}"
    finally:
        given.model.reset_hooks()
    return ""


def main() -> int:
    """Print what is not named, and return how many there are."""
    warnings.simplefilter("ignore")
    given = Given()
    before = {name: p.detach().clone() for name, p in given.model.wrapped.named_parameters()}
    tried = [
        unnamed(given, f"{kind}: {option}", call, wrong)
        for kind, calls in CALLS.items()
        for option, call in calls.items()
        for wrong in WRONG
    ]
    found = [line for line in tried if line]
    left = [name for name, p in given.model.wrapped.named_parameters() if not torch.equal(before[name], p)]
    found += [f"{name} was changed" for name in left] + [f"{hook} was left" for hook in given.model.list_hooks()]
    print("\n".join([*found, f"{len(tried)} tried, {len(found)} wrong"]))
    return len(found)


if __name__ == "__main__":
    # A name of a file may be taken at its word: none is written where the command was called.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        wrong = main()
        os.chdir("/")
    raise SystemExit(wrong)
