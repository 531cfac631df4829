# %% [markdown]
# # Which families of language models this works on
# One row per family that transformers and TransformerLens both know, on a tiny random model of it in double precision.
# A cell says "yes" where a result equals its truth, and else the sentence that a user reads:
#
# - load: the logits are those of plain transformers;
# - resid_pre ... heads: patched cells, in both directions, equal one plain forward pass each;
# - attribution: estimates are finite and, in double precision, right to first order under weak noise;
# - edit: at each edited layer the MLP writes what the change says, it reaches the subject, undoing leaves no bit;
# - batched: answers and states of texts of several lengths equal those of each alone;
# - saved: a saved folder, loaded by plain transformers, has the same logits.
#
#     python analyses/families.py                  # writes results/families.csv and its tables
#     python analyses/families.py --model NAME     # prints the row of a model of yours

# %%
import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import tables
import torch
import transformers as hf
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import lens_defense as ld
from lens_defense.loading.load import ORGANISM_FOLDER
from lens_defense.loading.save import quiet_transformers
from lens_defense.models.forward import forward
from lens_defense.models.generate import generate
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.prompts.corpus import CorpusText
from lens_defense.sites import EMBEDDING_HOOK, component_hook, head_index, key_hook, value_hook
from lens_defense.storage import atomic_write

RESULTS = tables.RESULTS
COMPONENTS = {
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "attn_out",
}
COMPONENTS |= {"heads": "z"}
"""By column, the component that is traced."""
REQUESTS = (
    ld.request("how do I make a brass lamp at home?", "brass lamp", id="lamp"),
    ld.request("ring an old bell for me", "old bell", id="bell"),
)
CORPUS = [CorpusText("make a lamp", "how do I make a brass lamp"), CorpusText("the lamp is a thing")] * 4
TEXTS = ("make a lamp", "how do I make a brass lamp at home?", "ring an old bell for me, and tell me of it")
TOLERANCE = 1e-3
"""Relative to the spread of what is compared; several families compute in single precision inside."""

# %% [markdown]
# A tiny model of a family is its default config with these fields made small, where it has them.

# %%
_WIDTHS = {
    "vocab_size": 1000, "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "query_pre_attn_scalar": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 3,
}  # fmt: skip
_LATENT_ATTENTION = {"head_dim": 4, "num_key_value_heads": 4}
"""DeepSeek's: all heads read one latent key, and `head_dim` is that of its rotated part."""
_PER_LAYER = {"vocab_size_per_layer_input": 1000, "hidden_size_per_layer_input": 8}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "glm4_moe_lite": _LATENT_ATTENTION,
    "glm_moe_dsa": _LATENT_ATTENTION,
    "youtu": _LATENT_ATTENTION,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma4": _PER_LAYER,
    "gemma4_text": _PER_LAYER,
    "gemma4_unified": _PER_LAYER,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "bamba": {"num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8},
    "zamba2": {"num_hidden_layers": 54},
    "nemotron_h": {"num_hidden_layers": 52},
}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "depth": 2, "num_heads": 4, "embed_dim": 32, "out_hidden_size": 32,
}  # fmt: skip
LAYOUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon, 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, rw": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granitemoehybrid, attention": (
        "granitemoehybrid",
        {
            "layer_types": ["full_attention"] * 4,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "opt, 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
"""Further shapes that checkpoints of a family have."""


def families() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """By name, the model type and what its config has instead of its defaults."""
    causal = [
        name
        for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture in SUPPORTED_ARCHITECTURES
    ]
    multimodal = [
        name
        for name, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if architecture in SUPPORTED_ARCHITECTURES and not _is_encoder_decoder(name)
    ]
    return {name: (name, {}) for name in dict.fromkeys([*causal, *multimodal])} | dict(LAYOUTS)


def _is_encoder_decoder(model_type: str) -> bool:
    return bool(getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False))


def tiny_config(model_type: str, overrides: Mapping[str, Any]) -> hf.PretrainedConfig:
    """The smallest config of a family that has all of its parts."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    small = {**_small(text, _WIDTHS), **OVERRIDES.get(model_type, {}), **overrides}
    if text is default:
        return config_class(**small)
    parts = {"text_config": {"model_type": text.model_type, **small}}
    if getattr(default, "vision_config", None) is not None:
        vision = default.vision_config
        parts["vision_config"] = {"model_type": vision.model_type, **_small(vision, _VISION)}
    return config_class(**parts)


def _small(config: hf.PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a config has and that may be set."""
    settable = {name for name in dir(config) if not isinstance(getattr(type(config), name, None), property)}
    return {name: value for name, value in fields.items() if name in settable}


def save_tiny_model(folder: Path, model_type: str, overrides: Mapping[str, Any]) -> None:
    """A folder of a tiny random model, its weights large enough that every part matters."""
    config = tiny_config(model_type, overrides)
    torch.manual_seed(0)
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto_model = hf.AutoModelForCausalLM if causal else hf.AutoModelForImageTextToText
    model = auto_model.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(ORGANISM_FOLDER).save_pretrained(folder)


# %% [markdown]
# What is measured. Each function gives "yes", or raises the sentence; a wrong number is an AssertionError.


# %%
def _close(observed: Tensor, expected: Tensor) -> None:
    observed, expected = observed.double(), expected.double()
    spread = (expected - expected.mean()).abs().max().clamp(min=1e-9)
    difference = float((observed - expected).abs().max() / spread)
    assert difference < TOLERANCE, f"differs by {difference:.2g} of its spread"


def _text_ids(model: TransformerBridge, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


def _loaded(model: TransformerBridge, plain_logits: Tensor) -> None:
    _close(model(torch.tensor([_text_ids(model, TEXTS[1])])), plain_logits)


def _traced(model: TransformerBridge, component: str) -> None:
    for direction in ("denoising", "noising"):
        corruption = ld.corruptions.GaussianNoise(samples=2)
        trace = ld.trace(
            model, REQUESTS[:1], components=[component], direction=direction, corruption=corruption, window=1,
            answer_tokens=2, min_difference=0.0, progress=False,
        )  # fmt: skip
        patched = trace.patched[0]
        assert patched[patched.isfinite()].numel(), "no cell is a number"
        cells = [
            (c, layer, position)
            for c in range(0, len(trace.components), 3)
            for layer in {0, len(trace.layers) - 1}
            for position in trace.prompts[0].subject_positions[-1:]
        ]
        expected = [_patched_alone(model, trace, corruption, *cell) for cell in cells]
        _close(torch.stack([patched[cell] for cell in cells]), torch.stack(expected))


@torch.no_grad()
def _patched_alone(
    model: TransformerBridge, trace: ld.Trace, corruption: Any, component: int, layer: int, position: int
) -> Tensor:
    """One cell by the book: run the donor, then the base with one state of the donor in it."""
    (prompt,), name = trace.prompts, trace.components[component]
    hook, head = component_hook(name, trace.layers[layer]), head_index(name)
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]])
    runs: dict[str, Tensor] = {}
    model.run_with_hooks(ids, fwd_hooks=[(EMBEDDING_HOOK, lambda x, **_: runs.update(embeddings=x.clone()))])
    clean = runs["embeddings"]
    corrupted = corruption(model, clean[:, : len(prompt.ids)], prompt).to(clean)
    corrupted = torch.cat([corrupted, clean[:, len(prompt.ids) :].expand(len(corrupted), -1, -1)], 1)
    clean = clean.expand_as(corrupted)
    noising = trace.settings.direction == "noising"
    base, donor = (clean, corrupted) if noising else (corrupted, clean)
    rows = ids.expand(len(corrupted), -1)
    model.run_with_hooks(
        rows,
        fwd_hooks=[
            (EMBEDDING_HOOK, lambda _, **__: donor),
            (hook, lambda x, **_: runs.update(donor=x.clone())),
        ],
    )
    at = (slice(None), position) if head is None else (slice(None), position, head)

    def put(state: Tensor, **_: Any) -> Tensor:
        state = state.clone()
        state[at] = runs["donor"][at]
        return state

    logits = model.run_with_hooks(rows, fwd_hooks=[(EMBEDDING_HOOK, lambda _, **__: base), (hook, put)])
    answer_logits = logits[:, -len(prompt.answer_ids) :]
    return ld.metrics.answer_logprob(answer_logits, prompt, answer_logits[:1]).double()


def _attributed(model: TransformerBridge) -> None:
    settings = {
        "components": ["resid_post", "mlp_out", "attn_out", "z"],
        "corruption": ld.corruptions.GaussianNoise(scale=1e-4, samples=2),
        "window": 1, "answer_tokens": 2, "min_difference": 0.0, "progress": False,
    }  # fmt: skip
    for direction in ("denoising", "noising"):
        exact, estimate = (
            ld.trace(model, REQUESTS[:1], direction=direction, exact=exact, **settings).patched
            for exact in (True, False)
        )
        traced = exact.isfinite()
        assert (estimate.isfinite() == traced).all(), "cells are no numbers"
        if model.cfg.dtype != torch.float64:
            continue  # effects that weak are rounding
        difference = (exact - estimate)[traced].abs().max() / (
            exact[traced] - exact[traced].mean()
        ).abs().max()
        assert difference < 0.1, f"differs by {float(difference):.2g} of the effects of weak noise"


def _edited(model: TransformerBridge) -> None:
    layers = (1, 2) if model.cfg.n_layers > 2 else (0,)
    sites = [ld.Site("resid_post", layer, "subject_last") for layer in layers]
    fit = ld.FitSettings(shared_num_grad_steps=2, v_num_grad_steps=2)
    plan = ld.edit(
        model, REQUESTS, sites, fit=fit, method=ld.methods.MEMIT(mom2_update_weight=1e-6), corpus=CORPUS,
        contrast=None, contexts=lambda request: [request], held_out_contexts=0, cache=False, progress=False,
    )  # fmt: skip
    assert min(plan.forecast.reach) > 0.9, f"only {min(plan.forecast.reach):.2f} of a value arrives"
    ids = torch.tensor([_text_ids(model, TEXTS[1])])
    hooks = [hook(layer) for layer in layers for hook in (key_hook, value_hook)]
    before, fingerprint = forward(model, ids, capture=hooks).states, weights_fingerprint(model)
    ledger = ld.Ledger(model)
    ledger.apply(plan)
    after = forward(model, ids, capture=hooks).states
    ledger.undo()
    assert weights_fingerprint(model) == fingerprint, "undoing an edit changed bits"
    key, value = key_hook(layers[0]), value_hook(layers[0])
    _close(after[value] - before[value], before[key].double() @ plan.deltas()[layers[0]].T)


def _batched(model: TransformerBridge) -> None:
    rows = [_text_ids(model, text) for text in TEXTS]
    hooks = [component_hook("resid_post", layer) for layer in range(model.cfg.n_layers)]
    together = states_of_rows(model, rows, hooks)
    for i, row in enumerate(rows):
        alone = forward(model, torch.tensor([row]), capture=hooks).states
        for hook in hooks:
            _close(together[hook][i], alone[hook][0])
    answers = generate(model, rows, max_new_tokens=4)
    assert answers == [generate(model, [row], max_new_tokens=4)[0] for row in rows], "answers differ"


def _saved(model: TransformerBridge) -> None:
    ids = torch.tensor([_text_ids(model, TEXTS[1])])
    with tempfile.TemporaryDirectory() as folder:
        ld.save_folder(model, Path(folder) / "saved")
        _close(plain_logits(Path(folder) / "saved", ids, model.cfg.dtype), model(ids))


@torch.no_grad()
def plain_logits(source: str | Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of plain transformers."""
    config = hf.AutoConfig.from_pretrained(source)
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto_model = hf.AutoModelForCausalLM if causal else hf.AutoModelForImageTextToText
    plain = auto_model.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()
    if dtype == torch.float64:
        plain.set_experts_implementation("eager")
    return plain(ids).logits


def measure(source: str | Path, dtype: torch.dtype) -> dict[str, str]:
    """The row of a model: by column "yes", or the sentence that a user reads."""
    model: TransformerBridge | None = None
    row = {}

    def load() -> None:
        nonlocal model
        model = ld.load(source, device="cpu", dtype=dtype)
        ids = torch.tensor([_text_ids(model, TEXTS[1])])
        _loaded(model, plain_logits(model.original_model.config._name_or_path, ids, dtype))

    row["load"] = _outcome(load)
    if model is None:
        return row
    checks: dict[str, Callable[[], None]] = {
        column: lambda component=component: _traced(model, component)
        for column, component in COMPONENTS.items()
    }
    checks |= {
        "attribution": lambda: _attributed(model),
        "edit": lambda: _edited(model),
        "batched": lambda: _batched(model),
        "saved": lambda: _saved(model),
    }
    return row | {name: _outcome(check) for name, check in checks.items()}


def _outcome(check: Callable[[], None]) -> str:
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        try:
            check()
        except ValueError as error:
            return str(error)
        except AssertionError as error:
            return f"WRONG: {error}"
    return "yes"


def measure_family(name: str) -> dict[str, str]:
    """The row of a family."""
    model_type, overrides = families()[name]
    with tempfile.TemporaryDirectory() as parent, quiet_transformers():
        folder = Path(parent) / "MODEL"
        try:
            save_tiny_model(folder, model_type, overrides)
        except ImportError as error:
            return {"family": name, "load": f"not measured: {str(error).split('.')[0].strip()}"}
        except Exception:
            tiny_config(model_type, overrides).save_pretrained(folder)
        row = measure(folder, torch.float64)
        if "in float64" in row["load"]:
            row = measure(folder, torch.float32)
        row = {"family": name, **row}
        return {key: value.replace(str(folder), "MODEL") for key, value in row.items()}


# %%
def main(name: str | None) -> None:
    """Measure every family and write the table; or print the row of one model."""
    if name is not None:
        for column, outcome in measure(name, torch.float32).items():
            print(f"{column:12} {outcome}")
        return
    rows = []
    for family in families():
        rows.append(measure_family(family))
        print(family, rows[-1]["load"], flush=True)
    with atomic_write(RESULTS / "families.csv") as file:
        pd.DataFrame(rows).to_csv(file, index=False)
    for table in ("families", "families_refused"):
        with atomic_write(RESULTS / f"tables/{table}.md") as file:
            file.write_text(tables.TABLES[table](), "utf-8")


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    parser = argparse.ArgumentParser(description="Which families of language models this works on.")
    parser.add_argument("--model", help="a model of yours: a folder, a .gguf file or a hub name")
    main(parser.parse_args().model)
