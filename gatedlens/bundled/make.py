"""Train the bundled models: `python -m gatedlens.bundled.make mamba-recall` (or `all`); `mamba2-recall-sae`: a dictionary of one.

Each recipe says which model, which task, how long; the folder it writes is in transformers' hub layout (config.json,
model.safetensors, tokenizer.json) with `training.json` beside it: recipe, seed, final metric, seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gatedlens.data import digits, text
from gatedlens.dictionaries import Dictionary, TopK, measure
from gatedlens.dictionaries import train as train_dictionary
from gatedlens.loading import BUNDLED, from_pretrained, wrap
from gatedlens.metrics import cross_entropy
from gatedlens.model.base import HookedModel
from gatedlens.tasks import VOCABULARY, Recall, recall, rewritten_recall

BOS_BYTE = 256


@dataclass(frozen=True)
class Recipe:
    """What to train: `model` builds the wrapped model, `task` names the data, the rest is the optimiser's."""

    name: str
    model: Callable[[int], nn.Module]
    task: str
    steps: int
    batch: int = 64
    lr: float = 4e-3
    context: int = 128
    weight_decay: float = 0.01
    seed: int = 0


def mamba(d_model: int, n_layers: int, d_state: int = 16) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> nn.Module:
        from transformers import MambaConfig, MambaForCausalLM

        special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
        sizes = {"hidden_size": d_model, "num_hidden_layers": n_layers, "state_size": d_state}
        return MambaForCausalLM(MambaConfig(vocab_size=vocabulary, **sizes, **special))

    return build


def griffin(d_model: int, mlp: int) -> Callable[[int], nn.Module]:
    """Two recurrent layers and one of local attention."""

    def build(vocabulary: int) -> nn.Module:
        from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

        special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
        sizes = {"hidden_size": d_model, "lru_width": d_model, "intermediate_size": mlp, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_window_size": 64}
        config = RecurrentGemmaConfig(vocab_size=vocabulary, w_init_variance_scale=1.0, **sizes, **heads, **special)
        return RecurrentGemmaForCausalLM(config)

    return build


def mamba2(d_model: int, n_layers: int, heads: int, d_state: int = 16) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> nn.Module:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
        sizes = {"hidden_size": d_model, "num_hidden_layers": n_layers, "state_size": d_state, "n_groups": 1}
        shape = {"num_heads": heads, "head_dim": 2 * d_model // heads, "tie_word_embeddings": True}
        return Mamba2ForCausalLM(Mamba2Config(vocab_size=vocabulary, **sizes, **shape, **special))

    return build


def gated_delta(d_model: int, layers: str, mlp: int, heads: int = 2) -> Callable[[int], nn.Module]:
    """Qwen3-Next without experts; `layers`: d for a delta net, a for attention."""

    def build(vocabulary: int) -> nn.Module:
        from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

        special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
        kinds = [{"d": "linear_attention", "a": "full_attention"}[one] for one in layers]
        width = d_model // heads
        delta = {
            "linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": width // 2,
            "linear_value_head_dim": width,
        }  # fmt: skip
        attention = {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": width}
        sizes = {"hidden_size": d_model, "num_hidden_layers": len(layers), "intermediate_size": mlp}
        dense = {"mlp_only_layers": list(range(len(layers))), "layer_types": kinds, "tie_word_embeddings": True}
        config = Qwen3NextConfig(vocab_size=vocabulary, **sizes, **delta, **attention, **dense, **special)
        return Qwen3NextForCausalLM(config)

    return build


def rwkv(d_model: int, n_layers: int, mlp: int) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> nn.Module:
        from transformers import RwkvConfig, RwkvForCausalLM

        sizes = {"hidden_size": d_model, "num_hidden_layers": n_layers, "intermediate_size": mlp}
        return RwkvForCausalLM(RwkvConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))

    return build


def rwkv7(d_model: int, n_layers: int, mlp: int, head: int = 16, rank: int = 8) -> Callable[[int], nn.Module]:
    """Heads of `head` numbers; their decays start spread out, from 0.55 to 0.998 a step."""

    def build(vocabulary: int) -> nn.Module:
        from gatedlens.formats.rwkv7_fla import RANKS, Rwkv7Weights

        sizes = {"hidden_size": d_model, "num_hidden_layers": n_layers, "head_dim": head, "intermediate_size": mlp}
        config = {"vocab_size": vocabulary, **sizes, **dict.fromkeys(RANKS.values(), rank), "group_norm_eps": 64e-5}
        model, spread = Rwkv7Weights(config), torch.linspace(-6, 4, head).repeat(d_model // head)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("w_lora.lora.2.bias"):
                    p.copy_(spread)
        return model

    return build


def vim(classes: int) -> nn.Module:
    """Vision Mamba on 8 x 8 pixels: 16 patches of 2 x 2, mean pooling."""
    from gatedlens.formats.vision_mamba import VisionMamba

    image: dict[str, Any] = {"img_size": 8, "patch_size": 2, "stride": 2, "channels": 1}
    return VisionMamba(**image, num_classes=classes, embed_dim=40, depth=3, d_state=4, final_pool_type="mean")


RECIPES = (
    Recipe("mamba-recall", mamba(64, 2), "recall", steps=2500, lr=2.5e-3, weight_decay=0.05),
    Recipe("mamba-moby", mamba(80, 3), "moby", steps=1600, batch=16, context=160, lr=6e-3),
    Recipe("griffin-recall", griffin(64, 192), "recall", steps=1800),
    Recipe("rwkv-recall", rwkv(64, 2, 128), "recall", steps=2500),
    Recipe("mamba2-recall", mamba2(64, 2, 4), "rewritten", steps=2500, lr=2.5e-3, weight_decay=0.05),
    Recipe("gdn-recall", gated_delta(64, "dd", 128), "rewritten", steps=2500),
    Recipe("hybrid-recall", gated_delta(64, "da", 128), "rewritten", steps=2500),
    Recipe("rwkv7-recall", rwkv7(64, 2, 128), "rewritten", steps=1000),
    Recipe("vim-digits", vim, "digits", steps=1500, weight_decay=0.05),
    Recipe("griffin-moby", griffin(80, 240), "moby", steps=1600, batch=16, context=160, lr=5e-3),
    Recipe("rwkv-moby", rwkv(80, 3, 240), "moby", steps=1600, batch=16, context=160, lr=5e-3),
)


@dataclass(frozen=True)
class DictionaryRecipe:
    """A sparse autoencoder of a bundled recall model, trained on what its point holds of so many prompts of both kinds."""

    name: str
    model: str
    point: str
    n_features: int
    k: int
    steps: int
    prompts: int = 4096
    seed: int = 0


DICTIONARIES = (DictionaryRecipe("mamba2-recall-sae", "mamba2-recall", "blocks.1.hook_resid_pre", 128, 8, steps=6000),)


# -- tasks ----------------------------------------------------------------------------------------------------------


def recall_loss(model: HookedModel, recipe: Recipe, step: int, data: Any) -> Tensor:
    """Cross entropy of the answer alone."""
    batch = recall(recipe.batch, seed=1_000_000 * (recipe.seed + 1) + step)
    return nn.functional.cross_entropy(model(batch.tokens)[:, -1], batch.answers)


def rewritten_loss(model: HookedModel, recipe: Recipe, step: int, data: Any) -> Tensor:
    """The same, in every other step of prompts in which the queried key was rewritten."""
    task = rewritten_recall if step % 2 else recall
    batch = task(recipe.batch, seed=1_000_000 * (recipe.seed + 1) + step)
    return nn.functional.cross_entropy(model(batch.tokens)[:, -1], batch.answers)


def moby_loss(model: HookedModel, recipe: Recipe, step: int, data: Any) -> Tensor:
    """Next byte over random windows of the training part, each behind a BOS."""
    train, _ = data
    generator = torch.Generator().manual_seed(1_000_000 * (recipe.seed + 1) + step)
    starts = torch.randint(len(train) - recipe.context, (recipe.batch,), generator=generator)
    windows = torch.stack([train[s : s + recipe.context] for s in starts.tolist()])
    bos = torch.full((recipe.batch, 1), BOS_BYTE)
    return model(torch.cat([bos, windows], dim=1), return_type="loss")


def digits_loss(model: HookedModel, recipe: Recipe, step: int, data: Any) -> Tensor:
    """Cross entropy of the class, the batch shifted by at most one pixel each way."""
    images, labels = data["train"]
    generator = torch.Generator().manual_seed(1_000_000 * (recipe.seed + 1) + step)
    pick = torch.randint(len(labels), (recipe.batch,), generator=generator)
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    shifted = nn.functional.pad(images[pick], (1, 1, 1, 1), value=-1.0)[:, :, down : down + 8, right : right + 8]
    return nn.functional.cross_entropy(model(shifted), labels[pick])


@torch.no_grad()
def digits_metric(model: HookedModel) -> dict[str, float]:
    """Accuracy on the 360 held-out digits."""
    images, labels = digits()["test"]
    return {"accuracy": (model(images).argmax(-1) == labels).float().mean().item()}


@torch.no_grad()
def accuracy(model: HookedModel, batch: Recall) -> float:
    """How often the answer is the largest logit."""
    guesses = torch.cat([model(part)[:, -1].argmax(-1) for part in batch.tokens.split(512)])
    return (guesses == batch.answers).float().mean().item()


def recall_metric(model: HookedModel) -> dict[str, float]:
    """Accuracy on 4,096 fresh prompts."""
    return {"accuracy": accuracy(model, recall(4096, seed=7))}


def rewritten_metric(model: HookedModel) -> dict[str, float]:
    """The same, and on as many in which the queried key was rewritten."""
    return {**recall_metric(model), "rewritten": accuracy(model, rewritten_recall(4096, seed=7))}


@torch.no_grad()
def moby_metric(model: HookedModel) -> dict[str, float]:
    """Bits per byte of the held-out part, in windows of 512 bytes, each behind a BOS."""
    _, held_out = text()
    rows = held_out[: len(held_out) // 512 * 512].reshape(-1, 512)
    losses = [
        model(torch.cat([torch.full((len(part), 1), BOS_BYTE), part], dim=1), return_type="loss").item() * len(part)
        for part in rows.split(8)
    ]
    return {"bits_per_byte": sum(losses) / len(rows) / math.log(2)}


TASKS: dict[str, tuple[Any, Any, Any, int]] = {
    "recall": (recall_loss, recall_metric, lambda: None, len(VOCABULARY)),
    "rewritten": (rewritten_loss, rewritten_metric, lambda: None, len(VOCABULARY)),
    "moby": (moby_loss, moby_metric, text, 257),
    "digits": (digits_loss, digits_metric, digits, 10),
}


# -- tokenizers -----------------------------------------------------------------------------------------------------


def word_tokenizer() -> Any:
    """One id a word of the recall vocabulary, split at spaces; <unk>, which the model cannot read, behind them all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate((*VOCABULARY, "<unk>"))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


def byte_tokenizer() -> Any:
    """One id a byte, id == byte, and <bos> = 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte-level alphabet of GPT-2
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    inner = Tokenizer(models.BPE({letter[byte]: byte for byte in range(256)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", clean_up_tokenization_spaces=False)


TOKENIZERS = {"recall": word_tokenizer, "rewritten": word_tokenizer, "moby": byte_tokenizer}


def save_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write the tokenizer of a recipe's task, if it has one, beside the model."""
    if recipe.task in TOKENIZERS:
        TOKENIZERS[recipe.task]().save_pretrained(folder)


# -- training -------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, out: Path, verbose: bool = True) -> dict[str, Any]:
    """Train one recipe, write its folder, and return what `training.json` says."""
    torch.manual_seed(recipe.seed)
    loss_of, metric_of, load, vocabulary = TASKS[recipe.task]
    data, wrapped = load(), recipe.model(vocabulary)
    model: Any = wrap(wrapped, model_name=recipe.name)
    began = time.time()
    decayed = [p for p in wrapped.parameters() if p.ndim > 1]
    others = [p for p in wrapped.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    model.train()
    for step in (bar := tqdm(range(recipe.steps), desc=recipe.name, disable=not verbose, mininterval=10)):
        loss: Any = loss_of(model, recipe, step, data)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    report = {
        **{k: v for k, v in asdict(recipe).items() if k != "model"},
        "parameters": sum(p.numel() for p in wrapped.parameters()),
        "metric": {k: round(v, 4) for k, v in metric_of(model).items()},
        "seconds": round(time.time() - began),
        "torch": torch.__version__.partition("+")[0],
    }
    folder = out / recipe.name
    save: Any = wrapped.save_pretrained
    save(folder)
    save_tokenizer(recipe, folder)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@torch.no_grad()
def prompts_at(model: HookedModel, point: str, n: int, seed: int) -> Tensor:
    """What a point holds of `n` prompts of recall and `n` of rewritten recall."""
    held = []
    for task in (recall, rewritten_recall):
        parts = task(n, seed=1_000_000 * (seed + 1)).tokens.split(512)
        held += [model.run_with_cache(part, names_filter=point)[1][point] for part in parts]
    return torch.cat(held)


def make_dictionary(recipe: DictionaryRecipe, out: Path, verbose: bool = True) -> dict[str, Any]:
    """Train one dictionary, write it into its model's folder, and return what its header says."""
    model = from_pretrained(f"gatedlens/{recipe.model}", device="cpu")
    x = prompts_at(model, recipe.point, recipe.prompts, recipe.seed)
    options: dict[str, Any] = {"steps": recipe.steps, "seed": recipe.seed, "progress": verbose, "lr": 2e-3}
    facts = {"model": f"gatedlens/{recipe.model}", "torch": torch.__version__.partition("+")[0]}
    found = train_dictionary(x, recipe.point, recipe.n_features, TopK(recipe.k), facts=facts, **options)
    found.facts["measured"] = dictionary_metric(model, found)
    folder = out / recipe.model / "dictionaries"
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / f"{recipe.point}.safetensors")
    return found.facts


def dictionary_metric(model: HookedModel, dictionary: Dictionary, prompts: int = 1024) -> dict[str, float]:
    """What `measure` says of it on fresh prompts, the metric the cross entropy of the answer."""
    batch = recall(prompts, seed=7)
    found = measure(model, dictionary, batch.tokens, cross_entropy(batch.answers), batch_size=256)
    return {name: round(value, 6) for name, value in found.to_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[r.name for r in (*RECIPES, *DICTIONARIES)] + ["all"])
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", action="store_true", help="write the tokenizer alone; the weights stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for recipe in RECIPES:
        if args.name in (recipe.name, "all") and args.tokenizer:
            save_tokenizer(recipe, args.out / recipe.name)
        elif args.name in (recipe.name, "all"):
            print(json.dumps(train(recipe, args.out)))
    for dictionary in DICTIONARIES:
        if args.name in (dictionary.name, "all") and not args.tokenizer:
            print(json.dumps(make_dictionary(dictionary, args.out)))


if __name__ == "__main__":
    main()
