"""A saved folder is the same model in plain transformers, and appears whole or not at all."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_folder, tiny_model
from helpers.weights import copy_weights, weights_equal

from lens_defense.loading.load import load
from lens_defense.loading.save import save_folder
from lens_defense.storage import atomic_folder

IDS = torch.randint(3, 297, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "neox"])
def test_a_saved_folder_gives_equal_logits_in_plain_transformers(family, tmp_path):
    base = tiny_folder(tmp_path / "base", family)
    model = load(base, device="cpu")
    weights = copy_weights(model)

    def plain_logits(folder):
        plain = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return plain.eval()(IDS).logits

    original = plain_logits(base)
    assert torch.equal(plain_logits(save_folder(model, tmp_path / "as it is")), original)
    with handmade_edit(model, (1, 2)).applied(model):
        edited = plain_logits(save_folder(model, tmp_path / "edited"))
        bridged = model(IDS)
    if family == "gpt2":  # the bridge splits GPT-2's joined q, k, v: other roundings
        torch.testing.assert_close(edited, bridged, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(edited, bridged)
    assert (edited - original).abs().max() > 0.1
    assert weights_equal(model, weights)


def test_a_saved_folder_loads_again(tmp_path):
    base = tiny_folder(tmp_path / "base")
    hf.GenerationConfig(eos_token_id=[1, 2]).save_pretrained(base)
    model = load(base, device="cpu")
    with handmade_edit(model, (1, 2)).applied(model):
        loaded = load(save_folder(model, tmp_path / "edited"), device="cpu")
        assert weights_equal(loaded, copy_weights(model))
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert loaded.original_model.generation_config.eos_token_id == [1, 2]
    assert not list((tmp_path / "edited").glob("*.bin"))


def test_nothing_is_written_over(tmp_path):
    model = tiny_model("llama", chat=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        save_folder(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new") as unfinished:
        (unfinished / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with nullcontext() if text == "first" else pytest.raises(FileExistsError):
            write(tmp_path / "new", text)
    assert (tmp_path / "new/file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def write(folder, text):
    with atomic_folder(folder) as unfinished:
        (unfinished / "file").write_text(text)


def test_where_two_write_at_once_the_first_to_finish_stays(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(FileExistsError), atomic_folder(folder) as slow:
        (slow / "file").write_text("slow")
        write(folder, "quick")
    assert (folder / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing unfinished is left"


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "mine")
    assert (tmp_path / "empty/file").read_text() == "mine"
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(ValueError, match="notes exists and is not empty; name a new folder"):
        save_folder(tiny_model("llama", chat=True), tmp_path / "notes")


def test_of_two_that_save_to_one_path_one_is_told(tmp_path):
    models, results = [tiny_model("llama", chat=True, seed=seed) for seed in (0, 1)], {}
    start = threading.Barrier(2)

    def save(seed):
        start.wait()
        try:
            results[seed] = save_folder(models[seed], tmp_path / "model")
        except ValueError as error:
            results[seed] = error

    threads = [threading.Thread(target=save, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (seed for seed, result in results.items() if not isinstance(result, ValueError))
    assert "; name a new folder" in str(results[1 - winner])
    loaded = load(tmp_path / "model", device="cpu", dtype=torch.float64)
    assert weights_equal(loaded, copy_weights(models[winner]))


def test_two_threads_that_save_leave_the_default_dtype(tmp_path, monkeypatch):
    """Transformers sets it for the process while it builds a model, and puts back what it found."""
    models = [tiny_model("llama", chat=True, seed=seed) for seed in (0, 1)]
    pauses, build = iter((0.1, 0.4)), hf.LlamaModel.__init__

    def build_slowly(*arguments):
        time.sleep(next(pauses))
        build(*arguments)

    monkeypatch.setattr(hf.LlamaModel, "__init__", build_slowly)
    threads = [
        threading.Thread(target=save_folder, args=(model, tmp_path / str(i)))
        for i, model in enumerate(models)
    ]
    default = torch.get_default_dtype()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == default != models[0].cfg.dtype
    finally:
        torch.set_default_dtype(default)


def test_a_saved_folder_reads_text_as_its_original(tmp_path):
    """TransformerLens gives a tokenizer that has no beginning token its end token for one."""
    texts = ["a brass lamp", "How do I make a lamp?"]
    original = hf.AutoTokenizer.from_pretrained(tiny_folder(tmp_path / "base"))
    assert original.bos_token is None
    model = load(tmp_path / "base", device="cpu")
    again = load(save_folder(model, tmp_path / "saved"), device="cpu")
    saved = hf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for tokenizer in (model.tokenizer, again.tokenizer, saved):
        assert tokenizer(texts)["input_ids"] == original(texts)["input_ids"]
        assert tokenizer.bos_token is None
