"""Folders in compressed-tensors', GPTQ's and AWQ's integers: exactly the values of each format's formula, Hugging
Face's tokens on them, and whatever else is in such a folder refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime.api import Model, load
from runtime.checkpoint.cache import CACHE_ENV
from runtime.checkpoint.containers import packed_tensor
from runtime.checkpoint.containers.folder import FolderCheckpoint
from runtime.cli.main import main
from runtime.cost import info
from runtime.errors import CheckpointError, InvalidArgument
from runtime.hugging_face.shared_weights import named_weights
from runtime.kernels.quantized import QuantizedMatrix
from runtime.loading import resolve

from . import container_files
from .container_files import Packed, Variant, changed, pack_model, save_plain_model

pytestmark = pytest.mark.newest_only  # about code of our own

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj."
LIMITS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "progress": False}
VARIANTS = {  # and the blocks that have their values
    Variant("pack"): "Q4_0_BF16",
    Variant("pack", group=128, scales="F16"): "Q4_0",
    Variant("pack", group=None): "Q4_0_BF16",
    Variant("pack", group=64, symmetric=False): "Q5_0_BF16",
    Variant("pack", 8, None): "INT8",
    Variant("pack", 8, 128): "Q8_0_BF16",
    Variant("naive", 8, None, scales="F32"): "INT8",
    Variant("gptq", scales="F16"): "Q4_0",
    Variant("gptq", group=128): "Q4_0_BF16",
    Variant("gptq", symmetric=False, scales="F16"): "Q5_0",
    Variant("gptq_v2", group=64, symmetric=False, scales="F16"): "Q5_0",
    Variant("gptq", 8, 32, scales="F16"): "Q8_0",
    Variant("gptq", 8, None, scales="F16"): "INT8",
    Variant("awq", scales="F16"): "Q4_0",
    Variant("awq", group=128, symmetric=False, scales="F16"): "Q5_0",
    Variant("awq", group=None, symmetric=False): "Q5_0_BF16",
}
BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}  # of 32 weights


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that writes (once) a small model of a family as values."""
    made: dict[str, Path] = {}

    def make(family: str = "gemma3") -> Path:
        return made.get(family) or made.setdefault(family, save_plain_model(family, tmp_path_factory.mktemp(family)))

    return make


@pytest.fixture
def pack(plain: Callable[[str], Path]) -> Callable[..., Packed]:
    return lambda variant, family="gemma3", **options: pack_model(plain(family), variant, **options)


def assert_holds(model: Model, packed: Packed) -> None:
    """That a model has exactly the values of what is stored, and no others."""
    weights = {name: value for name, value in named_weights(model).items() if name != HEAD or name in packed.values}
    assert weights.keys() == packed.values.keys()
    for name, expected in packed.values.items():
        np.testing.assert_array_equal(weights[name].numpy(), expected, err_msg=name)  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_and_bytes(
    pack: Callable[..., Packed], tmp_path: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_tensor, "SLICE", 1500)  # some rows at a time, and the last ones fewer
    packed = pack(variant)
    model = load(packed.write(tmp_path / "m"), **LIMITS)
    assert_holds(model, packed)
    form = VARIANTS[variant]
    assert (model.runtime.quantize, model.dtype) == (variant.container, torch.float32)
    assert model.weights.formats == f"BF16 + {form}" and model.weights.embedding.formats == "BF16"  # type: ignore[union-attr]
    integers = {name: value for name, value in packed.values.items() if "_proj" in name}
    per_row = {name: value.size + 4 * len(value) for name, value in integers.items()}
    per_block = {name: value.size // 32 * BLOCK_BYTES.get(form[:4], 0) for name, value in integers.items()}
    norms = sum(value.size for name, value in packed.values.items() if name not in integers and name != EMBEDDING)
    dense = 4 * norms + 2 * packed.values[EMBEDDING].size
    expected = dense + sum((per_row if form == "INT8" else per_block).values())
    assert model.plan.weights == model.weights.nbytes == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_of_any_integers_zeros_and_scales(
    pack: Callable[..., Packed], tmp_path: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of 0, of either sign, subnormal and huge; as blocks and as values."""
    draw, dtype = np.random.default_rng(0), container_files.DTYPES[variant.scales]
    limits, top = torch.finfo(dtype), 2**variant.bits
    huge = min(limits.max, 0.9 * torch.finfo(torch.float32).max / top)

    def anything(values: np.ndarray, _: Variant) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        shape = len(values), values.shape[1] // (variant.group or values.shape[1])
        zero = np.full(shape, top // 2) if variant.symmetric else draw.integers(0, top, shape)
        size = draw.choice([0, -0.0, 1, -1, limits.tiny / 16, -limits.tiny / 5, huge, -huge], shape)
        scale = torch.from_numpy(size * draw.uniform(0.5, 1, shape)).to(dtype)
        return draw.integers(0, top, values.shape), np.maximum(zero, variant.kind == "gptq"), scale

    monkeypatch.setattr(container_files, "quantised", anything)
    packed = pack(variant)
    assert_holds(load(packed.write(tmp_path / "m"), **LIMITS), packed)
    tensors = FolderCheckpoint(tmp_path / "m", in_blocks=False).tensors
    for name, expected in packed.values.items():
        np.testing.assert_array_equal(torch.cat(list(tensors[name].rows())).numpy(), expected, err_msg=name)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("gemma3", Variant("pack", group=128)),
        ("gemma2", Variant("gptq", symmetric=False, scales="F16")),
        ("gemma", Variant("awq", group=64, symmetric=False, scales="F16")),
    ],
    ids=str,
)
def test_tokens_are_hugging_faces_on_the_values(
    pack: Callable[..., Packed], tmp_path: Path, family: str, variant: Variant
) -> None:
    packed = pack(variant, family)
    folder = packed.write(tmp_path / "m")
    ids = list(range(5, 30))
    expected = tokens_on_values(packed, tmp_path / "values", ids, 12)
    assert len(set(expected)) > 4
    for options in ({}, {"interface": "hf", "dtype": "float32"}):  # in blocks by plain steps, and as values
        model: Any = load(folder, eager=True, **LIMITS | options)
        if options:
            out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert out[0, len(ids) :].tolist() == expected and not model.gemma_runtime.weights.formats
        else:
            assert list(runtime.generate(model, ids, max_new_tokens=12, ignore_eos=True).token_ids) == expected
            assert isinstance(model.weights.layers[0].down, QuantizedMatrix)


def tokens_on_values(packed: Packed, folder: Path, ids: list[int], count: int) -> list[int]:
    """Hugging Face's greedy tokens in fp32, on the values as a checkpoint of their own."""
    import transformers

    config = {name: value for name, value in packed.config.items() if name != "quantization_config"}
    Packed(config, {name: torch.from_numpy(value) for name, value in packed.values.items()}).write(folder)
    attention = "eager" if config["model_type"] == "gemma2" else "sdpa"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    prompt = torch.tensor([ids])
    out = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(ids) :].tolist()


def test_another_dtype_gets_values_rounded_to_it(pack: Callable[..., Packed], tmp_path: Path) -> None:
    packed = pack(Variant("gptq"))
    model = load(packed.write(tmp_path / "m"), dtype="bf16", **LIMITS)
    assert model.runtime.quantize is None and model.dtype == torch.bfloat16 and model.weights.formats == ""
    for name, value in packed.values.items():
        assert torch.equal(named_weights(model)[name], torch.from_numpy(value).bfloat16()), name  # type: ignore[arg-type]
    assert model.plan.weights == model.weights.nbytes
    with_hf = load(tmp_path / "m", interface="hf", **LIMITS)  # which needs values: in the checkpoint's dtype
    assert with_hf.dtype == torch.bfloat16 and not hasattr(with_hf.config, "quantization_config")


def test_a_model_of_such_a_folder_is_loaded_again(pack: Callable[..., Packed], tmp_path: Path) -> None:
    packed = pack(Variant("awq"))
    model = load(packed.write(tmp_path / "m"), **LIMITS)
    again = pickle.loads(pickle.dumps(model))
    assert_holds(again, packed)
    assert again.runtime == model.runtime and again.runtime.quantize == "awq"
    with pytest.raises(InvalidArgument, match=r"quantize='gptq' takes a folder that is quantised so, got .*m$"):
        load(tmp_path / "m", quantize="gptq", **LIMITS)


def test_it_can_be_quantised_further(
    pack: Callable[..., Packed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As int4 its matrices, which lie on a grid of Q4_0, come back bit for bit; the embedding becomes int8."""
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    packed = pack(Variant("pack"))
    model = load(packed.write(tmp_path / "m"), quantize="int4", **LIMITS)
    assert model.weights.formats == "INT8 + Q4_0" and model.weights.embedding.formats == "INT8"  # type: ignore[union-attr]
    packed.values[EMBEDDING] = model.weights.embedding.dequantized().numpy()  # type: ignore[operator]
    assert_holds(model, packed)
    name = f"{DOWN}weight_scale"
    packed.tensors[name] = packed.tensors[name] * 2
    load(packed.write(tmp_path / "m"), quantize="int4", **LIMITS)
    assert len(list((tmp_path / "cache").glob("int4-*/"))) == 2


def test_the_same_files_read_otherwise_are_not_found_in_the_cache(
    pack: Callable[..., Packed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    packed = pack(Variant("gptq", symmetric=False))
    first = load(packed.write(tmp_path / "m"), quantize="int8", **LIMITS)
    packed.config = changed(packed.config, checkpoint_format="gptq_v2")
    other = load(packed.write(tmp_path / "m"), quantize="int8", **LIMITS)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "empty"))
    expected = load(tmp_path / "m", quantize="int8", **LIMITS)
    name = f"{DOWN}weight"
    before, after, anew = (named_weights(model)[name] for model in (first, other, expected))
    assert torch.equal(after, anew) and not torch.equal(after, before)  # type: ignore[arg-type]


def test_tables_in_integers_are_tied_or_not(pack: Callable[..., Packed], tmp_path: Path) -> None:
    packed = pack(Variant("pack", 8, None), is_packed=lambda name: "norm" not in name)
    model = load(packed.write(tmp_path / "tied"), **LIMITS)
    assert_holds(model, packed)
    assert model.config.tied and model.weights.head is model.weights.embedding
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        packed.tensors[f"lm_head.{part}"] = packed.tensors[f"model.embed_tokens.{part}"].clone()
    assert load(packed.write(tmp_path / "equal"), **LIMITS).config.tied
    packed.tensors["lm_head.weight_scale"] *= 2
    packed.values[HEAD] = packed.values[EMBEDDING] * 2
    model = load(packed.write(tmp_path / "other"), **LIMITS)
    assert_holds(model, packed)
    assert not model.config.tied and model.weights.formats == "INT8" and model.plan.weights == model.weights.nbytes
    # A head of values beside a table of integers is another one.
    packed.tensors = {name: tensor for name, tensor in packed.tensors.items() if not name.startswith("lm_head")}
    packed.tensors[HEAD] = torch.from_numpy(packed.values[HEAD])
    model = load(packed.write(tmp_path / "values"), **LIMITS)
    assert_holds(model, packed)
    assert not model.config.tied and isinstance(model.weights.head, torch.Tensor)


def test_matrices_that_are_values_stay_so(
    pack: Callable[..., Packed], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone, or packed with others."""
    caplog.set_level("INFO", "gemma_runtime")
    packed = pack(Variant("gptq"), is_packed=lambda name: "_proj" in name and "1.self_attn.k_proj" not in name)
    packed.config["quantization_config"]["modules_in_block_to_quantize"] = [["self_attn.q_proj"]]
    model = load(packed.write(tmp_path / "m"), **LIMITS)
    assert_holds(model, packed)
    first, second = model.weights.layers
    assert isinstance(first.qkv, QuantizedMatrix) and isinstance(second.qkv, torch.Tensor)
    assert isinstance(second.down, QuantizedMatrix) and model.plan.weights == model.weights.nbytes
    assert "3 matrices are kept as values: stored as or packed with BF16" in caplog.text


def test_multimodal_names_shards_and_widths_that_kernels_do_not_take(tmp_path: Path) -> None:
    folder = save_plain_model("gemma3", tmp_path / "plain", intermediate_size=96)
    packed = pack_model(folder, Variant("awq", scales="F16"))
    names = {name: f"language_model.{name}" for name in packed.tensors}
    packed.tensors = {names[name]: tensor for name, tensor in packed.tensors.items()}
    packed.tensors["vision_tower.encoder.k_proj.qweight"] = torch.zeros(3, 3, dtype=torch.int32)
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(packed.tensors.items())):
        shards[number % 2][name] = tensor
    places = {}
    for number, tensors in enumerate(shards):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        Packed(packed.config, tensors).write(tmp_path / "m")
        (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / file)
        places |= dict.fromkeys(tensors, file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model = load(tmp_path / "m", **LIMITS)
    assert_holds(model, packed)
    assert isinstance(model.weights.layers[0].down, torch.Tensor)  # 96 columns
    assert isinstance(model.weights.layers[0].gate_up, QuantizedMatrix)


def test_the_command_line(
    pack: Callable[..., Packed], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "read_bandwidth_gb_s", lambda _: 10.0)
    folder = pack(Variant("gptq")).write(tmp_path / "m")
    page = info.gather(str(folder), device="cpu", max_seq_len=64)
    plan = resolve(folder, **LIMITS).plan
    assert page.weights == plan.weights and page.ceilings[0].bytes_per_token == plan.bytes_per_token(1)
    assert main(["info", str(folder), "--device", "cpu"]) == 0
    assert "float32, matrices in gptq's integers\n" in capfd.readouterr().out


# What is refused


WEIGHTS = ("config_groups", "group_0", "weights")
GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("pack", ("quant_method",), "bitsandbytes", "got 'bitsandbytes', NF4 or LLM.int8() weights"),
        ("pack", ("quant_method",), "fp8", "got 'fp8', float8 weights"),
        ("pack", ("quant_method",), "hqq", "got 'hqq', HQQ weights"),
        ("pack", ("quant_method",), "new", "must be one of ('compressed-tensors', 'gptq', 'awq'), got 'new'"),
        ("pack", ("quant_method",), ["awq"], "('compressed-tensors', 'gptq', 'awq'), got ['awq']"),
        ("pack", ("format",), ["pack-quantized"], "quantization_config.format must be one of"),
        ("pack", ("quant_method",), None, "('compressed-tensors', 'gptq', 'awq'), got None"),
        ("pack", ("format",), "nvfp4-pack-quantized", "(nvfp4-pack-quantized has NVFP4 weights)"),
        ("pack", ("format",), "float-quantized", "(float-quantized has float8 weights)"),
        ("pack", ("format",), "marlin-24", "2:4 sparse weights in Marlin's order"),
        ("pack", ("format",), "mixed-precision", "matrices in several formats"),
        ("pack", ("format",), None, "quantization_config.format must be one of"),
        ("pack", ("kv_cache_scheme",), {"num_bits": 8}, "quantization_config.kv_cache_scheme must be None"),
        ("pack", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config must be absent or"),
        ("pack", ("transform_config",), {"config_groups": {}}, "quantization_config.transform_config must be None"),
        ("pack", ("rounding",), "up", "quantization_config.rounding must be absent: it is not known here, got 'up'"),
        ("pack", ("config_groups",), {}, "quantization_config.config_groups must be one group, got {}"),
        ("pack", ("config_groups",), {"W4A16": ["Linear"]}, "config_groups.W4A16 must be an object, got ['Linear']"),
        ("pack", (*GROUP, "input_activations"), {"num_bits": 8}, "group_0.input_activations must be None"),
        ("pack", (*GROUP, "format"), "naive-quantized", "group_0.format must be 'pack-quantized'"),
        ("pack", (*GROUP, "weights"), None, "group_0.weights must be an object, got None"),
        ("pack", (*WEIGHTS, "num_bits"), 3, "weights.num_bits must be 4 or 8 (nothing else is supported), got 3"),
        ("pack", (*WEIGHTS, "type"), "float", "weights.type must be 'int'"),
        ("pack", (*WEIGHTS, "strategy"), "tensor", "weights.strategy must be 'group' or 'channel'"),
        ("pack", (*WEIGHTS, "group_size"), 48, "weights.group_size must be a multiple of 32, got 48"),
        ("pack", (*WEIGHTS, "actorder"), "group", "weights.actorder must be None or False or 'weight' or 'static'"),
        ("pack", (*WEIGHTS, "dynamic"), True, "weights.dynamic must be False or None"),
        ("pack", (*WEIGHTS, "block_structure"), [128, 128], "weights.block_structure must be None"),
        ("naive", (*WEIGHTS, "symmetric"), False, "weights.symmetric must be true with 8 bits, got False"),
        ("naive", (*WEIGHTS, "num_bits"), 4, "weights.num_bits must be 8"),
        ("gptq", ("bits",), 3, "quantization_config.bits must be 4 or 8"),
        ("gptq", ("desc_act",), True, "quantization_config.desc_act must be False or None"),
        ("gptq", ("group_size",), 16, "quantization_config.group_size must be a multiple of 32 or -1, got 16"),
        ("gptq", ("group_size",), None, "quantization_config.group_size must be a multiple of 32 or -1, got None"),
        ("gptq", ("checkpoint_format",), "marlin", "checkpoint_format must be 'gptq' or 'gptq_v2'"),
        ("gptq", ("format",), "gptq_v2", "quantization_config.format must be 'gptq', as checkpoint_format"),
        ("gptq", ("is_marlin_format",), True, "quantization_config.is_marlin_format must be False or None"),
        ("gptq", ("dynamic",), {"+:.*k_proj": {"bits": 8}}, "quantization_config.dynamic must be None or {}"),
        ("gptq", ("pack_dtype",), "int64", "quantization_config.pack_dtype must be 'int32' or None"),
        ("awq", ("version",), "gemv", "quantization_config.version must be 'gemm'"),
        ("awq", ("version",), 3, "quantization_config.version must be 'gemm', got 3"),
        ("awq", ("bits",), 8, "quantization_config.bits must be 4"),
        ("awq", ("zero_point",), "yes", "quantization_config.zero_point must be True or False"),
        # Two names for one thing.
        ("awq", ("w_bit",), 8, "quantization_config.w_bit must be 4"),
        ("awq", ("q_group_size",), 64, "quantization_config.q_group_size must be 32, as group_size, got 64"),
        ("awq", ("q_group_size",), 4, "quantization_config.q_group_size must be a multiple of 32 or -1, got 4"),
        ("gptq", ("group_size",), -1.0, "quantization_config.group_size must be a multiple of 32 or -1, got -1.0"),
        # Names that are no names.
        ("gptq", ("a\nb",), 1, r"quantization_config.a\nb must be absent: it is not known here, got 1"),
        ("pack", ("x" * 500,), 1, "x must be absent: it is not known here, got 1"),
        ("pack", ("config_groups",), {"a\nb": 3}, r"quantization_config.config_groups.a\nb must be an object, got 3"),
    ],
)
def test_configs(
    pack: Callable[..., Packed],
    tmp_path: Path,
    kind: str,
    path: tuple[str, ...],
    value: object,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.loading.FolderCheckpoint", lambda *_, **__: pytest.fail("looked for tensors"))
    config = copy.deepcopy(pack(Variant(kind, 8, None) if kind == "naive" else Variant(kind)).config)
    *parents, name = path
    fields = config["quantization_config"]
    for parent in parents:
        fields = fields[parent]
    fields[name] = value
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        resolve(Packed(config, {}).write(tmp_path / "m"), **LIMITS)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_config_without_its_tensors(plain: Callable[[str], Path], tmp_path: Path) -> None:
    packed = pack_model(plain("gemma3"), GPTQ, is_packed=lambda name: False)
    with pytest.raises(CheckpointError, match=r"quantization_config says gptq, but all tensors are values: .*m$"):
        resolve(packed.write(tmp_path / "m"), **LIMITS)


@pytest.mark.parametrize(("kind", "part"), [("gptq", "qweight"), ("pack", "weight_packed")])
def test_tensors_without_their_config(pack: Callable[..., Packed], tmp_path: Path, kind: str, part: str) -> None:
    packed = pack(Variant(kind))  # as in old folders, which have it in quantize_config.json
    del packed.config["quantization_config"]
    message = rf"config.json must have a quantization_config beside tensor .*_proj\.{part}: .*m$"
    with pytest.raises(CheckpointError, match=message):
        resolve(packed.write(tmp_path / "m"), **LIMITS)


@pytest.mark.parametrize("given", ["gptq", [], 4], ids=str)
def test_a_config_that_is_no_object(pack: Callable[..., Packed], tmp_path: Path, given: object) -> None:
    config = pack(Variant("gptq")).config | {"quantization_config": given}
    with pytest.raises(CheckpointError, match=r"quant_method must be one of .*, got "):
        resolve(Packed(config, {}).write(tmp_path / "m"), **LIMITS)


def _drop(part: str) -> Callable[[Packed], Any]:
    return lambda packed: packed.tensors.pop(DOWN + part)


def _put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Packed], Any]:
    return lambda packed: packed.tensors.update({DOWN + part: change(packed.tensors[DOWN + part])})


def _set(part: str, value: float) -> Callable[[Packed], Any]:
    """The last element of a tensor."""
    return lambda packed: packed.tensors[DOWN + part].contiguous().view(-1).__setitem__(-1, value)


def _add(name: str, tensor: torch.Tensor) -> Callable[[Packed], Any]:
    return lambda packed: packed.tensors.update({name: tensor})


def _config(**fields: Any) -> Callable[[Packed], Any]:
    return lambda packed: setattr(packed, "config", changed(packed.config, **fields))


PACK, GPTQ, AWQ = Variant("pack"), Variant("gptq"), Variant("awq", symmetric=False)
NAIVE = Variant("naive", 8, None)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (PACK, _drop("weight_shape"), "tensor {}weight_shape is missing"),
        (PACK, _drop("weight_scale"), "tensor {}weight_scale is missing"),
        (PACK, _drop("weight_packed"), "tensor {}weight_packed is missing"),
        (PACK, _add(f"{DOWN}weight", torch.zeros(128, 256)), "tensor {}weight is stored twice, as values and as "),
        (PACK, _add(f"{DOWN}weight_zero_point", torch.zeros(2)), "tensor {}weight_zero_point is not part of"),
        (PACK, _add(f"{DOWN}weight_g_idx", torch.zeros(256)), "tensor {}weight_g_idx is not part of this model"),
        (PACK, _add(f"{DOWN}input_scale", torch.zeros(1)), "tensor {}input_scale is not part of this model"),
        (PACK, _put("weight_packed", lambda t: t[:, 1:]), "{}weight_packed must have shape [128, 32], got [128, 31]"),
        (PACK, _put("weight_packed", lambda t: t.long()), "{}weight_packed is stored as I64, expected I32"),
        (PACK, _put("weight_scale", lambda t: t[:, :4]), "{}weight_scale must have shape [128, 8], got [128, 4]"),
        (PACK, _put("weight_scale", lambda t: t.float()), "{}weight_scale is stored as F32, expected BF16 or F16"),
        (PACK, _put("weight_shape", lambda t: t.flip(0)), "{}weight_shape must hold [128, 256], got [256, 128]"),
        (PACK, _set("weight_scale", float("nan")), "{}weight_scale holds a scale that is not finite"),
        (PACK, _set("weight_scale", 1e38), "{}weight_scale holds a scale that is too large, "),
        (NAIVE, _put("weight", lambda t: t.view(torch.uint8)), "{}weight is stored as U8, expected I8"),
        (NAIVE, _put("weight", lambda t: t.float()), "{}weight is stored as F32, expected I8"),
        (NAIVE, _drop("weight_scale"), "{}weight is stored as I8, expected one of"),
        (NAIVE, _set("weight_scale", -float("inf")), "{}weight_scale holds a scale that is not finite"),
        (GPTQ, _drop("g_idx"), "tensor {}g_idx is missing"),
        (GPTQ, _put("g_idx", lambda t: t.flip(0)), "{}g_idx must hold each column's number // 32"),
        (GPTQ, _put("qzeros", lambda t: t + 1), "{}qzeros must hold 7 alone where weights are symmetric, got 8"),
        (GPTQ, _config(checkpoint_format="gptq_v2"), "qzeros must hold 8 alone where weights are symmetric, got 7"),
        (GPTQ, _put("scales", lambda t: t.T), "{}scales must have shape [8, 128], got [128, 8]"),
        (GPTQ, _add(f"{DOWN}bias", torch.zeros(128)), "tensor {}bias is not part of this model"),
        (GPTQ, _config(group_size=96), "q_proj.weight must have a multiple of 96 columns, its groups, got 128"),
        (GPTQ, _config(group_size=64), "qzeros must have shape [2, 16], got [4, 16]"),
        (GPTQ, _config(bits=8), "q_proj.qweight must have shape [32, 128], got [16, 128]"),
        (
            Variant("gptq", symmetric=False),
            _put("qzeros", lambda t: torch.full_like(t, -1)),
            "{}qzeros must hold zeros of at most 14, got 15",
        ),
        (AWQ, _drop("qzeros"), "tensor {}qzeros is missing"),
        (AWQ, _config(zero_point=False), "qzeros must hold 8 alone where weights are symmetric"),
        (AWQ, _add(f"{DOWN}g_idx", torch.zeros(2)), "tensor {}g_idx is not part of this model"),
        (AWQ, _add("model.norm.qweight", torch.zeros(2)), "tensor model.norm.weight is stored twice"),
        (AWQ, lambda packed: packed.tensors.pop("model.layers.1.input_layernorm.weight"), "norm.weight is missing"),
    ],
)  # fmt: skip
def test_tensors(
    pack: Callable[..., Packed], tmp_path: Path, variant: Variant, change: Callable[[Packed], Any], message: str
) -> None:
    packed = pack(variant)
    packed.tensors = {name: tensor.contiguous() for name, tensor in packed.tensors.items()}
    change(packed)
    with pytest.raises(CheckpointError, match=re.escape(message.format(DOWN))) as refused:
        load(packed.write(tmp_path / "m"), **LIMITS)
    assert "\n" not in str(refused.value) and str(tmp_path / "m") in str(refused.value)


def test_a_file_that_changes_after_its_header_is_refused(pack: Callable[..., Packed], tmp_path: Path) -> None:
    packed = pack(GPTQ)
    found = resolve(packed.write(tmp_path / "m"), **LIMITS)
    (tmp_path / "m" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        found.stored[f"{DOWN}weight"].copy_into(torch.empty(128, 256))
