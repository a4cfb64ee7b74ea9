"""End-to-end credit: of chains, of networks with residuals and concatenations, and of those too large to store phi."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import EfficientVectorRouting, credit_assignment
from fastroute.capsules import Add, Concatenate, Credit, Residual, _phi_tiles, credit, record, trace
from tests.capsules.test_definable import Largest
from tests.capsules.test_definable import layer as definable
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

F64 = torch.float64
A43 = torch.zeros(4, 3)


def chain(*sizes: int, lead: tuple[int, ...] = ()) -> list[Tensor]:
    generator = seeds.generator(0)
    return [torch.randn(*lead, n, m, dtype=torch.float64, generator=generator) for n, m in pairwise(sizes)]


def test_is_the_sum_over_all_paths() -> None:
    one, two, three = chain(4, 3, 5, 2)
    paths = sum(one[:, a, None] * two[a, b] * three[b] for a in range(3) for b in range(5))
    assert isinstance(paths, Tensor)
    assert_same(credit_assignment([one, two, three], normalize=False), paths)


def test_is_upstreams_recipe() -> None:
    """The product, divided by its standard deviation plus 1e-5 after each one."""
    phis = chain(6, 4, 3, 5)
    expected = phis[0]
    for phi in phis[1:]:
        expected = expected @ phi
        expected = expected / (expected.std() + 1e-5)
    assert_same(credit_assignment(phis), expected)


def test_normalizing_is_per_sample_and_changes_no_ratio() -> None:
    phis = chain(4, 3, 5, lead=(2, 3))
    raw, scaled = credit_assignment(phis, normalize=False), credit_assignment(phis)
    assert scaled.shape == (2, 3, 4, 5)
    for b in range(2):
        for t in range(3):
            assert_same(scaled[b, t], credit_assignment([phi[b, t] for phi in phis]))
            assert_same(scaled[b, t] / scaled[b, t, 0, 0], raw[b, t] / raw[b, t, 0, 0])


def test_one_routing() -> None:
    (phi,) = chain(4, 3)
    assert credit_assignment([phi], normalize=False) is phi
    assert_same(credit_assignment([phi]), phi / (phi.std() + 1e-5))


def test_long_chains_stay_in_range() -> None:
    phis = [100 * phi for phi in chain(*[8] * 400)]
    assert not credit_assignment(phis, normalize=False).isfinite().all()
    assert credit_assignment(phis).isfinite().all()


def test_of_two_routings() -> None:
    """Credit explains the output: with linear votes and no norm, phi is what each input counts."""
    seeds.manual_seed(0)
    first = EfficientVectorRouting(6, 4, 5, 5, return_dict=True, dtype=torch.float64)
    second = EfficientVectorRouting(4, 3, 5, 5, return_dict=True, dtype=torch.float64)
    a = first(torch.randn(2, 6, 5, dtype=torch.float64))
    b = second(a["x_out"])
    credit = credit_assignment([a["phi"], b["phi"]])
    assert credit.shape == (2, 6, 3)
    credit.sum().backward()
    assert first.W_A.grad is not None and first.W_A.grad.isfinite().all() and first.W_A.grad.any()


@pytest.mark.parametrize(
    ("phis", "message"),
    [
        (A43, r"phis: expected a list of tensors, got a tensor \[4, 3\] of torch.float32; write \[phi\]"),
        ([A43.long()], r"phis\[0\]: expected a floating-point tensor, got torch.int64"),
        ([A43, A43.mT.double()], r"phis\[1\]: expected torch.float32 on cpu like phis\[0\], got .* of torch.float64"),
        ([], r"phis: expected at least one phi \[\.\.\., n_inp, n_out\], got none"),
        ([torch.zeros(3)], r"phis\[0\]: expected \[\.\.\., n_inp, n_out\], got \[3\]"),
        ([torch.zeros(4, 3), torch.zeros(2)], r"phis\[1\]: expected \[\.\.\., n_inp, n_out\], got \[2\]"),
        (
            [torch.zeros(4, 3), torch.zeros(2, 5)],
            r"phis\[1\]: expected 3 input vectors, as many as phis\[0\] has outputs, got 2 \(phis\[1\] is \[2, 5\]\)",
        ),
    ],
)
def test_bad_input(phis: list[Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^" + message):
        credit_assignment(phis)


# -------------------------------------------------------------------------------------------- maps and how they compose


def phis_of(*shapes: tuple[int, int]) -> tuple[list[Tensor], list[Credit]]:
    generator = seeds.generator(1)
    made = [torch.randn(2, *shape, dtype=F64, generator=generator) for shape in shapes]
    return made, [Credit.of(phi) for phi in made]


def same_map(found: Credit, matrix: Tensor) -> None:
    """Dense, by columns, by outputs, and transposed."""
    n, m = matrix.shape[-2:]
    assert (found.n_inp, found.n_out) == (n, m)
    assert_same(found.dense(), matrix)
    assert_same(torch.stack([found.output(j) for j in range(m)], -1), matrix)
    assert_same(found.transposed_times(torch.eye(n, dtype=F64)), matrix.mT)


def test_the_algebra_is_that_of_matrices() -> None:
    (a, b, c), (A, B, C) = phis_of((4, 4), (4, 4), (4, 3))
    one = torch.eye(4, dtype=F64)
    same_map(A @ C, a @ c)
    same_map((1 + A) @ (B + 1) @ C, (one + a) @ (b + one) @ c)
    same_map(2 * A + B * 0.5, 2 * a + b / 2)
    same_map(A + 0.25, a + one / 4)
    same_map(sum([A, B, A]), 2 * a + b)  # type: ignore[arg-type]
    same_map(Credit.of_outputs(A, C), torch.cat([a, c], -1))
    same_map(Credit.of_inputs(A, B), torch.cat([a, b], -2))
    diagonal = torch.zeros(2, 8, 7, dtype=F64)
    diagonal[:, :4, :4], diagonal[:, 4:, 4:] = a, c
    same_map(Credit.diagonal(A, C), diagonal)
    same_map(Credit.identity(4, a), one)
    assert repr(A @ C) == "Credit(n_inp=4, n_out=3)"


def test_a_residual_network_is_the_sum_over_its_subsets_of_layers() -> None:
    (a, b, c), (A, B, C) = phis_of((4, 4), (4, 4), (4, 4))
    paths = torch.eye(4, dtype=F64) + a + b + c + a @ b + a @ c + b @ c + a @ b @ c
    assert_same(((1 + A) @ (1 + B) @ (1 + C)).dense(), paths)


def make(n: int, m: int, d: int = 5, h: int = 5, **options: Any) -> EfficientVectorRouting:
    return EfficientVectorRouting(n, m, d, h, **options, dtype=F64)


def phi_of(layer: nn.Module, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    layer.return_dict = True
    with torch.no_grad():
        phi = layer(x, *arguments, **options)["phi"]
    layer.return_dict = False
    return phi  # type: ignore[no-any-return]


@pytest.mark.parametrize("n_inp", [9, -1])
@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("padding", ["whole", "masked", "padded"])
def test_tiles_are_those_of_phi(n_inp: int, n_iters: int, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_phi_tiles, "tile_rows", lambda *_: 4)
    seeds.manual_seed(0)
    layer, x = make(n_inp, 4, n_iters=n_iters), torch.randn(2, 3, 9, 5, dtype=F64)
    mask = torch.rand(2, 3, 9, 4) < 0.4 if padding != "whole" else None
    lengths = torch.tensor([[9, 4, 1], [0, 8, 9]]) if padding == "padded" else None
    same_map(Credit.routed(layer, x, mask, lengths=lengths), phi_of(layer, x, mask, lengths=lengths))


def test_of_a_definable_routing() -> None:
    layer, x = definable(), torch.randn(2, 11, 8, dtype=F64)
    same_map(Credit.routed(layer, x), phi_of(layer, x))
    assert not layer.return_dict


# -------------------------------------------------------------------------------------------------------- additivity


def votes(layer: EfficientVectorRouting, x: Tensor) -> Tensor:
    """V_ij = (s x_i * W_F1_j) W_F2 + B_F2_j, [..., n, m, h]."""
    s: float = x.shape[-2] ** -0.5
    return (s * x[..., None, :] * layer.W_F1) @ layer.W_F2 + layer.B_F2


def test_an_output_is_the_sum_of_what_is_credited_to_inputs() -> None:
    """y_j = sum_i phi_ij V_ij: phi_ij V_ij is input i's part of output j, and nothing is left over."""
    seeds.manual_seed(0)
    for n_inp in (6, -1):
        layer, x = make(n_inp, 4, normalize=False, n_iters=3), torch.randn(2, 6, 5, dtype=F64)
        parts = Credit.routed(layer, x).dense()[..., None] * votes(layer, x)
        assert_same(parts.sum(-3), layer(x).detach())


def test_two_routings_are_the_sum_over_paths() -> None:
    """Through i, j, k the vote of i for j, voted again for k, weighs phi_ij phi_jk: the end-to-end credit's terms.

    Votes are affine, and the constant part B_F2 of the second ones belongs to no input: with the first ones' credit of
    zero what is left of output k is sum_j phi_jk B_F2_k.
    """
    seeds.manual_seed(0)
    first, second = make(6, 4, normalize=False), make(4, 3, normalize=False)
    with torch.no_grad():
        first.B_F2.normal_()
        second.B_F2.normal_()
        x = torch.randn(2, 6, 5, dtype=F64)
        y = first(x)
        one, two = Credit.routed(first, x).dense(), Credit.routed(second, y).dense()
        V = votes(first, x)  # [b, i, j, h]
        again = (4**-0.5 * V[:, :, :, None] * second.W_F1) @ second.W_F2  # [b, i, j, k, h]
        paths = (one[..., None] * two[:, None])[..., None]  # phi_ij phi_jk
        constant = (two[..., None] * second.B_F2).sum(1)
        assert_same((paths * again).sum((1, 2)) + constant, second(y))
        assert_same(paths.sum(2)[..., 0], (Credit.of(one) @ Credit.of(two)).dense())


# ---------------------------------------------------------------------------------------------- networks end to end


def networks() -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Each with its credit written out with matrices."""
    seeds.manual_seed(0)
    a, b, c = make(-1, 6), make(6, 6), make(6, 3)
    wide = make(-1, 3)

    def chain_of(x: Tensor) -> Tensor:
        y = a(x)
        return phi_of(a, x) @ phi_of(b, y) @ phi_of(c, b(y))

    def residual(x: Tensor) -> Tensor:
        y = a(x)
        one = torch.eye(6, dtype=F64)
        return phi_of(a, x) @ (one + phi_of(b, y)) @ phi_of(c, y + b(y))

    def joined(x: Tensor) -> Tensor:
        y = torch.cat([a(x), wide(x)], -2)
        return torch.cat([phi_of(a, x), phi_of(wide, x)], -1) @ phi_of(wide, y)

    def added(x: Tensor) -> Tensor:
        y = a(x)
        return phi_of(a, x) @ (phi_of(b, y) + torch.eye(6, dtype=F64))

    normed = nn.LayerNorm(5, dtype=F64)
    return {
        "chain": (nn.Sequential(a, b, c), chain_of),
        "residual": (nn.Sequential(a, Residual(b), c), residual),
        "concatenation": (nn.Sequential(Concatenate(a, wide), wide), joined),
        "parallel": (nn.Sequential(a, Add(b, nn.Identity())), added),
        "per vector": (nn.Sequential(normed, a, nn.GELU(), nn.Dropout()).eval(), lambda x: phi_of(a, normed(x))),
        "nested": (nn.Sequential(nn.Sequential(a, b), nn.Sequential(), c), chain_of),
    }


@pytest.mark.parametrize("name", ["chain", "residual", "concatenation", "parallel", "per vector", "nested"])
def test_end_to_end(name: str) -> None:
    model, written_out = networks()[name]
    x = torch.randn(2, 9, 5, dtype=F64)
    y, found = trace(model, x)
    with torch.no_grad():
        assert torch.equal(y, model(x))
        expected = written_out(x)
    same_map(found, expected)
    for j in (0, -1):
        assert_same(credit(model, x, output=j), expected[..., j])
        scaled = expected[..., j] / (expected[..., j].std(-1, keepdim=True) + 1e-5)
        assert_same(credit(model, x, j, normalize=True), scaled)
    weights = torch.randn(2, expected.shape[-1], dtype=F64)
    assert_same(credit(model, x, weights), (expected @ weights[..., None])[..., 0])
    assert_same(credit(model, x, weights[0]), expected @ weights[0])


def test_credits_add_up_over_outputs() -> None:
    model, _ = networks()["residual"]
    x = torch.randn(2, 9, 5, dtype=F64)
    total = credit(model, x, torch.ones(3, dtype=F64))
    assert_same(total, sum(credit(model, x, j) for j in range(3)))  # type: ignore[arg-type]


class Custom(nn.Module):
    """What no trace could follow: one routing called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = make(7, 7), make(7, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.first(x, mask=mask)
        x = x + self.first(x)
        return self.last(x)  # type: ignore[no-any-return]


def test_recording_any_network() -> None:
    seeds.manual_seed(0)
    model, x = Custom(), torch.randn(3, 7, 5, dtype=F64)
    mask = torch.rand(7, 7) < 0.3
    plain = model(x, mask)
    with record(model) as found:
        y = model(x, mask)
    assert torch.equal(y, plain) and {k: len(calls) for k, calls in found.items()} == {"first": 2, "last": 1}
    one, two = found["first"]
    assert_same(one.dense(), phi_of(model.first, x, mask))
    end_to_end = (1 + one) @ (1 + two) @ found["last"][0]
    identity = torch.eye(7, dtype=F64)
    with torch.no_grad():
        middle = x + model.first(x, mask)
        last = middle + model.first(middle)
        expected = (identity + phi_of(model.first, x, mask)) @ (identity + phi_of(model.first, middle))
    same_map(end_to_end, expected @ phi_of(model.last, last))
    model(x)
    assert len(found["last"]) == 1, "recorded after the end"


def test_recording_layers_that_return_dicts() -> None:
    """The paper's recipe: return_dict=True and a hook that hands on x_out."""
    a, b = make(6, 4, return_dict=True), make(4, 3, return_dict=True)
    model, x = nn.Sequential(a, b), torch.randn(6, 5, dtype=F64)
    with record(model) as found:
        y = model(x)
    first = a(x)
    second = b(first["x_out"])
    assert torch.equal(y, second["x_out"])
    assert_same((found["0"][0] @ found["1"][0]).dense(), (first["phi"] @ second["phi"]).detach())
    module = definable()
    with record(module) as found:
        module(torch.randn(11, 8, dtype=F64))
    assert len(found[""]) == 1


class Normed(EfficientVectorRouting):
    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return super().forward(3 * nn.functional.layer_norm(x, x.shape[-1:]), *args, **options)


class Twice(EfficientVectorRouting):
    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return super().forward(x, *args, **options) + super().forward(-x, *args, **options)


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Half(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.module(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.roll(1, -2))


def scaled(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda _, args: (3 * args[0], *args[1:]))
    return module


def seen(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, y: y.detach() * 1 if isinstance(y, Tensor) else None)
    return module


def called(module: nn.Module) -> nn.Module:
    """Its submodules have to be called."""
    module.f.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("change", [lambda m: m, scaled, seen, called], ids=["plain", "scaled", "seen", "called"])
@pytest.mark.parametrize("kind", [EfficientVectorRouting, Normed, definable])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_credit_is_of_what_the_routing_was_given(
    kind: Callable[..., nn.Module], change: Callable[[nn.Module], nn.Module], lead: tuple[int, ...]
) -> None:
    """Whatever stands between the caller and the routing: phi is the one of the pass."""
    if change is called and kind is definable:
        change = scaled
    seeds.manual_seed(0)
    made = definable(n_iters=3) if kind is definable else kind(11, 4, 8, 8, n_iters=3, dtype=F64)
    module, x = change(made), torch.randn(*lead, 11, 8, dtype=F64)
    mask = torch.rand(*lead, 11, made.n_out) < 0.3
    options: dict[str, Any] = {"lengths": torch.randint(1, 12, lead)} if lead else {}
    with record(nn.ModuleDict({"r": module})) as found:
        y = module(x, mask, **options)
    hooks = module._forward_hooks.copy()
    module._forward_hooks.clear()  # of a user, who expects tensors
    phi = phi_of(module, x, mask, **options)
    module._forward_hooks.update(hooks)
    (one,) = found["r"]
    same_map(one, phi)
    same_map(Credit.routed(module, x, mask, **options), phi)
    assert torch.equal(y, module(x, mask, **options))
    if kind is Normed:
        with pytest.raises(
            TypeError, match=r"^model: expected routings, .* none of another forward, got Normed; record"
        ):
            trace(module, x)
    else:
        y, whole = trace(module, x)
        same_map(whole, Credit.routed(module, x).dense())
        assert torch.equal(y, module(x).detach())


def set_forward() -> nn.Module:
    module = nn.Linear(5, 5)
    module.forward = lambda x: x.cumsum(-2)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("module", [nn.LayerNorm((4, 5)), nn.RMSNorm((4, 5)), set_forward()], ids=lambda m: f"{m}")
def test_modules_that_look_at_several_vectors(module: nn.Module) -> None:
    """A norm over vectors is not one of each vector."""
    with pytest.raises(TypeError, match=r"^model\.1: expected routings, modules that treat every vector alone"):
        trace(nn.Sequential(make(6, 4), module, make(4, 3)).double(), torch.randn(2, 6, 5, dtype=F64))


HOOKED = nn.Sequential(make(6, 6))
HOOKED.register_forward_hook(lambda _, __, y: 2 * y)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Skip(make(6, 6)), "got Skip;"), (Half(make(6, 6)), "got Half;"), (HOOKED, "got Sequential with a hook;"),
        (scaled(Residual(make(6, 6))), "got Residual with a hook;"),
        (scaled(Concatenate(make(6, 6))), "got Concatenate with a hook;"),
        (scaled(Add(make(6, 6))), "got Add with a hook;"), (Doubled(5, 5, dtype=F64), "got Doubled;"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_trace_would_leave_out_is_refused(model: nn.Module, what: str) -> None:
    with pytest.raises(TypeError, match=r"^model\.0: expected routings, .*" + what):
        trace(nn.Sequential(model), torch.randn(2, 6, 5, dtype=F64))


def test_a_layer_that_routes_twice() -> None:
    twice, x = Twice(6, 4, 5, 5, dtype=F64), torch.randn(2, 6, 5, dtype=F64)
    with record(twice) as found:
        twice(x)
    assert len(found[""]) == 2
    with pytest.raises(TypeError, match=r"^layer: expected a Twice that routes once in a call, .* told of 2 routings"):
        Credit.routed(twice, x)


@pytest.mark.parametrize("kind", ["efficient", "called", "definable"])
def test_one_pass_is_recorded_once(kind: str) -> None:
    """What is drawn, counted and looked at in it is not drawn, counted and looked at again."""
    seeds.manual_seed(0)
    x, norm, looked = torch.randn(2, 11, 8, dtype=F64), nn.BatchNorm1d(11, dtype=F64), []
    module = definable() if kind == "definable" else make(11, 5, 8, 6)
    if kind == "definable":
        module.A = nn.Sequential(norm, nn.Dropout(0.5), module.A)
    elif kind == "called":
        module.f = nn.Sequential(nn.Sigmoid(), nn.Dropout(0.5))
    module.register_forward_hook(lambda _, __, y: looked.append(y.detach()))
    for run in (trace, Credit.routed):
        made = run(module, x)
        assert len(looked) == 1
        if run is trace:
            y, credit = made
            votes_ = module.F(x) if kind == "definable" else votes(module, x)
            parts = (credit.dense()[..., None] * votes_).sum(-3)
            assert_same(y, (parts if kind == "definable" else module.N(parts)).detach())
        looked.clear()
    norm.reset_running_stats()
    with record(module) as found:
        module(x)
    assert len(found[""]) == len(looked) == 1 and norm.num_batches_tracked == (kind == "definable")


def test_credit_is_of_the_weights_of_its_pass() -> None:
    layer, x = make(6, 6), torch.randn(2, 6, 5, dtype=F64)
    phi = phi_of(layer, x)
    with record(layer) as found:
        y = layer(x)
    y.square().sum().backward()
    for optimizer in (torch.optim.Adam(layer.parameters(), 0.1, fused=True), torch.optim.SGD(layer.parameters(), 0.1)):
        optimizer.step()
        same_map(found[""][0], phi)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("changed", ["x", "mask"])
def test_an_input_changed_in_place_is_seen(changed: str, mode: Callable[[], Any]) -> None:
    layer = make(6, 6)
    with mode():
        x, mask = torch.randn(2, 6, 5, dtype=F64), torch.zeros(2, 6, 6, dtype=torch.bool)
        phi = phi_of(layer, x, mask)
        with record(layer) as found:
            y = layer(x, mask)
        if changed == "x":
            x += y
        elif mode is torch.no_grad:
            mask[0, 0] = True
        if mode is torch.inference_mode:
            same_map(found[""][0], phi)
        else:
            with pytest.raises(RuntimeError, match=r"^x_inp: expected the routing's input \(or its mask\) as it was"):
                found[""][0].dense()


def test_a_compiled_routing_says_that_it_tells_nothing() -> None:
    model, x = nn.Sequential(make(6, 4)), torch.randn(2, 6, 5, dtype=F64)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="record: _orig_mod.0 told nothing, as torch.compile"):  # noqa: SIM117
        with record(compiled) as found:
            compiled(x)
    assert not found
    with record(compiled) as found, torch.compiler.set_stance("force_eager"):
        compiled(x)
    same_map(found["_orig_mod.0"][0], phi_of(model[0], x))


@pytest.mark.parametrize("container", [Residual, Concatenate, Add])
def test_parts_that_return_dicts_are_named(container: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"^modules?: expected to return a tensor .*, got dict; set its return_dict"):
        container(make(6, 6, return_dict=True))(torch.randn(6, 5, dtype=F64))


def test_no_matrix_is_stored() -> None:
    """Credit in one output of 20,000 inputs: nothing of size n x m, nor much more than the inputs, is ever made."""
    n, m, d = 20_000, 64, 4
    model = nn.Sequential(EfficientVectorRouting(-1, m, d, d), EfficientVectorRouting(m, 3, d, d))
    x = torch.randn(n, d)
    with Largest() as largest:
        made = credit(model, x, output=1)
    assert made.shape == (n,) and largest.numel < n * m / 2
    full = phi_of(model[0], x) @ phi_of(model[1], model[0](x).detach())
    torch.testing.assert_close(made, full[:, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Credit.of(torch.zeros(3)), ValueError, r"phi: expected \[\.\.\., n_inp, n_out\], got \[3\]"),
        (lambda: Credit.of(A43) @ Credit.of(A43), ValueError, r"A @ B: expected B of 3 inputs, .* got 4 \(A is 4 x 3"),
        (lambda: Credit.of(A43) + Credit.of(A43.mT), ValueError, r"A \+ B: expected equal sizes, got 4 x 3 and 3 x 4"),
        (lambda: Credit.of(A43) + 1, ValueError, r"A \+ 1: expected as many outputs as inputs, got 4 inputs and 3"),
        (lambda: Credit.of_outputs(), ValueError, "parts: expected at least one Credit, got none"),
        (
            lambda: Credit.of_outputs(Credit.of(A43), Credit.of(A43.mT)),
            ValueError,
            "parts: expected equal n_inp, got 4, 3",
        ),
        (
            lambda: Credit.of(A43).times(torch.zeros(4, 1)),
            ValueError,
            r"weights: expected \[\.\.\., 3, k\].* got \[4, 1\]",
        ),
        (lambda: Credit.of(A43).output(3), IndexError, "output: expected an output from 0 to 2, got 3"),
        (lambda: Credit.routed(nn.Linear(2, 2), A43), TypeError, "layer: expected an EfficientVectorRouting or"),  # type: ignore[arg-type]
        (
            lambda: credit(nn.Sequential(make(4, 3, d=3), nn.Flatten()), A43.double(), 0),
            TypeError,
            r"model\.1: expected routings, .*, got Flatten; record\(\) its routings",
        ),
        (
            lambda: credit(make(4, 3, d=3), A43.double(), torch.zeros(4)),
            ValueError,
            r"output: expected weights \[\.\.\., 3\], got \[4\]",
        ),
        (lambda: credit(make(4, 3, d=3), A43.double(), 1.5), TypeError, "output: expected an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: Residual(make(4, 3, d=3))(A43.double()), ValueError, r"module: expected to return \[4, 3\], like x"),
        (lambda: Add(), ValueError, "modules: expected at least one, got none"),
    ],
)
def test_bad_maps(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        call()
