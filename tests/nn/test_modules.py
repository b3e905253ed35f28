from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import bitforbit
from bitforbit import nn as bnn
from bitforbit.errors import CompressedParameterError, CorruptTensorError, UsageError
from torch_helpers import assert_same_bits, gaussian, random_bits


class Experts(nn.Module):
    """Stacked matrices, as mixtures of experts hold them."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 96, 64))
        self.shift = nn.Parameter(torch.zeros(64))

    def forward(self, x: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        return sum((functional.linear(x, self.up[i]) for i in wanted), torch.zeros(()))


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


class OtherLinear(nn.Linear):
    pass


def small_model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False), nn.LayerNorm(64)
    ).to(dtype)


IDS = torch.tensor([[0, 17, 299], [5, 5, 18]])


def compressed_pair(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    plain = small_model(dtype).requires_grad_(False)
    return bitforbit.compress_model(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_compress_model(dtype):
    model, plain = compressed_pair(dtype)
    assert_same_bits(model(IDS), plain(IDS))
    if dtype == torch.float64:
        assert not [m for m in model.modules() if isinstance(m, bnn.Compressed)]
        return
    assert (type(model[0]), type(model[1]), type(model[4])) == (bnn.Embedding, bnn.Linear, nn.LayerNorm)
    assert isinstance(model[0], nn.Embedding)
    assert isinstance(model[1], nn.Linear)
    for i in (0, 1, 3):
        spec = bnn.compressed_parameters(model[i])["weight"]
        assert (spec.dtype, spec.shape) == (dtype, tuple(plain[i].weight.shape))
        weight = model[i].weight
        assert (weight.dtype, weight.shape, weight.device) == (dtype, plain[i].weight.shape, torch.device("cpu"))
        assert_same_bits(weight + 0, plain[i].weight + 0)
        assert_same_bits(weight.data, plain[i].weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_parameters(dtype):
    module = nn.Module()
    weight = gaussian((64, 128)).to(dtype)
    module.register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))
    assert bnn.compress_parameter(module, "weight")
    assert_same_bits(module.weight.data, weight)


def test_all_bit_patterns_of_bf16():
    module = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    weight = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    spec_of = gaussian((256, 256))
    module.weight = nn.Parameter(spec_of, requires_grad=False)
    assert bnn.compress_parameter(module, "weight")
    module.load_state_dict({"weight": weight})
    assert_same_bits(module.weight.data, weight)


def test_fused_mode_is_close():
    model, plain = compressed_pair()
    bnn.set_mode(model, "fused")
    torch.testing.assert_close(model(IDS), plain(IDS), atol=0.02, rtol=0.02)
    assert "mode='fused'" in repr(model)
    with pytest.raises(UsageError, match="mode among exact, fused"):
        bnn.set_mode(model, "fast")
    with pytest.raises(UsageError, match="mode among exact, fused"):
        bitforbit.compress_model(small_model(), mode="fast")


def test_sizes_and_repr():
    model, plain = compressed_pair()
    size = bnn.compressed_size(model)
    assert size.original_nbytes + size.plain_nbytes == sum(2 * p.numel() for p in plain.parameters())
    assert size.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert 8 < size.bits_per_weight < 12
    assert size.ratio < 0.8
    assert f"{8 * sum(p.numel() for n, p in model[3].named_parameters()) / 6144:.2f} bits/weight" in repr(model[3])
    assert bnn.compressed_size(plain).ratio == 1


def test_named_parameters():
    model, _ = compressed_pair()
    names = [name for name, _ in model.named_parameters()]
    parts = [f"{i}.{part}__weight" for i in (0, 1, 3) for part in bnn.PARTS]
    assert sorted(names) == sorted([*parts, "1.bias", "4.weight", "4.bias"])
    assert all(p.dtype == torch.uint8 and not p.requires_grad for n, p in model.named_parameters() if "__weight" in n)


def test_skip():
    for pattern, left in (("1", {1}), ("1.weight", {1}), ("[13]", {1, 3}), ("*", {0, 1, 3}), ("none", set())):
        model = bitforbit.compress_model(small_model(), skip=[pattern])
        assert {i for i in (0, 1, 3) if not isinstance(model[i], bnn.Compressed)} == left
    nested = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(64, 64)]), "head": nn.Linear(64, 64)})
    bitforbit.compress_model(nested, skip=["experts"])
    assert [isinstance(m, bnn.Linear) for m in (nested["experts"][0], nested["head"])] == [False, True]


def test_tiny_parameters_stay_plain():
    model = nn.Linear(4, 4)
    assert not bnn.compress_parameter(model, "weight")
    assert type(bitforbit.compress_model(model)) is nn.Linear
    incompressible = nn.Linear(64, 64, dtype=torch.bfloat16)
    incompressible.weight.data.copy_(random_bits((64, 64), torch.bfloat16))
    assert not bnn.compress_parameter(incompressible, "weight")


def test_compressing_twice_changes_nothing():
    model, plain = compressed_pair()
    before = list(model.parameters())
    bitforbit.compress_model(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert_same_bits(model(IDS), plain(IDS))


def test_decompress_model():
    model, plain = compressed_pair()
    assert bitforbit.decompress_model(model) is model
    for got, expected in zip(model.modules(), plain.modules(), strict=True):
        assert type(got) is type(expected)
        assert got.__dict__.keys() == expected.__dict__.keys()
    for (name, got), (other, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert type(got) is nn.Parameter
        assert_same_bits(got, expected)
    assert repr(model) == repr(plain)


def tied_model() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(300, 64), "head": nn.Linear(64, 300, bias=False)}).bfloat16()
    model["head"].weight = model["embed"].weight
    return model


def test_tied_weights_share_their_parts():
    model = tied_model()
    weight = model["head"].weight.detach().clone()
    bitforbit.compress_model(model)
    assert model["embed"].code__weight is model["head"].code__weight
    assert len(list(model.parameters())) == 4
    assert bnn.compressed_size(model).original_nbytes == weight.nbytes
    copied = copy.deepcopy(model)
    assert copied["embed"].tails__weight is copied["head"].tails__weight
    model.load_state_dict({"embed.weight": weight * 2, "head.weight": weight * 2})
    assert model["embed"].tails__weight is model["head"].tails__weight
    for name in ("embed", "head"):
        assert_same_bits(model[name].weight.data, weight * 2)
    bitforbit.decompress_model(model)
    assert model["embed"].weight is model["head"].weight
    assert_same_bits(copied["head"].weight.data, weight)


def test_tying_compressed_modules():
    """What a library does to tie: assign the attribute."""
    model, other = tied_model(), tied_model()
    bitforbit.compress_model(model)
    bitforbit.compress_model(other)
    model["head"].weight = other["embed"].weight
    assert model["head"].digits__weight is other["embed"].digits__weight
    assert_same_bits(model["head"].weight.data, other["embed"].weight.data)


def test_tying_to_a_transposed_stack_is_refused():
    """Parts of a transposed weight are not transposed."""
    one, other = (nn.ParameterDict({"up": torch.randn(3, 64, 64)}).bfloat16() for _ in range(2))
    for module in (one, other):
        bnn.compress_parameter(module, "up")
    with pytest.raises(CompressedParameterError):
        one.up = other.up.mT


def test_the_plain_weight_is_freed():
    linear = nn.Linear(64, 64)
    weight = weakref.ref(linear.weight)
    bnn.compress_parameter(linear, "weight")
    gc.collect()
    assert weight() is None


# --- what must not be done to a compressed weight --------------------------------------------------------------


def test_weights_are_read_only():
    linear = compressed_pair()[0][1]
    before = linear.weight.data.clone()
    for change in (
        lambda: setattr(linear, "weight", nn.Parameter(before)),
        lambda: setattr(linear, "weight", before),
        lambda: setattr(linear.weight, "data", before),
        lambda: linear.register_parameter("weight", nn.Parameter(before)),
        lambda: linear.weight.add_(1),
        lambda: linear.weight.copy_(before),
        lambda: linear.weight.__setitem__(0, 1),
        lambda: nn.init.normal_(linear.weight),
        lambda: torch.mul(before, 2, out=linear.weight),
        lambda: linear.requires_grad_(),
    ):
        with pytest.raises(CompressedParameterError, match="decompress"):
            change()
    with pytest.raises(AttributeError):
        del linear.weight
    with pytest.raises(RuntimeError):
        nn.Sequential(linear).requires_grad_()
    linear.requires_grad_(False)
    linear.reset_parameters()
    assert_same_bits(linear.weight.data, before)


def test_casts_are_refused():
    model, plain = compressed_pair()
    for cast in (
        model.half,
        model.float,
        model.double,
        lambda: model.to(torch.float16),
        lambda: model.to(dtype=torch.half),
    ):
        with pytest.raises(CompressedParameterError, match=r"to stay torch\.bfloat16"):
            cast()
    model, plain = compressed_pair()
    assert_same_bits(model.bfloat16().to("cpu").to(torch.bfloat16)(IDS), plain(IDS))


def test_meta():
    model, _ = compressed_pair()
    model.to("meta")
    assert model[1].weight.is_meta
    assert model[1].weight.shape == (96, 64)
    assert model(IDS.to("meta")).shape == (2, 3, 64)


def test_unknown_names():
    linear = nn.Linear(64, 64)
    with pytest.raises(UsageError, match="a parameter of Linear, got 'wait'"):
        bnn.compress_parameter(linear, "wait")
    with pytest.raises(CompressedParameterError, match="a compressed parameter of Linear"):
        bnn.decompress_parameter(linear, "weight")
    bnn.compress_parameter(linear, "weight")
    with pytest.raises(UsageError, match="a parameter of Linear, got 'weight'"):
        bnn.compress_parameter(linear, "weight")
    with pytest.raises(CompressedParameterError):
        bnn.decompress_parameter(linear, "bias")


def test_ours_are_not_constructed():
    with pytest.raises(CompressedParameterError):
        bnn.Linear(64, 64)


# --- the tensor that stands for a weight -----------------------------------------------------------------------


def test_weight_outside_of_forward():
    model, plain = compressed_pair()
    weight, expected = model[1].weight, plain[1].weight
    assert isinstance(weight, torch.Tensor)
    assert not weight.values.is_decoded
    assert (weight.numel(), weight.element_size(), weight.itemsize, weight.nbytes) == (6144, 2, 2, 12288)
    assert (weight.stride(), weight.is_contiguous(), weight.requires_grad) == ((64, 1), True, False)
    assert not weight.values.is_decoded
    assert torch.equal(weight, expected)
    assert_same_bits(copy.deepcopy(weight), expected)
    assert_same_bits(pickle.loads(pickle.dumps(weight)), expected)
    assert_same_bits(weight.detach().clone(), expected)
    assert_same_bits(weight.t()[3:5].contiguous(), expected.t()[3:5].contiguous())
    assert_same_bits(weight[0], expected[0])
    assert_same_bits(weight.float(), expected.float())
    assert weight.tolist() == expected.tolist()
    assert (weight.float().numpy() == expected.float().numpy()).all()
    assert model[1].weight.data_ptr() != 0
    assert repr(expected.data)[:30] in repr(weight)
    assert type(torch.stack([weight, weight])) is torch.Tensor
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    assert_same_bits(torch.load(buffer), expected)


def test_gradients_through_weight_outside_of_forward():
    model, plain = compressed_pair()
    grads = []
    for weight in (model[1].weight, plain[1].weight):
        x = gaussian((5, 64)).requires_grad_()
        (functional.linear(x, weight).relu() @ weight).sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)


def test_slices_of_experts():
    experts = Experts().bfloat16()
    plain = experts.up.detach().clone()
    bnn.compress_parameter(experts, "up")
    experts.tails__up.data[-64:] = 255  # damage to the last expert: whatever needs it fails
    for wanted in (0, 2, -2, torch.tensor(1), torch.tensor([2, 0, 2]), torch.tensor([[-4, 1]]), [0, 1]):
        assert_same_bits(experts.up[wanted], plain[wanted])
    assert_same_bits(experts.up[1, 3], plain[1, 3])
    assert_same_bits(experts.up.mT[2].contiguous(), plain.mT[2].contiguous())
    weight = experts.up
    assert weight[0].data_ptr() == weight[0].data_ptr()
    for wanted in (3, slice(0, 2), torch.tensor([True, False, False, False]), torch.tensor([3, 0])):
        with pytest.raises(CorruptTensorError):
            experts.up[wanted] + 0
    for wanted in (4, -5, torch.tensor([4])):
        with pytest.raises(IndexError):
            experts.up[wanted]


def test_weights_of_experts_as_a_whole_after_slices():
    experts = Experts().bfloat16()
    plain = experts.up.detach().clone()
    bnn.compress_parameter(experts, "up")
    weight = experts.up
    assert_same_bits(weight[2], plain[2])
    assert_same_bits(weight + 0, plain)
    assert_same_bits(weight[torch.tensor([0, 1]), 1:5], plain[torch.tensor([0, 1]), 1:5])
    assert_same_bits(weight.transpose(-1, 1).contiguous(), plain.transpose(-1, 1).contiguous())
    assert_same_bits(weight.transpose(0, 1).contiguous(), plain.transpose(0, 1).contiguous())
    assert (weight.mT.shape, weight.mT.stride(), weight.mT.mT.stride()) == ((4, 64, 96), (6144, 1, 64), (6144, 64, 1))


@pytest.mark.parametrize("sizes", [(2, 0, 3, 0), (0, 5, 0, 0), (0, 0, 0, 0)])
def test_grouped_products(sizes):
    experts = Experts().bfloat16()
    plain = experts.up.detach().clone()
    bnn.compress_parameter(experts, "up")
    experts.tails__up.data[-64:] = 255
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    results = []
    for weight in (experts.up, plain):
        x = gaussian((sum(sizes), 64), seed=2).requires_grad_()
        y = functional.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_forward_decodes_each_weight_once(monkeypatch):
    decoded = []
    from bitforbit.nn import classes

    monkeypatch.setattr(classes, "decode", lambda spec, parts: decoded.append(spec) or weight_decode(spec, parts))
    from bitforbit.nn.values import decode as weight_decode

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
            assert self.matrix is self.matrix
            return self(x @ self.matrix, depth - 1) if depth else x @ self.matrix.t()

    module = Twice()
    x = torch.randn(3, 64)
    expected = module(x)
    bnn.compress_parameter(module, "matrix")
    assert_same_bits(module(x).detach(), expected.detach())
    assert len(decoded) == 1
    assert module.matrix is not module.matrix
    with pytest.raises(RuntimeError):
        module(x[:, :3])
    assert isinstance(module.matrix, bnn.CompressedWeight)


def test_experts_decode_only_what_they_use():
    experts = Experts().bfloat16()
    x = gaussian((5, 64))
    expected = experts(x, [1, 2])
    bnn.compress_parameter(experts, "up")
    rows = bnn.compressed_parameters(experts)["up"].rows // 4
    assert rows == 96
    tails = experts.tails__up
    tails.data[-64:] = 255  # damage to the last expert alone
    assert_same_bits(experts(x, [1, 2]).detach(), expected.detach())
    assert experts.shift.shape == (64,)


# --- copies and state ------------------------------------------------------------------------------------------


def round_trips(model: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]


def test_copies():
    model, plain = compressed_pair()
    for copied in round_trips(model):
        assert type(copied[1]) is bnn.Linear
        assert_same_bits(copied(IDS), plain(IDS))
        assert copied[1].digits__weight is not model[1].digits__weight
        bitforbit.decompress_model(copied)
        assert_same_bits(copied(IDS), plain(IDS))


def test_copies_of_other_classes():
    x = gaussian((1, 16, 9, 9))
    for module in (nn.Conv2d(16, 32, 3), nn.Sequential(ScaledEmbedding(300, 64), OtherLinear(64, 64))):
        module = module.bfloat16()
        x = gaussian((1, 16, 9, 9)) if isinstance(module, nn.Conv2d) else IDS
        expected = module(x).detach()
        bitforbit.compress_model(module)
        for copied in round_trips(module):
            assert_same_bits(copied(x).detach(), expected)
            assert type(copied) is type(module)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_other_weights(assign):
    model, _ = compressed_pair()
    other = small_model()
    for p in other.parameters():
        p.data.mul_(torch.linspace(0.01, 3, p.numel()).view(p.shape).to(p.dtype))
    bitforbit.compress_model(other)
    sizes = [m[1].tails__weight.numel() for m in (model, other)]
    assert sizes[0] != sizes[1]
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert model.load_state_dict(state, assign=assign).missing_keys == []
    assert_same_bits(model(IDS), other(IDS))
    assert repr(model) == repr(other)


def test_plain_state_dict_is_compressed():
    model, _ = compressed_pair()
    other = small_model()
    for p in other.parameters():
        p.data.mul_(-3)
    model.load_state_dict(other.state_dict())
    assert type(model[1]) is bnn.Linear
    assert_same_bits(model(IDS), other(IDS).detach())
    model.load_state_dict(other.float().state_dict())  # cast as torch does
    assert_same_bits(model(IDS), other.bfloat16()(IDS).detach())
    state = other.state_dict()
    state["1.weight"] = random_bits((96, 64), torch.bfloat16)  # which does not get smaller
    model.load_state_dict(state)
    assert_same_bits(model[1].weight.data, state["1.weight"])


def test_state_dicts_that_do_not_fit():
    model, plain = compressed_pair()
    bigger = bitforbit.compress_model(nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 512)).bfloat16())
    state = bigger.state_dict()
    with pytest.raises(
        RuntimeError, match=r"1\.weight: expected torch\.bfloat16 of shape \(96, 64\), got .*\(512, 64\)"
    ):
        model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"1\.weight: expected uint8 parts .* lacks the metadata"):
        model.load_state_dict(dict(state), strict=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        model.load_state_dict({"1.weight": torch.zeros(3, 3)}, strict=False)
    partial = model.state_dict()
    del partial["1.tails__weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1\.tails__weight"'):
        model.load_state_dict(partial)
    wrong = model.state_dict()
    wrong._metadata["1"]["bitforbit"]["weight"] = {"dtype": "BF16"}
    with pytest.raises(RuntimeError, match="its metadata cannot be read"):
        model.load_state_dict(wrong)
    assert_same_bits(model[1].weight.data, plain[1].weight)


def test_state_dict_into_meta():
    model, plain = compressed_pair()
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same_bits(empty(IDS), plain(IDS))


def test_install_on_meta_then_fill():
    linear, plain = nn.Linear(64, 96, bias=False).bfloat16(), nn.Linear(64, 96, bias=False).bfloat16()
    donor = copy.deepcopy(plain)
    bnn.compress_parameter(donor, "weight")
    spec = bnn.compressed_parameters(donor)["weight"]
    parts = {part: getattr(donor, bnn.part_name(part, "weight")) for part in bnn.PARTS}
    bnn.install_parameter(linear, "weight", spec, {part: p.data.to("meta") for part, p in parts.items()}, mode="exact")
    assert linear.weight.is_meta
    for part, p in parts.items():
        setattr(linear, bnn.part_name(part, "weight"), nn.Parameter(p.data.clone(), requires_grad=False))
    x = gaussian((3, 64))
    assert_same_bits(linear(x), plain(x).detach())


def test_install_refuses():
    linear, donor = nn.Linear(64, 96, bias=False).bfloat16(), nn.Linear(64, 96, bias=False).bfloat16()
    bnn.compress_parameter(donor, "weight")
    spec = bnn.compressed_parameters(donor)["weight"]
    parts = {part: getattr(donor, bnn.part_name(part, "weight")) for part in bnn.PARTS}
    for changed, match in (
        ({"code": parts["code"][:-64]}, "parts that fit"),
        ({"code": parts["code"].float()}, "code to be uint8"),
        ({"more": parts["code"]}, "expected parts"),
    ):
        with pytest.raises(UsageError, match=match):
            bnn.install_parameter(linear, "weight", spec, {**parts, **changed})
    with pytest.raises(UsageError, match="expected shape"):
        bnn.install_parameter(nn.Linear(64, 95, bias=False), "weight", spec, parts)
    with pytest.raises(UsageError, match="mode"):
        bnn.install_parameter(linear, "weight", spec, parts, mode="")
    assert type(linear) is nn.Linear


def test_specs():
    spec = bnn.PlanesSpec(torch.bfloat16, (2, 3, 64), "BF16", 6, 64, 16)
    assert bnn.PlanesSpec.from_record(spec.to_record()) == spec
    assert (spec.elements, spec.nbytes) == (384, 768)
    with pytest.raises(CorruptTensorError):
        bnn.PlanesSpec(torch.bfloat16, (2, 3, 64), "BF16", 7, 64, 16)


def test_damaged_parts_are_noticed():
    linear = nn.Linear(64, 96, bias=False).bfloat16()
    bnn.compress_parameter(linear, "weight")
    linear.digits__weight.data.fill_(255)
    for mode in ("exact", "fused"):
        bnn.set_mode(linear, mode)
        with pytest.raises(CorruptTensorError):
            linear(gaussian((1, 64)))
