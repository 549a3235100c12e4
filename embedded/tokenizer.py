"""Train the CLIP-format BPE tokenizer on every caption the data can make.

python -m embedded.tokenizer --work DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from embedded.captions import all_captions, read_concepts
from embedded.common import add_work_option

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 24
VOCABULARY = 2048
END_OF_WORD = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_bpe(corpus: Iterable[str], size: int = VOCABULARY) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn a vocabulary (special tokens last, as CLIP has them) and merges from captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return with_word_ends(alphabet, merges), merges


def with_word_ends(alphabet: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order of entries: bytes, bytes that end a word, merges, then the two special tokens."""
    entries = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    return {entry: index for index, entry in enumerate(dict.fromkeys(entries))}


def build_tokenizer(corpus: Iterable[str], size: int = VOCABULARY) -> CLIPTokenizer:
    """A CLIPTokenizer trained on captions."""
    vocabulary, merges = train_bpe(corpus, size)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=MAX_LENGTH,
    )


def main() -> None:
    """Train and save the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    work: Path = parser.parse_args().work
    tokenizer = build_tokenizer(all_captions(read_concepts()))
    tokenizer.save_pretrained(work / "tokenizer")
    longest = max(len(tokenizer(text).input_ids) for text in all_captions(read_concepts()))
    print(f"{len(tokenizer)} entries; the longest simple caption has {longest} of {MAX_LENGTH} tokens")


if __name__ == "__main__":
    main()
