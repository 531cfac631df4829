"""Small fast tokenizers of other kinds than byte-level BPE: SentencePiece's way, and BERT's."""

import json

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "how do I make a brass lamp, the lamp is a thing "
LETTERS = "abcdefghijklmnopqrstuvwxyzIHW0123456789.,?!'éï日本🔥[]/"


def metaspace(chat: bool = False) -> hf.PreTrainedTokenizerFast:
    """BPE over ▁-marked words with byte fallback and a BOS, as Llama 2's; its template where asked."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    core.train_from_iterator([TEXT * 9], trainer)
    trained = json.loads(core.to_str())["model"]
    vocab = trained["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in trained["merges"]]
    core.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}"
        )
    return tokenizer


def wordpiece() -> hf.PreTrainedTokenizerFast:
    """Words in ##-pieces between [CLS] and [SEP], as BERT's; white space is no token."""
    names = ["[UNK]", "[CLS]", "[SEP]", "how", "make", "la", "##mp", *LETTERS]
    vocab = {name: i for i, name in enumerate([*names, *(f"##{letter}" for letter in LETTERS)])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )
