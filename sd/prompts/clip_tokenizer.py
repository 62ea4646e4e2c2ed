"""CLIP's tokenizer by the `tokenizers` package alone: to import transformers takes longer than to draw a small picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
# What a text is split into, Radford et al. 2021 (CLIP's simple_tokenizer.py): the two tokens themselves, English
# contractions, runs of letters, single digits, and runs of what is neither letter, digit nor space.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Encoded(dict):
    """What a call of the tokenizer returns; its entries, such as `input_ids`, are attributes too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class CLIPTokenizer:
    """Byte-pair encoding of a text in NFC and lower case; ids, offsets and calls are those of transformers' CLIPTokenizer."""

    bos_token, eos_token, pad_token, unk_token = START, END, END, END
    model_max_length = 77

    def __init__(self, folder: Path):
        """`folder` has CLIP's vocab.json and merges.txt."""
        self.backend = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=END,
                                               continuing_subword_prefix="", end_of_word_suffix="</w>"))
        self.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
        self.bos_token_id, self.eos_token_id = self.backend.encode(START + END, add_special_tokens=False).ids
        self.pad_token_id = self.unk_token_id = self.eos_token_id

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True, padding: bool | str = False,
                 truncation: bool | str = False, max_length: int | None = None, return_tensors: str | None = None,
                 return_offsets_mapping: bool = False, verbose: bool = True) -> Encoded:
        """`input_ids`, `attention_mask` and, if asked for, `offset_mapping` (first and last + 1 character of each token).

        Lists for a text, lists of lists for several, and with `return_tensors="pt"` tensors [B, L]. `padding` is True (to the
        longest text) or "max_length"; `max_length` is 77 where none is given. `verbose` is taken and has no effect.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; allowed: None, 'pt'")
        length = self.model_max_length if max_length is None else max_length
        room = max(length - (2 if add_special_tokens else 0), 0) if truncation else None
        texts = [text] if isinstance(text, str) else text
        rows = []
        for encoding in (self.backend.encode(one, add_special_tokens=False) for one in texts):
            ids, offsets = encoding.ids[:room], encoding.offsets[:room]
            if add_special_tokens:
                ids, offsets = [self.bos_token_id, *ids, self.eos_token_id], [(0, 0), *offsets, (0, 0)]
            rows.append((ids, offsets))
        longest = length if padding == "max_length" else max((len(ids) for ids, _ in rows), default=0)
        found = Encoded(input_ids=[], attention_mask=[], offset_mapping=[])
        for ids, offsets in rows:
            missing = max(longest - len(ids), 0) if padding else 0
            found["input_ids"].append(ids + [self.pad_token_id] * missing)
            found["attention_mask"].append([1] * len(ids) + [0] * missing)
            found["offset_mapping"].append(offsets + [(0, 0)] * missing)
        if not return_offsets_mapping:
            del found["offset_mapping"]
        if return_tensors == "pt":
            import torch
            return Encoded({name: torch.tensor(values) for name, values in found.items()})
        return Encoded({name: values[0] for name, values in found.items()}) if isinstance(text, str) else found

    def encode(self, text: str, **options) -> list[int]:
        """The ids of a call, with start and end."""
        return self(text, **options)["input_ids"]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids, as far as lower case and spaces allow."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens).replace("</w>", " ").strip()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text as spelled in vocab.json, without start and end."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def convert_tokens_to_ids(self, tokens):
        """The id of a token, or the ids of several; that of the unknown token for one that is not in the vocabulary."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        """The token of an id, or the tokens of several."""
        return self.backend.id_to_token(ids) if isinstance(ids, int) else [self.backend.id_to_token(int(i)) for i in ids]

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size
