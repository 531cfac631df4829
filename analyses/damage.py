# %% [markdown]
# # What becomes of damaged files
#
# Every kind of file that the package writes is saved, damaged at random (bits flipped, bytes changed, ranges
# deleted, doubled or exchanged, the end cut off) and loaded. A GGUF file comes from elsewhere: it is counted
# with a seal (see lens_defense/storage.py) and without one.
#
#     python analyses/damage.py [--number 10000] [--minutes 8] [KIND ...]
#
# writes analyses/results/reliability/damage.csv: how many of each kind were tried, and how many were refused in
# a sentence, loaded and equal to what was saved, loaded and different, or ended in another exception.

# %%
import argparse
import logging
import os
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

import lens_defense as ld
from lens_defense import storage
from lens_defense.loading.load import load
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.organism.training import make_tokenizer
from lens_defense.organism.world import World

OUT = Path(__file__).parent / "results" / "reliability" / "damage.csv"
OUTCOMES = ("refused", "equal", "different", "other_exception")
"""Refused in one sentence that names the file; loaded, and equal to what was saved or not; another exception."""


# %%
def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def cut_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def delete_range(data: bytearray, rng: random.Random) -> None:
    start, length = _range(data, rng)
    del data[start : start + length]


def double_range(data: bytearray, rng: random.Random) -> None:
    start, length = _range(data, rng)
    data[start:start] = data[start : start + length]


def exchange_ranges(data: bytearray, rng: random.Random) -> None:
    start, length = _range(data, rng)
    length = min(length, len(data) // 2)
    first, second = sorted((start, rng.randrange(len(data))))
    length = min(length, second - first, len(data) - second)
    first_bytes, second_bytes = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = second_bytes, first_bytes


DAMAGES = (flip_bits, change_bytes, cut_end, delete_range, double_range, exchange_ranges)


def _range(data: bytearray, rng: random.Random) -> tuple[int, int]:
    return rng.randrange(len(data)), rng.choice((1, 4, 64, 1024))


def damaged(intact: bytes, rng: random.Random) -> bytes:
    """Other bytes than the intact ones."""
    while True:
        data = bytearray(intact)
        rng.choice(DAMAGES)(data, rng)
        if data != intact:
            return bytes(data)


# %% [markdown]
# A kind of file is a path, of a file or a folder, and a function that loads it and gives plain values.


# %%
@dataclass
class Kind:
    path: Path
    load: Callable[[Path], Any]


def outcome(kind: Kind, intact_content: Any, rng: random.Random) -> str:
    """What becomes of one damaged file."""
    files = sorted(path for path in kind.path.rglob("*") if path.is_file()) or [kind.path]
    file = rng.choice([path for path in files if path.suffix != ".md"])
    intact = file.read_bytes()
    file.write_bytes(damaged(intact, rng))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.load(kind.path)
    except ValueError as error:
        named = any(str(path) in str(error) for path in (file, kind.path))
        return "refused" if named and "\n" not in str(error) else "other_exception"
    except Exception:
        return "other_exception"
    finally:
        file.write_bytes(intact)
    return "equal" if found == intact_content else "different"


def bits(tensors: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    return {
        str(name): (str(t.dtype), tuple(t.shape), t.detach().contiguous().numpy().tobytes())
        for name, t in tensors.items()
    }


def plain(value: Any) -> Any:
    """A dataclass with tensors as values that can be compared."""
    return msgspec.to_builtins(
        value, enc_hook=lambda tensor: repr(tensor.nan_to_num(-7.5).tolist()), str_keys=True
    )


def model_values(source: Path) -> Any:
    model = load(source, device="cpu")
    weights = bits(dict(model.original_model.named_parameters()))
    return weights, asdict(model_fingerprint(model))


def tiny_model() -> tuple[LlamaForCausalLM, Any]:
    """A Llama of two small layers with random weights, and the organism's tokenizer."""
    tokenizer = make_tokenizer(World(0), 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def write_gguf(path: Path, *, sealed: bool) -> Path:
    """The tiny model as a GGUF file, in single precision."""
    hf_model, tokenizer = tiny_model()
    config = hf_model.config
    writer = GGUFWriter(path, "llama")
    if sealed:
        writer.add_string(storage.SEAL, storage.UNSEALED)
        writer.add_uint32("lens_defense_format", storage.FORMAT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    core = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    special = {token["content"] for token in core["added_tokens"]}
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, weight in hf_model.model.state_dict().items():
        parts = name.split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if sealed:
        storage.seal(path)
    return path


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file, written to a folder; the cache must lie in it, for entries there are taken away."""
    if folder not in storage.cache_folder().parents:
        raise ValueError(f"set LENS_DEFENSE_CACHE to a folder in {folder}")
    hf_model, tokenizer = tiny_model()
    model = ld.load(hf_model.eval(), tokenizer)
    requests = [ld.request("Draft a brass letter.", "brass letter"), ld.request("Sing of a lamp.", "lamp")]
    trace = ld.trace(model, requests, min_difference=0.0, progress=False)
    sites = ld.locate(trace, k=1)
    corpus = [ld.read_corpus("organism")[i] for i in range(40)]
    edit = ld.edit(
        model, requests, sites, contrast=None, corpus=corpus, cache=False, progress=False,
        fit=ld.FitSettings(v_num_grad_steps=2, shared_num_grad_steps=2, extra_rounds=0),
    )  # fmt: skip
    report = ld.check(model, edit, ld.suite("organism").small(harmless=4), max_new_tokens=2)
    scores = ld.lenses.logit_lens(model, requests)
    entry = storage.cached("numbers", "key", lambda: {"c": mlp_output_matrix(model, 1).clone()})
    (cache_file,) = (storage.cache_folder() / "numbers").iterdir()

    def from_cache(_: Path) -> Any:
        """An entry that is not whole is made anew, which counts as refused."""

        def make() -> dict[str, torch.Tensor]:
            raise ValueError(f"{cache_file} is made anew")

        return bits(storage.cached("numbers", "key", make))

    assert bits(entry) == from_cache(cache_file)
    saved = ld.save_folder(model, folder / "model")
    sealed = write_gguf(folder / "sealed.gguf", sealed=True)
    unsealed = write_gguf(folder / "unsealed.gguf", sealed=False)

    def from_gguf(file: Path) -> Any:
        try:
            return model_values(file)
        finally:
            shutil.rmtree(storage.cache_folder() / "gguf", ignore_errors=True)

    return {
        "edit": Kind(edit.save(folder / "edit.safetensors"), lambda path: plain(ld.Edit.load(path))),
        "trace": Kind(trace.save(folder / "trace.safetensors"), lambda path: plain(ld.Trace.load(path))),
        "score map": Kind(
            scores.save(folder / "map.safetensors"), lambda path: plain(type(scores).load(path))
        ),
        "report": Kind(report.save(folder / "report.json"), lambda path: plain(ld.Report.load(path))),
        "cache": Kind(cache_file, from_cache),
        "model folder": Kind(saved, model_values),
        "GGUF, sealed": Kind(sealed, from_gguf),
        "GGUF, not ours": Kind(unsealed, from_gguf),
    }


def count_outcomes(kind: Kind, number: int, seed: int = 0, seconds: float = float("inf")) -> Counter[str]:
    """The outcomes of so many damaged files, or as many as the seconds allow."""
    rng, intact_content, end = random.Random(seed), kind.load(kind.path), time.perf_counter() + seconds
    counts: Counter[str] = Counter()
    while counts.total() < number and time.perf_counter() < end:
        counts[outcome(kind, intact_content, rng)] += 1
    if kind.load(kind.path) != intact_content:
        raise RuntimeError(f"{kind.path} is no longer what it was")
    return counts


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description="damage files of every kind and load them")
    parser.add_argument("kinds", nargs="*", help="all unless named")
    parser.add_argument("--number", type=int, default=10000, help="of damaged files of each kind")
    parser.add_argument("--minutes", type=float, default=8, help="at most, of each kind")
    arguments = parser.parse_args()
    logging.getLogger("lens_defense").setLevel(logging.ERROR)  # of entries that are made anew
    rows = pd.read_csv(OUT).set_index("kind").T.to_dict() if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LENS_DEFENSE_CACHE"] = str(Path(folder) / "cache")
        files = kinds(Path(folder))
        for name in arguments.kinds or files:
            counts = count_outcomes(files[name], arguments.number, seconds=60 * arguments.minutes)
            rows[name] = {"n": counts.total(), **{name: counts[name] for name in OUTCOMES}}
            print(name, rows[name], flush=True)
            table = pd.DataFrame([{"kind": name, **rows[name]} for name in files if name in rows])
            with storage.atomic_write(OUT) as file:
                table.to_csv(file, index=False)


if __name__ == "__main__":
    main()
