"""Kernel cases of the operators over records: linear_records and quantize."""

import numpy as np
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan
from gqsa_runtime.operators import FUSED_TOKENS

from gqsac.compiler.kernel_spec import KernelSpec
from tests.kernels.oracles import halves_places
from tests.kernels.random_records import random_keep, random_matrix

TILE = 64


def _source(p, pattern, seed):
    rows, k = p["rows"], p["k"]
    rng = np.random.default_rng(seed)
    mixed = {"mixed": [0, 1, 2, 3, 4, 8], "two": [2, 4]}
    widths = rng.choice(mixed[p["width"]], rows) if p["width"] in mixed else p["width"]
    pairs = None
    if p["epilogue"] == "gated":
        pairs = np.stack([np.arange(rows // 2), np.arange(rows // 2) + rows // 2], 1)
        widths = widths if np.isscalar(widths) else np.tile(widths[: rows // 2], 2)
    matrix = random_matrix(rows, k, widths, random_keep(rows, k, pattern, seed), seed=seed, scale=k**-0.5)
    return matrix, make_plan(matrix.row_bits, k, matrix.keep, pairs)


def _linear_records(helpers, pattern, offset):
    def fill(rng, p, case):
        source = _source({**p, "width": case.extra}, pattern, len(case.name))
        assert source[1].constants.items() <= p.items()
        filled = case.name.endswith("aliased")
        out = helpers.activations(rng, case, p, p["out_stride"], p["out_width"], filled=filled)
        dtypes = {"i8": np.int8, "i32": np.int32}
        arguments = dict(helpers.fill_epilogue(rng, p, case, out))
        arguments |= {
            part.name: helpers.array(RECORDS.pack(part.name, source, p), dtypes[part.dtype]) for part in RECORDS.parts
        }
        if case.spec.op == "matmul_records":
            # What lies behind the last token is used for nothing.
            halves, scales = np.full(_halves_elements(case, p), np.nan), np.full(case.max_tokens, np.nan)
            halves[halves_places(case.n_tokens, p["k"])] = rng.normal(size=(case.n_tokens, p["k"])) * 3000
            scales[: case.n_tokens] = np.exp2(rng.integers(-14, -11, case.n_tokens))
            return arguments | {
                "halves": helpers.array(halves, np.float16), "scales": helpers.array(scales, np.float32), "out": out,
            }  # fmt: skip
        several = p["tokens"] > FUSED_TOKENS
        arguments |= {"x": None, "planes": None, "ranges": None, "norm_weight": None, "norm_bias": None, "out": out}
        if several:
            n_tiles = p["k"] // TILE
            q = rng.integers(-32639, 32640, (case.max_tokens, n_tiles, TILE))
            ranges = np.stack([(rng.random(q.shape[:2]) + 0.5) / 20000, q.sum(2)], 2).astype(np.float32)
            # What lies behind the last token is never read.
            ranges[case.n_tokens :] = np.nan
            arguments["planes"] = helpers.array(_planes(q), np.int8)
            arguments["ranges"] = helpers.array(ranges, np.float32)
        else:
            arguments["x"] = helpers.activations(rng, case, p, p["x_stride"], p["k"], offset)
            if p["norm"] != "none":
                arguments["norm_weight"] = helpers.normal(rng, p["k"])
            if p["norm"] == "layer":
                arguments["norm_bias"] = helpers.normal(rng, p["k"])
        return arguments

    return fill


def _planes(q):
    """int8 [..., 2, 64] of integers [..., 64]."""
    high = q + 128 >> 8
    return np.stack([high, q - 256 * high], -2).astype(np.int8)


def _embedding_records(helpers):
    def fill(rng, p, case):
        source = _source({**p, "width": case.extra, "epilogue": "rows"}, "all", len(case.name))
        dtypes = {"i8": np.int8, "i32": np.int32}
        n_tokens = 1 if p["tokens"] == 1 else case.n_tokens
        ids = helpers.output(case.max_tokens, np.int32)
        ids[:n_tokens] = rng.integers(0, p["rows"], n_tokens)
        ids[0] = p["rows"] - 1
        return {
            "ids": ids,
            **{
                part.name: helpers.array(RECORDS.pack(part.name, source, p), dtypes[part.dtype])
                for part in RECORDS.parts
            },
            "out": helpers.activations(rng, case, p, p["out_stride"], p["k"], filled=False),
        }

    return fill


def _quantize(helpers):
    def fill(rng, p, case):
        n_tiles = p["k"] // TILE
        return {
            "x": helpers.activations(rng, case, p, p["x_stride"], p["k"], scale=3.0),
            "norm_weight": helpers.normal(rng, p["k"]) if p["norm"] != "none" else None,
            "norm_bias": helpers.normal(rng, p["k"]) if p["norm"] == "layer" else None,
            "planes": helpers.output(case.max_tokens * n_tiles * 2 * TILE, np.int8),
            "ranges": helpers.output(case.max_tokens * n_tiles * 2, np.float32),
        }

    return fill


def _halves_elements(case, p):
    return -(-case.max_tokens // 128) * 128 * p["k"]


def _halves(helpers):
    def fill(rng, p, case):
        return {
            "x": helpers.activations(rng, case, p, p["x_stride"], p["k"], scale=case.extra),
            "norm_weight": helpers.normal(rng, p["k"]) if p["norm"] != "none" else None,
            "norm_bias": helpers.normal(rng, p["k"]) if p["norm"] == "layer" else None,
            "halves": helpers.output(_halves_elements(case, p), np.float16),
            "scales": helpers.output(case.max_tokens, np.float32),
        }

    return fill


def make_cases(Case, helpers):
    """All cases. helpers: the array makers of tests.kernels.cases."""
    base = {
        "tokens": 1, "rows": 37, "k": 576, "bias": False, "activation": "none", "residual": False, "norm": "none",
        "eps": 1e-5, "epilogue": "rows",
    }  # fmt: skip

    def case(name, width=4, pattern="all", offset=0, n_tokens=1, **changes):
        p = {**base, **changes}
        out_width = p["rows"] // (2 if p["epilogue"] == "gated" else 1)
        p = {"x_stride": p["k"], "out_stride": out_width, "residual_stride": out_width, "out_width": out_width, **p}
        full_name = f"linear_records/{name}"
        _, plan = _source({**p, "width": width}, pattern, len(full_name))
        spec = KernelSpec.make("linear_records", **p, **plan.constants)
        fill = _linear_records(helpers, pattern, offset)
        # 16-bit activations: an error of 2^-16 of a tile's largest in each, over sums of about 1.
        atol = 5e-5 if p["tokens"] > FUSED_TOKENS else 1.5e-4 if p["tokens"] == 1 else 2.5e-4
        return Case(full_name, spec, fill, n_tokens, 3, 16, 64, atol=atol, extra=width)

    several, few = {"tokens": 8, "n_tokens": 13}, {"tokens": 4, "n_tokens": 7}
    for width in (1, 2, 3, 4, 8, "mixed"):
        yield case(f"w{width}", width)
        yield case(f"w{width}_tile", width, **several)
        yield case(f"w{width}_few", width, **few)
    for width in (2, 4, 8):
        for pattern in ("groups", "tiles", "skewed"):
            yield case(f"w{width}_{pattern}", width, pattern)
        yield case(f"w{width}_groups_tile", width, "groups", **several)
        yield case(f"w{width}_groups_few", width, "groups", **few)
    for width in (1, 2, 3, 4, 8):
        yield case(f"bare_w{width}", width, k=512)
        yield case(f"bare_w{width}_tile", width, k=512, **several)
        yield case(f"bare_w{width}_few", width, k=512, **few)
    yield case("bare_many_rows", 2, rows=16 * 140, k=512)  # a block of threads takes more than one of rows
    yield case("bare_many_rows_tile", 2, rows=16 * 140, k=512, tokens=8, n_tokens=2)
    yield case("bare_k4608", k=4608, rows=33)  # more records in a row block than warps
    yield case("whole_two_widths", "two", k=512)
    yield case("whole_two_widths_tile", "two", k=512, **several)
    yield case("empty", pattern="empty", bias=True)
    yield case("empty_tile", pattern="empty", bias=True, **several)
    yield case("empty_few", pattern="empty", bias=True, **few)
    yield case("k64", k=64)
    yield case("k4096", k=4096, rows=40, norm="rms")
    yield case("k4096_few", k=4096, rows=40, norm="rms", **few)
    yield case("k11008", pattern="groups", k=11008, rows=33, residual=True)
    yield case("many_rows", k=64, rows=16 * 300, width=2)
    yield case("many_rows_tile", k=64, rows=16 * 300, width=2, tokens=8, n_tokens=2)
    yield case("unaligned_x", offset=3, norm="rms")
    yield case("unaligned_x_few", offset=3, norm="rms", **few)
    for norm in ("rms", "layer"):
        yield case(f"norm_{norm}", norm=norm, k=640)
        yield case(f"norm_{norm}_few", norm=norm, k=640, **few)
    for activation in ("relu", "silu", "gelu", "gelu_tanh"):
        yield case(f"epilogue_{activation}", activation=activation, bias=True, residual=True, residual_stride=41)
    yield case("residual_aliased", residual=True)
    yield case("tile_residual_aliased", residual=True, **several)
    yield case("few_residual_aliased", residual=True, **few)
    for tokens in (2, 4, 8):
        for n_tokens in (1, 2, 5, 16):
            yield case(f"tile{tokens}_tokens_{n_tokens}", tokens=tokens, n_tokens=n_tokens, bias=True, out_stride=45)
    yield case("gated", rows=72, epilogue="gated", activation="silu", norm="rms")
    yield case("gated_mixed_bias", "mixed", rows=72, epilogue="gated", activation="silu", bias=True)
    yield case("gated_tile", pattern="groups", rows=72, epilogue="gated", activation="gelu", **several)
    yield case("gated_few", pattern="groups", rows=72, epilogue="gated", activation="gelu", **few)

    for width in (4, 8):
        for rows, k in ((37, 576), (64, 256)):
            for tokens, n_tokens in ((1, 1), (8, 13)):
                p = {"tokens": tokens, "rows": rows, "k": k, "scale": 1.5, "out_stride": k + 3}
                name = f"embedding_records/w{width}_r{rows}_k{k}{'_tile' if tokens > 1 else ''}"
                plan = _source({**p, "width": width, "epilogue": "rows"}, "all", len(name))[1]
                spec = KernelSpec.make("embedding_records", **p, **plan.constants)
                yield Case(name, spec, _embedding_records(helpers), n_tokens, 3, 16, 64, extra=width)

    for norm in ("none", "rms", "layer"):
        for k in (64, 576, 4096):
            for tokens, n_tokens in ((1, 1), (8, 13)):
                p = {"tokens": tokens, "k": k, "x_stride": k + 4, "norm": norm, "eps": 1e-5}
                name = f"quantize/{norm}_k{k}{'_tile' if tokens > 1 else ''}"
                yield Case(name, KernelSpec.make("quantize", **p), _quantize(helpers), n_tokens, 3, 16, 64)

    for norm in ("none", "rms", "layer"):
        for k, scale in ((64, 3.0), (576, 1e6), (4096, 1e-3)):
            p = {"tokens": 128, "k": k, "x_stride": k + 4, "norm": norm, "eps": 1e-5}
            yield Case(
                f"halves/{norm}_k{k}", KernelSpec.make("halves", **p), _halves(helpers), 5, 3, 6, 64, extra=scale
            )
    p = {"tokens": 128, "k": 128, "x_stride": 128, "norm": "none", "eps": 0.0}
    yield Case("halves/zeros", KernelSpec.make("halves", **p), _halves(helpers), 3, 3, 4, 64, extra=0.0)

    def matmul(name, width=4, pattern="all", n_tokens=13, max_tokens=16, **changes):
        p = {**base, "tokens": 128, **changes}
        out_width = p["rows"] // (2 if p["epilogue"] == "gated" else 1)
        p = {"out_stride": out_width, "residual_stride": out_width, "out_width": out_width, **p}
        del p["norm"], p["eps"]
        full_name = f"matmul_records/{name}"
        _, plan = _source({**p, "width": width}, pattern, len(full_name))
        spec = KernelSpec.make("matmul_records", **p, **plan.constants)
        fill = _linear_records(helpers, pattern, 0)
        # Weights are rounded to 11 bits, over sums of about 1.
        return Case(full_name, spec, fill, n_tokens, 3, max_tokens, 192, 1e-3, 1e-3, width)

    for width in (1, 2, 3, 4, 8, "mixed"):
        yield matmul(f"w{width}", width)
    for width in (1, 2, 3, 4, 8):
        yield matmul(f"bare_w{width}", width, k=512)
    for width in (2, 4, 8):
        for pattern in ("groups", "tiles", "skewed"):
            yield matmul(f"w{width}_{pattern}", width, pattern, k=448)
    yield matmul("whole_two_widths", "two", k=512)
    yield matmul("empty", pattern="empty", bias=True)
    yield matmul("k64", k=64)
    yield matmul("k1024_whole", k=1024, rows=16 * 9)
    for width, pattern in ((4, "groups"), (2, "tiles"), (8, "tiles")):  # records that both halves of the tiles need
        yield matmul(f"k2496_w{width}_{pattern}", width, pattern, k=39 * 64, n_tokens=5)
    yield matmul("k9024", k=141 * 64, n_tokens=2)  # more records than lanes look for the middle at once
    yield matmul("residual_aliased", residual=True)
    yield matmul("epilogue", activation="gelu_tanh", bias=True, residual=True, residual_stride=41, out_stride=45)
    for n_tokens in (1, 63, 64, 65, 127, 128, 129):
        yield matmul(f"tokens_{n_tokens}", n_tokens=n_tokens, max_tokens=160, k=128, bias=True)
    yield matmul("gated", pattern="groups", rows=72, epilogue="gated", activation="silu", k=256)
    yield matmul("gated_bare", 8, rows=72, epilogue="gated", activation="silu", k=256)
    yield matmul("gated_mixed_bias", "mixed", rows=72, epilogue="gated", activation="gelu", bias=True, k=192)
