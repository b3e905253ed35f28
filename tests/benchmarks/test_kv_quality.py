"""The benchmarks of quantized caches: what they compare, count and show, on a model that takes no time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks.kv_models import DIGITS, Subject  # noqa: E402
from benchmarks.kv_quality import Size  # noqa: E402

from benchmarks import kv_caches, kv_error, kv_memory, kv_models, kv_quality, kv_report, report  # noqa: E402
from bitforbit.kv.spec import KiviSpec  # noqa: E402


class Letters:
    """A tokenizer: one token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}


@pytest.fixture(scope="module")
def source() -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=128, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    stream = [int(x) for x in torch.randint(0, 128, (20000,), generator=torch.Generator().manual_seed(1))]
    yield Subject("demo", model, Letters(), stream)
    torch.set_num_threads(threads)


def test_tasks_ask_for_what_was_given(source: Subject) -> None:
    copy = kv_models.copying(source, 2, 300, 64)
    assert copy.ids.shape == (2, 364)
    assert torch.equal(copy.ids[:, :64], copy.ids[:, 300:])
    assert copy.asked.sum().item() == 2 * (64 - 16)
    lookup = kv_models.lookup(source, 2, 600, 200)
    assert lookup.ids.shape == (2, 800)
    for row, asked in zip(lookup.ids, lookup.asked, strict=True):
        given = "".join(map(chr, row[:600]))
        rest = "".join(map(chr, row[600:]))
        digits = "".join(c for c, mark in zip(rest, asked, strict=True) if mark)
        assert digits
        assert len(digits) % DIGITS == 0
        assert digits.isdigit()
        lines = [line for line in rest.split("\n") if line]
        assert all(f"\n{line}\n" in given for line in lines)
        assert [line[-DIGITS:] for line in lines] == [digits[i : i + DIGITS] for i in range(0, len(digits), DIGITS)]
    plain = kv_models.text(source, 3, 100, 20)
    assert plain.ids[0].tolist() == source.stream[:120]
    assert plain.ids[-1].tolist() == source.stream[-120:]


def losses(source: Subject, variant: kv_caches.Variant, size: Size) -> tuple[kv_quality.Scores, Any]:
    task = kv_models.text(source, 2, size.prefix, size.steps)
    kv_caches.use(source.model, kv_caches.exact())
    given = kv_quality.prefill(source.model, task.ids[:, : size.prefix])
    cache = kv_caches.use(source.model, variant)
    kv_caches.hand_over(given, cache)
    scores, _ = kv_quality.score(
        kv_quality.steps(source.model, cache, task.ids, size), task.ids[:, size.prefix + 1 :], None
    )
    return scores, cache


@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize(("bits", "sink"), [((4, 4), 0), ((4, 2), 4), ((2, 2), 4)])
def test_the_packed_cache_is_kivi(source: Subject, chunk: int, bits: tuple[int, int], sink: int) -> None:
    """Against the 16-bit cache rounded in place: the same losses, but for the order of sums."""
    size = Size({"text": 2}, 200, 40, chunk)
    ours, _ = losses(source, kv_caches.kivi(*bits, residual=32, sink=sink), size)
    fake, _ = losses(source, kv_caches.fake_kivi(*bits, residual=32, sink=sink), size)
    exact, _ = losses(source, kv_caches.exact(), size)
    difference, error = (ours.loss - fake.loss).abs().mean(), (exact.loss - fake.loss).abs().mean()
    assert difference < 0.35 * error
    assert error > 0.01


def test_an_unlimited_window_is_the_16_bit_cache(source: Subject) -> None:
    size = Size({"text": 2}, 100, 24, 1)
    ours, _ = losses(source, kv_caches.kivi(4, 4, residual=None), size)
    exact, _ = losses(source, kv_caches.exact(), size)
    assert torch.equal(ours.loss, exact.loss)


def test_scores() -> None:
    logits = torch.tensor([[[0.0, 5.0, 0.0], [4.0, 0.0, 0.0]]])
    targets = torch.tensor([[1, 1]])
    base, kept = kv_quality.score(iter([logits]), targets, None)
    assert base.kl.abs().max() == 0
    assert base.right.tolist() == [[1, 0]]
    other, _ = kv_quality.score(iter([logits.flip(-1)]), targets, kept)
    assert other.agrees.tolist() == [[1, 0]]
    p, q = logits[0, 1].softmax(-1), logits.flip(-1)[0, 1].softmax(-1)
    assert other.kl[0, 1] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert base.loss[0, 0] == pytest.approx(-float(logits[0, 0].log_softmax(-1)[1]), rel=1e-5)


def test_bits_are_counted_from_tensors(source: Subject) -> None:
    size = Size({"text": 2}, 544, 4, 1)
    for bits, group, expected in (((4, 4), 32, 5.0), ((4, 2), 32, 4.0), ((2, 2), 64, 2.5), ((8, 8), 32, 9.0)):
        variant = kv_caches.kivi(*bits, group=group, residual=64)
        _, cache = losses(source, variant, size)
        assert kv_caches.quantized_bits(variant, cache) == expected
        elements = 2 * 2 * 2 * 2 * 64 * 547  # keys and values, layers, rows, heads, channels, tokens
        assert expected < kv_caches.whole_bits(variant, cache, elements) < 16
    assert kv_caches.num_bytes([torch.zeros(4), {"a": torch.zeros(8)[2:]}]) == 16 + 32  # the memory behind a view
    shared = torch.zeros(4)
    assert kv_caches.num_bytes([shared, shared[1:]]) == 16


@pytest.mark.parametrize("backend", list(kv_caches.PACKAGES))
def test_quantized_cache_counts_its_scales(source: Subject, backend: str) -> None:
    if not kv_caches.installed(backend):
        pytest.skip(f"{backend} is not installed")
    for bits, group, best in ((4, 64, False), (2, 32, True)):
        variant = kv_caches.quantized(backend, bits, group, best)
        _, cache = losses(source, variant, Size({"text": 2}, 128, 4, 1))
        assert kv_caches.quantized_bits(variant, cache) == pytest.approx(bits + 32 / group, rel=0.01)


def test_share_of_what_is_attended_that_is_quantized() -> None:
    size = Size({"text": 1}, 256, 3, 1)
    share = kv_quality.attended_share(kv_caches.kivi(4, 4), size)
    assert share == {
        "keys": pytest.approx((256 / 257 + 256 / 258) / 2),
        "values": pytest.approx((128 / 257 + 129 / 258) / 2),
    }
    assert kv_quality.attended_share(kv_caches.exact(), size) == {}


def test_errors_shrink_with_bits(source: Subject) -> None:
    task = kv_models.text(source, 2, 200, 4)
    kv_caches.use(source.model, kv_caches.exact())
    given = kv_quality.prefill(source.model, task.ids[:, :200])
    captured = kv_error.capture(source.model, given, task.ids[:, 200], 2)
    assert len(captured) == 2
    assert captured[0][1].shape == (2, 2, 201, 64)
    right = kv_error.exact(captured)
    eight, four, two = (max(kv_error.errors(captured, right, KiviSpec(b, b, 32, residual=32))) for b in (8, 4, 2))
    assert 0 < eight < four / 4 < two


@pytest.mark.parametrize("case", ["16", "4", "k4v2"])
def test_memory_is_driven_as_by_a_model(case: str) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    driver, phases = kv_memory.Driver(config, case), []
    with torch.inference_mode():
        cache = driver.drive(512, phases.append)
    assert phases == ["prefill", "growth", "decode"]
    assert cache.get_seq_length() == 512
    whole = 2 * 2 * 8 * 512 * 128 * 2
    found = driver.num_bytes(cache)
    assert found == whole if case == "16" else found < 0.6 * whole


# --- what is shown -----------------------------------------------------------------------------------------------

MACHINE = {"cpu": "x", "cpus": 2, "instruction_sets": ["y"], "python": "3", "versions": {}, "commit": "c", "date": "d"}


def quality_result() -> dict[str, Any]:
    def line(name: str, bits: float, difference: float) -> dict[str, Any]:
        text = {
            "loss": 1.0, "perplexity": math.e, "loss_difference": difference, "loss_difference_error": 0.001,
            "kl": 0.0123, "kl_99": 0.1, "right": 0.5, "agrees": 0.987,
        }  # fmt: skip
        return {
            "name": name, "family": "f", "settings": "group 32", "bits": bits, "whole_bits": bits + 1, "seconds": 1.0,
            "attended": {}, "text": text, "copy": text, "lookup": {**text, "asked": 40, "found": 0.625},
        }  # fmt: skip

    rows = [line("16 bits", 16.0, 0.0), line("bitforbit 4", 5.0, 0.005), line("bitforbit 4", 4.5, 0.5)]
    errors = [{"bits": "16", "median": 0.001, "worst": 0.002}]
    errors += [{"bits": "4", "group": 32, "residual": 128, "sink": s, "median": 0.05, "worst": 0.2} for s in (0, 4)]
    return {
        "benchmark": "kv_quality", "machine": MACHINE, "threads": 2,
        "models": [{
            "model": "smollm2", "rows": {"text": 2, "copy": 1, "lookup": 1}, "prefix": 10, "steps": 5, "chunk": 16,
            "variants": rows, "sensitivity": errors,
        }],
    }  # fmt: skip


def memory_result() -> dict[str, Any]:
    points = []
    for tokens in (1024, 8192, 32768):
        for name, share in (("16 bits", 1.0), ("bitforbit 4", 0.3125)):
            size = int(tokens * 2**10 * share)
            peaks = {"prefill": size, "growth": size + 2**20, "decode": size}
            points.append({
                "name": name, "tokens": tokens, "cache_bytes": size, "resident": size, "peaks": peaks,
                "bits": 16 * share, "peak": size + 2**20, "smaller": 1 / share, "peak_smaller": 1.5,
            })  # fmt: skip
    return {
        "benchmark": "kv_memory", "machine": MACHINE, "layers": 8, "heads": 8, "head_dim": 128, "points": points,
    }  # fmt: skip


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("kv", "kv_quality", "kv_memory"):
        assert report.render(name) == "not measured"
    (tmp_path / "kv_memory.json").write_text(json.dumps(memory_result()))
    assert "3.20x" in report.render("kv")
    assert "not measured" in report.render("kv")
    (tmp_path / "kv_quality.json").write_text(json.dumps(quality_result()))
    short = next(line for line in report.render("kv").splitlines() if line.startswith("| bitforbit 4 "))
    cells = [cell.strip() for cell in short.strip("|").split("|")]
    assert cells == ["bitforbit 4", "5.00", "10 MiB (3.20x)", "+0.50 ± 0.10 %", "0.0123", "62 %"]
    long = report.render("kv_quality")
    assert "40 numbers looked up" in long
    assert "98.7 %" in long
    assert "5 % (20)" in long
    assert "| bitforbit 4 | 5.00 " in report.render("kv_memory").replace("  ", " ")
    page = report.fill("a\n<!-- benchmark: kv -->\nold\n<!-- end -->\nb\n")
    assert "old" not in page
    assert "3.20x" in page


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        assert kv_report.picture(memory_result(), path)
    assert paths[0].read_text() == paths[1].read_text()
    assert "bitforbit 4" in paths[0].read_text()
    assert not kv_report.picture({}, tmp_path / "c.svg")
