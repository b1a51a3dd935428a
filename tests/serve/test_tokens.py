"""Text to ids and back, and the small paths beside."""

import pytest

import runtime

pytestmark = pytest.mark.newest_only


def test_a_text_and_a_conversation(client, model):
    ids = model.tokenizer.encode("the dog")
    answer = client.post("/tokenize", json={"prompt": "the dog", "return_token_strs": True}).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": 128,
        "tokens": ids,
        "token_strs": ["<bos>", *"the dog"],
    }
    assert client.post("/tokenize", json={"prompt": "the dog", "add_special_tokens": False}).json()["tokens"] == ids[1:]
    talk = [{"role": "user", "content": "the dog"}]
    assert client.post("/tokenize", json={"messages": talk}).json()["tokens"] == model.tokenizer.apply_chat(talk)
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "<bos>the dog"}


def test_what_is_no_text(client):
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, {"prompt": 1}, {"x": 1}):
        assert client.post("/tokenize", json=body).status_code == 400
    for tokens in ([-1], [10**6], ["a"], [10**30]):
        assert client.post("/detokenize", json={"tokens": tokens}).status_code == 400


def test_the_small_paths(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": runtime.__version__}
