"""Programs that speak to OpenAI's API, against a server of our own: LangChain, LlamaIndex, lm-evaluation-harness, and
schemathesis, which sends what the server's own schema allows and what it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

import runtime

from .conftest import NAME, listening, serving

pytestmark = [pytest.mark.serve, pytest.mark.newest_only]

TALK = [("user", "go")]
MESSAGES = [{"role": "user", "content": "go"}]


class Turn(pydantic.BaseModel):
    """Turns."""

    left: bool


@pytest.fixture(scope="module")
def server(tool_model):
    with listening(tool_model) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        yield server


class TestLangChain:
    @pytest.fixture
    def chat(self, server):
        openai = pytest.importorskip("langchain_openai", reason="needs the extra clients")
        return openai.ChatOpenAI(
            model=NAME, base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=20, max_retries=0
        )

    def test_whole_and_streamed(self, chat, tool_model):
        expected = runtime.chat(tool_model, MESSAGES, max_new_tokens=20)
        answer = chat.invoke(TALK)
        assert answer.content == expected.text
        assert answer.usage_metadata["output_tokens"] == len(expected.token_ids)
        assert "".join(part.content for part in chat.stream(TALK)) == expected.text
        assert [one.content for one in chat.batch([TALK] * 5)] == [expected.text] * 5

    def test_tools_and_structured_output(self, chat):
        with_tools = chat.bind_tools([Turn], tool_choice="Turn").bind(max_tokens=100)
        (call,) = with_tools.invoke(TALK).tool_calls
        assert call["name"] == "Turn" and isinstance(call["args"]["left"], bool)
        for method in ("json_schema", "function_calling"):
            structured = chat.model_copy(update={"max_tokens": 100}).with_structured_output(Turn, method=method)
            assert isinstance(structured.invoke(TALK), Turn)

    def test_completions(self, server, tool_model):
        from langchain_openai import OpenAI

        model = OpenAI(model=NAME, base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=8)
        expected = runtime.generate(tool_model, "the dog", max_new_tokens=8)
        assert model.invoke("the dog") == expected.text
        assert "".join(model.stream("the dog")) == expected.text


class TestLlamaIndex:
    @pytest.fixture
    def model(self, server):
        like = pytest.importorskip("llama_index.llms.openai_like", reason="needs the extra clients")
        return lambda is_chat: like.OpenAILike(
            model=NAME,
            api_base=f"{server.url}/v1",
            api_key="none",
            is_chat_model=is_chat,
            is_function_calling_model=is_chat,
            context_window=256,
            max_tokens=20,
            temperature=0,
        )

    def test_chat(self, model, tool_model):
        from llama_index.core.llms import ChatMessage

        expected = runtime.chat(tool_model, MESSAGES, max_new_tokens=20)
        asked = [ChatMessage(role="user", content="go")]
        assert model(True).chat(asked).message.content == expected.text
        assert [part.message.content for part in model(True).stream_chat(asked)][-1] == expected.text

    def test_completions(self, model, tool_model):
        expected = runtime.generate(tool_model, "the dog", max_new_tokens=20)
        assert model(False).complete("the dog").text == expected.text
        assert [part.text for part in model(False).stream_complete("the dog")][-1] == expected.text


EVAL = Path(__file__).parents[1] / "eval"


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval(server, tool_folder, kind, monkeypatch, tmp_path):
    """Choices by log probability, and answers until a stop string, as the harness scores the model in its process."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra clients")
    from lm_eval.tasks import TaskManager

    import runtime.lm_eval  # noqa: F401  (it registers the model)

    for name, value in {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(EVAL)  # the tasks name their files without a folder
    chats = kind == "local-chat-completions"
    tasks = ["gemma_runtime_until"] if chats else ["gemma_runtime_until", "gemma_runtime_choice"]
    manager = TaskManager(include_path=str(EVAL), include_defaults=False)

    def results(model, arguments, **options):
        options |= {"tasks": tasks, "task_manager": manager, "batch_size": 1, "bootstrap_iters": 0}
        return lm_eval.simple_evaluate(model, arguments, apply_chat_template=chats, **options)["results"]

    arguments = {
        "model": NAME,
        "base_url": f"{server.url}/v1/{'chat/' * chats}completions",
        "num_concurrent": 4,
        "tokenizer_backend": None if chats else "huggingface",
        "tokenizer": None if chats else str(tool_folder),
        "tokenized_requests": False,
        "max_length": 256,
    }
    own = {"pretrained": str(tool_folder), "max_length": 256}
    assert results(kind, arguments) == results("gemma-runtime", own, device="cpu")


def test_spans(tool_model, monkeypatch):
    """Of FastAPI's own making: a request has one, which holds nothing of its body."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra clients")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with serving(tool_model) as client:
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        client.post("/v1/completions", json={"prompt": "the dog", "max_tokens": 2}, headers=headers)
    spans = [span for span in exporter.get_finished_spans() if "/v1/completions" in span.name]
    assert spans, [span.name for span in exporter.get_finished_spans()]
    assert f"{spans[0].context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert "the dog" not in json.dumps([dict(span.attributes) for span in exporter.get_finished_spans()])


def test_schemathesis(server, tmp_path):
    """No answer of 5xx, and none that the schema does not have, whatever is sent."""
    pytest.importorskip("schemathesis", reason="needs the extra clients")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks]
    options = [
        "--max-examples",
        "40",
        "--seed",
        "1",
        "--workers",
        "2",
        "--request-timeout",
        "60",
        "--suppress-health-check",
        "all",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout[-1500:])
    assert not server.service.admission.answers
