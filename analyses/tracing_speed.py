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
from typing import Any, TypeVar

import pandas as pd
import torch
import transformers as hf
from tidy import read_table
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import lens_defense as ld
from lens_defense.models.forward import forward
from lens_defense.patching.activation_patching import sweep
from lens_defense.patching.pass_plan import block_passes
from lens_defense.patching.patch_cell import PatchCell, PatchPoint, base_hooks, donor_hooks
from lens_defense.sites import block_input_hook
from lens_defense.storage import atomic_write

T = TypeVar("T")
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
        vocab = model.cfg.d_vocab
        ids = torch.randint(vocab, (1, length), generator=generator)
        corrupted = ids.repeat(samples, 1)
        corrupted[:, SUBJECT] = torch.randint(vocab, corrupted[:, SUBJECT].shape, generator=generator)
        self.ids, self.corrupted = ids.to(self.device), corrupted.to(self.device)
        self.answer = int(torch.randint(vocab, (), generator=generator))
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
        base = forward(self.model, self.corrupted, capture=base_hooks(self.cells))
        donor = forward(self.model, self.ids, capture=donor_hooks(self.cells))
        readings = sweep(
            self.model, self.ids, base, donor, self.cells, lambda logits: self.read(logits)[:, None],
            keep=1, max_rows=MOST_ROWS[self.device.type],
        )  # fmt: skip
        return readings[..., 0]

    def looped(self) -> Tensor:
        """ROME's loop on some cells: rows are the clean prompt and the corrupted ones."""
        rows = torch.cat([self.ids, self.corrupted])
        readings = []
        for point in (self.cells[i].points[0] for i in self.timed):

            def restore(state: Tensor, point: PatchPoint = point, **_: Any) -> Tensor:
                state[1:, point.position] = state[:1, point.position]
                return state

            with self.model.hooks(fwd_hooks=[(block_input_hook(point.layer), restore)]):
                readings.append(self.read(self.model(rows))[1:])
        return torch.stack(readings)

    def patched(self) -> Tensor:
        """TransformerLens's patching of the residual stream before a block, on the same cells."""
        places = [(self.cells[i].points[0].layer, self.cells[i].points[0].position) for i in self.timed]
        return torch.as_tensor(
            patching.generic_activation_patch(
                self.model,
                self.corrupted,
                self.clean,
                lambda logits: self.read(logits).mean(),
                patching.layer_pos_patch_setter,
                "resid_pre",
                index_df=pd.DataFrame(places, columns=pd.Index(["layer", "pos"])),
            )
        )

    # operations
    def operations(self) -> dict[str, float]:
        """Of each way, for the whole map: two per weight and token, and those of attention."""
        cfg, tokens, layers = self.model.cfg, self.length, self.model.cfg.n_layers
        block = sum(p.numel() for p in self.model.blocks[0].parameters())
        block_pass = 2 * block + 4 * tokens * cfg.n_heads * cfg.d_head
        head = 2 * cfg.d_model * cfg.d_vocab
        cells, samples = len(self.cells), self.samples
        clean_and_corrupted = (1 + samples) * (tokens * layers * block_pass + head)
        passes = block_passes(self.cells, layers=layers, tokens=tokens, samples=samples)
        return {
            "sweep": passes * block_pass + cells * samples * head + clean_and_corrupted,
            "ROME's loop": cells * (1 + samples) * tokens * (layers * block_pass + head),
            "TransformerLens": cells * samples * tokens * (layers * block_pass + head),
        }


def product_rate(model: TransformerBridge) -> float:
    """Operations per second of a product of the model's own shape: some tokens by its MLP's first matrix."""
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


def ms_per_call(case: Case) -> float:
    """Milliseconds per block of a run of one token, embedding and head included: mostly what calls cost."""
    token = case.ids[:, :1]
    seconds = min(clocked(lambda: forward(case.model, token).logits, case.device)[0] for _ in range(5))
    return 1000 * seconds / case.model.cfg.n_layers


def clocked(make: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds, and what was made."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    result = make()
    wait()
    return time.perf_counter() - start, result


def peak(make: Callable[[], T], device: torch.device) -> tuple[float, T, float]:
    """Seconds, what was made, and the most memory above what was in use before, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        in_use = torch.cuda.memory_allocated(device)
        seconds, result = clocked(make, device)
        return seconds, result, (torch.cuda.max_memory_allocated(device) - in_use) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, or it would serve unseen
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the high-water mark begins anew
    in_use = _high_water()
    seconds, result = clocked(make, device)
    return seconds, result, (_high_water() - in_use) / 1024


def _high_water() -> int:
    """The most memory that this process has used, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def with_floors(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table: floors by the best rate that a model's products were ever seen at."""
    table = pd.DataFrame(rows)
    best_rate = table.groupby("model")["gflop_per_s"].transform("max")
    table["floor"] = table["gflop"] / best_rate
    table["over_floor"] = table["seconds"] / table["floor"]
    return table.round(5)


# %%
@torch.no_grad()
def main() -> None:
    """Time every case; the table is written after each."""
    parser = argparse.ArgumentParser(description="the sweep against loops; see the top of this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--more", action="store_true", help="keep what the file has, and time the other cases"
    )
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    cpu_words = f"{platform.machine()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(args.device) if cuda else cpu_words
    file = args.out or OUT / f"{'cuda' if cuda else 'cpu'}.csv"
    rows = read_table(file).to_dict("records") if args.more else []
    timed = {(row["model"], row["tokens"], row["samples"]) for row in rows}
    warmed_up = None
    for name, model, length, samples in cases(args.device):
        if (name, length, samples) in timed:
            continue
        case = Case(model, length, samples)
        case.cache()
        share = len(case.timed) / len(case.cells)
        # a model's first run is never the typical one; on a GPU neither is a shape's
        if model is not warmed_up or cuda:
            case.swept()
            warmed_up = model
        sweep_seconds, swept, memory = peak(case.swept, case.device)
        rate, operations, ms = product_rate(model), case.operations(), ms_per_call(case)
        ways = [("sweep", sweep_seconds, memory, 0.0)]
        for way, make, expected in (
            ("ROME's loop", case.looped, swept[case.timed]),
            ("TransformerLens", case.patched, swept[case.timed].mean(1)),
        ):
            if cuda:
                make()
            seconds, values, memory = peak(make, case.device)
            differs_by = float((values.double().cpu() - expected.double().cpu()).abs().max())
            ways.append((way, seconds / share, memory, differs_by))
        rows += [
            {
                "model": name,
                "layers": model.cfg.n_layers,
                "tokens": length,
                "samples": samples,
                "cells": len(case.cells),
                "way": way,
                "seconds": seconds,
                "gflop": operations[way] / 1e9,
                "times_the_sweep": seconds / sweep_seconds,
                "floors_ratio": operations[way] / operations["sweep"],
                "peak_mib": memory,
                "differs_by": differs_by,
                "gflop_per_s": rate / 1e9,
                "ms_per_call": ms,
                "hardware": hardware,
            }
            for way, seconds, memory, differs_by in ways
        ]
        table = with_floors(rows)
        with atomic_write(file) as unfinished:
            table.to_csv(unfinished, index=False)
        print(table.tail(len(ways)).to_string(index=False, header=False), flush=True)


if __name__ == "__main__":
    main()
