"""The tokenizer: text round-trips, the template is Qwen3's, prompts can't forge control tokens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.tokenizer import Wording, load_pair, load_tokenizer, pieces, shared_vocabulary
from kdjax.errors import ConfigError, DataError

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
@given(text=st.text().filter(lambda text: not any(token in text for token in CONTROL)))
def test_pieces_are_the_text(tokenizer, text):
    """Pieces join to the text and hold every token once; none has a part of a character."""
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in found) == text
    assert sum(tokens for _, tokens in found) == len(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece, _ in found)


def test_a_piece_is_a_token_but_for_long_characters(tokenizer):
    """Characters of 2, 3 and 4 bytes are pieces of as many tokens; a control token is spelled; what
    was cut within a character is shown as such."""
    ids = tokenizer.encode("a\u00e9\u4e2d\U0001f600b<|im_end|>")
    expected = [("a", 1), ("\u00e9", 2), ("\u4e2d", 3), ("\U0001f600", 4), ("b", 1)]
    assert pieces(tokenizer, ids) == [*expected, ("<|im_end|>", 1)]
    assert pieces(tokenizer, ids[:5]) == [*expected[:2], ("\ufffd", 2)]


def test_a_piece_keeps_its_space(tokenizer):
    """A tokenizer that drops the space at the front of a text keeps it between pieces."""
    words = (" two", " words", "!")
    dropping = tokenizer._replace(decode=lambda ids: "".join(words[i] for i in ids).lstrip(" "))
    assert pieces(dropping, [0, 1, 2, 1]) == [("two", 1), (" words", 1), ("!", 1), (" words", 1)]


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
        (damage_tokenizer, DataError, "not a readable JSON file"),
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


def cut_otherwise(fields):
    fields["pre_tokenizer"]["use_regex"] = True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap_two_tokens, "differ in 2 of {size} ids: 15 is '0' and '1', 16 is '1' and '0'; token"),
        (cut_otherwise, r"differ in how they cut text (pre_tokenizer); token"),
    ],
    ids=["swap_two_tokens", "cut_otherwise"],
)
def test_another_vocabulary_is_refused(folder, tokenizer, change, says):
    """Two ids exchanged, or another way to cut text: the first ids that differ are named."""
    assert shared_vocabulary(tokenizer, load_tokenizer(folder)) == tokenizer.size
    edit_json(folder / "tokenizer.json", change)
    other = load_tokenizer(folder)
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(ConfigError, match=re.escape(says.format(size=tokenizer.size))) as caught:
        shared_vocabulary(tokenizer, other)
    assert "\n" not in str(caught.value)


def test_more_tokens_at_the_end_are_shared_up_to_there(folder, tokenizer, tokenizer_folder):
    """One vocabulary begins with the other: the smaller one is in use, whoever has more."""
    edit_json(folder / "tokenizer.json", add_a_token)
    assert load_tokenizer(folder).size == tokenizer.size + 1
    for pair in ((folder, tokenizer_folder), (tokenizer_folder, folder)):
        both = load_pair(*pair)
        assert [t.size for t in both] == [tokenizer.size] * 2
        assert {t.full_size for t in both} == {tokenizer.size, tokenizer.size + 1}


def stop_at_the_new_token(folder):
    new = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]["id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": new}))


def render_the_new_token(folder):
    path = folder / "chat_template.jinja"
    path.write_text("<new>" + path.read_text())


def end_answers_with_the_new_token(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("+ '<|im_end|>'", "+ '<new>'"))


@pytest.mark.parametrize(
    ("spoil", "whose", "place"),
    [
        (stop_at_the_new_token, "student", "student stop"),
        (stop_at_the_new_token, "teacher", "teacher stop"),
        (render_the_new_token, "student", "rendered prompt"),
        (end_answers_with_the_new_token, "teacher", "teacher's template end of an answer"),
    ],
)
def test_tokens_beyond_the_shared_ones_are_not_needed(
    folder, tokenizer, tokenizer_folder, spoil, whose, place
):
    """A token that only one model has neither stops a response nor stands in a prompt."""
    edit_json(folder / "tokenizer.json", add_a_token)
    spoil(folder)
    pair = (folder, tokenizer_folder) if whose == "student" else (tokenizer_folder, folder)
    with pytest.raises(ConfigError, match=f"id {tokenizer.size} .'<new>', {place}. is beyond"):
        load_pair(*pair)


def test_another_teacher_template_is_no_error(folder, tokenizer_folder):
    """Prompts are the student's rendering; a template of the teacher's own, even one whose tokens
    the student lacks, changes nothing in them."""
    edit_json(folder / "tokenizer.json", add_a_token)
    render_the_new_token(folder)
    student, teacher = load_pair(tokenizer_folder, folder)
    assert teacher.render("1") == "<new>" + student.render("1")


def test_the_template_of_the_other_serves(folder, tokenizer, tokenizer_folder):
    """A folder without a chat template takes the other's, and says where it is from."""
    drop_template(folder)
    for pair in ((folder, tokenizer_folder), (tokenizer_folder, folder)):
        student, teacher = load_pair(*pair)
        assert student.template_folder == teacher.template_folder == str(tokenizer_folder)
        assert (
            student.encode_prompt("1") == teacher.encode_prompt("1") == tokenizer.encode_prompt("1")
        )
    with pytest.raises(DataError, match="no chat template; add chat_template"):
        load_pair(folder, folder)


def test_a_template_of_another_vocabulary_does_not_serve(folder, tokenizer_folder, tmp_path):
    """The student would spell the teacher's control tokens in pieces."""
    drop_template(folder)
    teacher = shutil.copytree(tokenizer_folder, tmp_path / "teacher")
    edit_json(teacher / "tokenizer.json", add_a_token)
    with pytest.raises(DataError, match=r"in another vocabulary .* add chat_template"):
        load_pair(folder, teacher)


def test_thinking_is_the_template_s_switch(tokenizer_folder, tokenizer):
    """With thinking on, Qwen3's template leaves the thinking part to the model."""
    open_ended = load_tokenizer(tokenizer_folder, Wording(thinking=True))
    assert tokenizer.render("1") == open_ended.render("1") + "<think>\n\n</think>\n\n"
    assert open_ended.encode_prompt("1") == open_ended.encode(open_ended.render("1"))
    for one in load_pair(tokenizer_folder, tokenizer_folder, Wording(thinking=True)):
        assert one.render("1") == open_ended.render("1")


WORDED = Wording("{prompt}\nAnswer in \\boxed{}.", "You add.")


def test_a_wording_is_rendered_whole(tokenizer_folder):
    """System turn, the prompt in its template (other braces stay), the thinking switch; the ids are
    those of the text."""
    worded = load_tokenizer(tokenizer_folder, WORDED)
    rendered = (
        "<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\n3+4=\nAnswer in \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert worded.render("3+4=") == rendered
    assert worded.decode(worded.encode_prompt("3+4=")) == worded.decode(worded.encode(rendered))
    assert [t.render("3+4=") for t in load_pair(*[tokenizer_folder] * 2, WORDED)] == [rendered] * 2


@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(
    template=text_with_control_tokens(),
    system=text_with_control_tokens().filter(str.strip),
    prompt=text_with_control_tokens(),
)
def test_a_wording_cannot_forge_control_tokens(tokenizer_folder, template, system, prompt):
    """However often template, system prompt and prompt spell control tokens, the ids hold only the
    chat template's own, and every word of the text."""
    wording = Wording(template.replace("{prompt}", "") + "{prompt}", system)
    worded = load_tokenizer(tokenizer_folder, wording)
    ids = worded.encode_prompt(prompt)
    assert [ids.count(id_of(worded, token)) for token in CONTROL] == [3, 2, 0]
    text = worded.decode(ids)
    assert system in text
    assert wording.user_turn(prompt) in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0].content }}",
        "{{ messages[-1].content }}{{ messages[0].content }}",
    ],
    ids=["dropped", "refused", "after"],
)
def test_no_place_for_a_system_prompt(folder, template):
    """A chat template that drops, refuses or displaces it: nothing is lost silently."""
    (folder / "chat_template.jinja").write_text(template)
    load_tokenizer(folder)
    with pytest.raises(DataError, match=r"does not show a system prompt .* data.prompt_template"):
        load_tokenizer(folder, Wording(system_prompt="s"))


def test_the_template_s_end_of_an_answer(folder, tokenizer):
    """It is read from a rendered answer; a template that refuses or ends bare has none."""
    assert tokenizer.turn_end_id == id_of(tokenizer, "<|im_end|>")
    assert tokenizer.token(tokenizer.turn_end_id) == "<|im_end|>"
    path = folder / "chat_template.jinja"
    ends = {
        "{{ messages[-1].content + ' \n<|endoftext|>' }}": id_of(tokenizer, "<|endoftext|>"),
        "{{ messages[-1].content + 'x' }}": id_of(tokenizer, "x"),
        "{{ messages[-1].content }}": None,
        "{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}":
            None,
    }  # fmt: skip
    for template, wanted in ends.items():
        path.write_text(template)
        assert load_tokenizer(folder).turn_end_id == wanted


def test_a_template_may_take_its_memory_whatever_the_cores_reserve():
    """NumPy reserves address space for each core before a template is read: 1 GiB more of it, and
    the template still has all of its own."""
    import kdjax.data.chat as chat

    program = str(Path(chat.__file__).with_name("program.py"))
    script = (
        "import mmap, runpy, sys; reserved = mmap.mmap(-1, 1 << 30);"
        f"sys.argv = ['', '3', '512', '1000000']; runpy.run_path({program!r}, run_name='__main__')"
    )
    request = {"template": "{{ 'ab' * 100000 }}", "conversations": [[]], "values": {}}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(request), capture_output=True, text=True
    )
    _, reply = map(json.loads, done.stdout.splitlines())
    assert [len(text) for text in reply["value"]] == [200_000], done.stderr[-500:]
