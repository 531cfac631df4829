# %% [markdown]
# # How fast an exact map is
# The same map (residual stream before every block at every token, subject tokens replaced, log probability of the
# next token) made three ways in one process: by the sweep; by the loop of ROME's experiments/causal_trace.py, in our
# own writing (a batch of the clean and all corrupted rows, one forward a cell, logits everywhere); by
# TransformerLens's activation patching. The loops' time is that of some cells, evenly spread, times the number of
# cells over theirs, since every cell costs a loop the same; the cells that are timed must agree with the sweep's.
# Beside each time stands its floor: operations counted from the shapes over a measured matrix-product rate. On an
# accelerator a model of seven billion weights in half precision is timed too.
#
#     python analyses/tracing_speed.py [--out FILE] [--more] [--device cuda]

# %%
import argparse
import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers as hf
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import lens_defense as ld
from lens_defense.models.forward import forward
from lens_defense.sites import block_input_hook
from lens_defense.storage import atomic_write
from lens_defense.tracing.activation_patching import (
    PatchCell,
    PatchPoint,
    base_hooks,
    block_passes,
    donor_hooks,
    sweep,
)

OUT = Path(__file__).parent / "results" / "tracing_speed"
LENGTHS, SAMPLES, DEPTHS = (10, 20, 40, 60), (1, 10), (6, 12, 24)
SUBJECT = slice(2, 5)
"""The tokens that are replaced."""
TIMED = 8
"""Cells that a loop is timed on, evenly spread over the map."""
MOST_ROWS = {"cpu": 512, "cuda": 2048}
"""Of a pass, by the device's kind."""
LLAMA = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape, but for its depth."""
SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
"""Llama-2-7B's shape."""


# %%
def random_model(
    config: Any, name: str, device: str, dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """A model of a shape, with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        body = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    return build_bridge_from_module(
        body, type(body).__name__, hf_config=body.config, tokenizer=None, model_name=name
    )


def llama(layers: int, device: str) -> TransformerBridge:
    """A Llama-shaped random model of some depth."""
    return random_model(hf.LlamaConfig(**LLAMA, num_hidden_layers=layers), f"llama-shaped {layers}", device)


def cases(device: str) -> Iterator[tuple[str, TransformerBridge, int, int]]:
    """Name, model, tokens, samples."""
    for name, make in (
        ("gpt2 small", lambda: random_model(hf.GPT2Config(), "gpt2", device)),
        ("llama-shaped, 12 layers", lambda: llama(12, device)),
        ("organism", lambda: ld.load("organism", device=device)),
    ):
        model = make()
        for samples in SAMPLES:
            for length in LENGTHS:
                yield name, model, length, samples
    for layers in DEPTHS:
        if layers != 12:
            yield f"llama-shaped, {layers} layers", llama(layers, device), 20, 1
    if device != "cpu":
        half = random_model(hf.LlamaConfig(**SEVEN_BILLION), "llama 7B", device, torch.bfloat16)
        for samples in SAMPLES:
            for length in LENGTHS:
                yield "llama-shaped, 7 billion, bfloat16", half, length, samples


# %% [markdown]
# ## Three ways


# %%
class Case:
    """One map to be made."""

    def __init__(self, model: TransformerBridge, length: int, samples: int) -> None:
        self.model, self.length, self.samples = model, length, samples
        self.device = model.embed.weight.device
        generator = torch.Generator().manual_seed(0)
        words = model.cfg.d_vocab
        ids = torch.randint(words, (1, length), generator=generator)
        spoiled = ids.repeat(samples, 1)
        spoiled[:, SUBJECT] = torch.randint(words, spoiled[:, SUBJECT].shape, generator=generator)
        self.ids, self.spoiled = ids.to(self.device), spoiled.to(self.device)
        self.answer = int(torch.randint(words, (), generator=generator))
        self.cells = [
            PatchCell((PatchPoint("resid_pre", layer, t),))
            for layer in range(model.cfg.n_layers)
            for t in range(length)
        ]
        self.timed = list(range(0, len(self.cells), max(1, len(self.cells) // TIMED)))

    def cache(self) -> None:
        """The clean run that TransformerLens's patching takes its states from; it is no part of its time here."""
        _, self.clean = self.model.run_with_cache(self.ids)

    def read(self, logits: Tensor) -> Tensor:
        """Log probability of the answer after the last token."""
        return logits[:, -1].float().log_softmax(-1)[:, self.answer]

    def swept(self) -> Tensor:
        """The sweep, every cell [cell, sample]."""
        base = forward(self.model, self.spoiled, capture=base_hooks(self.cells))
        donor = forward(self.model, self.ids, capture=donor_hooks(self.cells))
        told = sweep(
            self.model, self.ids, base, donor, self.cells, lambda logits: self.read(logits)[:, None],
            keep=1, max_rows=MOST_ROWS[self.device.type],
        )  # fmt: skip
        return told[..., 0]

    def looped(self) -> Tensor:
        """ROME's loop on some cells: rows are the clean prompt and the corrupted ones."""
        rows = torch.cat([self.ids, self.spoiled])
        told = []
        for point in (self.cells[i].points[0] for i in self.timed):

            def restore(state: Tensor, point: PatchPoint = point, **_: Any) -> Tensor:
                state[1:, point.position] = state[:1, point.position]
                return state

            with self.model.hooks(fwd_hooks=[(block_input_hook(point.layer), restore)]):
                told.append(self.read(self.model(rows))[1:])
        return torch.stack(told)

    def patched(self) -> Tensor:
        """TransformerLens's patching of the residual stream before a block, on the same cells."""
        where = [(self.cells[i].points[0].layer, self.cells[i].points[0].position) for i in self.timed]
        return torch.as_tensor(
            patching.generic_activation_patch(
                self.model,
                self.spoiled,
                self.clean,
                lambda logits: self.read(logits).mean(),
                patching.layer_pos_patch_setter,
                "resid_pre",
                index_df=pd.DataFrame(where, columns=pd.Index(["layer", "pos"])),
            )
        )

    # operations
    def operations(self) -> dict[str, float]:
        """Of each way, for the whole map: two a weight and token, and those of attention."""
        cfg, tokens, layers = self.model.cfg, self.length, self.model.cfg.n_layers
        block = sum(p.numel() for p in self.model.blocks[0].parameters())
        a_pass = 2 * block + 4 * tokens * cfg.n_heads * cfg.d_head
        head = 2 * cfg.d_model * cfg.d_vocab
        cells, samples = len(self.cells), self.samples
        ends = (1 + samples) * (tokens * layers * a_pass + head)
        passes = block_passes(self.cells, layers=layers, tokens=tokens, samples=samples)
        return {
            "sweep": passes * a_pass + cells * samples * head + ends,
            "ROME's loop": cells * (1 + samples) * tokens * (layers * a_pass + head),
            "TransformerLens": cells * samples * tokens * (layers * a_pass + head),
        }


def rate(model: TransformerBridge) -> float:
    """Operations a second of a product of the model's own shape: some tokens by its MLP's first matrix."""
    width, wide = model.cfg.d_model, model.cfg.d_mlp or 4 * model.cfg.d_model
    weight = model.embed.weight
    tokens, again = (512, 1) if weight.device.type == "cpu" else (16384, 10)
    a, b = weight.new_empty(tokens, width).normal_(), weight.new_empty(width, wide).normal_()

    def products() -> Tensor:
        for _ in range(again - 1):
            a @ b
        return a @ b

    seconds = min(clocked(products, weight.device)[0] for _ in range(30 // again))
    return 2 * tokens * width * wide * again / seconds


def call(case: Case) -> float:
    """Milliseconds a block of a run of one token, embedding and head included: mostly what calls cost."""
    one = case.ids[:, :1]
    seconds = min(clocked(lambda: forward(case.model, one).logits, case.device)[0] for _ in range(5))
    return 1000 * seconds / case.model.cfg.n_layers


def clocked(make: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds, and what was made."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    told = make()
    wait()
    return time.perf_counter() - start, told


def peak(make: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor, float]:
    """Seconds, what was made, and the most memory above what was held before, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        seconds, told = clocked(make, device)
        return seconds, told, (torch.cuda.max_memory_allocated(device) - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, or it would serve unseen
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the high-water mark begins anew
    held = _high_water()
    seconds, told = clocked(make, device)
    return seconds, told, (_high_water() - held) / 1024


def _high_water() -> int:
    """The most memory that this process has held, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def with_floors(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table: floors by the best rate that a model's products were ever seen at."""
    told = pd.DataFrame(rows)
    best = told.groupby("model")["GFLOP/s"].transform("max")
    told["floor"] = told["GFLOP"] / best
    told["over floor"] = told["seconds"] / told["floor"]
    return told.round(5)


# %%
@torch.no_grad()
def main() -> None:
    """Time every case; the table is written after each."""
    asked = argparse.ArgumentParser(description="the sweep against loops; see the top of this file")
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--out", type=Path)
    asked.add_argument("--more", action="store_true", help="keep what the file has, and time the other cases")
    given = asked.parse_args()
    cuda = given.device.startswith("cuda")
    ran_on = (
        torch.cuda.get_device_name(given.device)
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    file = given.out or OUT / f"{'cuda' if cuda else 'cpu'}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(file).to_dict("records") if given.more else []
    warmed = None
    timed = {(row["model"], row["tokens"], row["samples"]) for row in rows}
    for name, model, length, samples in cases(given.device):
        if (name, length, samples) in timed:
            continue
        case = Case(model, length, samples)
        case.cache()
        share = len(case.timed) / len(case.cells)
        if model is not warmed or cuda:  # a model's first run is never the typical one, nor a shape's there
            case.swept()
            warmed = model
        seconds, told, memory = peak(case.swept, case.device)
        speed, calls, operations = rate(model), call(case), case.operations()
        wanted = told[case.timed]
        ways = [("sweep", seconds, memory, 0.0)]
        for way, make, right in (
            ("ROME's loop", case.looped, wanted),
            ("TransformerLens", case.patched, wanted.mean(1)),
        ):
            if cuda:
                make()
            took, values, used = peak(make, case.device)
            differs = float((values.double().cpu() - right.double().cpu()).abs().max())
            ways.append((way, took / share, used, differs))
        for way, took, used, differs in ways:
            rows.append(
                {
                    "model": name,
                    "layers": model.cfg.n_layers,
                    "tokens": length,
                    "samples": samples,
                    "cells": len(case.cells),
                    "way": way,
                    "seconds": took,
                    "GFLOP": operations[way] / 1e9,
                    "times the sweep": took / seconds,
                    "floors' ratio": operations[way] / operations["sweep"],
                    "peak MiB": used,
                    "differs by": differs,
                    "GFLOP/s": speed / 1e9,
                    "ms a call": calls,
                    "on": ran_on,
                }
            )
        shown = "  ".join(f"{way} {took:.2f} s" for way, took, _, _ in ways)
        table = with_floors(rows)
        over = table["over floor"].iloc[-3]
        print(f"{name:26} {length:3} tokens {samples:3} samples  {shown}  over floor {over:.2f}", flush=True)
        with atomic_write(file) as unfinished:
            table.to_csv(unfinished, index=False)


if __name__ == "__main__":
    main()
