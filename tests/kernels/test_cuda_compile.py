"""Every CUDA template compiles for every default target, and decode kernels keep to registers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gqsa_runtime.errors import GqsaError, UnsupportedError
from gqsa_runtime.layouts.records import MASKED_WIDTHS, WIDTHS, is_bare
from gqsa_runtime.operators import FUSED_TOKENS, OPERATORS

from gqsac.compiler.cuda_launch import MAX_SHARED_BYTES, geometry, launch, own_targets, splits_of
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes import compile_cuda as compile_pass
from gqsac.compiler.passes.compile import CUDA_TARGETS
from gqsac.compiler.passes.compile_cuda import CompileError, compile_cuda, nvrtc_version
from gqsac.compiler.passes.render import headers, render
from tests.kernels.cases import CUDA_CASES

SNAPSHOTS = Path(__file__).parent / "snapshots"
_REGISTERS_PER_BLOCK = 65536


def _sparse(**changes) -> KernelSpec:
    params = {
        "tokens": 1, "rows": 4096, "k": 4096, "group_size": 16, "bits": 4, "n_tasks": 2048, "x_stride": 4096,
        "out_stride": 4096, "bias": False, "activation": "none", "residual": True, "residual_stride": 4096,
        "accumulate": False,
    }  # fmt: skip
    return KernelSpec.make("linear_sparse", **{**params, **changes})


def _attention(**changes) -> KernelSpec:
    params = {
        "tokens": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "scale": 0.088, "window": 0, "kv_dtype": "f16",
        "q_stride": 6144, "out_stride": 4096,
    }  # fmt: skip
    return KernelSpec.make("attention", **{**params, **changes})


def _records(width=4, masked=False, whole=True, **changes) -> KernelSpec:
    """width: 0 for all widths at once."""
    widths = sum(1 << w for w in (MASKED_WIDTHS if masked else WIDTHS)) if width == 0 else 1 << width
    params = {
        "tokens": 1, "rows": 4096, "k": 4096, "x_stride": 4096, "out_stride": 4096, "out_width": 4096, "bias": False,
        "activation": "none", "residual": True, "residual_stride": 4096, "norm": "none", "eps": 0.0,
        "epilogue": "rows", "n_blocks": 256, "widths": 0 if masked else widths,
        "masked_widths": widths if masked else 0,
        "whole": whole and not masked,
    }  # fmt: skip
    header = 0 if is_bare(params) else 16
    params["record_bytes"] = header + 32 * masked + 4 * 32 + 4 * 8 + 4 * 128 * (width or 8)
    return KernelSpec.make("linear_records", **{**params, **changes})


def _gated(**changes) -> KernelSpec:
    """Llama-2-7B's gate and up."""
    fields = {
        "rows": 22016, "n_blocks": 1376, "out_width": 11008, "out_stride": 11008, "residual": False,
        "residual_stride": 0, "epilogue": "gated", "activation": "silu",
    }  # fmt: skip
    return _records(**{**fields, "norm": "rms" if changes.get("tokens", 1) == 1 else "none", "eps": 1e-5, **changes})


def _matmul(like: KernelSpec) -> KernelSpec:
    """matmul_records with the constants of a linear_records."""
    params = {name: value for name, value in like.params if name not in ("x_stride", "norm", "eps")}
    return KernelSpec.make("matmul_records", **{**params, "tokens": 128})


def _append_attention(**changes) -> KernelSpec:
    params = {
        "tokens": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "scale": 0.088, "window": 0, "kv_dtype": "f16",
        "rotary_dim": 128,
    }  # fmt: skip
    params |= changes
    rows = {"q": params["heads"], "k": params["kv_heads"], "v": params["kv_heads"], "out": params["heads"]}
    params |= {f"{name}_stride": heads * params["head_dim"] for name, heads in rows.items()}
    return KernelSpec.make("append_attention", splits=splits_of(params["heads"], params["kv_heads"]), **params)


def _first_of_each_variant() -> list[KernelSpec]:
    """One kernel per operator and variant."""
    return list({(c.spec.op, dict(c.spec.params).get("tokens")): c.spec for c in reversed(CUDA_CASES)}.values())


def _real_shapes() -> list[KernelSpec]:
    """Real models' shapes of the operators that could spill."""
    return [
        *(_sparse(bits=bits) for bits in (2, 4, 8)),
        _sparse(group_size=8),
        _sparse(group_size=64),
        _sparse(k=576, rows=1536, bias=True, activation="gelu"),
        _sparse(k=28672, rows=8192),
        _sparse(tokens=8),
        *(_attention(head_dim=head_dim) for head_dim in (64, 80, 256)),
        *(_attention(kv_dtype=kv_dtype) for kv_dtype in ("f32", "int8")),
        _attention(),
        _attention(tokens=8),
        _attention(tokens=8, head_dim=256),
        *_real_records(),
        *(_matmul(spec) for spec in (*map(_records, (*WIDTHS, 0)), _gated(), _gated(width=0, whole=False, bias=True))),
        *(_matmul(_records(width, masked=True)) for width in (*MASKED_WIDTHS, 0)),
        *(
            KernelSpec.make("attention_halves", **{**dict(_attention().params), "tokens": 128, "head_dim": head_dim})
            for head_dim in (64, 80, 128)
        ),
        KernelSpec.make("attention_halves", **{**dict(_attention(kv_dtype="int8").params), "tokens": 128}),
        *(_append_attention(kv_dtype="int8", head_dim=d, rotary_dim=d) for d in (128, 256)),
        _append_attention(kv_dtype="int8", tokens=FUSED_TOKENS),
        *(_append_attention(head_dim=head_dim, rotary_dim=head_dim) for head_dim in (64, 80, 128, 256)),
        *(_append_attention(heads=heads, kv_heads=kv_heads) for heads, kv_heads in ((32, 32), (14, 2), (64, 8))),
        _append_attention(window=4096),
        *(_append_attention(tokens=FUSED_TOKENS, kv_heads=kv_heads) for kv_heads in (8, 32)),
        *(_append_attention(tokens=FUSED_TOKENS, head_dim=d, rotary_dim=d) for d in (64, 256)),
    ]


def _real_records() -> list[KernelSpec]:
    return [
        spec
        for tokens in (1, FUSED_TOKENS)
        for spec in (
            *(_records(width, tokens=tokens) for width in (*WIDTHS, 0)),
            *(_records(width, masked=True, tokens=tokens) for width in (*MASKED_WIDTHS, 0)),
            _records(whole=False, tokens=tokens),
            _gated(tokens=tokens),
            _gated(tokens=tokens, width=0, whole=False, bias=True),
        )
    ] + [_records(norm="layer", bias=True, activation="gelu"), _records(norm="rms", k=11008, x_stride=11008)]


SPECS = [*_first_of_each_variant(), *_real_shapes()]
NAMES = name_kernels(SPECS)
# Real shapes take longest to compile: a target of each generation with registers of its own stands for its kin.
_GENERATIONS = ("sm_80", "sm_90", "sm_120")


@pytest.fixture(scope="module")
def binaries():
    """(spec, target) -> CudaBinary."""
    jobs = [(spec, target) for spec in _first_of_each_variant() for target in CUDA_TARGETS]
    jobs += [(spec, target) for spec in _real_shapes() for target in _GENERATIONS]

    def compile_one(job):
        spec, target = job
        return compile_cuda(render("cuda", spec, NAMES[spec]), target, NAMES[spec], headers("cuda"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


def _of_target(binaries, target):
    found = [(spec, binary) for (spec, of), binary in binaries.items() if of == target]
    assert {spec.op for spec, _ in found} == {op for op, of in OPERATORS.items() if "cuda" in of.families}
    return found


@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_every_template_compiles(binaries, target):
    for spec, binary in _of_target(binaries, target):
        name = NAMES[spec]
        if target.startswith("compute_"):
            assert f".entry {name}(".encode() in binary.data, name
        else:
            assert binary.data.startswith(b"\x7fELF") and 8 <= binary.registers <= 255, name


@pytest.mark.parametrize("target", [target for target in CUDA_TARGETS if target.startswith("sm_")])
def test_no_kernel_spills(binaries, target):
    for spec, binary in _of_target(binaries, target):
        allowed = 0
        # 512 threads leave 128 registers: too few for masks of three widths in one matrix.
        if spec.op == "matmul_records" and spec["masked_widths"].bit_count() > 1 and target == "sm_90":
            allowed = 32
        # A block goes on with other tokens' work: some registers more than heads of 256 leave.
        if spec.op == "append_attention" and spec["head_dim"] == 256 and spec["tokens"] > 1:
            allowed = 208
        assert binary.spill_bytes <= allowed and binary.stack_bytes <= allowed, f"{NAMES[spec]}: {binary.log}"


@pytest.mark.parametrize("target", [target for target in CUDA_TARGETS if target.startswith("sm_")])
def test_launches_fit_the_device(binaries, target):
    for spec, binary in _of_target(binaries, target):
        name, made = NAMES[spec], launch(spec, 512, target)
        assert binary.registers * made.block <= _REGISTERS_PER_BLOCK, name
        room = (227 if target in own_targets(spec.op) else 99) * 1024
        assert made.shared_bytes + binary.shared_bytes <= room, name
        assert made.block % 32 == 0 and all(size >= 1 for size in made.grid), name


def test_same_bytes_for_the_same_source():
    spec = _sparse()
    source = render("cuda", spec, "kernel")
    assert compile_cuda(source, "sm_90", "kernel", headers("cuda")) == compile_cuda(
        source, "sm_90", "kernel", headers("cuda")
    )


@pytest.mark.parametrize("max_tokens", [1, 8, 512, 4096])
def test_grids_cover_every_row_and_token(max_tokens):
    for spec in SPECS:
        params = dict(spec.params)
        made = launch(spec, max_tokens)
        grid, block = made.grid, made.block
        tokens = 1 if params.get("tokens") == 1 or spec.op in ("last_row", "choose") else max_tokens
        assert made.shared_bytes <= MAX_SHARED_BYTES
        assert grid[1] <= tokens or spec.op in ("append_attention", "matmul_records"), "block rows without tokens"
        if spec.op == "linear_sparse":
            assert grid[0] * block // 32 >= params["n_tasks"] and grid[1] * params["tokens"] >= tokens
        elif spec.op == "attention":
            assert grid[0] == params["heads"] and grid[1] * (1 if tokens == 1 else 64) >= tokens
        elif spec.op == "linear_dense":
            assert grid[1] * params["tokens"] >= tokens
        elif spec.op == "linear_records":  # a block goes through all tokens of a launch
            assert grid[0] * geometry(spec).constants["LOCAL_BLOCKS"] >= params["n_blocks"]
        elif spec.op == "matmul_records":
            for target in ("", "sm_90"):
                x, y, _ = launch(spec, max_tokens, target).grid
                assert x * 128 >= tokens and y * geometry(spec, target).constants["ROW_BLOCKS"] >= params["n_blocks"]
        elif spec.op == "attention_halves":
            assert grid[0] == params["heads"] and grid[1] * 64 >= tokens
        elif spec.op == "append_attention":
            for target in ("", "sm_90"):
                queries = geometry(spec, target).constants["QUERIES"]
                blocks = launch(spec, max_tokens, target).grid[0]
                assert blocks * queries >= params["heads"] * params["splits"]
                assert params["heads"] // params["kv_heads"] % queries == 0
        else:
            assert grid[1] == tokens


def test_launches_that_no_gpu_can_make_are_refused():
    rms_norm = next(spec for spec in SPECS if spec.op == "rms_norm" and spec["tokens"] > 1)
    with pytest.raises(UnsupportedError, match="smaller prefill chunk"):
        launch(rms_norm, 70_000)
    with pytest.raises(UnsupportedError, match="shared memory"):
        launch(_attention(head_dim=2048), 8)


def test_an_error_in_a_kernel_names_it_and_the_line():
    with pytest.raises(CompileError, match=r"kernel broken for sm_80.*broken\.cu\(1\): error"):
        compile_cuda('extern "C" __global__ void broken() { nonsense; }', "sm_80", "broken", {})


def test_an_unknown_target_is_named():
    with pytest.raises(CompileError, match="does not know the target sm_1"):
        compile_cuda('extern "C" __global__ void k() {}', "sm_1", "k", {})
    assert issubclass(CompileError, GqsaError)


def test_spills_are_read_from_the_log():
    log = (
        "ptxas info    : Function properties for k\n"
        "    40 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 40 bytes cumulative stack size, 256 bytes smem\n"
    )
    assert compile_pass._parse_usage(log, "k", "sm_80") == (64, 56, 40, 256)
    with pytest.raises(CompileError, match="did not report"):
        compile_pass._parse_usage("", "k", "sm_80")


def test_missing_nvrtc_is_one_clear_sentence(monkeypatch):
    from cuda.bindings import nvrtc

    def missing():
        raise RuntimeError("Failed to dlopen libnvrtc.so.12")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(CompileError, match="pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc_version()


SNAPSHOT_SPECS = (_sparse(), _gated())


@pytest.mark.parametrize("spec", SNAPSHOT_SPECS, ids=lambda spec: spec.op)
def test_rendered_linears_are_as_reviewed(spec):
    """To accept a change: python -m tests.kernels.test_cuda_compile"""
    assert _snapshot(spec) == (SNAPSHOTS / f"{spec.op}.cu").read_text()


def _snapshot(spec: KernelSpec) -> str:
    return render("cuda", spec, name_kernels([spec])[spec])


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for each in SNAPSHOT_SPECS:
        (SNAPSHOTS / f"{each.op}.cu").write_text(_snapshot(each))
