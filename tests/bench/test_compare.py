"""`bench compare`: engines in processes of their own, run by run in turn; what one does leaves the others alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.bench import compare, gguf_file, measure, worker
from runtime.bench.records import Report
from runtime.bench.worker import NotInstalled, PeerError, Worker
from runtime.checkpoint.gguf.file import GgufFile
from runtime.cli import main as cli

pytestmark = pytest.mark.newest_only  # about code of our own

PROMPT, TOKENS, REPEAT = 9, 6, 3

# Engines made of nothing: each token is the prompt's length plus its place, and every run is noted in a file.
FAKE = """
import os, time
LOG = {log!r}

class Engine:
    version = "fake 1.0"

    def load(self, options):
        self.name = options["name"]
        self.runs = 0

    def run(self, prompt, new_tokens, emit):
        self.runs += 1
        with open(LOG, "a") as log:
            log.write(self.name + "\\n")
        print("what a library prints must not end up between the answers")
        for index in range(new_tokens):
            time.sleep(0.001)
            emit(len(prompt) + index)
"""
OURS = """
    def audit(self):
        return {"passed": True, "verdict": "passed: as if"}
"""
REFUSED = """
    def audit(self):
        return {"passed": False, "verdict": "refused: 0 of 2 prompts equal"}
"""
DIES = """
    def load(self, options):
        os.write(2, b"a warning of long ago\\n")

    def run(self, prompt, new_tokens, emit):
        if prompt[0] >= 0:
            os.write(2, b"something burns\\n")
        os.kill(os.getpid(), 11)
"""
DIES_LATER = """
    honest = run

    def run(self, prompt, new_tokens, emit):
        self.honest(prompt, new_tokens, emit)
        if self.runs == 3:
            raise RuntimeError("out of\\nmemory")
"""
STOPS_EARLY = """
    honest = run

    def run(self, prompt, new_tokens, emit):
        self.honest(prompt, new_tokens - 1, emit)
"""
OTHER_TOKENS = """
    honest = run

    def run(self, prompt, new_tokens, emit):
        self.honest(prompt, new_tokens, lambda token: emit(token if token % 2 else 0))
"""


@pytest.fixture
def engines(tmp_path, monkeypatch, steady_ceiling):
    """A function that puts engines beside serve.py, {name: what is added to FAKE}, and the log of their runs."""
    log = tmp_path / "runs.log"
    shutil.copy(worker.PEERS / "serve.py", tmp_path)
    monkeypatch.setattr(worker, "PEERS", tmp_path)
    monkeypatch.setattr(compare, "SETTLE_S", 0.0)

    def make(**sources: str) -> Path:
        for name, added in sources.items():
            (tmp_path / f"{name}.py").write_text(FAKE.format(log=str(log)) + added)
        named = {"gemma-runtime" if name == "ours" else name: (name, {"name": name}) for name in sources}
        monkeypatch.setattr(compare, "ENGINES", named)
        return log

    return make


@pytest.fixture
def options(small_pair):
    """A small comparison of all engines that there are."""
    return Namespace(
        model=small_pair("gemma3").ours.name,
        device="cpu",
        dtype=["float32"],
        warmup=1,
        repeat=REPEAT,
        engines=None,
        peer=[],
        prompt_len=[PROMPT],
        gen_len=[TOKENS],
    )


def by_engine(rows):
    return {row.engine: row for row in rows}


def has_numbers(row):
    return any(value is not None for value in (row.ttft_ms, row.decode_tokens_per_s, row.achieved_gb_s, row.load_s))


def test_beside_hugging_face_every_token_is_equal_and_every_row_is_full(small_pair, tmp_path, capsys):
    model = small_pair("gemma3").ours
    kept = tmp_path / "compare.json"
    arguments = ["bench", "compare", "--model", model.name, "--device", "cpu", "--dtype", "float32"]
    arguments += ["--engines", "gemma-runtime,hf-dynamic,hf-static", "--prompt-len", str(PROMPT)]
    arguments += ["--gen-len", str(TOKENS), "--warmup", "0", "--repeat", "2", "--output", "json", "--json", str(kept)]
    assert cli.main(arguments) == 0
    report = Report.from_file(kept)
    assert json.loads(capsys.readouterr().out) == json.loads(kept.read_text())
    rows = by_engine(report.rows)
    assert list(rows) == ["gemma-runtime", "hf-dynamic", "hf-static"]
    for row in rows.values():
        assert (row.status, row.dtype, row.prompt_len, row.gen_len) == ("ok", "float32", PROMPT, TOKENS)
        assert row.equal_tokens == 1.0
        assert len(row.ttft_ms.values) == len(row.tpot_ms.values) == 2
        assert len(row.inter_token_ms.values) == 2 * (TOKENS - 1)
        assert row.bytes_per_step == model.plan.bytes_per_token(PROMPT + TOKENS // 2)
        assert row.load_s > 0 and row.first_call_s > 0 and row.peak_memory_mb > 0
        achieved = [row.bytes_per_step / spent / 1e6 for spent in row.tpot_ms.values]
        assert row.achieved_gb_s == pytest.approx(statistics.median(achieved))
    assert rows["gemma-runtime"].audit.passed
    assert rows["hf-dynamic"].audit is None and rows["hf-dynamic"].engine_version


def test_a_planted_fault_in_this_runtime_is_refused_and_nobody_gets_a_speed(engines, options, tmp_path):
    peers = Path(compare.__file__).parent / "peers"
    log = engines(ours="", peer="")
    (tmp_path / "ours.py").write_text(f"""
import dataclasses, runpy
from runtime.parity.faults import faulty_models

class Engine(runpy.run_path({str(peers / "ours.py")!r})["Engine"]):
    def load(self, options):
        super().load(options | {{"source": options["folder"]}})
        faulty = dict(faulty_models(self.model, 128))["rotary base 1 % too large"]
        self.model = dataclasses.replace(self.model, rope=faulty.rope)
""")
    rows = by_engine(compare.rows(options))
    ours = rows["gemma-runtime"]
    assert ours.status == "refused" and not ours.audit.passed and ours.reason == ours.audit.verdict
    assert rows["peer"].status == "skipped" and "gemma-runtime was refused" in rows["peer"].reason
    assert not any(map(has_numbers, rows.values()))
    assert not log.exists()


def test_the_audit_comes_after_the_first_calls_and_its_memory_does_not_count(engines, options):
    log = engines(
        ours="""
    def audit(self):
        self.ballast = bytes(range(256)) * 400_000
        with open(LOG, "a") as log:
            log.write("audit\\n")
        return {"passed": True, "verdict": "passed: as if"}
""",
        peer="",
    )
    rows = by_engine(compare.rows(options))
    assert log.read_text().split()[:5] == ["ours", "ours", "audit", "peer", "peer"]
    assert rows["gemma-runtime"].peak_memory_mb < rows["peer"].peak_memory_mb + 50


def test_runs_take_turns_and_no_engine_is_always_the_first(engines, options):
    log = engines(ours=OURS, one="", two="")
    rows = by_engine(compare.rows(options))
    assert all(len(row.ttft_ms.values) == REPEAT for row in rows.values())
    order = log.read_text().split()
    timed = order[3 * 2 :]  # behind the first call and the warm-up of each
    assert [timed[start : start + 3] for start in range(0, len(timed), 3)] == [
        ["ours", "one", "two"],
        ["one", "two", "ours"],
        ["two", "ours", "one"],
    ]


def test_a_peer_that_fails_has_its_reason_in_its_row_and_the_others_go_on(engines, options, tmp_path):
    engines(ours=OURS, dies=DIES, later=DIES_LATER, early=STOPS_EARLY, other=OTHER_TOKENS, good="")
    (tmp_path / "absent.py").write_text("import a_package_that_nobody_has\n")
    compare.ENGINES["absent"] = ("absent", {})
    compare.ENGINES["elsewhere"] = ("good", {})
    options.peer = [("elsewhere", str(tmp_path / "no" / "python"))]
    rows = by_engine(compare.rows(options))
    reasons = {name: (row.status, row.reason) for name, row in rows.items() if row.status != "ok"}
    assert reasons.keys() == {"dies", "later", "early", "absent", "elsewhere"}
    assert reasons["dies"] == ("crashed", "crashed: ended by SIGSEGV: something burns")
    assert reasons["later"] == ("crashed", "crashed: RuntimeError: out of memory")
    assert reasons["early"] == ("crashed", f"crashed: gave {TOKENS - 1} tokens, expected {TOKENS}")
    assert reasons["absent"][0] == "skipped" and "No module named 'a_package_that_nobody_has'" in reasons["absent"][1]
    assert reasons["elsewhere"][0] == "skipped" and "no interpreter" in reasons["elsewhere"][1]
    assert not any(has_numbers(rows[name]) for name in reasons)
    # 9, 10, 11, 12, 13, 14 against 9, 0, 11, 0, 13, 0
    assert {name: row.equal_tokens for name, row in rows.items() if row.status == "ok"} == {
        "gemma-runtime": 1.0,
        "other": 0.5,
        "good": 1.0,
    }
    assert rows["good"].ttft_ms.p50 >= 1.0 and len(rows["good"].ttft_ms.values) == REPEAT


@pytest.mark.parametrize("times", [0, 7])
def test_ctrl_c_keeps_what_was_measured_and_ends_every_worker(engines, options, monkeypatch, times):
    engines(ours=OURS, peer="")
    honest, runs, started = compare.Entry.run, [], []

    def run(entry, prompt, new_tokens, **told):
        if len(runs) == times:
            started.append(entry.worker._process)
            raise KeyboardInterrupt
        runs.append(entry.name)
        return honest(entry, prompt, new_tokens, **told)

    monkeypatch.setattr(compare.Entry, "run", run)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in compare.rows(options):
            rows.append(row)
    # Behind two calls each that do not count, round 1 runs both, round 2 (the peer first) ends after its first.
    assert {row.engine: len(row.ttft_ms.values) for row in rows} == ({"gemma-runtime": 1, "peer": 2} if times else {})
    assert all(row.reason == f"interrupted after {len(row.ttft_ms.values)} of {REPEAT} runs" for row in rows)
    assert started[0].poll() is not None


def test_each_size_and_dtype_has_its_rows(engines, options):
    engines(ours=OURS, peer="")
    options.dtype, options.prompt_len, options.repeat = ["float32", "bfloat16"], [4, 7], 1
    rows = list(compare.rows(options))
    assert [(row.dtype, row.prompt_len, row.engine) for row in rows] == [
        (dtype, length, engine)
        for dtype in ("float32", "bfloat16")
        for length in (4, 7)
        for engine in ("gemma-runtime", "peer")
    ]
    assert rows[0].bytes_per_step > rows[4].bytes_per_step


def test_exit_codes_tell_our_failures_from_a_peers(engines, options, capsys):
    arguments = ["bench", "compare", "--model", str(options.model), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--prompt-len", "4", "--gen-len", "3", "--repeat", "1"]
    engines(ours=OURS, dies=DIES)
    assert cli.main(arguments) == 0
    assert "crashed: ended by SIGSEGV" in capsys.readouterr().out
    engines(ours=REFUSED, peer="")
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "refused: 0 of 2 prompts equal" in out and "tg3" not in out
    engines(ours=OURS + DIES, peer="")
    assert cli.main(arguments) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "gemma-runtime,tgi"], "engine must be one of gemma-runtime, .* got 'tgi'"),
        (["--peer", "tgi=/usr/bin/python3"], "engine must be one of gemma-runtime, .* got 'tgi'"),
        (["--peer", "vllm"], "expected NAME=PYTHON, got 'vllm'"),
        (["--gen-len", "1"], "expected at least 2, got 1"),
        (["--prompt-len", "8,x"], "expected a whole number, got 'x'"),
        (["--dtype", "int8"], "got 'int8'"),
        (["--prompt-len", "600"], r"max_position_embeddings \(512\), got 664"),
        (["--json", "/no/such/folder/report.json"], "cannot write the report /no/such/folder/report.json"),
    ],
)
def test_bad_flags_end_with_one_line_and_exit_code_2(small_pair, arguments, message, capsys):
    name = small_pair("gemma3").ours.name
    capsys.readouterr()  # what making a model prints
    try:
        code = cli.main(["bench", "compare", "--model", name, *arguments])
    except SystemExit as stopped:
        code = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.search(message, line), line


def test_a_worker_answers_until_it_is_closed(engines):
    engines(good="")
    with Worker("good") as found:
        assert found.version == "fake 1.0"
        assert found.ask(load={"name": "good"})["load_s"] >= 0
        answer = found.ask(run={"prompt": [5, 5, 5], "new_tokens": 4})
        assert answer["tokens"] == [3, 4, 5, 6]
        assert answer["times_s"] == sorted(answer["times_s"]) and answer["times_s"][0] >= 0.001
        process = found._process
    assert process.poll() is not None


def test_an_idle_worker_does_not_spin(engines):
    engines(good="")
    with Worker("good") as found:
        found.ask(load={"name": "good"})
        stat = Path(f"/proc/{found._process.pid}/stat")

        def ticks() -> int:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            return int(user) + int(system)

        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 0.1 * os.sysconf("SC_CLK_TCK")


def test_a_worker_that_does_not_answer_is_given_up(engines):
    engines(hangs="\n    def run(self, prompt, new_tokens, emit):\n        time.sleep(60)\n")
    with Worker("hangs", timeout_s=10.0) as found:
        found.ask(load={"name": "hangs"})
        found._timeout_s = 0.2
        with pytest.raises(PeerError, match=r"no answer within 0 s"):
            found.ask(run={"prompt": [1], "new_tokens": 2})


def test_an_error_leaves_a_worker_usable(engines):
    engines(good="")
    with Worker("good") as found:
        with pytest.raises(PeerError, match="KeyError: 'name'"):
            found.ask(load={})
        assert found.ask(load={"name": "good"})["load_s"] >= 0


def test_only_what_an_engine_said_about_the_last_request_is_its_reason(engines):
    engines(dies=DIES)
    for prompt, reason in (([1], "ended by SIGSEGV: something burns"), ([-1], "ended by SIGSEGV")):
        with Worker("dies") as found:
            found.ask(load={})
            with pytest.raises(PeerError) as error:
                found.ask(run={"prompt": prompt, "new_tokens": 2})
        assert str(error.value) == reason


def test_a_package_that_is_not_there_is_not_a_crash(engines, tmp_path):
    engines()
    (tmp_path / "absent.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(NotInstalled, match="No module named 'a_package_that_nobody_has'"):
        Worker("absent")
    with pytest.raises(NotInstalled, match="no interpreter"):
        Worker("absent", str(tmp_path / "python"))


def test_peers_need_nothing_of_this_package():
    """Any interpreter will do: a peer's file imports the peer's packages and the standard library."""
    import ast

    folder = Path(compare.__file__).parent / "peers"
    allowed = {"serve": set(), "llama_cpp": {"llama_cpp"}, "vllm": {"vllm"}}
    allowed["openvino"] = {"openvino", "openvino_genai", "optimum", "numpy"}
    for name, packages in allowed.items():
        imported = set()
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
        assert imported - sys.stdlib_module_names == packages, name


def test_every_peer_says_what_to_install():
    """Into an environment of its own: OpenVINO's export takes no transformers that this package takes."""
    from packaging.requirements import Requirement

    for file, _ in compare.ENGINES.values():
        lines = worker.PEERS / f"{file}.txt"
        assert lines.is_file() is (file not in ("ours", "hugging_face")), file
        if lines.is_file():
            named = [Requirement(line) for line in lines.read_text().splitlines() if not line.startswith("#")]
            assert all(requirement.specifier for requirement in named) and named, file


def test_a_peer_that_is_not_installed_says_how_to_install_it(engines, tmp_path):
    engines(absent="\nimport no_such_engine\n")
    with pytest.raises(NotInstalled, match=r"No module named 'no_such_engine'$"):
        Worker("absent")
    (tmp_path / "absent.txt").write_text("no-such-engine>=1\n")
    with pytest.raises(NotInstalled, match=rf"\(pip install -r {tmp_path}/absent.txt, in an environment of its own"):
        Worker("absent")


# What llama.cpp takes for granted: a scale of 1 / sqrt(head_dim), and that Gemma 3's every sixth layer sees everything.
SAYABLE = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", SAYABLE)
def test_llama_cpp_is_given_the_same_weights(small_pair, family, dtype, tmp_path):
    pytest.importorskip("gguf", reason="needs the demo extra")
    model = small_pair(family, dtype, **SAYABLE[family]).ours
    gguf_file.check_expressible(model.config)
    gguf_file.write_gguf(model, tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    stored = {name: np.concatenate(list(file.rows(name))) for name in file.tensors}
    layers = model.weights.layers
    assert file.tensors["token_embd.weight"].ggml_type == ("F32" if dtype == torch.float32 else "BF16")
    assert np.array_equal(stored.pop("token_embd.weight"), model.weights.embedding.float())
    assert np.array_equal(stored.pop("output_norm.weight")[0], 1 + model.weights.final_norm.float())
    for index, layer in enumerate(layers):
        block = {name: stored.pop(name) for name in list(stored) if name.startswith(f"blk.{index}.")}
        found = {name.split(".")[2]: values for name, values in block.items()}
        qkv = np.concatenate([found.pop(f"attn_{part}") for part in "qkv"])
        gate_up = np.concatenate([found.pop("ffn_gate"), found.pop("ffn_up")])
        assert np.array_equal(qkv, layer.qkv.float()) and np.array_equal(gate_up, layer.gate_up.float())
        assert np.array_equal(found.pop("attn_output"), layer.output.float())
        assert np.array_equal(found.pop("ffn_down"), layer.down.float())
        norms = {"attn_norm": layer.attention_norm, "ffn_norm": layer.mlp_norm}
        norms |= {"post_attention_norm": layer.post_attention_norm, "post_ffw_norm": layer.post_mlp_norm}
        norms |= {"attn_q_norm": layer.q_norm, "attn_k_norm": layer.k_norm}
        given = {name: 1 + weight.float() for name, weight in norms.items() if weight is not None}
        assert found.keys() == given.keys()
        for name, weight in given.items():
            assert np.array_equal(found[name][0], weight), name
    assert not stored


def test_a_model_that_llama_cpp_would_take_for_another_is_skipped(small_pair, engines, options):
    engines(ours=OURS, llama_cpp="")
    rows = by_engine(compare.rows(options))  # its third layer of four looks at everything, and its scale is its own
    assert rows["llama_cpp"].status == "skipped"
    assert "a GGUF file cannot express this model's attention_scale, layers" in rows["llama_cpp"].reason
    with pytest.raises(ValueError, match=r"cannot express this model's attention_scale$"):
        gguf_file.check_expressible(small_pair("gemma2").ours.config)


def test_a_gguf_files_bytes_are_its_own(small_pair, tmp_path):
    """Counted by the package gguf; a table that is not the head is read a row at a time."""
    gguf = pytest.importorskip("gguf", reason="needs the demo extra")
    model = small_pair("gemma3", torch.bfloat16, **SAYABLE["gemma3"]).ours
    path = tmp_path / "model.gguf"
    gguf_file.write_gguf(model, path)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    file = gguf_file.own_file(str(path))
    assert file == gguf_file.OwnFile(path, "BF16", sum(tensors.values()))
    cached = measure.bytes_per_step(model.plan, [PROMPT], TOKENS) - model.plan.weights_read
    assert file.bytes_per_step(model.plan, "bfloat16", "float16", PROMPT, TOKENS) == file.weights_read + cached
    in_fp32 = small_pair("gemma3", torch.float32, **SAYABLE["gemma3"]).ours.plan
    assert file.bytes_per_step(in_fp32, "float32", "float16", PROMPT, TOKENS) == file.weights_read + cached

    writer = gguf.GGUFWriter(tmp_path / "untied.gguf", "gemma3")
    for name, kind in (("token_embd", np.float32), ("output", np.float16), ("output_norm", np.float32)):
        writer.add_tensor(f"{name}.weight", np.ones((7, 32) if "norm" not in name else 32, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    untied = gguf_file.own_file(str(tmp_path / "untied.gguf"))
    assert (untied.types, untied.weights_read) == ("F32, F16", 7 * 32 * 2 + 32 * 4)


def test_the_engines_of_gguf_files_run_them_as_they_are(engines, options, tmp_path, monkeypatch):
    loads = """
    def load(self, options):
        self.name, self.runs = " ".join(filter(None, map(options.get, ("quantize", "gguf", "dtype")))), 0
"""
    log = engines(ours=OURS + loads, llama_cpp=loads)
    compare.ENGINES[compare.AS_STORED] = compare.ENGINES.pop("llama_cpp")
    compare.ENGINES[compare.OUR_BLOCKS] = ("ours", {"quantize": "gguf"})
    of_files = [compare.AS_STORED, compare.OUR_BLOCKS]
    rows = by_engine(compare.rows(options))
    for name in of_files:
        assert rows[name].status == "skipped"
        assert f"expected a .gguf file or 'demo', got {options.model}" in rows[name].reason

    own = gguf_file.OwnFile(tmp_path / "model.gguf", "Q8_0, Q5_0", 10**6)
    monkeypatch.setattr(compare, "own_file", lambda source: own)
    options.dtype = ["float32", "bfloat16"]
    found = [(row.engine, row.dtype, row.bytes_per_step) for row in compare.rows(options)]
    ours, theirs, blocks, again = found
    assert [row[:2] for row in (theirs, blocks)] == [(name, "Q8_0, Q5_0") for name in of_files]
    cached = theirs[2] - 10**6
    assert 0 < cached < ours[2] and blocks[2] == 10**6 + 2 * cached, "the KV cache is in fp16 and in fp32"
    assert (ours[1], again[1]) == ("float32", "bfloat16"), "once, whatever the other engines' types are"
    options.engines = [compare.OUR_BLOCKS]
    (row,) = compare.rows(options)
    assert row.dtype == "Q8_0, Q5_0" and row.audit is not None and row.audit.passed
    lines = log.read_text().splitlines()
    assert {f"{own.path} float16", f"gguf {own.path} float32"} <= set(lines)


@pytest.mark.newest_only
def test_auto_is_a_dtype_beside_others_and_a_files_blocks_alone(engines, options, tmp_path, monkeypatch):
    """As `runtime.load` has it, except where values are compared: by engines on the same weights, by kernels."""
    pytest.importorskip("gguf", reason="needs the demo extra")
    from ..runtime.gguf_files import write_gguf

    monkeypatch.setenv("GEMMA_RUNTIME_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf")
    options.model, options.dtype = str(tmp_path / "m.gguf"), ["auto"]
    alone, _ = measure.load_model(options, "auto", 8, 1)
    values, _ = measure.load_model(options, "auto", 8, 1, needs_values=True)
    assert (measure.types_of(alone), measure.types_of(values)) == ("Q8_0", "bfloat16")
    engines(ours=OURS)
    (row,) = compare.rows(options)
    assert row.dtype == "bfloat16" and row.bytes_per_step > values.plan.weights_read > 1.8 * alone.plan.weights_read


def test_what_an_engine_exports_is_kept_for_the_next_time(engines, options, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_RUNTIME_CACHE", str(tmp_path / "cache"))
    exports = """
    def export(self, folder, target, dtype):
        assert os.path.isfile(os.path.join(folder, "config.json"))
        with open(os.path.join(target, "model.bin"), "a") as file:
            file.write(dtype)

    def load(self, options):
        with open(os.path.join(options["exported"], "model.bin")) as file:
            assert file.read() == options["dtype"]
        with open(LOG, "a") as log:
            log.write("loaded ")
        self.name, self.runs = options["name"], 0
"""
    log = engines(ours=OURS, openvino=exports)
    options.repeat = 1
    for _ in range(2):
        assert by_engine(compare.rows(options))["openvino"].status == "ok"
    assert log.read_text().count("loaded") == 2
    (kept,) = (tmp_path / "cache").glob("*/model.bin")
    assert kept.parent.name.startswith("fake-1.0-") and kept.read_text() == "float32"


def test_the_share_of_equal_tokens():
    assert compare.equal_share([1, 2, 3, 4], [1, 9, 3, 4]) == 0.75
    assert compare.equal_share([2, 1], [1, 2]) == 0.0
