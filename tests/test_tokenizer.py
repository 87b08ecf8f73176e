"""The tokenizer: text round-trips, the template is Qwen3's, prompts can't forge control tokens."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.base import ConfigError, DataError
from kdjax.tokenizer import check_same_vocabulary, load_tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """A copy of the embedded tokenizer's folder, free to be spoilt."""
    return shutil.copytree(tokenizer_folder, tmp_path / "copy")


def edit_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def id_of(tokenizer, token: str) -> int:
    (number,) = tokenizer.encode(token)
    return number


def text_with_control_tokens():
    return st.lists(st.one_of(st.text(), st.sampled_from(CONTROL)), max_size=5).map("".join)


@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(text=st.text().filter(lambda text: not any(token in text for token in CONTROL)))
def test_any_text_round_trips(tokenizer, text):
    """decode(encode(text)) = text, for every text without control tokens."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(prompt=text_with_control_tokens())
def test_prompts_cannot_forge_control_tokens(tokenizer, prompt):
    """However often a prompt spells control tokens, the ids hold only the template's own."""
    ids = tokenizer.encode_prompt(prompt)
    counts = [ids.count(id_of(tokenizer, token)) for token in CONTROL]
    assert counts == [2, 1, 0]
    assert prompt in tokenizer.decode(ids)


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(prompt=st.text(alphabet="0123456789+-x=? ab\u00e9\u4e2d", min_size=1))
def test_encode_prompt_is_the_rendered_prompt(tokenizer, prompt):
    """For an ordinary prompt the ids are those of the rendered text, tokenized in one piece."""
    assert tokenizer.encode_prompt(prompt) == tokenizer.encode(tokenizer.render(prompt))


def test_template_is_qwen3_without_thinking(tokenizer):
    """The rendered prompt is, letter by letter, Qwen3's with enable_thinking=False."""
    assert tokenizer.render("3+4=") == (
        "<|im_start|>user\n3+4=<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_trusted_text_keeps_its_control_tokens(tokenizer):
    """encode reads each control token as one id, of the vocabulary's last; decode leaves it out."""
    ids = tokenizer.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert max(ids) == id_of(tokenizer, "<|im_end|>") < tokenizer.size
    assert tokenizer.decode(ids) == "ab"


def test_stop_ids_are_both(tokenizer):
    """A response may end with <|im_end|> or with <|endoftext|>; <|im_end|> comes first."""
    assert tokenizer.stop_ids == tuple(
        id_of(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>")
    )


def test_a_worked_answer_is_short(tokenizer):
    r"""\boxed{ is a single token, and each digit and sign is one."""
    assert len(tokenizer.encode("\\boxed{")) == 1
    assert len(tokenizer.encode("3+4=7;\\boxed{7}")) == 9


def test_stop_ids_of_one_number_and_of_the_tokenizer_alone(folder, tokenizer):
    """generation_config comes first, the tokenizer's own eos after it, each once."""
    end, pad = tokenizer.stop_ids
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": pad}))
    assert load_tokenizer(folder).stop_ids == (pad, end)
    path.unlink()
    assert load_tokenizer(folder).stop_ids == (end,)


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')


def damage_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1,')


def drop_template(folder):
    (folder / "chat_template.jinja").unlink()


def hide_the_user(folder):
    (folder / "chat_template.jinja").write_text("{{- 'always the same' }}")


def drop_stop_ids(folder):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", lambda fields: fields.pop("eos_token"))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (spoil_tokenizer, DataError, "no tokenizer.json"),
        (damage_tokenizer, DataError, "can't read the tokenizer"),
        (damage_generation_config, DataError, "generation_config.json"),
        (drop_template, DataError, "no chat template"),
        (hide_the_user, DataError, "does not show the user's text"),
        (drop_stop_ids, ConfigError, "no stop token"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_spoilt_folders(folder, spoil, error, says):
    """A folder that can't be used is refused in one line that says what is wrong and where."""
    spoil(folder)
    with pytest.raises(error) as caught:
        load_tokenizer(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def swap_two_tokens(fields):
    vocabulary = fields["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]


def add_a_token(fields):
    extra = dict(fields["added_tokens"][-1])
    fields["added_tokens"].append({**extra, "id": extra["id"] + 1, "content": "<new>"})


@pytest.mark.parametrize("change", [swap_two_tokens, add_a_token], ids=lambda f: f.__name__)
def test_another_vocabulary_is_refused(folder, tokenizer, change):
    """Two ids exchanged, or one more: token-level KL would compare different tokens."""
    check_same_vocabulary(tokenizer, load_tokenizer(folder))
    edit_json(folder / "tokenizer.json", change)
    other = load_tokenizer(folder)
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(ConfigError, match="tokenizers differ"):
        check_same_vocabulary(tokenizer, other)


def test_another_template_is_refused(folder, tokenizer):
    """One vocabulary, another template: student and teacher would read different prompts."""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<think>", "<think>\\n"))
    other = load_tokenizer(folder)
    assert other.fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="templates render the same prompt differently"):
        check_same_vocabulary(tokenizer, other)
