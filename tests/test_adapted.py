"""What tools do to a module's parts, tried on every layer: hooks, parametrizations, pruning, adapters, quantization.

Layers read the parameters of parts that are plain, and call the others. What is expected is that nobody can tell: a
changed part counts as much as it does where every part is called (a hook on each sees to that), or as the same layer
with the changed weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map

from tests.helpers import seeds
from tests.helpers.layers import LAYERS, LayerCase, rand
from tests.helpers.matrix import WITHOUT_LINEAR, cell, each
from tests.test_works_with import near, outputs

F64 = torch.float64


def results(layer: nn.Module, case: LayerCase, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Outputs, and the gradients of all parameters."""
    layer.zero_grad()
    made = outputs(layer, case, dtype)
    wanted = [t for t in made if t.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.linspace(-1, 2, t.numel()).view_as(t).to(t.dtype) for t in wanted])
    found = {f"output {i}": t.detach() for i, t in enumerate(made)}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for gradients that are nothing and those that are zeros."""
    for name in found.keys() | expected.keys():
        a, b = found.get(name), expected.get(name)
        if a is None or b is None:
            assert not (b if a is None else a).any(), name  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda said, name=name: f"{name}: {said}")


# ------------------------------------------------------------------------------------------------------------ hooks


def doubled(made: Any) -> Any:
    return tree_map(lambda t: 2 * t if isinstance(t, Tensor) and t.is_floating_point() else t, made)


def nothing(*_: Any) -> None:
    return None


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, x, y: doubled(y)),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, x: doubled(x)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, dx, dy: doubled(dx)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, dy: doubled(dy)),
}


def hooked(case: LayerCase) -> None:
    """Every part is called; each kind of hook, on one part after the other, does the same whether others are called."""
    plain, layer, ran = results(case.layer(), case), case.layer(), set()
    for name, m in layer.named_modules():
        m.register_forward_hook(lambda *_, name=name: ran.add(name))
    close(results(layer, case), plain)
    for name, grad in plain.items():
        if not name.startswith("output") and grad.any():
            owner = name.rpartition(".")[0]
            if isinstance(layer.get_submodule(owner), nn.ParameterList):
                owner = owner.rpartition(".")[0]
            assert owner in ran, f"{name} has a gradient, and its module is not called"
    kinds = list(HOOKS.values())
    alone, among = case.layer(), layer
    parts = [dict(m.named_modules()) for m in (alone, among)]
    for i, name in enumerate(sorted(ran)):
        kind = kinds[i % len(kinds)]
        handles = [kind(modules[name]) for modules in parts]
        close(results(alone, case), results(among, case))
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    close(results(alone, case), plain)


def watched_globally(case: LayerCase) -> None:
    """Hooks on all modules see the calls that hooks on each would see."""
    layer, ran, seen = case.layer(), set(), set()
    handles: list[Any] = [m.register_forward_hook(lambda m, *_: ran.add(m)) for m in layer.modules()]
    plain = results(layer, case)
    for handle in handles:
        handle.remove()
    handles = [
        nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m)),
        nn.modules.module.register_module_forward_pre_hook(nothing),
        nn.modules.module.register_module_full_backward_hook(nothing),
    ]
    try:
        close(results(layer, case), plain)
    finally:
        for handle in handles:
            handle.remove()
    assert ran <= seen


def with_tensor_hooks(case: LayerCase) -> None:
    """On parameters: they are given tensors, what they give is the gradient, and hooks after accumulation run."""
    plain, layer, after = results(case.layer(), case), case.layer(), set()
    for name, p in layer.named_parameters():
        p.register_hook(lambda g: 2 * g)
        p.register_post_accumulate_grad_hook(lambda p, name=name: after.add(name))
    found = results(layer, case)
    close(found, {name: t if name.startswith("output") else 2 * t for name, t in plain.items()})
    assert after == {name for name in found if not name.startswith("output")}


@each("tensor hooks")
def test_tensor_hooks(name: str) -> None:
    cell(name, "tensor hooks", lambda: with_tensor_hooks(LAYERS[name]))


@pytest.mark.parametrize("try_", [hooked, watched_globally])
@each("hooks")
def test_hooks(name: str, try_: Callable[[LayerCase], None]) -> None:
    cell(name, "hooks", lambda: try_(LAYERS[name]))


# -------------------------------------------------------------------------------------------------- parametrizations


class Triple(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 3 * w


def spectral(m: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(m, name)
    m.parametrizations.eval()  # type: ignore[operator,union-attr]


WAYS: dict[str, Callable[[Any, str], Any]] = {
    "parametrize": lambda m, name: parametrize.register_parametrization(m, name, Triple()),
    "prune": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),  # type: ignore[no-untyped-call]
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": spectral,
}


def parameters_of(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(the module's name, the parameter's), the parameter once."""
    for full, _ in layer.named_parameters():
        path, _, name = full.rpartition(".")
        yield path, name


def varied(case: LayerCase) -> nn.Module:
    """With other parameters than zeros and ones, which norms could not be made of."""
    layer = case.layer()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(rand(*p.shape, seed=20 + i), alpha=0.1)
    return layer


def parametrized(case: LayerCase, every: bool = False) -> None:
    """One parameter after the other, each in one of the ways: as the layer with the parameter that comes of it.

    Every parameter in every way, or one for each way.
    """
    parameters, ways = list(parameters_of(case.layer())), list(WAYS.values())
    for i, way in enumerate(ways):
        possible = [of for of in parameters if i < 2 or _of(case.layer(), *of).dim() > 1]
        for path, name in possible if every else possible[i * len(possible) // len(ways) :][:1]:
            changed, plain = varied(case), varied(case)
            owner = changed.get_submodule(path)
            way(owner, name)
            made = effective(owner, name)
            with torch.no_grad():
                _of(plain, path, name).copy_(made)
            found, expected = results(changed, case), results(plain, case)
            full = f"{path}.{name}".lstrip(".")
            leaves = {k: p for k, p in changed.named_parameters() if k not in dict(plain.named_parameters())}
            grad = expected.pop(full, None)
            assert leaves
            if grad is not None:
                gradients = torch.autograd.grad(made, list(leaves.values()), grad)
                expected.update(zip(leaves, gradients, strict=True))
            close(found, expected)


def _of(layer: nn.Module, path: str, name: str) -> Tensor:
    return layer.get_submodule(path)._parameters[name]  # type: ignore[return-value]


def effective(owner: Any, name: str) -> Tensor:
    """What a call uses, with a graph of its own."""
    if f"{name}_orig" in owner._parameters:
        return owner._parameters[f"{name}_orig"] * owner._buffers[f"{name}_mask"]  # type: ignore[no-any-return]
    return getattr(owner, name)  # type: ignore[no-any-return]


@each("parametrized")
def test_parametrizations(name: str) -> None:
    cell(name, "parametrized", lambda: parametrized(LAYERS[name]))


@pytest.mark.long
@each("parametrized")
def test_every_parametrization(name: str) -> None:
    cell(name, "parametrized", lambda: parametrized(LAYERS[name], every=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if LAYERS[name].long else []) for name in LAYERS]
)
def test_parameters_whose_memory_holds_other_numbers(name: str) -> None:
    """As that of ``z.conj().imag`` does. PyTorch sees to it where it knows of the tensor, which may be in a list."""
    case = LAYERS[name]
    layer, expected = case.layer(), results(case.layer(), case)
    negated: dict[Tensor, nn.Parameter] = {}
    for m in layer.modules():
        for key, p in m._parameters.items():
            if p is not None:
                m._parameters[key] = negated.setdefault(p, nn.Parameter(torch._neg_view(-p.detach())))
    assert all(p.is_neg() for p in layer.parameters())
    close(results(layer, case), expected)


# ---------------------------------------------------------------------------------------- adapters and quantization


def linears_of(layer: nn.Module) -> list[str]:
    return [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def with_lora(case: LayerCase) -> None:
    """Adapters on every Linear: as the layer with W + B A for W, and they learn."""
    import peft

    seeds.fixed_seed(0)
    config = peft.LoraConfig(r=2, target_modules=linears_of(case.layer()), init_lora_weights=False)
    changed: Any = peft.inject_adapter_in_model(config, case.layer()).to(F64)
    plain = case.layer()
    adapted = {name: m for name, m in changed.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert list(adapted) == linears_of(plain)
    with torch.no_grad():
        for name, m in adapted.items():
            plain.get_submodule(name).weight.add_(m.get_delta_weight("default"))  # type: ignore[operator,union-attr]
    found, expected = results(changed, case), results(plain, case)
    close(*({k: t for k, t in of.items() if k.startswith("output")} for of in (found, expected)))
    for name, m in adapted.items():
        of_weight, learns = expected.get(f"{name}.weight"), found.get(f"{name}.lora_B.default.weight")
        right = torch.zeros_like(plain.get_submodule(name).weight) if of_weight is None else of_weight  # type: ignore[arg-type]
        right = m.scaling["default"] * right @ m.lora_A["default"].weight.T
        close({} if learns is None else {name: learns}, {name: right.detach()})


def quantized(case: LayerCase, how: Callable[[nn.Module], nn.Module]) -> None:
    """Every Linear as int8: as where all parts are called, and near what it was."""
    exact = outputs(case.layer().float().eval(), case, torch.float32)
    layer, called = (how(case.layer().float().eval()) for _ in range(2))
    for m in called.modules():
        m.register_forward_hook(nothing)
    with torch.no_grad():
        made, expected = outputs(layer, case, torch.float32), outputs(called, case, torch.float32)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)
    near(made, exact, case)
    assert any(not torch.equal(a, b) for a, b in zip(made, exact, strict=True))


def dynamically(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    return made


def weight_only(layer: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(layer, Int8WeightOnlyConfig())
    return layer


@each("quantize_dynamic")
def test_dynamic_quantization(name: str) -> None:
    cell(name, "quantize_dynamic", lambda: quantized(LAYERS[name], dynamically))


@pytest.mark.long
@each("torchao")
def test_weights_in_int8(name: str) -> None:
    cell(name, "torchao", lambda: quantized(LAYERS[name], weight_only))


@pytest.mark.long
@each("LoRA")
def test_lora(name: str) -> None:
    cell(name, "LoRA", lambda: with_lora(LAYERS[name]))


def test_layers_without_a_linear() -> None:
    """Nothing to adapt or to quantize is said where it is so."""
    without = [name for name in LAYERS if not linears_of(LAYERS[name].layer())]
    assert without == list(WITHOUT_LINEAR), (
        "name them in WITHOUT_LINEAR of tests/helpers/matrix.py, in the order of LAYERS"
    )
