"""Text and tokens, chat templates, and stop strings that end in the middle of anything."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mqinfer.errors import PlanError, RequestError
from mqinfer.tokenizer import Tokenizer, find_stop

CORPUS = ["the quick brown fox jumps over the lazy dog, stop here and stop there", "User: hello\n\nAssistant: hi"] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def save(raw: RawTokenizer, folder: Path, *, chat_template: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level() -> RawTokenizer:
    """Every byte is a token, some pairs are merged, BOS comes first: like Llama 3 in small."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return raw


def metaspace() -> RawTokenizer:
    """Words that carry their space, stripped at the beginning of a text; bytes for the rest: like Llama 2 in small."""
    vocab = {token: 0.0 for token in ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]}
    vocab |= {
        token: -float(len(vocab)) for token in ["▁", "▁stop", "stop", "▁a", "a", "▁now", "s", "t", "o", "p", "▁▁"]
    }
    raw = RawTokenizer(models.Unigram(list(vocab.items()), unk_id=2, byte_fallback=True))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("byte_level"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save(metaspace(), tmp_path_factory.mktemp("metaspace")))


def encode_bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """As a model generates: no BOS."""
    return tokenizer.encode(text)[1:]


def test_a_text_is_encoded_with_what_the_model_puts_before_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the fox")
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == "the fox"


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_any_text_comes_back_with_its_spaces(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode_bare(tokenizer, text)) == text.replace("<s>", "").replace("</s>", "")


def test_special_tokens_are_no_text_but_have_a_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_tokens == (1,)
    assert tokenizer.decode([*encode_bare(tokenizer, "hi , there ."), 1]) == "hi , there ."
    assert tokenizer.decode_token(1) == "</s>"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("\ud83d")
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_a_token_that_the_tokenizer_does_not_know_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*encode_bare(tokenizer, "hi"), 99_999]) == "hi"
    assert tokenizer.decode_token(99_999) == ""


def test_a_token_is_decoded_as_inside_a_text(spaced: Tokenizer) -> None:
    tokens = spaced.encode("stop a stop")
    assert spaced.decode(tokens) == "stop a stop"
    assert [spaced.decode_token(token) for token in tokens] == [" stop", " a", " stop"]


def test_a_piece_of_a_character_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode_token(token) for token in encode_bare(tokenizer, "é")] == ["\ufffd", "\ufffd"]


def test_a_chat_goes_through_the_models_own_template(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode_chat([{"role": "user", "content": "the fox"}])
    assert tokens[0] == tokens[-len(encode_bare(tokenizer, "assistant:")) - 1] == 0
    assert tokenizer.decode(tokens) == "user: the foxassistant:"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: there is none"),
        ([{"role": "user"}], "messages.0.content: missing or not a text"),
        ([{"role": "user", "content": "a"}, {"role": 3, "content": "a"}], "messages.1.role: missing or not a text"),
        ([{"role": "system", "content": "a"}], "the model's chat template refuses the messages: no system messages"),
    ],
)
def test_messages_that_make_no_prompt_are_refused(
    tokenizer: Tokenizer, messages: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(messages)
    assert str(caught.value) == words


def test_a_template_that_breaks_costs_only_its_request(tmp_path: Path) -> None:
    broken = Tokenizer.load(save(byte_level(), tmp_path, chat_template="{{ messages[0]['content'] + 1 }}"))
    with pytest.raises(RequestError, match="chat template refuses the messages: can only concatenate"):
        broken.encode_chat([{"role": "user", "content": "a"}])


def test_a_model_without_a_template_says_so(spaced: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template: send a prompt"):
        spaced.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PlanError, match="has no tokenizer that can be read: "):
        Tokenizer.load(tmp_path)


def ends(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> tuple[int, str] | None:
    """After how many tokens a stop string was found, and the text before it."""
    for count in range(1, len(tokens) + 1):
        if (text := find_stop(tokenizer, tokens[:count], stops)) is not None:
            return count, text
    return None


def ends_by_the_whole_text(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> tuple[int, str] | None:
    """The same, by decoding everything each time."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if found := [text.index(stop) for stop in stops if stop in text]:
            return count, text[: min(found)]
    return None


def test_the_text_ends_before_the_first_stop_string(tokenizer: Tokenizer) -> None:
    tokens = encode_bare(tokenizer, "hello\n\nUser: stop")
    assert ends(tokenizer, tokens, ["User:", "\n\n", "never"]) == ends_by_the_whole_text(tokenizer, tokens, ["\n\n"])
    assert find_stop(tokenizer, tokens, ["stop", "", "User:"]) == "hello\n\n"


def test_no_stop_string_is_no_end(tokenizer: Tokenizer) -> None:
    tokens = encode_bare(tokenizer, "hello")
    assert find_stop(tokenizer, tokens, []) is None
    assert find_stop(tokenizer, tokens, [""]) is None
    assert find_stop(tokenizer, tokens, ["hello!"]) is None
    assert find_stop(tokenizer, [], ["hello"]) is None


def test_a_stop_string_is_seen_when_its_last_byte_comes(tokenizer: Tokenizer) -> None:
    before, stop = encode_bare(tokenizer, "a🎉b"), encode_bare(tokenizer, "🛑")
    assert len(stop) == 4
    assert ends(tokenizer, [*before, *stop], ["🛑"]) == (len(before) + 4, "a🎉b")


def test_a_stop_string_longer_than_the_tail_is_seen(tokenizer: Tokenizer) -> None:
    stop = "🛑🎉 zebra" * 30
    tokens = encode_bare(tokenizer, "quiz " * 50 + stop)
    assert ends(tokenizer, tokens, [stop]) == (len(tokens), "quiz " * 50)


def test_a_stop_string_with_special_tokens_inside_is_seen(tokenizer: Tokenizer) -> None:
    first, second = encode_bare(tokenizer, "xyz st"), encode_bare(tokenizer, "op")
    assert find_stop(tokenizer, [*first, *[1] * 100, *second], ["stop"]) == "xyz "


def test_a_stop_string_that_begins_with_a_space_is_seen(spaced: Tokenizer) -> None:
    tokens = spaced.encode("a" + " stop" * 40)
    assert find_stop(spaced, tokens[:2], [" stop"]) == "a"
    assert find_stop(spaced, tokens, [" stop" * 41]) is None
    assert find_stop(spaced, tokens, [" stop" * 40]) == "a"


PIECES = st.lists(st.sampled_from(["stop", "st", "op", " ", "é", "🛑", "\n", "a", "</s>", "��"]), max_size=40)


@given(pieces=PIECES, noise=st.lists(st.integers(0, 400), max_size=12), stops=st.lists(PIECES.map("".join), max_size=3))
def test_stop_strings_are_found_as_in_the_whole_text(
    tokenizer: Tokenizer, pieces: list[str], noise: list[int], stops: list[str]
) -> None:
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]
    tokens = [*noise, *encode_bare(tokenizer, "".join(pieces))]
    assert ends(tokenizer, tokens, stops) == ends_by_the_whole_text(tokenizer, tokens, stops)


def counting(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(tokens: Sequence[int]) -> str:
        decoded.append(len(tokens))
        return decode(tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    return lambda: max(decoded)


def test_only_the_tail_of_a_long_text_is_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = encode_bare(tokenizer, "quick brown fox " * 200)
    most = counting(tokenizer, monkeypatch)
    assert find_stop(tokenizer, tokens, ["\n\nUser:"]) is None
    assert most() <= 32


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_tokenizer_works_quietly_where_torch_is_hidden(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from mqinfer import tokenizer
assert "transformers" not in sys.modules, "importing the module must be cheap"
tokenizer.hide_torch()
loaded = tokenizer.Tokenizer.load(Path(sys.argv[1]))
print(loaded.decode(loaded.encode_chat([{"role": "user", "content": "the fox"}])))
assert sys.modules["torch"] is None
"""
    assert run(code, str(folder)) == "user: the foxassistant:\n"


def test_torch_that_is_loaded_already_stays(tokenizer: Tokenizer) -> None:
    code = "import torch; from mqinfer.tokenizer import hide_torch; hide_torch(); import torch.nn; print(torch.ones(1))"
    assert run(code) == "tensor([1.])\n"
