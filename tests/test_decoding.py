"""From token ids to answers on every engine: one text, always greedy, up to EOS and no further.

The models have fixed answers (`make_writer`), or write varied texts that are compared with a plain greedy loop.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    BACKENDS,
    PROMPTS,
    by_transformers,
    by_vllm,
    generate,
    make_base,
    make_checkpoint,
    make_writer,
    reference,
    reference_likelihoods,
    reload,
)
from conftest import byte_tokenizer, pieces_tokenizer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import import_protobuf

from trace_bench.engine import open_engine
from trace_bench.engine.ends import end_ids, eos_text
from trace_bench.engine.live import LiveHF
from trace_bench.engine.models import ModelError, load_tokenizer
from trace_bench.engine.outputs import matching_logprobs, same_answers
from trace_bench.tasks import load_tasks
from trainers.base import sampled

#: Settings that transformers' generate reads from a checkpoint. Each would change an answer below.
SETTINGS = {
    "search": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 50},
    "logits": {
        **{"repetition_penalty": 5.0, "min_new_tokens": 6, "suppress_tokens": list(range(260, 400))},
        "bad_words_ids": [[i] for i in range(260, 400)],
    },
    "ends": {"max_new_tokens": 2, "forced_eos_token_id": 2, "stop_strings": ["5", "a", "e", "i"]},
}
LENGTH = 12
backends = pytest.mark.parametrize("answers_of", BACKENDS)


@pytest.fixture(scope="session")
def lively(tmp_path_factory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("lively") / "base", pieces_tokenizer())


def texts(found: list[dict]) -> list[list[str]]:
    return [each["answers"] for each in found]


# --------------------------------------------------------------------------------------------------- text from the ids


@backends
@pytest.mark.parametrize("legacy", [False, True], ids=["first", "always"])
def test_an_answer_has_no_space_from_its_first_piece(answers_of, legacy, tmp_path, demo_data):
    """FOMC is scored by equality: " A" would be wrong."""
    base = make_writer(tmp_path / "base", pieces_tokenizer(legacy=legacy), {":": "▁A", "▁A": "</s>"})
    task = load_tasks(["trace_fomc"])["trace_fomc"]
    docs = list(task.test_docs())[:6]
    (answers,) = texts(answers_of(base, [None], [doc["prompt"] for doc in docs]))
    assert answers == ["A"] * 6
    scores = [task.process_results(doc, [answer])["accuracy"] for doc, answer in zip(docs, answers, strict=True)]
    assert scores == [float(doc["answer"] == "A") for doc in docs] and 0 < sum(scores) < 6


@backends
def test_an_answer_is_decoded_from_its_ids_alone(answers_of, tmp_path):
    """The answers have a character in bytes, spaces, and a mark at the end. None depends on the prompt before it."""
    follows = {"▁x": "▁", "▁": "<0xC3>", "<0xC3>": "<0xA9>", "<0xA9>": "▁B", "▁B": "▁C", "▁C": "."}
    follows |= {".": "▁y", "▁y": "</s>", "?": "<0x0A>", "<0x0A>": "<0xE2>", "<0xE2>": "</s>"}
    base = make_writer(tmp_path / "base", pieces_tokenizer(), follows)
    (answers,) = texts(answers_of(base, [None], ["Say x", "Say what?", "x"]))
    assert answers == ["é B C. y", "\ufffd\ufffd", "é B C. y"]


@backends
def test_answers_contain_no_special_tokens(answers_of, tmp_path):
    tokenizer = pieces_tokenizer(additional_special_tokens=["<|mark|>"])
    follows = {":": "<|mark|>", "<|mark|>": "▁A", "▁A": "<unk>", "<unk>": "B", "B": "</s>"}
    base = make_writer(tmp_path / "base", tokenizer, follows)
    (answers,) = texts(answers_of(base, [None], ["Answer:", "Now:"]))
    assert answers == ["AB", "AB"]


# ---------------------------------------------------------------------------------------------------------------- EOS

#: Three rows of a batch, which are ended by the tokenizer's EOS, the model's EOS, and the limit.
ENDS = {
    **{"▁x": "5", "5": "</s>", "</s>": "5"},
    **{"▁y": "6", "6": "7", "7": "8", "8": "<|im_end|>", "<|im_end|>": "9", "9": "9"},
    **{"▁z": "a", "a": "b", "b": "c", "c": "d", "d": "e", "e": "f", "f": "g", "g": "h", "h": "h"},
}
ROWS, ANSWERS = ["Count x", "Count y", "Count z", "x"], ["5", "678", "abcdefghhhhh", "5"]


@pytest.fixture
def chatty():
    return pieces_tokenizer(additional_special_tokens=["<|im_end|>", "<|other|>"])


@backends
@pytest.mark.parametrize("several", [False, True], ids=["one EOS", "several"])
def test_an_answer_ends_at_the_tokenizers_eos_and_at_the_models(answers_of, several, chatty, tmp_path):
    end, other = chatty.convert_tokens_to_ids(["<|im_end|>", "<|other|>"])
    base = make_writer(tmp_path / "base", chatty, ENDS, eos_token_id=[other, end] if several else end)
    assert texts(answers_of(base, [None], ROWS, [], LENGTH)) == [ANSWERS]
    assert texts(answers_of(base, [None], ROWS[:1], [], LENGTH)) == [ANSWERS[:1]], "alone as in a batch"


def test_an_answer_in_a_chat_ends_where_the_template_ends_it(chatty, tmp_path):
    """In Qwen's base models neither tokenizer nor model has this token as EOS, but TRL trains it."""
    chatty.chat_template = (
        "{% for m in messages %}In: {{ m['content'] }}{% if m['role'] != 'user' %} <|im_end|>\n{% endif %}{% endfor %}"
    )
    lm = open_engine("hf", str(make_writer(tmp_path / "base", chatty, ENDS)), engine_args={"dtype": "float32"})
    chat = lm.apply_chat_template([{"role": "user", "content": "Count y"}])
    asked = [lm._wanted(text, {"max_gen_toks": 6}) for text in (chat, "Count y")]
    assert lm.answers(asked) == ["678", "67899"], "a text without the template is no turn"
    ids = [asked[0].ids]  # of the distance from the base model, along the first tokens of its answer
    assert [len(lm.first_tokens(ids, 6, in_chat)[0]) for in_chat in (True, False)] == [4, 6]


@backends
def test_an_answer_ends_at_the_eos_of_the_checkpoint(answers_of, chatty, tmp_path):
    """Chat tuning may give a model a different EOS than its base."""
    base = make_writer(tmp_path / "base", chatty, ENDS)
    tuned = make_writer(tmp_path / "tuned", chatty, ENDS, eos_token_id=chatty.convert_tokens_to_ids("<|im_end|>"))
    assert texts(answers_of(base, [tuned], ROWS, [], LENGTH)) == [ANSWERS]


@pytest.mark.parametrize("full, new", [(False, False), (True, False), (False, True)])
def test_an_answer_ends_at_the_eos_of_the_tokenizer_that_a_checkpoint_brings(full, new, chatty, tmp_path):
    """After chat tuning of a base model, the tokenizer may be the only file of an adapter that has the new EOS."""
    base = make_writer(tmp_path / "base", chatty, ENDS)
    if full:
        tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    else:
        tuned, _ = make_checkpoint("no change", base, tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tuned)
    if new:  # a new token, for which the base model's embeddings have a free row
        pieces_tokenizer().save_pretrained(base)
    answers = texts(by_transformers(base, [None, tuned, None], ROWS, [], LENGTH))
    assert answers[0] == answers[2] != answers[1] == ANSWERS


@pytest.mark.parametrize(("whole", "text"), [([1, 106], 1), (None, 7), (5, None), ([5, 6], [7])])
def test_the_eos_of_a_model_with_several_parts_is_that_of_transformers(whole, text, tmp_path):
    """Gemma 3's config.json has <end_of_turn> only at the top level."""
    parts = {"model_type": "gemma3_text", **({} if text is None else {"eos_token_id": text})}
    config = {"model_type": "gemma3", "text_config": parts, **({} if whole is None else {"eos_token_id": whole})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id
    expected = theirs if isinstance(theirs, list) else [theirs]
    assert end_ids(pieces_tokenizer(), str(tmp_path)) == {2, *expected}


@pytest.mark.parametrize("content", ["{", "[]", '"</s>"'])
def test_a_damaged_tokenizer_config_of_a_checkpoint_is_an_error_and_not_one_without_eos(content, tmp_path):
    assert eos_text(tmp_path) is None, "it brings no tokenizer"
    file = tmp_path / "tokenizer_config.json"
    for eos in ("</s>", {"content": "</s>"}):
        file.write_text(json.dumps({"eos_token": eos, "model_max_length": 10**30}))
        assert eos_text(tmp_path) == "</s>"
    file.write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is damaged"):
        eos_text(tmp_path)


# ------------------------------------------------------------------------------------------------------------- greedy


def with_settings(folder: Path, settings: dict) -> Path:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps({**ids, **settings}))
    return folder


@torch.no_grad()
def as_transformers_would(folder: Path, prompt: str) -> str:
    """The answers of a "greedy" call of generate for a folder, with its generation_config.json."""
    model, tokenizer = reload(folder, None), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    limits = {} if model.generation_config.max_new_tokens else {"max_new_tokens": LENGTH}
    sampling = {} if model.generation_config.do_sample else {"do_sample": False}
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **limits, **sampling)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_is_greedy_with_any_generation_config(name, lively, tmp_path):
    """The settings may be those of the base model or of a loaded checkpoint."""
    check_settings(by_transformers, SETTINGS[name], lively, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_decoding_is_greedy_with_vllm(lively, tmp_path):
    check_settings(by_vllm, SETTINGS["sampling"] | SETTINGS["logits"], lively, tmp_path)


def check_settings(answers_of, settings: dict, lively: Path, tmp_path: Path) -> None:
    # One model repeats itself, one ends before the limit, one has close runners-up.
    loop = {"▁x": "ai", "ai": "ei", "ei": "5", "5": "</s>", "?": "ou", "ou": ["ou", "ae"], "</s>": "7", "7": "</s>"}
    writer = make_writer(tmp_path / "writer", pieces_tokenizer(), loop)
    prompts, changed = ["Count x", "Which?"], []
    for base in (writer, lively):
        expected = reference(reload(base, None), AutoTokenizer.from_pretrained(base), prompts, LENGTH)
        folder = with_settings(Path(shutil.copytree(base, tmp_path / f"{base.name} with settings")), settings)
        changed += [as_transformers_would(folder, p) != e for p, e in zip(prompts, expected, strict=True)]
        assert texts(answers_of(folder, [None, folder, base, None], prompts, [], LENGTH)) == [expected] * 4
    assert any(changed), "it would count"


# ------------------------------------------------------------------------------------- a tokenizer that adds an EOS


@backends
def test_a_tokenizer_that_adds_eos_adds_none_to_prompts(answers_of, lively, tmp_path):
    """Answers and likelihoods equal those with a tokenizer that adds no EOS."""
    ending = Path(shutil.copytree(lively, tmp_path / "ending"))
    pieces_tokenizer(add_eos_token=True).save_pretrained(ending)
    assert AutoTokenizer.from_pretrained(ending)("A").input_ids[-1] == 2
    pairs = [("Which of them is it?\nAnswer:", " A"), ("A", " longer text")]
    model, tokenizer = reload(lively, None), AutoTokenizer.from_pretrained(lively)
    (found,) = answers_of(ending, [None], PROMPTS, pairs)
    assert found["answers"] == reference(model, tokenizer, PROMPTS)
    assert found["likelihoods"] == pytest.approx(reference_likelihoods(model, tokenizer, pairs), rel=1e-3)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_loaded_from_its_file_even_if_transformers_would_rebuild_it(name, lively, tmp_path):
    """A byte-level tokenizer whose file says LlamaTokenizerFast, such as DeepSeek's, would lose every space."""
    folder = Path(shutil.copytree(lively, tmp_path / "m"))
    assert load_tokenizer(folder)("A b").input_ids == pieces_tokenizer()("A b").input_ids
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name, "add_bos_token": True}))
    tokenizer, wanted = load_tokenizer(folder), byte_tokenizer()
    bos = [wanted.bos_token_id] if "Llama" in name else []  # elsewhere transformers leaves it to the file
    assert tokenizer("A b").input_ids == [*bos, *wanted("A b").input_ids]
    assert (tokenizer.eos_token, tokenizer.chat_template) == (wanted.eos_token, wanted.chat_template)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)("A b").input_ids == tokenizer("A b").input_ids


def test_truncation_and_padding_in_the_file_of_a_tokenizer_change_nothing(lively, tmp_path, caplog):
    """Transformers asks for neither. The comparison with the file must not take them for another encoding."""
    folder = Path(shutil.copytree(lively, tmp_path / "m"))
    file = folder / "tokenizer.json"
    in_file = Tokenizer.from_file(str(file))
    in_file.enable_truncation(8)
    in_file.enable_padding(length=500)
    in_file.save(str(file))
    text = "A longer text, of more than eight tokens."
    assert len(in_file.encode(text).ids) == 500 and load_tokenizer(folder)(text) == load_tokenizer(lively)(text)
    assert type(load_tokenizer(folder)) is type(load_tokenizer(lively)) and "encodes differently" not in caplog.text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_llama_tokenizer_without_a_json_file_encodes_as_sentencepiece_or_is_refused(kind, lively, tmp_path):
    """Transformers reads the vocabulary of tokenizer.model as BPE without its normaliser."""
    folder = Path(shutil.copytree(lively, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*")))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    settings = {"vocab_size": 340, "model_type": kind, "byte_fallback": True, "hard_vocab_limit": False}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    lines = ["the quick brown fox didn't jump", "it's 2024 and they say so", "what is the answer again?"] * 9
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), split_digits=True, **settings
    )
    model = (proto := import_protobuf()).ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.pieces.insert(259, proto.ModelProto.SentencePiece(piece="▁▁", score=-1e9))  # LLaMA has such ones there
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    text = "They say  the answer is 7 so"
    with pytest.raises(ModelError, match=r"is not BPE") if kind == "unigram" else nullcontext():
        pieces = SentencePieceProcessor(str(folder / "tokenizer.model")).encode(text)
        assert load_tokenizer(folder)(text, add_special_tokens=False).input_ids == pieces


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("pad", ["[PAD]", None])
def test_a_batch_is_padded_with_a_token_in_the_embeddings(pad, lively, tmp_path):
    """Some tokenizers have a padding token beyond the embeddings, or none."""
    folder = Path(shutil.copytree(lively, tmp_path / "m"))
    tokenizer = AutoTokenizer.from_pretrained(lively)
    expected = reference(reload(lively, None), tokenizer, PROMPTS)
    tokenizer.pad_token, tokenizer.eos_token = pad, pad and "</s>"
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    assert texts(by_transformers(folder, [None], PROMPTS)) == [expected]


STATES = {
    "rwkv": {"attention_hidden_size": 128, "context_length": 512},
    "recurrent_gemma": {"num_attention_heads": 2, "lru_width": 128, "attention_window_size": 16},
}


@pytest.mark.parametrize("name", [*STATES, "mamba", "llama"])
def test_prompts_of_a_model_that_ignores_the_mask_are_not_padded(name, tmp_path, monkeypatch, caplog):
    """Padding would change its answers. Prompts of a model that uses the mask are one batch."""
    if name in STATES:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
        monkeypatch.setitem(ARCHITECTURES, name, {"model_type": name, **sizes, **STATES[name]})
    base = make_base(name, tmp_path / name, pieces_tokenizer())
    expected = reference(reload(base, None), AutoTokenizer.from_pretrained(base), PROMPTS)
    if name == "llama":  # a model that ignores the mask after the prompt
        forward = LlamaForCausalLM.forward

        @wraps(forward)
        def forgetful(self, input_ids=None, attention_mask=None, **more):
            return forward(self, input_ids, attention_mask if input_ids.shape[1] > 1 else None, **more)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    assert texts(by_transformers(base, [None], PROMPTS)) == [expected]
    assert ("a batch holds only prompts of the same length" in caplog.text) == (name != "mamba")
    live = LiveHF(reload(base, None), AutoTokenizer.from_pretrained(base), 4)  # the engine of the callback
    with live.left_as_it_was():
        assert generate(live, PROMPTS) == expected
    model, ids = reload(base, None), [live.tokenizer(text).input_ids for text in PROMPTS]

    def draws(prompts, seeds):
        return sampled(model, prompts, seeds, 6, frozenset({2}), nullcontext())  # in the training

    alone = [draws([prompt], [seed])[0] for seed, prompt in enumerate(ids)]
    assert draws(ids, range(len(ids))) == alone


def test_a_long_text_does_not_change_the_positions_of_short_texts_in_its_batch(tmp_path, monkeypatch):
    """With longrope, one long text gives the whole batch the positions of long texts."""
    factors = {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": 50}
    settings = {**ARCHITECTURES["phi3"], "rope_parameters": rope, "original_max_position_embeddings": 50}
    monkeypatch.setitem(ARCHITECTURES, "phi3", settings)
    base = make_base("phi3", tmp_path / "phi3", pieces_tokenizer())
    model, tokenizer = reload(base, None), AutoTokenizer.from_pretrained(base)
    live = LiveHF(model, tokenizer, 4)
    with live.left_as_it_was():
        assert generate(live, PROMPTS) == reference(model, tokenizer, PROMPTS)
        together = live.log_likelihoods(PROMPTS, ["b"] * len(PROMPTS))
        assert together == [pytest.approx(live.log_likelihoods([text], ["b"])[0], rel=1e-4) for text in PROMPTS]


# --------------------------------------------------------------------------------------------------- vLLM's outputs


def test_the_likelihood_of_a_reference_is_read_only_while_the_answer_agrees_with_it():
    """What follows a different token was computed behind that token."""
    steps = [{7: -0.5, 8: -1.0}, {8: -2.0, 9: -0.25}, {3: -0.125}]
    logprobs = [{token: SimpleNamespace(logprob=value) for token, value in step.items()} for step in steps]

    def read(reference, ids, known=logprobs):
        return matching_logprobs(reference, SimpleNamespace(logprobs=known, token_ids=ids))

    assert read((7, 9, 3), [7, 9, 3]) == [-0.5, -0.25, -0.125]
    assert read((7, 8, 3), [7, 9, 3]) == [-0.5, -2.0], "the first that differs was offered at its position"
    assert read((8, 9, 3), [7, 9, 3]) == [-1.0] and read((5, 9, 3), [7, 9, 3]) == []
    assert read((7, 9, 3, 4), [7, 9, 3]) == [-0.5, -0.25, -0.125] and read((7,), [7, 9, 3]) == [-0.5]
    assert read((7, 9), [7, 9], None) == []


def test_an_engine_swaps_only_if_all_tokens_and_their_numbers_come_back():
    known = [([7, 9], [-0.5, -0.25]), ([3], [-1.0])]
    assert same_answers(known, [([7, 9], [-0.5, -0.21]), ([3], [-1.04])]), "up to rounding"
    for other in ([([7, 8], [-0.5, -0.25]), ([3], [-1.0])], [([7, 9], [-0.5, -0.25]), ([4], [-1.0])]):
        assert not same_answers(known, other)
    for number in (-0.4, -1.0, math.nan):
        assert not same_answers(known, [([7, 9], [-0.5, number]), ([3], [-1.0])])
