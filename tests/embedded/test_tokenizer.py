"""The tokenizer and the text encoder's input."""

import pytest
import torch
from transformers import CLIPTokenizer

from embedded.text_model import build_text_encoder, embed_frozen, token_ids
from embedded.tokenizer import MAX_LENGTH, build_tokenizer

CORPUS = ["a cat", "a dog on a blue background", "a smiling face with sunglasses in 3d style"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CORPUS, 700)


def test_known_words_are_one_token(tokenizer):
    ids = tokenizer("A  Blue cat").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "a</w>", "blue</w>", "cat</w>", "<|endoftext|>"]


@pytest.mark.parametrize("text", ["a cat", "a zebra", "cafe crème", "日本", ""])
def test_any_text_survives(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_saved_folder_reloads_identically(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in [*CORPUS, "unseen words, 12 of them", ""]:
        assert token_ids(again, [text]).tolist() == token_ids(tokenizer, [text]).tolist()
    assert again.model_max_length == MAX_LENGTH
    assert (again.bos_token_id, again.eos_token_id) == (len(again) - 2, len(again) - 1)
    assert again.pad_token_id == again.eos_token_id


def test_pooled_state_is_the_first_end_of_text(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(tokenizer, width=16, layers=1).eval()
    ids = token_ids(tokenizer, ["a cat"])
    output = encoder(ids)
    torch.testing.assert_close(output.pooler_output[0], output.last_hidden_state[0, 3])
    assert embed_frozen(encoder, tokenizer, ["", "a dog"]).shape == (2, MAX_LENGTH, 16)
